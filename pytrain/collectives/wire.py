"""What an algorithm sees of the world: numbered members, messages to and from them, scratch and addition."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pytrain.collectives.copies import Outgoing
from pytrain.collectives.staging import Block, Staging
from pytrain.collectives.sums import Operation, add_halves_in_order, merge, merge_in_order
from pytrain.collectives.turns import Passage, Turn

if TYPE_CHECKING:
    from pytrain._native import Device
    from pytrain.collectives.counters import Counters

Array = NDArray[Any]
Request = Any
"""Whatever the transport gives for a message on its way."""
Steps = Generator[list[Request], None, Any]
"""A collective operation: yields the messages that must be complete before it goes on (or `Copies`, or a `Turn`);
returns its result."""


class Transport(Protocol):
    """Non-blocking messages between ranks. Two with the same ends and tag arrive in the order of posting."""

    def send(self, data: Array, to: int, tag: int) -> Request:
        """Start to send a contiguous array; it must stay as it is until the request is complete."""

    def receive(self, data: Array, source: int, tag: int) -> Request:
        """Start to receive into a contiguous array."""

    def wait_all(self, requests: list[Request]) -> None:
        """Return when all are complete."""

    def wait_some(self, requests: list[Request]) -> None:
        """Return when at least one more is complete than before, or all are."""

    def test_all(self, requests: list[Request]) -> bool:
        """Whether all are complete; does not wait."""


@dataclass(frozen=True)
class Limits:
    """How arrays are cut into messages."""

    message_bytes: int = 2**30
    """Largest message: MPI counts in 32-bit integers, and some transports stop at 2 GiB."""
    block_bytes: int = 2**20
    """Reductions add and pass on blocks of this size while the next are on their way."""


@dataclass(frozen=True)
class Tools:
    """What all operations of a process share."""

    device: Device
    """Adds 16-bit numbers: of one thread, as a progress thread may use it, or the GPU that the arrays lie on."""
    staging: Staging
    limits: Limits
    sums_on_device: bool = False
    """Whether float32 is added by the device, too."""


class Wire:  # made for every operation, so that it is kept light
    """One operation of one group.

    Args:
        transport: carries messages between ranks.
        members: rank of each member in the transport, in the order in which reductions add.
        index: which of the members this process is.
        tag: of the operation's messages; no other operation under way between these ranks has it.
        tools: scratch and addition.
        counters: where bytes are counted, under `kind`.
        kind: of the operation.
        half: what uint16 arrays hold, "bf16" or "fp16", where they are added.
        operation: how two numbers become one in a reduction.
    """

    __slots__ = (
        *("transport", "members", "index", "size", "tag", "tools", "counters", "kind", "half", "operation"),
        *("alone", "staged", "in_order", "turn", "passage", "outgoing", "_taken"),
    )

    def __init__(
        self,
        transport: Transport,
        members: Sequence[int],
        index: int,
        tag: int,
        tools: Tools,
        counters: Counters,
        kind: str,
        half: str | None = None,
        operation: Operation = "sum",
    ) -> None:
        self.transport = transport
        self.members = members
        self.index = index
        self.size = len(members)
        self.tag = tag
        self.tools = tools
        self.counters = counters
        self.kind = kind
        self.half = half
        self.operation = operation
        self.alone = False
        """Whether nothing else is under way in this process and the caller waits: steps may then block in MPI."""
        self.staged = False
        """Whether the array is a pinned copy of one in a GPU's memory."""
        self.in_order = False
        """Whether its messages are told apart by the order in which members post them, and not by a tag."""
        self.turn: Turn | None = None
        """At the pinned buffers of the operation's group."""
        self.passage: Passage | None = None
        """What is done around it, where its array lies in a buffer that others pass through, too."""
        self.outgoing: Outgoing | None = None
        """Of an array in a GPU's memory whose algorithm says in which order its parts are needed on the host."""
        self._taken: list[Block] = []

    def subset(self, indices: Sequence[int]) -> Wire:
        """The same operation among some of the members, this process one of them."""
        wire = Wire(
            self.transport,
            [self.members[index] for index in indices],
            list(indices).index(self.index),
            self.tag,
            self.tools,
            self.counters,
            self.kind,
            self.half,
            self.operation,
        )
        wire._taken = self._taken
        return wire

    def others(self) -> list[int]:
        """Indices of the other members, in order."""
        return [index for index in range(self.size) if index != self.index]

    def fetch(self, parts: Iterable[Array]) -> None:
        """Say what of the operation's array will be read, in this order: from a GPU's memory it must come first."""
        if self.outgoing is not None:
            self.outgoing.fetch(parts)

    def ready(self, part: Array) -> Steps:
        """Wait until a part of what was fetched may be read."""
        if self.outgoing is not None and (missing := self.outgoing.missing(part)):
            yield missing

    def send(self, array: Array, to: int) -> list[Request]:
        """Start to send to member `to`; nothing is sent for an empty array."""
        size = array.nbytes
        self.counters.sent(self.kind, size)
        rank = self.members[to]
        if 0 < size <= self.tools.limits.message_bytes:
            return [self.transport.send(array, rank, self.tag)]
        return [self.transport.send(part, rank, self.tag) for part in self._messages(array)]

    def receive(self, array: Array, source: int) -> list[Request]:
        """Start to receive from member `source` what it sends as one array of this size."""
        rank = self.members[source]
        if 0 < array.nbytes <= self.tools.limits.message_bytes:
            return [self.transport.receive(array, rank, self.tag)]
        return [self.transport.receive(part, rank, self.tag) for part in self._messages(array)]

    def _messages(self, array: Array) -> list[Array]:
        """The array in parts that one message can hold; none of an empty one."""
        step = max(1, self.tools.limits.message_bytes // array.itemsize)
        return [array[first : first + step] for first in range(0, array.size, step)]

    def blocks(self, elements: int, itemsize: int) -> list[slice]:
        """Slices of at most a block that cover `elements`."""
        step = max(1, self.tools.limits.block_bytes // itemsize)
        return [slice(first, min(first + step, elements)) for first in range(0, elements, step)]

    def scratch(self, dtype: np.dtype[Any], elements: int) -> Array:
        """Memory until the operation ends."""
        block = self.tools.staging.take(elements * dtype.itemsize)
        self._taken.append(block)
        return block.view(dtype, elements)

    def release(self) -> None:
        """Give all scratch back, and whatever was lent: the operation has ended."""
        while self._taken:
            self.tools.staging.give_back(self._taken.pop())
        if self.turn is not None:
            self.turn.end()

    @property
    def _adder(self) -> Device | None:
        return self.tools.device if self.tools.sums_on_device else None

    def merge(self, target: Array, other: Array) -> None:
        """target += other (or the larger of the two), in the arrays' own type."""
        merge(target, other, self.operation, self._adder)

    def merge_in_order(self, own: Array, before: Sequence[Array], after: Sequence[Array]) -> None:
        """own = the sum in order of members; before[0] is overwritten. 16-bit numbers are rounded once."""
        if self.half is None:
            merge_in_order(own, before, after, self.operation, self._adder)
            return
        block = self.tools.staging.take(own.size * 4)
        total = block.view(np.dtype(np.float32), own.size)
        add_halves_in_order(self.tools.device, own, before, after, total, self.half)
        self.tools.staging.give_back(block)


def even_bounds(elements: int, pieces: int) -> list[int]:
    """Where each of `pieces` nearly equal pieces begins, and the end of the last."""
    return [elements * piece // pieces for piece in range(pieces + 1)]


def pieces_of(array: Array, bounds: Sequence[int]) -> list[Array]:
    """Views of the pieces array[bounds[i] : bounds[i + 1]]."""
    return [array[first:last] for first, last in pairwise(bounds)]
