"""What this machine can do at most: multiply-adds on registers, reading and copying memory.

    python -m bench.peak

The FLOPs are those of the instruction set in use (PYTRAIN_ISA forces one): fused multiply-adds of fp32, dot
products of bf16 pairs where it has them. Other benchmarks divide by them.
Every number is the best of several runs: a machine shared with others only ever looks slower than it is.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import click
import numpy as np

from pytrain.native import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytrain._native import CpuDevice

MEBIBYTE = 2**20


def best_seconds(work: Callable[[], object], runs: int) -> float:
    """The shortest of `runs` times of `work`, in seconds, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_gflops(device: CpuDevice, dtype: str = "fp32", runs: int = 5, seconds: float = 0.05) -> float:
    """GFLOP/s of the multiply-adds that products of `dtype` are made of, on all of the device's threads together.

    Dot products of bf16 pairs where the instruction set in use has them, else fp32, in runs of about `seconds`.
    """
    work = partial(device.peak_flops, 100_000, dtype)
    while (elapsed := best_seconds(work, 1)) < seconds / 2:
        work = partial(device.peak_flops, round(work.args[0] * min(10.0, seconds / elapsed)), dtype)
    return work() / best_seconds(work, runs) / 1e9


def bandwidth(device: CpuDevice, mebibytes: int, runs: int = 5) -> tuple[float, float]:
    """GB/s of reading and of copying (bytes read and written) arrays of `mebibytes`, beyond any cache."""
    source = np.empty(mebibytes * MEBIBYTE // 4, np.float32)
    destination = np.empty_like(source)
    total = np.zeros(1)
    device.fill(source, 1.0)  # by the threads that will read it, so that its pages lie near them
    device.fill(destination, 0.0)
    read = best_seconds(lambda: device.sum_squares(total, source), runs)
    copy = best_seconds(lambda: device.copy(destination, source), runs)
    return source.nbytes / read / 1e9, 2 * source.nbytes / copy / 1e9


def thread_counts(most: int) -> list[int]:
    """Powers of two below `most`, and `most`."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="The most threads (default: all cores).")
@click.option("--mebibytes", type=click.IntRange(min=1), default=256, show_default=True, help="Of the arrays.")
def command(threads: int | None, mebibytes: int) -> None:
    """Measure peak FLOP/s and memory bandwidth, per number of threads."""
    device_class = native().CpuDevice
    most = threads or device_class().threads
    isa = device_class(threads=1).isa
    print(f"instruction set {isa}; memory: arrays of {mebibytes} MiB, copying counts bytes read and written")
    print(f"{'threads':>8} {'fp32 GFLOP/s':>13} {'bf16 GFLOP/s':>13} {'read GB/s':>10} {'copy GB/s':>10}")
    for count in thread_counts(most):
        device = device_class(threads=count)
        read, copy = bandwidth(device, mebibytes)
        fp32, bf16 = peak_gflops(device), peak_gflops(device, "bf16")
        print(f"{count:>8} {fp32:>13.1f} {bf16:>13.1f} {read:>10.1f} {copy:>10.1f}", flush=True)


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench peak` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench peak", standalone_mode=False)


if __name__ == "__main__":
    command(prog_name="python -m bench.peak")
