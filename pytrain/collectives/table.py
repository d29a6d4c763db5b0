"""Which algorithm a group takes for an operation of some size: measured once, then an input of every run."""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytrain.errors import UserError

FORMAT = 1
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("exchange", "direct", "ring", "halving_doubling", "two_level", "mpi"),
    "reduce_scatter": ("direct", "ring", "mpi"),
    "all_gather": ("direct", "ring", "mpi"),
    "broadcast": ("tree", "mpi"),
}
"""By kind of operation. "mpi" is MPI's own; the others go over its point-to-point messages."""
FEW = 8
"""Up to so many ranks everybody may talk to everybody at once."""
ROUNDS_EACH_HOP = ("ring", "halving_doubling", "mpi")
"""Reductions that would round 16-bit numbers more than once a level."""


@dataclass(frozen=True)
class Range:
    """Algorithms for arrays of at most so many bytes, the fastest first."""

    up_to_bytes: float
    """math.inf in the last range."""
    fastest_first: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What was measured for one kind of operation on one shape of group."""

    kind: str
    ranks: int
    nodes: int
    half: bool
    """Whether of 16-bit numbers."""
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Eligible:
    """Which algorithms a run may take."""

    own: bool
    """Only algorithms of our own, point-to-point."""
    deterministic: bool
    """Only reductions whose order of addition is fixed."""

    def allows(self, algorithm: str, kind: str, nodes: int, half: bool) -> bool:
        """Whether the algorithm may serve this kind of operation."""
        adds = kind in ("all_reduce", "reduce_scatter")
        if algorithm == "mpi" and (self.own or (adds and self.deterministic)):
            return False
        if adds and half and algorithm in ROUNDS_EACH_HOP:
            return False
        return algorithm != "two_level" or nodes > 1


def default_ranges(kind: str, ranks: int, nodes: int) -> tuple[Range, ...]:
    """Without a measurement: few rounds for small arrays, few bytes and neighbours for large ones."""
    if kind == "all_reduce":
        flat = ("direct", "ring") if ranks <= FEW else ("ring", "direct")
        return (
            Range(4096 if ranks <= FEW else 0, ("exchange",)),
            Range(65536, ("halving_doubling", "direct")),
            Range(math.inf, ("two_level", *flat) if 1 < nodes < ranks else flat),
        )
    if kind == "broadcast":
        return (Range(math.inf, ("tree",)),)
    return (Range(math.inf, ("direct", "ring") if ranks <= FEW else ("ring", "direct")),)


class Choice:
    """The table for one kind of operation of one group, reduced to what may be taken."""

    def __init__(self, ranges: Iterable[Range], kind: str, nodes: int, half: bool, eligible: Eligible) -> None:
        self._limits: list[float] = []
        self._names: list[str] = []
        for part in ranges:
            allowed = [name for name in part.fastest_first if eligible.allows(name, kind, nodes, half)]
            if allowed:
                self._limits.append(part.up_to_bytes)
                self._names.append(allowed[0])
        if self._limits:
            self._limits[-1] = math.inf

    def __bool__(self) -> bool:
        """Whether anything may be taken at all."""
        return bool(self._names)

    def of(self, size: int) -> str:
        """The algorithm for an array of `size` bytes."""
        return self._names[bisect_left(self._limits, size)]


@dataclass(frozen=True)
class Table:
    """All that was measured on a machine; empty: defaults."""

    measured: tuple[Measured, ...] = ()
    machine: str = ""

    def choice(self, kind: str, ranks: int, nodes: int, half: bool, eligible: Eligible) -> Choice:
        """What a group takes: as measured for the nearest number of ranks, else the defaults."""
        like = [
            entry for entry in self.measured if (entry.kind, entry.half, entry.nodes > 1) == (kind, half, nodes > 1)
        ]
        like.sort(key=lambda entry: (abs(math.log(entry.ranks / ranks)), entry.ranks))
        for entry in like[:1]:
            choice = Choice(entry.ranges, kind, nodes, half, eligible)
            if choice:
                return choice
        return Choice(default_ranges(kind, ranks, nodes), kind, nodes, half, eligible)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the run folder and checkpoints; `from_json` reads them."""
        return {
            "format": FORMAT,
            "machine": self.machine,
            "measured": [
                {
                    "kind": entry.kind,
                    "ranks": entry.ranks,
                    "nodes": entry.nodes,
                    "half": entry.half,
                    "ranges": [
                        {
                            "up_to_bytes": None if math.isinf(part.up_to_bytes) else int(part.up_to_bytes),
                            "fastest_first": list(part.fastest_first),
                        }
                        for part in entry.ranges
                    ],
                }
                for entry in self.measured
            ],
        }


def from_json(value: Any, source: str) -> Table:
    """The table that `as_json` gave.

    Args:
        value: what the JSON holds.
        source: where it comes from, for messages.

    Raises:
        UserError: it is no such table.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise UserError(
            f"{source}: not a table of collectives of format {FORMAT}; `pytrain info --collectives` writes one"
        )
    try:
        return Table(tuple(_entry(entry) for entry in value["measured"]), str(value["machine"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: a broken table of collectives ({error!r})") from None


def _entry(value: Mapping[str, Any]) -> Measured:
    kind, ranks, nodes, half = value["kind"], value["ranks"], value["nodes"], value["half"]
    ranges = tuple(
        Range(
            math.inf if part["up_to_bytes"] is None else int(part["up_to_bytes"]),
            tuple(part["fastest_first"]),
        )
        for part in value["ranges"]
    )
    limits = [part.up_to_bytes for part in ranges]
    if not limits or limits != sorted(set(limits)) or not math.isinf(limits[-1]):
        raise ValueError(f"{kind}: the ranges must rise and end with null")
    unknown = {name for part in ranges for name in part.fastest_first} - set(ALGORITHMS[kind])
    if unknown:
        raise ValueError(f"{kind} has no algorithm {', '.join(sorted(map(repr, unknown)))}")
    if not (isinstance(ranks, int) and isinstance(nodes, int) and ranks > 1 and nodes > 0):
        raise ValueError(f"{kind}: ranks {ranks!r} on nodes {nodes!r}")
    return Measured(kind, ranks, nodes, bool(half), ranges)


def read_table(path: Path) -> Table:
    """A table from the file that `pytrain info --collectives --out` wrote.

    Raises:
        UserError: it cannot be read, or is no such table.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return from_json(value, str(path))
