"""What this machine can do at most: fused multiply-adds on registers, reading and copying memory.

    python -m bench.peak

The FLOPs are those of the instruction set in use (PYTRAIN_ISA forces one); other benchmarks divide by them.
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


def peak_gflops(device: CpuDevice, runs: int = 5, seconds: float = 0.05) -> float:
    """GFLOP/s of fused multiply-adds on all of the device's threads together, in runs of about `seconds`."""
    repeats = 100_000
    while (elapsed := best_seconds(partial(device.peak_flops, repeats), 1)) < seconds / 2:
        repeats = round(repeats * min(10.0, seconds / elapsed))
    flops = device.peak_flops(repeats)
    return flops / best_seconds(partial(device.peak_flops, repeats), runs) / 1e9


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
    print(f"{'threads':>8} {'GFLOP/s':>9} {'read GB/s':>10} {'copy GB/s':>10}")
    for count in thread_counts(most):
        device = device_class(threads=count)
        read, copy = bandwidth(device, mebibytes)
        print(f"{count:>8} {peak_gflops(device):>9.1f} {read:>10.1f} {copy:>10.1f}", flush=True)


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench peak` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench peak", standalone_mode=False)


if __name__ == "__main__":
    command(prog_name="python -m bench.peak")
