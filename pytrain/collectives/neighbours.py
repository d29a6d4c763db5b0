"""`pytrain info --ring`: whether all ranks reach each other, and how fast each is to its neighbour."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytrain.errors import UserError

if TYPE_CHECKING:
    from pytrain.collectives.mpi_group import MpiGroup

PINGS = 21
LARGE = 4 * 2**20
LARGE_ROUNDS = 5


@dataclass(frozen=True)
class Link:
    """From one rank to the next."""

    microseconds: float
    """Half of a round trip of 8 bytes."""
    gigabytes_per_second: float
    """Of messages of 4 MiB, one way at a time."""


def pass_round(group: MpiGroup) -> None:
    """Send a token round the ring, to which every rank adds its number.

    Raises:
        UserError: it comes back with another sum.
    """
    token = np.zeros(1, np.int64)
    following, preceding = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.rank == 0:
        group.send(token, following)
        group.receive(token, preceding)
    else:
        group.receive(token, preceding)
        token += group.rank
        group.send(token, following)
    wanted = group.size * (group.size - 1) // 2
    if group.rank == 0 and token[0] != wanted:
        raise UserError(f"the token came back as {token[0]} instead of {wanted}: the ranks are not in a ring")


def measure_links(group: MpiGroup) -> Link:
    """Of this rank to the next. Links that share no rank are measured at the same time."""
    turns = 2 if group.size % 2 == 0 else 3  # with an odd number the last link needs a turn of its own
    link = Link(0.0, 0.0)
    for turn in range(turns):
        group.barrier()
        for first in (group.rank, (group.rank - 1) % group.size):
            if _turn_of(first, group.size) == turn:
                found = _ping(group, first)
                if first == group.rank:
                    link = found
    return link


def _turn_of(first: int, size: int) -> int:
    return 2 if size % 2 and first == size - 1 else first % 2


def _ping(group: MpiGroup, first: int) -> Link:
    """Messages to and fro between rank `first` and the next one."""
    other = (first + 1) % group.size if group.rank == first else first
    seconds = {}
    for size, rounds in ((8, PINGS), (LARGE, LARGE_ROUNDS)):
        array = np.zeros(size, np.uint8)
        times = []
        for _ in range(rounds + 1):  # the first one does not count
            started = time.perf_counter()
            if group.rank == first:
                group.send(array, other)
                group.receive(array, other)
            else:
                group.receive(array, other)
                group.send(array, other)
            times.append((time.perf_counter() - started) / 2)
        seconds[size] = statistics.median(times[1:])
    return Link(seconds[8] * 1e6, LARGE / seconds[LARGE] / 1e9)


def ring_report(group: MpiGroup) -> str:
    """A line for each rank on rank 0, empty elsewhere; all ranks call it.

    Raises:
        UserError: messages do not get round.
    """
    pass_round(group)
    links = group.gather(measure_links(group))
    lines = []
    for rank, link in enumerate(links):
        place = group.process.places[rank]
        lines.append(
            f"rank {rank} on {place.host}: {place.threads} threads, {len(place.cores)} cores; to rank "
            f"{(rank + 1) % group.size}: {link.microseconds:.1f} us, {link.gigabytes_per_second:.1f} GB/s"
        )
    return "\n".join([*lines, f"the token went round {group.size} ranks"]) if lines else ""
