"""What a checkpoint holds, as text for people."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pytrain.checkpoint.pieces import Progress
from pytrain.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

_CHUNK = 2**20  # elements at a time in float64
_SHOWN_STATE = str | int | float | bool


def inspect(
    path: str | Path,
    norms: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    width: int = 120,
) -> str:
    """Tables of a checkpoint (or of a run folder's newest), as plain text.

    Args:
        norms: read the tensors and show the root mean square of each.
        verify: read everything and compare it with the manifest.
        progress: of the verification.
        width: of the text, in characters.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    from rich.console import Console

    checkpoint = Checkpoint.open(path)
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for part in renderables(checkpoint, norms):
        console.print(part)
    if verify:
        checkpoint.verify(progress)
        console.print("verified: every byte is as it was written")
    return "\n".join(line.rstrip() for line in stream.getvalue().split("\n"))


def renderables(checkpoint: Checkpoint, norms: bool = False) -> list["RenderableType"]:
    """The tables, for a rich console."""
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
    columns = ["tensor", "file", "dtype", "shape", "bytes", *(["root mean square"] if norms else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[4:]:
        column.justify = "right"
    for name, entry in tensors.items():
        row = [name, entry.file, entry.dtype, " x ".join(map(str, entry.shape)), f"{entry.bytes:,}"]
        table.add_row(*map(Text, row), *([Text(f"{_root_mean_square(checkpoint, name):.6g}")] if norms else []))
    return [summary, Text(), table]


def _shown(value: _SHOWN_STATE) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _root_mean_square(checkpoint: Checkpoint, name: str) -> float:
    flat = checkpoint.read(name).reshape(-1)
    total = 0.0
    with np.errstate(invalid="ignore"):  # a NaN is to be shown, not to be warned of
        for first in range(0, flat.size, _CHUNK):
            total += float(np.sum(np.square(flat[first : first + _CHUNK].astype(np.float64))))
    return float(np.sqrt(total / flat.size))
