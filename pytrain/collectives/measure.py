"""Timing collectives on this machine: `pytrain info --collectives` makes the table that runs then use."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytrain.collectives.group import Array, Group
from pytrain.collectives.table import ALGORITHMS, Eligible, Measured, Range, Table

if TYPE_CHECKING:
    from pytrain.collectives.mpi_group import MpiGroup

SAMPLE_SECONDS = 2e-3  # short operations are repeated until a sample takes about this long
MOST_REPEATS = 50
SMALLEST, FACTOR = 1024, 4
KINDS = (
    ("all_reduce", False),
    ("all_reduce", True),
    ("reduce_scatter", False),
    ("reduce_scatter", True),
    ("all_gather", False),
    ("broadcast", False),
)
"""Kind of operation, and whether of 16-bit numbers (where nothing is added, bytes are bytes)."""
ALL = Eligible(own=False, deterministic=False)


@dataclass(frozen=True)
class Timing:
    """Median seconds of one algorithm on arrays of one size, of the slowest rank."""

    kind: str
    half: bool
    ranks: int
    nodes: int
    size: int
    """Bytes."""
    algorithm: str
    seconds: float


def sizes_up_to(mebibytes: int) -> list[int]:
    """Sizes of arrays in bytes, each four times the one before."""
    sizes = [SMALLEST]
    while sizes[-1] * FACTOR <= mebibytes * 2**20:
        sizes.append(sizes[-1] * FACTOR)
    return sizes


def alternate(group: Group, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, of the slowest rank; the calls take turns in every round.

    Args:
        group: all its members call this, with the same names.
        calls: by name.
        rounds: that are counted, after one that is not.
    """
    repeats = {name: _repeats(group, call) for name, call in calls.items()}
    times = np.zeros((rounds, len(calls)))
    for row in times:
        for column, (name, call) in enumerate(calls.items()):
            group.barrier()
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            row[column] = (time.perf_counter() - started) / repeats[name]
    group.all_reduce(times, operation="max")
    return {name: [float(row[column]) for row in times] for column, name in enumerate(calls)}


def _repeats(group: Group, call: Callable[[], object]) -> int:
    """How often a call is repeated in a sample: the same on all ranks."""
    call()
    group.barrier()
    started = time.perf_counter()
    call()
    longest = np.array([time.perf_counter() - started])
    group.all_reduce(longest, operation="max")
    return max(1, min(MOST_REPEATS, int(SAMPLE_SECONDS / float(longest[0]))))


def measure(group: Group, nodes: int, sizes: Iterable[int], rounds: int) -> list[Timing]:
    """Every algorithm of every kind on this group.

    Args:
        group: made with settings that allow MPI's own algorithms; all members call this.
        nodes: that its members are on.
        sizes: of the arrays, in bytes.
        rounds: for the median.
    """
    found = []
    for size in sizes:
        for kind, half in KINDS:
            names = [name for name in ALGORITHMS[kind] if ALL.allows(name, kind, nodes, half)]
            array = np.zeros(size // 2, np.uint16) if half else np.zeros(size // 4, np.float32)
            calls = {name: _call(group, kind, array, name) for name in names}
            for name, seconds in alternate(group, calls, rounds).items():
                median = statistics.median(seconds)
                found.append(Timing(kind, half, group.size, nodes, size, name, median))
    return found


def _call(group: Group, kind: str, array: Array, algorithm: str) -> Callable[[], object]:
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(array, "bf16", algorithm=algorithm),
        "reduce_scatter": lambda: group.reduce_scatter(array, half="bf16", algorithm=algorithm),
        "all_gather": lambda: group.all_gather(array, algorithm=algorithm),
        "broadcast": lambda: group.broadcast_array(array, algorithm=algorithm),
    }
    return calls[kind]


def measure_table(world: MpiGroup, sizes: list[int], rounds: int) -> tuple[Table, list[Timing]]:
    """The table of this machine for groups of 2, 4, ... neighbouring ranks and of all, with its timings.

    All ranks call this and get the same.
    """
    timings: list[Timing] = []
    count = 2
    while count < world.size:
        first = world.rank // count * count
        members = list(range(first, min(first + count, world.size)))
        group = world.subgroup(f"neighbours {first}", members)
        if group.size == count:
            timings += measure(group, _nodes(world, members), sizes, rounds)
        group.close()
        world.barrier()
        count *= 2
    timings += measure(world, _nodes(world, range(world.size)), sizes, rounds)
    timings = world.broadcast(timings)
    return table_of(timings, f"{platform.machine()}, {world.size} ranks"), timings


def _nodes(world: MpiGroup, members: Iterable[int]) -> int:
    return len({world.process.places[world.ranks[member]].node for member in members})


def table_of(timings: Iterable[Timing], machine: str) -> Table:
    """Rank the algorithms of each kind, shape of group and size; limits lie half-way between sizes (in powers)."""
    shapes: dict[tuple[str, int, int, bool], dict[int, list[Timing]]] = {}
    for timing in timings:
        shape = (timing.kind, timing.ranks, timing.nodes, timing.half)
        shapes.setdefault(shape, {}).setdefault(timing.size, []).append(timing)
    return Table(tuple(Measured(*shape, _ranges(by_size)) for shape, by_size in shapes.items()), machine)


def _ranges(by_size: Mapping[int, list[Timing]]) -> tuple[Range, ...]:
    ranges: list[Range] = []
    sizes = sorted(by_size)
    for index, size in enumerate(sizes):
        order = tuple(timing.algorithm for timing in sorted(by_size[size], key=lambda timing: timing.seconds))
        last = index + 1 == len(sizes)
        limit = math.inf if last else float(math.isqrt(size * sizes[index + 1]))
        if ranges and ranges[-1].fastest_first == order:
            ranges.pop()
        ranges.append(Range(limit, order))
    return tuple(ranges)


def size_text(size: int) -> str:
    """Bytes in binary units: 4 KiB."""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size} B"


def report(timings: Iterable[Timing]) -> str:
    """The timings as text: a line for each size, the fastest first."""
    rows: dict[tuple[str, bool, int, int, int], list[Timing]] = {}
    for timing in timings:
        key = (timing.kind, timing.half, timing.ranks, timing.nodes, timing.size)
        rows.setdefault(key, []).append(timing)
    lines = []
    for (kind, half, ranks, nodes, size), row in sorted(rows.items()):
        row.sort(key=lambda timing: timing.seconds)
        told = ", ".join(f"{timing.algorithm} {timing.seconds * 1e6:.0f}" for timing in row)
        lines.append(
            f"{kind}{' 16-bit' if half else ''}, {ranks} ranks on {nodes} nodes, {size_text(size)}: {told} us"
        )
    return "\n".join(lines)
