"""Causal attention, forward plus backward, by sequence length, head size and dtype, beside PyTorch's.

    python -m bench.attention

q, k and v lie side by side in one array, as the model's fused product leaves them, for PyTorch too
(scaled_dot_product_attention with is_causal). FLOPs are those below the diagonal: 2 B H T^2 D forward, 2.5 times that
backward. Both take turns in every round; `difference` is that of the two outputs, relative to the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pytrain.native import native

from . import _record
from .peak import peak_gflops

Work = Callable[[], object]
LENGTHS, HEAD_SIZES = (256, 1024, 4096, 16384), (64, 128, 144)
TOKENS = 4096
"""Of a batch, where a sequence is not longer."""


class Case(NamedTuple):
    """One shape: q, k and v are (batch, length, heads * head_size)."""

    dtype: str
    batch: int
    length: int
    heads: int
    head_size: int

    @property
    def flops(self) -> int:
        """Forward and backward, causal."""
        return 7 * self.batch * self.heads * self.length**2 * self.head_size


def random_arrays(case: Case) -> tuple[NDArray[Any], NDArray[Any]]:
    """(q, k and v side by side, gradient of the output), fp32 or bf16 bits, small enough for a mild softmax."""
    random = np.random.default_rng(1)
    width = case.heads * case.head_size
    arrays: list[NDArray[Any]] = [
        random.standard_normal((case.batch, case.length, size), dtype=np.float32) for size in (3 * width, width)
    ]
    if case.dtype == "bf16":
        arrays = [array.astype(ml_dtypes.bfloat16).view(np.uint16) for array in arrays]
    return arrays[0], arrays[1]


class Own:
    """The product's kernels."""

    def __init__(self, device: Any, case: Case, qkv: NDArray[Any], gradient: NDArray[Any]) -> None:
        self._device, self._case, self._gradient = device, case, gradient
        width = case.heads * case.head_size
        self._inputs = [qkv[:, :, i * width : (i + 1) * width] for i in range(3)]
        gradients = np.zeros_like(qkv)
        self._gradients = [gradients[:, :, i * width : (i + 1) * width] for i in range(3)]
        self.output = np.zeros_like(gradient)
        self._lse, self._delta = (np.zeros((case.batch, case.heads, case.length), np.float32) for _ in range(2))
        device.reserve(case.batch * case.length, 3 * width, case.head_size)

    @property
    def extra_bytes(self) -> int:
        """Memory beside inputs, outputs and gradients: statistics of each row, and scratch."""
        scratch: int = self._device.bytes_in_use("workspace")
        return self._lse.nbytes + self._delta.nbytes + scratch

    def __call__(self) -> None:
        heads = {"heads": self._case.heads, "kv_heads": self._case.heads}
        self._device.attention_forward(self.output, self._lse, *self._inputs, **heads)
        self._device.attention_backward(
            *self._gradients, self._delta, self._gradient, self.output, self._lse, *self._inputs, **heads
        )


class Torch:
    """PyTorch's scaled_dot_product_attention on the same numbers."""

    def __init__(self, case: Case, qkv: NDArray[Any], gradient: NDArray[Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._attend = torch.nn.functional.scaled_dot_product_attention

        def tensor(array: NDArray[Any]) -> Any:
            found = torch.from_numpy(array)
            return found.view(torch.bfloat16) if case.dtype == "bf16" else found

        self._inputs = tensor(qkv.copy()).requires_grad_()
        shape = (case.batch, case.length, case.heads, case.head_size)
        self._parts = [part.view(shape).transpose(1, 2) for part in self._inputs.chunk(3, -1)]
        self._gradient = tensor(gradient).view(shape).transpose(1, 2)
        self._shape = gradient.shape
        self._torch = torch
        self.output: NDArray[Any] = gradient

    def __call__(self) -> None:
        q, k, v = self._parts
        output = self._attend(q, k, v, is_causal=True)
        self._torch.autograd.grad(output, self._inputs, self._gradient, retain_graph=True)
        self._kept = output

    def as_floats(self) -> NDArray[np.float32]:
        """The last output, laid out like ours."""
        found: NDArray[np.float32] = self._kept.detach().transpose(1, 2).reshape(self._shape).float().numpy()
        return found


def measure(case: Case, device: Any, rounds: int, peer: bool) -> dict[str, Any]:
    """Time one shape."""
    qkv, gradient = random_arrays(case)
    own = Own(device, case, qkv, gradient)
    calls: dict[str, Work] = {"pytrain": own}
    torch = Torch(case, qkv, gradient, device.threads) if peer else None
    if torch is not None:
        calls["torch"] = torch
    times = _record.alternate(calls, rounds)
    found: dict[str, Any] = {
        **case._asdict(),
        "gflops": _record.summary([case.flops / seconds / 1e9 for seconds in times["pytrain"]]),
        "extra_bytes": own.extra_bytes,
    }
    if torch is not None:
        found["torch_gflops"] = _record.summary([case.flops / seconds / 1e9 for seconds in times["torch"]])
        pairs = zip(times["pytrain"], times["torch"], strict=True)
        found["ratio"] = _record.summary([theirs / ours for ours, theirs in pairs])
        found["difference"] = _difference(own.output, torch.as_floats())
    return found


def _difference(ours: NDArray[Any], theirs: NDArray[np.float32]) -> float:
    values = ours.view(ml_dtypes.bfloat16).astype(np.float32) if ours.dtype == np.uint16 else ours
    return float(np.abs(values - theirs).max() / np.abs(theirs).max())


def heads_of(length: int) -> int:
    """Fewer where a sequence is long, so that one run takes seconds."""
    return 12 if length <= 1024 else 4 if length <= 4096 else 2


def _row(found: Mapping[str, Any]) -> str:
    shape = (
        f"{found['dtype']:<5} {found['batch']:>3} {found['length']:>6} {found['heads']:>3} {found['head_size']:>4}"
    )
    own = f"{_record.spread(found['gflops']):>24}  {found['gflops']['median'] / found['peak_gflops']:>6.1%}"
    extra = f"{found['extra_bytes'] / 2**20:>7.1f} MiB"
    if "ratio" not in found:
        return f"{shape}  {own}  {extra}"
    return f"{shape}  {own}  {extra}  {_record.spread(found['ratio'], digits=2):>20} x torch"


@click.command()
@click.option("--length", "lengths", multiple=True, default=LENGTHS, show_default=True, type=click.IntRange(min=1))
@click.option("--head-size", "head_sizes", multiple=True, default=HEAD_SIZES, show_default=True,
              type=click.IntRange(min=1))  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, default=("fp32", "bf16"), show_default=True,
              type=click.Choice(["fp32", "bf16"]))  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Of taking turns.")
@click.option("--torch/--no-torch", "peer", default=True, help="Beside PyTorch, where it is installed.")
@_record.json_option
def command(**options: Any) -> None:
    """Time attention, forward plus backward."""
    device = native().CpuDevice(threads=options["threads"])
    peer = options["peer"] and _record.installed("torch") != _record.NOT_INSTALLED
    if options["peer"] and not peer:
        print("torch: skipped: PyTorch is not installed")
    results = []
    print(f"{device.isa}, {device.threads} threads; GFLOP/s of forward plus backward, and of the peak of its dtype")
    print(f"{'':<5} {'B':>3} {'T':>6} {'H':>3} {'D':>4}  {'GFLOP/s':>24}  {'peak':>6}  {'extra':>11}")
    for dtype in options["dtypes"]:
        for length in options["lengths"]:
            for head_size in options["head_sizes"]:
                case = Case(dtype, max(1, TOKENS // length), length, heads_of(length), head_size)
                results.append(measure(case, device, options["rounds"], peer))
                results[-1]["peak_gflops"] = peak_gflops(device, dtype, runs=3)
                print(_row(results[-1]), flush=True)
    found = {"machine": _record.machine(device.threads), "cases": results, "torch": peer}
    _record.write(options["json_path"], "attention", options, found)


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench attention` does."""
    command.main(arguments, prog_name="pytrain bench attention", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.attention")
