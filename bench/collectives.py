"""Each all-reduce of our own beside MPI's, from 1 KB to 256 MB, on 2 and 4 ranks of one thread.

    python -m bench.collectives

In every round all of them take turns; a number is the median over rounds of the slowest rank. `MPI` is the bare
blocking call; `auto` takes what a table says that the same ranks measured just before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from pytrain import launch
from pytrain.collectives import Settings, Table
from pytrain.collectives.measure import sizes_up_to
from pytrain.errors import UserError

from . import _record

if TYPE_CHECKING:
    from pytrain.collectives.mpi_group import MpiGroup

OWN = ("exchange", "direct", "ring", "halving_doubling")
MOST_EXCHANGED = 2**20  # `exchange` sends everything to everybody


def own_calls(world: MpiGroup, array: NDArray[np.float32]) -> dict[str, Callable[[], object]]:
    """Our own algorithms on one array, by name."""
    names = [name for name in OWN if name != "exchange" or array.nbytes <= MOST_EXCHANGED]
    return {name: partial(world.all_reduce, array, algorithm=name) for name in names}


def measured_table(world: MpiGroup, sizes: list[int], rounds: int) -> Table:
    """A table for sums of this group alone, from timings before those that are reported."""
    from pytrain.collectives.measure import Timing, alternate, table_of

    timings = []
    for size in sizes:
        array = np.zeros(size // 4, np.float32)
        calls = own_calls(world, array) | {"mpi": partial(world.all_reduce, array, algorithm="mpi")}
        for name, seconds in alternate(world, calls, rounds).items():
            median = statistics.median(seconds)
            timings.append(Timing("all_reduce", False, world.size, 1, size, name, median))
    return table_of(world.broadcast(timings), "bench.collectives")


def compare(world: MpiGroup, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Print the comparison on rank 0; all ranks call it. Seconds of each call, by size."""
    from mpi4py import MPI

    from pytrain.collectives.measure import alternate, size_text
    from pytrain.collectives.mpi_group import world_group

    table = measured_table(world, sizes, max(3, rounds // 2))
    auto = world_group(Settings(deterministic=False, table=table), world.communicator)
    show = print if world.rank == 0 else _silent
    cores = len(os.sched_getaffinity(0))
    show(f"{world.size} ranks on {cores} cores, fp32, {rounds} rounds; us (least to most), times MPI's")
    results: list[dict[str, Any]] = []
    for size in sizes:
        array, halves = np.zeros(size // 4, np.float32), np.zeros(size // 4, np.uint16)
        calls: dict[str, Callable[[], object]] = {
            "MPI": partial(world.communicator.Allreduce, MPI.IN_PLACE, array),
            **own_calls(world, array),
            "auto": partial(auto.all_reduce, array),
            "bf16": partial(world.all_reduce, halves, "bf16", algorithm="direct"),
        }
        times = alternate(world, calls, rounds)
        seconds_of = {name: _record.summary(seconds) for name, seconds in times.items()}
        results.append({"ranks": world.size, "bytes": size, "seconds": seconds_of})
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        best = min((name for name in OWN if name in medians), key=lambda name: medians[name])
        base = medians["MPI"]
        cells = [
            f"{name} {_record.spread(seconds_of[name], 1e-6, 0)} {seconds / base:.2f}"
            for name, seconds in medians.items()
        ]
        show(f"{size_text(size):>8}: best own {best} {medians[best] / base:.2f}; " + ", ".join(cells))
    show(_bytes(world))
    auto.close()
    return results


def _silent(_text: str) -> None:
    pass


def _bytes(world: MpiGroup) -> str:
    """What bf16 saves on the wire, by the counters."""
    sent = {}
    for dtype in (np.float32, np.uint16):
        world.counters.reset()
        world.all_reduce(np.zeros(2**20, dtype), "bf16", algorithm="direct")
        sent[dtype] = world.counters.bytes_sent["all_reduce"]
    return f"bytes sent per rank for 2^20 numbers: fp32 {sent[np.float32]:,}, bf16 {sent[np.uint16]:,}"


@click.command()
@click.option(
    "--ranks", multiple=True, default=(2, 4), show_default=True, type=click.IntRange(min=2), help="Job sizes."
)
@click.option("--largest", default=256, show_default=True, type=click.IntRange(min=1), help="Array, in MiB.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="For the median.")
@_record.json_option
def command(ranks: tuple[int, ...], largest: int, rounds: int, json_path: Path | None) -> None:
    """Compare our all-reduces with MPI's; starts its own ranks."""
    if launch.find_launcher(os.environ) is not None:
        with launch.world(Settings(deterministic=False, watchdog_seconds=0)) as world:
            if world.size == 1:
                raise UserError("a comparison needs several ranks")
            found = compare(world, sizes_up_to(largest), rounds)  # type: ignore[arg-type]
            if world.rank == 0:
                _write(json_path, [world.size], largest, rounds, found)
        return
    mpiexec, settings = launch.find_mpiexec()
    results: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for count in ranks:
            part = Path(folder) / f"{count}.json"
            options = ["--largest", str(largest), "--rounds", str(rounds), "--json", str(part)]
            subprocess.run(
                [*mpiexec, "-n", str(count), sys.executable, "-m", __spec__.name, *options],
                env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
                check=True,
            )
            results += _record.read(part)["cases"]
    _write(json_path, list(ranks), largest, rounds, results)


def _write(path: Path | None, ranks: list[int], largest: int, rounds: int, cases: list[dict[str, Any]]) -> None:
    options = {"ranks": ranks, "largest": largest, "rounds": rounds}
    _record.write(path, "collectives", options, {"cases": cases})


def main(arguments: list[str]) -> None:
    """Run with these command-line arguments, as `pytrain bench collectives` does; returns when done."""
    command.main(arguments, prog_name="pytrain bench collectives", standalone_mode=False)


if __name__ == "__main__":
    _record.start(command, "python -m bench.collectives")
