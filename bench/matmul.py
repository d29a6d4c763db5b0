"""Products of a GPT-2 124M step, forward and backward, beside the measured peak of the same run.

    python -m bench.matmul --dtype bf16

Rows are a micro-batch of 4 sequences of 256 tokens. NT is x W^T (the forward product of a column-parallel matrix),
NN x W (that of a row-parallel one, and the input gradient of the former), TN the weight gradient, which is summed in
fp32. Operands rotate through more memory than the last-level cache holds, as they do in a step.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np

from pytrain.native import native

from . import _record
from .peak import all_seconds, peak_gflops, thread_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytrain._native import CpuDevice

ROWS, HIDDEN, VOCABULARY = 1024, 768, 50257
ROTATED_BYTES = 3 * 32 * 2**20


class Layer(NamedTuple):
    """y (rows, outputs) = x (rows, inputs) W, and how often a step has it."""

    name: str
    outputs: int
    inputs: int
    repeats: int
    row_parallel: bool = False


LAYERS = [
    Layer("qkv", 3 * HIDDEN, HIDDEN, 12),
    Layer("attention.out", HIDDEN, HIDDEN, 12, row_parallel=True),
    Layer("mlp.up", 4 * HIDDEN, HIDDEN, 12),
    Layer("mlp.down", HIDDEN, 4 * HIDDEN, 12, row_parallel=True),
    Layer("head", VOCABULARY, HIDDEN, 1),
]


class Product(NamedTuple):
    """c (m, n) = op(a) op(b)."""

    what: str
    kind: str
    m: int
    n: int
    k: int
    fp32_result: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


def products(layer: Layer, rows: int) -> list[Product]:
    """The forward product, the input gradient and the weight gradient of a layer."""
    forward, backward = ("NN", "NT") if layer.row_parallel else ("NT", "NN")
    weight = (layer.inputs, layer.outputs) if layer.row_parallel else (layer.outputs, layer.inputs)
    return [
        Product("forward", forward, rows, layer.outputs, layer.inputs, layer.name == "head"),
        Product("dX", backward, rows, layer.inputs, layer.outputs, False),
        Product("dW", "TN", *weight, rows, True),
    ]


def call(device: CpuDevice, product: Product, dtype: str) -> Callable[[], object]:
    """A function that computes the product, each time with the next set of operands."""
    half = np.dtype(np.float32) if dtype == "fp32" else np.dtype(np.uint16)
    result = np.dtype(np.float32) if product.fp32_result else half
    m, n, k = product.m, product.n, product.k
    transpose_a, transpose_b = (letter == "T" for letter in product.kind)
    one: float = np.ones(1, np.float32).view(np.uint16)[1] if half == np.uint16 else 1.0
    size = (m * k + k * n) * half.itemsize + m * n * result.itemsize
    sets = [
        (
            np.full((m, n), 0, result),
            np.full((k, m) if transpose_a else (m, k), one, half),
            np.full((n, k) if transpose_b else (k, n), one, half),
        )
        for _ in range(max(1, -(-ROTATED_BYTES // size)))
    ]
    operands = cycle(sets)

    def work() -> None:
        c, a, b = next(operands)
        device.matmul(
            c,
            a,
            b,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            accumulate=product.what == "dW",
            half="bf16" if dtype == "fp32" else dtype,
        )

    return work


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Only this many (default: 1, 2, 4, ... cores).")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="The best of how many.")
@click.option("--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--rows", default=ROWS, show_default=True, type=click.IntRange(min=1), help="Tokens at a time.")
@click.option("--head-rows", default=0, type=click.IntRange(min=0), help="Of them, at a time in the head (0: all).")
@_record.json_option
def command(threads: int | None, runs: int, dtype: str, rows: int, head_rows: int, json_path: Path | None) -> None:
    """Measure the products of a GPT-2 124M step and print them as shares of the peak."""
    device_class = native().CpuDevice
    cases: list[dict[str, Any]] = []
    for count in [threads] if threads else thread_counts(device_class().threads):
        device = device_class(threads=count)
        peak = peak_gflops(device, dtype)
        print(f"{device.isa}, {count} threads, {dtype}: peak {peak:.1f} GFLOP/s")
        print(f"{'':22} {'m':>6} {'n':>6} {'k':>6}      GFLOP/s  of peak")
        flops = seconds = 0.0
        for layer in LAYERS:
            chunk = min(rows, head_rows or rows) if layer.name == "head" else rows
            for product in products(layer, chunk):
                times_taken = all_seconds(call(device, product, dtype), runs)
                elapsed = min(times_taken)
                speed = product.flops / elapsed / 1e9
                times = layer.repeats * rows / chunk
                flops, seconds = flops + times * product.flops, seconds + times * elapsed
                shape = f"{product.m:>6} {product.n:>6} {product.k:>6}  {product.kind}"
                print(f"{layer.name:14} {product.what:7} {shape}  {speed:>7.1f}  {speed / peak:>6.1%}", flush=True)
                cases.append(
                    {
                        "name": f"{layer.name} {product.what}",
                        **product._asdict(),
                        "threads": count,
                        "gflops": speed,
                        "share": speed / peak,
                        "seconds": _record.summary(times_taken),
                    }
                )
        speed = flops / seconds / 1e9
        print(f"all, weighted: {speed:.1f} GFLOP/s, {speed / peak:.1%}, {seconds:.3f} s")
    options = {"threads": threads, "runs": runs, "dtype": dtype, "rows": rows, "head_rows": head_rows}
    _record.write(json_path, "matmul", options, {"cases": cases})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench matmul` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench matmul", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.matmul")
