"""Algorithms without MPI: all members in one process, messages complete when both ends are there."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pytrain import _native
from pytrain.collectives.counters import Counters
from pytrain.collectives.staging import Staging
from pytrain.collectives.sums import Operation
from pytrain.collectives.wire import Array, Limits, Steps, Tools, Wire

TAG = 7


@dataclass
class Message:
    """One end of a message."""

    data: Array
    done: bool = False


@dataclass
class Mailbox:
    """Pairs sends with receives in the order of posting, and copies when both are posted (rendezvous)."""

    sends: dict[tuple[int, int, int], deque[Message]] = field(default_factory=lambda: defaultdict(deque))
    receives: dict[tuple[int, int, int], deque[Message]] = field(default_factory=lambda: defaultdict(deque))
    largest: int = 0
    """Bytes of the largest message."""

    def post(self, send: bool, data: Array, ends: tuple[int, int, int]) -> Message:
        """Post one end; the pair is delivered at once if the other is there."""
        message = Message(data)
        (self.sends if send else self.receives)[ends].append(message)
        outgoing, incoming = self.sends[ends], self.receives[ends]
        while outgoing and incoming:
            sent, received = outgoing.popleft(), incoming.popleft()
            assert sent.data.nbytes == received.data.nbytes, "the two ends of a message differ in size"
            received.data.view(np.uint8)[:] = sent.data.view(np.uint8)
            self.largest = max(self.largest, sent.data.nbytes)
            sent.done = received.done = True
        return message

    def left_over(self) -> int:
        """Ends that nobody answered."""
        return sum(map(len, (*self.sends.values(), *self.receives.values())))


@dataclass(frozen=True)
class MailboxTransport:
    """One rank's side. Nothing here can wait: `run` moves all ranks on."""

    box: Mailbox
    rank: int
    posted: list[Message] = field(default_factory=list)

    def send(self, data: Array, to: int, tag: int) -> Message:
        self.posted.append(self.box.post(True, data, (self.rank, to, tag)))
        return self.posted[-1]

    def receive(self, data: Array, source: int, tag: int) -> Message:
        self.posted.append(self.box.post(False, data, (source, self.rank, tag)))
        return self.posted[-1]

    def wait_all(self, requests: list[Any]) -> None:
        raise AssertionError("a rank of this process would wait for itself")

    wait_some = wait_all

    def test_all(self, requests: list[Any]) -> bool:
        return all(request.done for request in requests)


@dataclass(frozen=True)
class Outcome:
    """What a simulated operation did."""

    arrays: list[Array]
    counters: list[Counters]
    largest_message: int


def simulate(
    algorithm: Callable[[Wire, Array], Steps],
    arrays: list[Array],
    *,
    limits: Limits | None = None,
    half: str | None = None,
    operation: Operation = "sum",
    order: np.random.Generator | None = None,
) -> Outcome:
    """Run an operation on all members, in place; `order` draws who moves next.

    Fails where no member can move and some are not done: the algorithm would hang.
    """
    box = Mailbox()
    device = _native.CpuDevice(threads=1)
    counters, waiting = [Counters() for _ in arrays], {}
    wires, transports, awaited = [], [], set[int]()
    for index, array in enumerate(arrays):
        tools = Tools(device, Staging(device), limits or Limits())
        transport = MailboxTransport(box, index)
        transports.append(transport)
        members = range(len(arrays))
        wires.append(Wire(transport, members, index, TAG, tools, counters[index], "test", half, operation))
        waiting[index] = (algorithm(wires[index], array), [])
    while waiting:
        able = [i for i, (_, requests) in waiting.items() if all(request.done for request in requests)]
        assert able, f"deadlock: members {sorted(waiting)} wait for each other"
        for index in able if order is None else [int(order.choice(able))]:
            steps, _ = waiting[index]
            try:
                waiting[index] = (steps, next(steps))
                awaited.update(map(id, waiting[index][1]))
            except StopIteration:
                assert all(id(message) in awaited for message in transports[index].posted), (
                    "an operation ended without waiting for a message that it posted"
                )
                del waiting[index]
                wires[index].release()
    assert box.left_over() == 0, "messages were left over"
    return Outcome(arrays, counters, box.largest)
