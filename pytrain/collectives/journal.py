"""What this process did last, and a rolling hash of each group's operations: to find who went another way."""

import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LAST_OPERATIONS = 64


class CollectiveMismatchError(RuntimeError):
    """Members of a group are at different operations: a bug in the program, or settings that differ."""


@dataclass(slots=True)
class Entry:
    """One operation of one group on this process."""

    group: str
    text: str
    started: float
    finished: float | None = None


class Journal:
    """The last operations of a process, its phase, and when it last moved. One per process.

    Args:
        clock: seconds; tests give their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.label = ""
        self.last_move = clock()
        self.entries: deque[Entry] = deque(maxlen=LAST_OPERATIONS)
        self.histories: dict[str, History] = {}  # by group key
        self._phase = "starting"

    @property
    def phase(self) -> str:
        """What the process is doing, in words; setting it counts as a movement."""
        return self._phase

    @phase.setter
    def phase(self, text: str) -> None:
        self._phase = text
        self.moved()

    def moved(self) -> None:
        """Something went on: the watchdog begins to count anew."""
        self.last_move = self.clock()

    def begin(self, group: str, text: str) -> Entry:
        """Note the start of an operation."""
        entry = Entry(group, text, self.clock())
        self.last_move = entry.started
        self.entries.append(entry)
        return entry

    def end(self, entry: Entry) -> None:
        """Note its end."""
        self.last_move = entry.finished = self.clock()

    @property
    def waiting(self) -> bool:
        """Whether one of the last operations has not ended."""
        return any(entry.finished is None for entry in list(self.entries))

    def idle(self) -> float:
        """Seconds since the last movement."""
        return self.clock() - self.last_move

    def lines(self) -> list[str]:
        """The last operations, oldest first, with their age in seconds and how long they took."""
        now = self.clock()
        return [
            f"{now - entry.started:9.3f} s ago  {entry.group}: {entry.text}  "
            + ("NOT FINISHED" if entry.finished is None else f"{(entry.finished - entry.started) * 1e3:.3f} ms")
            for entry in list(self.entries)
        ]


@dataclass
class Stream:
    """Operations that must be the same in the same order at two or more ends."""

    count: int = 0
    hash: int = 0
    last: str = "nothing yet"

    def add(self, text: str) -> None:
        """Roll the hash over one more operation."""
        self.count += 1
        self.hash = zlib.crc32(f"{text}\n".encode(), self.hash)
        self.last = text

    def __str__(self) -> str:
        return f"operation {self.count} ({self.last})"


@dataclass
class History:
    """The operations of one group as one of its members saw them. Plain data, so that it can travel."""

    ranks: tuple[int, ...]
    index: int
    collective: Stream = field(default_factory=Stream)
    sent: dict[tuple[int, int], Stream] = field(default_factory=dict)
    """By (other member, tag)."""
    received: dict[tuple[int, int], Stream] = field(default_factory=dict)


def differences(name: str, histories: Mapping[int, History]) -> list[str]:
    """Sentences about which members of a group did other operations than the rest; none if all agree.

    Args:
        name: of the group.
        histories: by member; members that are missing are not compared.
    """
    found = []
    seen: dict[tuple[int, int], list[int]] = {}
    for member, history in histories.items():
        seen.setdefault((history.collective.count, history.collective.hash), []).append(member)
    if len(seen) > 1:
        common = max(seen.values(), key=len)  # the first of equally many
        for members in seen.values():
            if members is not common:
                found.append(
                    f"group {name}: {_ranks(members, histories)} at {histories[members[0]].collective}, "
                    f"{_ranks(common, histories)} at {histories[common[0]].collective}"
                )
    for member, history in histories.items():
        for (other, tag), sent in history.sent.items():
            if other in histories:
                received = histories[other].received.get((member, tag), Stream())
                if (sent.count, sent.hash) != (received.count, received.hash):
                    found.append(_unpaired(name, histories, member, other, tag))
        for (other, tag), _ in history.received.items():
            if other in histories and (member, tag) not in histories[other].sent:
                found.append(_unpaired(name, histories, other, member, tag))
    return found


def _unpaired(name: str, histories: Mapping[int, History], source: int, to: int, tag: int) -> str:
    sent = histories[source].sent.get((to, tag), Stream())
    received = histories[to].received.get((source, tag), Stream())
    return (
        f"group {name}, tag {tag}: {_ranks([source], histories)} sent {sent.count} messages to "
        f"{_ranks([to], histories)} (last: {sent.last}), which received {received.count} "
        f"(last: {received.last})"
    )


def _ranks(members: list[int], histories: Mapping[int, History]) -> str:
    ranks = ", ".join(str(histories[member].ranks[member]) for member in members)
    return f"rank{'s' if len(members) > 1 else ''} {ranks}"
