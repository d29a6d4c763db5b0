"""What the machine gives right now: arithmetic, reading memory and copying in the last-level cache, on all threads.

A machine that is shared has spells in which a neighbour takes memory or cache and leaves arithmetic alone: on a Zen 5
guest products on two cores fell from 460 to 370 GFLOP/s within a second, at an unmoved peak of 534, and copies in the
third-level cache from 204 to 161 GB/s. Probes between what is timed tell a run in such a spell from a good one.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _record
from .peak import peak_gflops

if TYPE_CHECKING:
    from pytrain._native import CpuDevice

MEBIBYTE = 2**20
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_CACHE = 32 * MEBIBYTE
"""Taken for the last level where the kernel shows none, or a smaller one."""
SECONDS = 0.05
"""That a probe of memory, or of the cache, takes."""
CACHED_BYTES = 4 * MEBIBYTE
"""That a thread reads and writes in the last-level cache, beyond its own second-level one, where there is room."""
APART = 0.15
"""Probes of one run that differ by more (largest over smallest) make a sentence."""


def last_cache_bytes() -> int:
    """Size of the largest cache of the first core; at least 32 MiB, since a guest may not be shown its host's."""
    sizes = [LEAST_CACHE]
    for path in CACHES.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        if match is not None:
            sizes.append(int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2]])
    return max(sizes)


class Reading(NamedTuple):
    """One probe."""

    gflops: float
    """Of the multiply-adds of the run's dtype."""
    read_gb_s: float
    """GB/s read from memory."""
    cache_gb_s: float
    """GB/s copied in the last-level cache, bytes read and written."""


def mean_of(*readings: Reading) -> Reading:
    """Means, for what ran between the probes."""
    return Reading(*(statistics.fmean(values) for values in zip(*readings, strict=True)))


class Probe:
    """Probes of one run.

    Args:
        device: whose threads compute.
        dtype: whose multiply-adds are probed.
    """

    def __init__(self, device: CpuDevice, dtype: str) -> None:
        self._device, self._dtype = device, dtype
        self._source = np.empty(4 * last_cache_bytes() // 4, np.float32)  # four times what a cache could keep
        self._total = np.zeros(1)
        half = min(CACHED_BYTES * device.threads, last_cache_bytes() // 2) // 2
        self._cached = [np.empty(half // 4, np.float32) for _ in range(2)]
        for array in (self._source, *self._cached):
            device.fill(array, 1.0)  # by the threads that will read it, so that its pages lie near them
        self.readings: list[Reading] = []

    def take(self) -> Reading:
        """One probe more."""
        source, destination = self._cached
        found = Reading(
            peak_gflops(self._device, self._dtype, runs=3),
            self._source.nbytes / _median(lambda: self._device.sum_squares(self._total, self._source)) / 1e9,
            2 * source.nbytes / _median(lambda: self._device.copy(destination, source)) / 1e9,
        )
        self.readings.append(found)
        return found

    def record(self) -> dict[str, Any]:
        """For the JSON: `peak_gflops`, `read_gb_s`, `cache_gb_s`, all values in order, and `spell`."""
        return {
            "peak_gflops": _record.summary([reading.gflops for reading in self.readings]),
            "read_gb_s": _record.summary([reading.read_gb_s for reading in self.readings]),
            "cache_gb_s": _record.summary([reading.cache_gb_s for reading in self.readings]),
            "spell": spell(self.readings),
        }


def _median(work: Callable[[], object]) -> float:
    """Seconds of the median of so many runs as fit into SECONDS: a spell slows all of them, a hiccup one."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def spell(readings: list[Reading]) -> str | None:
    """A sentence where the probes of one run lie far apart; None where they agree."""
    told = []
    for name, unit, values in (
        ("arithmetic", "GFLOP/s", [reading.gflops for reading in readings]),
        ("reading memory", "GB/s", [reading.read_gb_s for reading in readings]),
        ("copying in a cache", "GB/s", [reading.cache_gb_s for reading in readings]),
    ):
        if max(values) > (1 + APART) * min(values):
            told.append(f"{name} from {min(values):.1f} to {max(values):.1f} {unit}")
    if not told:
        return None
    return (
        f"probes within this run differ by more than {APART:.0%} ({', '.join(told)}): somebody else had a part of "
        "this machine for a while, so that only ratios paired within a round count"
    )
