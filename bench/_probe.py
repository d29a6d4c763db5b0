"""What the machine gives right now: arithmetic and reading memory, on all threads together, some 50 ms each.

A machine that is shared has spells in which a neighbour takes memory and leaves arithmetic alone, or the other way
round. Probes between what is timed tell a run in such a spell from a good one.
"""

from __future__ import annotations

import re
import statistics
import time
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
READ_SECONDS = 0.05
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
        device.fill(self._source, 1.0)  # by the threads that will read it, so that its pages lie near them
        self.readings: list[Reading] = []

    def take(self) -> Reading:
        """One probe more."""
        found = Reading(peak_gflops(self._device, self._dtype, runs=3), self._read())
        self.readings.append(found)
        return found

    def _read(self) -> float:
        """The median of so many reads as fit into READ_SECONDS: a spell slows all of them, a hiccup one."""
        times: list[float] = []
        end = time.perf_counter() + READ_SECONDS
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            self._device.sum_squares(self._total, self._source)
            times.append(time.perf_counter() - begin)
        return self._source.nbytes / statistics.median(times) / 1e9

    def record(self) -> dict[str, Any]:
        """For the JSON: `peak_gflops` and `read_gb_s`, each value in the order in which it was taken, and `spell`."""
        return {
            "peak_gflops": _record.summary([reading.gflops for reading in self.readings]),
            "read_gb_s": _record.summary([reading.read_gb_s for reading in self.readings]),
            "spell": spell(self.readings),
        }


def spell(readings: list[Reading]) -> str | None:
    """A sentence where the probes of one run lie far apart; None where they agree."""
    told = []
    for name, unit, values in (
        ("arithmetic", "GFLOP/s", [reading.gflops for reading in readings]),
        ("reading memory", "GB/s", [reading.read_gb_s for reading in readings]),
    ):
        if max(values) > (1 + APART) * min(values):
            told.append(f"{name} from {min(values):.1f} to {max(values):.1f} {unit}")
    if not told:
        return None
    return (
        f"probes within this run differ by more than {APART:.0%} ({', '.join(told)}): somebody else had a part of "
        "this machine for a while, so that only ratios paired within a round count"
    )
