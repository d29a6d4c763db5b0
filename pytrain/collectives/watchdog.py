"""Ends a job that hangs, and says where: a thread per rank, with a communicator of its own.

A rank that has waited for long tells rank 0, which asks every rank when it moved last. If none did for that
long, nobody ever will: rank 0 prints what each did, names those that went another way, and aborts.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytrain.collectives.journal import History, Journal, differences

if TYPE_CHECKING:
    from mpi4py import MPI

NOTICE, QUESTION, ANSWER = range(3)  # tags
LOOKS = 4  # how often a rank looks within the time that is too long
LONGEST_PAUSE = 1.0  # seconds between two looks, at most
PATIENCE = 5.0  # seconds for which rank 0 waits for answers, at most


@dataclass(frozen=True)
class Report:
    """What one rank says of itself."""

    label: str
    phase: str
    idle: float
    """Seconds since it last moved."""
    lines: list[str]
    """Its last operations."""
    histories: dict[str, History] = field(default_factory=dict)
    """Of its groups."""


def report_of(journal: Journal, seconds: float) -> Report:
    """What this process says; while it moves only that it does, as its histories change meanwhile."""
    idle = journal.idle()
    if idle < seconds:
        return Report(journal.label, journal.phase, idle, [])
    return Report(journal.label, journal.phase, idle, journal.lines(), dict(journal.histories))


def is_stuck(reports: Mapping[int, Report], seconds: float) -> bool:
    """Whether none of those who answered has moved for so long."""
    return all(report.idle >= seconds for report in reports.values())


def deviations(reports: Mapping[int, Report]) -> list[str]:
    """Sentences about ranks whose operations differ from those of the others of their group."""
    groups: dict[str, dict[int, History]] = {}
    for report in reports.values():
        for name, history in report.histories.items():
            groups.setdefault(name, {})[history.index] = history
    return [sentence for name, histories in groups.items() for sentence in differences(name, histories)]


def verdict(reports: Mapping[int, Report], ranks: int, seconds: float) -> str:
    """The text that ends a job: every rank's last operations, then who differs and who is silent."""
    parts = []
    for rank in range(ranks):
        if rank in reports:
            report = reports[rank]
            head = f"[{report.label}] phase: {report.phase}; last movement {report.idle:.1f} s ago; operations:"
            parts += [head, *(f"[{report.label}]   {line}" for line in report.lines)]
    silent = sorted(set(range(ranks)) - set(reports))
    parts.append(f"watchdog: nothing has moved for {seconds:g} s; the job ends.")
    if silent:
        numbers = ", ".join(map(str, silent))
        parts.append(f"watchdog: no answer from rank {numbers}: dead, or in code that holds the interpreter")
    told = deviations(reports)
    parts += [f"watchdog: {sentence}" for sentence in told]
    if not told and not silent:
        parts.append("watchdog: all histories agree: what hangs is not a difference in the order of operations")
    return "\n".join(parts)


class Watchdog:
    """The thread of one rank.

    Args:
        communicator: of all ranks; duplicated. Needs MPI_THREAD_MULTIPLE.
        journal: of this process.
        seconds: without a movement anywhere that are too long.
    """

    def __init__(self, communicator: MPI.Intracomm, journal: Journal, seconds: float) -> None:
        self._communicator = communicator.Dup()
        self._journal = journal
        self._seconds = seconds
        self._rank, self._ranks = communicator.Get_rank(), communicator.Get_size()
        self._pause = min(seconds / LOOKS, LONGEST_PAUSE)
        self._patience = min(seconds, PATIENCE) + self._pause
        self._asked_at: float | None = None
        self._answers: dict[int, Report] = {}
        self._noticed_at: float | None = None
        self._heeded = False  # rank 0 has asked since
        self._stop = threading.Event()
        self._pending: list[MPI.Request] = []
        self._thread = threading.Thread(target=self._run, name="pytrain watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the communicator stays, as messages to it may be under way."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            while (message := self._next_message()) is not None:
                self._hear(*message)
            if self._journal.waiting and self._journal.idle() >= self._seconds:
                self._notice()
            else:
                self._noticed_at = None
            if self._asked_at is not None:
                self._decide(self._asked_at)

    def _next_message(self) -> tuple[int, int, Any] | None:
        from mpi4py import MPI

        status = MPI.Status()
        if not self._communicator.iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            return None
        source, tag = status.Get_source(), status.Get_tag()
        return source, tag, self._communicator.recv(source=source, tag=tag)

    def _send(self, value: Any, to: int, tag: int) -> None:
        """Without waiting: the other rank may be gone."""
        self._pending = [request for request in self._pending if not request.Test()]
        self._pending.append(self._communicator.isend(value, to, tag))

    def _hear(self, source: int, tag: int, value: Any) -> None:
        if tag == NOTICE and self._asked_at is None:
            self._ask()
        elif tag == QUESTION:
            self._heeded = True
            self._send(report_of(self._journal, self._seconds), source, ANSWER)
        elif tag == ANSWER:
            self._answers[source] = value

    def _notice(self) -> None:
        """This rank has waited too long: tell rank 0, or end the job if that does not answer either."""
        now = self._journal.clock()
        since = now - self._noticed_at if self._noticed_at is not None else None
        if since is None or (self._heeded and since > self._seconds):
            self._noticed_at, self._heeded = now, False
            if self._rank:
                self._send(None, 0, NOTICE)
            elif self._asked_at is None:
                self._ask()
        elif not self._heeded and since > self._seconds + 2 * self._patience:
            self._end({self._rank: report_of(self._journal, self._seconds)})

    def _ask(self) -> None:
        self._asked_at = self._journal.clock()
        self._answers = {}
        self._heeded = True
        for other in range(1, self._ranks):
            self._send(None, other, QUESTION)

    def _decide(self, asked_at: float) -> None:
        """Once all have answered, or enough time has passed."""
        late = self._journal.clock() - asked_at > self._patience
        if len(self._answers) < self._ranks - 1 and not late:
            return
        reports = {0: report_of(self._journal, self._seconds), **self._answers}
        self._asked_at = None
        if is_stuck(reports, self._seconds):
            self._end(reports)

    def _end(self, reports: Mapping[int, Report]) -> None:
        print(verdict(reports, self._ranks, self._seconds), file=sys.stderr, flush=True)
        self._communicator.Abort(1)
        os._exit(1)  # called from a thread, MPICH's abort comes back
