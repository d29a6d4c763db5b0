"""What a checkpoint holds, as text for people."""

import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pytrain.checkpoint.pieces import Progress, TensorEntry
from pytrain.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_CHUNK = 2**20  # elements at a time in float64
_SHOWN_STATE = str | int | float | bool


def inspect(
    path: str | Path,
    norms: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    width: int = 120,
    tensors: bool = False,
) -> str:
    """Tables of a checkpoint (or of a run folder's newest), as plain text: of each layer, or of each tensor.

    Args:
        norms: read the tensors and show the root mean square of each; means `tensors` too.
        verify: read everything and compare it with the manifest.
        progress: of the verification.
        width: of the text, in characters.
        tensors: list every tensor, those of the optimizer too, instead of a line for each layer.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    from rich.console import Console

    checkpoint = Checkpoint.open(path)
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for part in renderables(checkpoint, norms, tensors or norms):
        console.print(part)
    if verify:
        checkpoint.verify(progress)
        console.print("verified: every byte is as it was written")
    return "\n".join(line.rstrip() for line in stream.getvalue().split("\n"))


def renderables(checkpoint: Checkpoint, norms: bool = False, every: bool = True) -> list["RenderableType"]:
    """The tables, for a rich console; a line for `every` tensor, or for each layer."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    tensors = checkpoint.tensors()
    weights = [entry for entry in tensors.values() if entry.file.endswith(".weights")]
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in [
        ("checkpoint", str(checkpoint.folder)),
        ("step", f"{checkpoint.step:,}"),
        *((key, _shown(value)) for key, value in checkpoint.state.items() if isinstance(value, _SHOWN_STATE)),
        ("model", ", ".join(f"{key} {value}" for key, value in checkpoint.manifest.model.items())),
        ("parameters", f"{sum(entry.elements for entry in weights):,}"),
        ("bytes", f"{sum(file.bytes for file in checkpoint.manifest.files.values()):,}"),
        ("copied along", ", ".join(checkpoint.manifest.copies)),
    ]:
        summary.add_row(name, escape(value))
    return [summary, Text(), _tensor_table(checkpoint, norms) if every else _layer_table(tensors.values())]


def _tensor_table(checkpoint: Checkpoint, norms: bool) -> "Table":
    """A line for each tensor; with its root mean square, if `norms`."""
    from rich.table import Table
    from rich.text import Text

    columns = ["tensor", "file", "dtype", "shape", "bytes", *(["root mean square"] if norms else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[4:]:
        column.justify = "right"
    for name, entry in checkpoint.tensors().items():
        row = [name, entry.file, entry.dtype, " x ".join(map(str, entry.shape)), f"{entry.bytes:,}"]
        table.add_row(*map(Text, row), *([Text(f"{_root_mean_square(checkpoint, name):.6g}")] if norms else []))
    return table


def _layer_table(entries: Iterable[TensorEntry]) -> "Table":
    """A line for each layer: its weights, and the bytes of them and of the optimizer's tensors."""
    from rich.table import Table
    from rich.text import Text

    weights, state = (defaultdict[str, list[TensorEntry]](list) for _ in range(2))
    for entry in entries:
        layer, _, kind = entry.file.rpartition(".")
        (weights if kind == "weights" else state)[layer].append(entry)
    columns = ["layer", "dtype", "parameters", "bytes of weights", "bytes of optimizer"]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for layer in dict.fromkeys([*weights, *state]):
        row = [layer, ", ".join(dict.fromkeys(entry.dtype for entry in weights[layer]))]
        row.append(f"{sum(entry.elements for entry in weights[layer]):,}")
        row += [f"{sum(entry.bytes for entry in of_kind[layer]):,}" for of_kind in (weights, state)]
        table.add_row(*map(Text, row))
    return table


def _shown(value: _SHOWN_STATE) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _root_mean_square(checkpoint: Checkpoint, name: str) -> float:
    flat = checkpoint.read(name).reshape(-1)
    total = 0.0
    with np.errstate(invalid="ignore"):  # a NaN is to be shown, not to be warned of
        for first in range(0, flat.size, _CHUNK):
            total += float(np.sum(np.square(flat[first : first + _CHUNK].astype(np.float64))))
    return float(np.sqrt(total / flat.size))
