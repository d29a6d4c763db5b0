"""What this machine can do at most: multiply-adds on registers, reading and copying memory.

    python -m bench.peak

The FLOPs are those of the instruction set in use (PYTRAIN_ISA forces one): fused multiply-adds of fp32, dot
products of bf16 pairs where it has them. Other benchmarks divide by them.
Memory is measured beyond any cache, and by how many bytes a thread touches, from what its own cache holds upwards.
A number of a round is the best of several runs: a machine shared with others only ever looks slower than it is.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from pytrain.native import native

from . import _record

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytrain._native import CpuDevice

MEBIBYTE = 2**20
SIZES = (2**18, 4 * MEBIBYTE, 16 * MEBIBYTE, 256 * MEBIBYTE)
"""Bytes that a thread reads and writes together: of a second-level cache, a part of a third, memory."""


def all_seconds(work: Callable[[], object], runs: int) -> list[float]:
    """The times of `runs` runs of `work`, in seconds, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def best_seconds(work: Callable[[], object], runs: int) -> float:
    """The shortest of `runs` times of `work`, in seconds, after one that is not counted."""
    return min(all_seconds(work, runs))


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


def copy_by_size(device: CpuDevice, size: int, runs: int = 5) -> float:
    """GB/s of copying, `size` bytes a thread read and written together, over and over."""
    source, destination = (np.empty(size * device.threads // 8, np.float32) for _ in range(2))
    for array in (source, destination):
        device.fill(array, 1.0)  # by the threads that will read it, so that its pages lie near them
    times = _record.alternate({"copy": lambda: device.copy(destination, source)}, runs)
    return 2 * source.nbytes / min(times["copy"]) / 1e9


def sizes(device: CpuDevice, most: int, rounds: int) -> list[dict[str, Any]]:
    """Copying by size, up to `most` bytes a thread; sizes take turns."""
    chosen = [size for size in SIZES if size <= most]
    found = [[copy_by_size(device, size) for size in chosen] for _ in range(rounds)]
    return [
        {"bytes_per_thread": size, "copy_gb_s": _record.summary([values[index] for values in found])}
        for index, size in enumerate(chosen)
    ]


def thread_counts(most: int) -> list[int]:
    """Powers of two below `most`, and `most`."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]


def ceilings(device: CpuDevice, mebibytes: int, rounds: int) -> dict[str, Any]:
    """Every ceiling of a device, each measured once in each round; keys end in their unit."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        read, copy = bandwidth(device, mebibytes)
        values = {"fp32_gflops": peak_gflops(device), "bf16_gflops": peak_gflops(device, "bf16")}
        for name, value in (values | {"read_gb_s": read, "copy_gb_s": copy}).items():
            found.setdefault(name, []).append(value)
    return {name: _record.summary(values) for name, values in found.items()}


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="The most threads (default: all cores).")
@click.option(
    "--mebibytes", type=click.IntRange(min=1), default=256, show_default=True, help="Of the largest arrays."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="For median, min and max.")
@_record.json_option
def command(threads: int | None, mebibytes: int, rounds: int, json_path: Path | None) -> None:
    """Measure peak FLOP/s and memory bandwidth, per number of threads."""
    device_class = native().CpuDevice
    most = threads or device_class().threads
    isa = device_class(threads=1).isa
    print(f"instruction set {isa}; memory: arrays of {mebibytes} MiB, copying counts bytes read and written")
    print(f"{'threads':>8} {'fp32 GFLOP/s':>24} {'bf16 GFLOP/s':>24} {'read GB/s':>22} {'copy GB/s':>22}")
    cases = []
    for count in thread_counts(most):
        device = device_class(threads=count)
        found = ceilings(device, mebibytes, rounds)
        copies = sizes(device, mebibytes * MEBIBYTE, rounds)
        cases.append({"threads": count, **found, "sizes": copies})
        fp32, bf16, read, copy = (_record.spread(values) for values in found.values())
        print(f"{count:>8} {fp32:>24} {bf16:>24} {read:>22} {copy:>22}", flush=True)
        for row in copies:
            size = f"copying {row['bytes_per_thread'] // 1024:,} KiB a thread, over and over"
            print(f"{'':>8} {size:>72} {_record.spread(row['copy_gb_s']):>24}", flush=True)
    options = {"threads": threads, "mebibytes": mebibytes, "rounds": rounds}
    _record.write(json_path, "peak", options, {"machine": _record.machine(most), "isa": isa, "cases": cases})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench peak` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench peak", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.peak")
