"""What all groups of one process share, and where each rank of the world runs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

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


def this_place(node: int) -> Place:
    """Of this process."""
    from pytrain.native import native

    cores = frozenset(os.sched_getaffinity(0))
    return Place(node, platform.node(), cores, int(native().information()["threads"]))


def crowding(places: Sequence[Place], node: int) -> str | None:
    """A sentence, if the threads of the ranks on a node are more than the cores they may run on."""
    local = [place for place in places if place.node == node]
    threads = sum(place.threads for place in local)
    cores = frozenset[int]().union(*(place.cores for place in local))
    if threads > len(cores):
        return (
            f"{len(local)} ranks on {local[0].host} run {threads} threads on {len(cores)} cores and will "
            "hinder each other; lower OMP_NUM_THREADS, or start fewer ranks"
        )
    tight = next((place for place in local if place.threads > len(place.cores)), None)
    if tight is not None:
        return (
            f"a rank on {tight.host} runs {tight.threads} threads on the {len(tight.cores)} cores of its "
            "affinity mask; lower OMP_NUM_THREADS, or let the launcher bind it to more cores"
        )
    return None


@dataclass
class Process:
    """One per process, made with its world."""

    settings: Settings
    journal: Journal
    progress: Progress
    tools: Tools
    places: list[Place]
    """By rank in the world."""
    spin: bool = False
    """Wait without giving the core away."""
