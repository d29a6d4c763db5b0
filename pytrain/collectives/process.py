"""What all groups of one process share, and where each rank of the world runs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pytrain.collectives.device_memory import DeviceMemory
from pytrain.collectives.journal import Journal
from pytrain.collectives.progress import Progress
from pytrain.collectives.settings import Settings
from pytrain.collectives.wire import Tools


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: int
    """The same number on all ranks that share memory."""
    host: str
    cores: frozenset[int]
    """Its affinity mask."""
    threads: int
    """That its kernels use."""
    given: bool = True
    """Whether `OMP_NUM_THREADS` says so; else the ranks of a node share its cores."""


def this_place(node: int) -> Place:
    """Of this process, as OpenMP set it up: `share_cores` has not been asked yet."""
    from pytrain.native import native

    cores = frozenset(os.sched_getaffinity(0))
    threads = int(native().information()["threads"])
    return Place(node, platform.node(), cores, threads, "OMP_NUM_THREADS" in os.environ)


def share_cores(places: Sequence[Place]) -> list[Place]:
    """The places with as many threads as each rank's share of its cores, where no number was given.

    Without one OpenMP starts a thread for each core of the affinity mask, in every rank: ranks that share cores would
    wait for each other's threads, which takes many times longer. Bits do not depend on the number of threads.

    Args:
        places: by rank in the world.
    """

    def share(mine: Place) -> int:
        beside = sum(place.node == mine.node and bool(place.cores & mine.cores) for place in places)
        return max(1, len(mine.cores) // beside)

    return [place if place.given else replace(place, threads=min(place.threads, share(place))) for place in places]


def sharing(before: Place, after: Place) -> str | None:
    """A sentence, if a rank has fewer threads after `share_cores` than before."""
    if after.threads == before.threads:
        return None
    return (
        f"OMP_NUM_THREADS is not set, and ranks on {after.host} share {len(after.cores)} cores: "
        f"each takes {after.threads} of the {before.threads} threads that one alone would"
    )


def crowding(places: Sequence[Place], node: int) -> str | None:
    """A sentence, if the threads of the ranks on a node are more than the cores they may run on."""
    local = [place for place in places if place.node == node]
    threads = sum(place.threads for place in local)
    cores = frozenset[int]().union(*(place.cores for place in local))
    if threads > len(cores):
        fewer = "lower OMP_NUM_THREADS, or " if any(place.threads > 1 for place in local) else ""
        return (
            f"{len(local)} ranks on {local[0].host} run {threads} threads on {len(cores)} cores and will "
            f"hinder each other; {fewer}start fewer ranks"
        )
    tight = next((place for place in local if place.threads > len(place.cores)), None)
    if tight is not None:
        return (
            f"a rank on {tight.host} runs {tight.threads} threads on the {len(tight.cores)} cores of its "
            "affinity mask; lower OMP_NUM_THREADS, or let the launcher bind it to more cores"
        )
    return None


class ProgressChoice(NamedTuple):
    """What moves non-blocking operations of a rank on, and why."""

    mode: Literal["thread", "test"]
    reason: str

    def __str__(self) -> str:
        return f"{self.mode}: {self.reason}"


def choose_progress(asked: Literal["auto", "thread", "test"], places: Sequence[Place], rank: int) -> ProgressChoice:
    """What moves the operations of a rank on.

    "auto" takes a thread where the rank may run on a core that no kernel thread of the node's ranks needs (A64FX
    has assistant cores; other nodes may leave some free): it would take time from the kernels anywhere else.

    Args:
        asked: of the settings.
        places: by rank in the world.
        rank: which of them.
    """
    if asked != "auto":
        return ProgressChoice(asked, "as configured")
    mine = places[rank]
    beside = [place for place in places if place.node == mine.node and place.cores & mine.cores]
    threads = sum(place.threads for place in beside)
    cores = len(frozenset[int]().union(*(place.cores for place in beside)))
    ranks = f"{len(beside)} rank{'s' if len(beside) > 1 else ''}"
    use = f"{ranks} with {threads} threads together may run on {cores} cores of {mine.host}"
    if threads < cores and mine.threads < len(mine.cores):
        return ProgressChoice("thread", f"{use}, which leaves one for a thread")
    return ProgressChoice("test", f"{use}, which leaves none for a thread")


@dataclass
class Process:
    """One per process, made with its world."""

    settings: Settings
    journal: Journal
    progress: Progress
    tools: Tools
    places: list[Place]
    """By rank in the world."""
    progress_choice: ProgressChoice
    sharing: str | None = None
    """What to say of threads that this rank leaves to others of its node."""
    device_memory: DeviceMemory | None = None
    """Of the GPU that this process computes on; None where it computes on the CPU."""
    spin: bool = False
    """Wait without giving the core away."""
