"""Products of a GPT-2 124M step, forward and backward, beside the measured FMA peak of the same run.

    python -m bench.matmul

Rows are a micro-batch of 4 sequences of 256 tokens; the head runs in chunks of 256 rows. NT is x W^T (the
forward product of a column-parallel matrix), NN x W (that of a row-parallel one, and the input gradient of
the former), TN the weight gradient, which is accumulated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import numpy as np

from pytrain.native import native

from .peak import best_seconds, peak_gflops, thread_counts

if TYPE_CHECKING:
    from pytrain._native import CpuDevice

ROWS, HIDDEN, HEAD_ROWS, VOCABULARY = 1024, 768, 256, 50257
# (what, rows, out, in) of y (rows, out) = x (rows, in) W
LAYERS = [
    ("qkv", ROWS, 3 * HIDDEN, HIDDEN),
    ("attention.out", ROWS, HIDDEN, HIDDEN),
    ("mlp.up", ROWS, 4 * HIDDEN, HIDDEN),
    ("mlp.down", ROWS, HIDDEN, 4 * HIDDEN),
    ("head", HEAD_ROWS, VOCABULARY, HIDDEN),
]


def product_gflops(device: CpuDevice, m: int, n: int, k: int, kind: str, runs: int) -> float:
    """GFLOP/s of c (m,n) = op(a) op(b), fp32; `kind` is NN, NT or TN, and TN accumulates."""
    a = np.ones((k, m) if kind[0] == "T" else (m, k), np.float32)
    b = np.ones((n, k) if kind[1] == "T" else (k, n), np.float32)
    c = np.zeros((m, n), np.float32)
    seconds = best_seconds(
        lambda: device.matmul(
            c, a, b, transpose_a=kind[0] == "T", transpose_b=kind[1] == "T", accumulate=kind == "TN"
        ),
        runs,
    )
    return 2.0 * m * n * k / seconds / 1e9


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="Only this many (default: 1, 2, 4, ... cores).")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="The best of how many.")
def command(threads: int | None, runs: int) -> None:
    """Measure the products of a GPT-2 124M step and print them as shares of the peak."""
    device_class = native().CpuDevice
    for count in [threads] if threads else thread_counts(device_class().threads):
        device = device_class(threads=count)
        peak = peak_gflops(device)
        print(f"{device.isa}, {count} threads: peak {peak:.1f} GFLOP/s")
        print(f"{'':14} {'m':>6} {'n':>6} {'k':>6}      GFLOP/s  of peak")
        for name, rows, outputs, inputs in LAYERS:
            for kind, m, n, k in [
                ("NT", rows, outputs, inputs),
                ("NN", rows, inputs, outputs),
                ("TN", outputs, inputs, rows),
            ]:
                speed = product_gflops(device, m, n, k, kind, runs)
                shape = f"{name:14} {m:>6} {n:>6} {k:>6}  {kind}"
                print(f"{shape}  {speed:>7.1f}  {speed / peak:>6.1%}", flush=True)


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench matmul` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench matmul", standalone_mode=False)


if __name__ == "__main__":
    command(prog_name="python -m bench.matmul")
