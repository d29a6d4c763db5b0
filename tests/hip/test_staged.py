"""What is in pinned memory travels while the next is copied, and nobody waits for more than the next message needs.

A stream of the shim copies nothing until somebody waits for it or looks (which copies one piece): what has been
copied when a message is posted is what was waited for.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _native
from pytrain.collectives import algorithms
from pytrain.collectives.copies import Copies
from pytrain.collectives.counters import Counters
from pytrain.collectives.device_memory import WHOLE, DeviceMemory, Pinned, Sending
from pytrain.collectives.journal import Journal
from pytrain.collectives.progress import Progress, Running
from pytrain.collectives.staging import Staging
from pytrain.collectives.wire import Limits, Tools, Wire, even_bounds
from tests.parallel.mailbox import Mailbox, MailboxTransport

BLOCK = 16
LIMITS = Limits(block_bytes=4 * BLOCK)
REDUCE_SCATTER = {"direct": algorithms.direct_reduce_scatter, "ring": algorithms.ring_reduce_scatter}
Array = NDArray[Any]


@dataclass(frozen=True)
class Posts(MailboxTransport):
    """A rank's side that notes, with each message it sends, how much has been copied to pinned memory by then."""

    log: list[tuple[int, int]] = field(default_factory=list)
    """Elements of each message, and elements that had been copied when it was posted."""
    buffers: list[Array] = field(default_factory=list)

    def send(self, data: Array, to: int, tag: int) -> Any:
        assert np.all(data), "sent before it was copied"
        copied = sum(int(np.count_nonzero(buffer.view(np.float32))) for buffer in self.buffers)
        self.log.append((data.size, copied))
        return super().send(data, to, tag)


def wire_of(transport: MailboxTransport, index: int, members: int, tag: int = 7) -> Wire:
    device = _native.CpuDevice(threads=1)
    tools = Tools(device, Staging(device), LIMITS)
    return Wire(transport, range(members), index, tag, tools, Counters(), "test")


def pinned(memory: DeviceMemory, group: str) -> list[Array]:
    """The arrays of a group's free buffers."""
    return [buffer.array for buffer in memory._free[group]]


@pytest.mark.parametrize("name", REDUCE_SCATTER)
@pytest.mark.parametrize("members", [2, 3])
def test_the_first_block_is_sent_before_the_next_is_copied(
    device: _native.Device, random: np.random.Generator, name: str, members: int
) -> None:
    """One member computes on the GPU, the others on the CPU; all get the bits that ranks on CPUs get."""
    elements = members * 5 * BLOCK - 3
    arrays = [random.standard_normal(elements).astype(np.float32) + 10 for _ in range(members)]
    bounds, call = even_bounds(elements, members), REDUCE_SCATTER[name]
    box, memory = Mailbox(), DeviceMemory(device, "staged", LIMITS)
    memory.reserve({"dp": Pinned(1, 4 * elements)})
    posts = Posts(box, 0, buffers=pinned(memory, "dp"))
    on_gpu = _native.Buffer(device, elements, "fp32", "gradients")
    on_gpu.array[:] = arrays[0]
    wires = [wire_of(MailboxTransport(box, i) if i else posts, i, members) for i in range(members)]
    own = slice(bounds[0], bounds[1])
    running = [
        memory.through_host(
            wires[0], on_gpu.array, lambda host: call(wires[0], host, bounds), WHOLE, (own,), "dp", "parts"
        ),
        *(call(wires[i], arrays[i], bounds) for i in range(1, members)),
    ]
    wanted = [array.copy() for array in arrays]
    waits = drive(running)
    first = posts.log[:5]  # the blocks of the piece that goes first
    assert [copied for _, copied in first] == list(accumulate(size for size, _ in first))
    assert first[0] == (BLOCK, BLOCK), "nothing but the first block was waited for"
    assert waits == 5 * members + 1, "one block after the other, and the result"
    drive([call(wire_of(MailboxTransport(box, i), i, members), wanted[i], bounds) for i in range(members)])
    assert on_gpu.array[own].tobytes() == wanted[0][own].tobytes()
    for i in range(1, members):
        mine = slice(bounds[i], bounds[i + 1])
        assert arrays[i][mine].tobytes() == wanted[i][mine].tobytes()


def drive(running: list[Any]) -> int:
    """Run operations of this process to their end; how often one waited for copies."""
    waiting: dict[int, Any] = {i: [] for i in range(len(running))}
    waits = 0
    while waiting:
        able = [
            i
            for i, requests in waiting.items()
            if isinstance(requests, Copies) or all(request.done for request in requests)
        ]
        assert able, "deadlock"
        for i in able:
            if isinstance(waiting[i], Copies):
                waits += 1
                waiting[i].wait()
            try:
                waiting[i] = next(running[i])
            except StopIteration:
                del waiting[i]
    return waits


def started(progress: Progress, memory: DeviceMemory, array: Array, tag: int, sending: Sending) -> Running:
    """An operation that sends an array to member 1, which receives it at once."""
    wire = wire_of(progress.transport, 0, 2, tag)  # type: ignore[arg-type]

    def steps(host: Array) -> Any:
        yield wire.send(host, 1)

    journal = progress.journal
    operation = memory.through_host(wire, array, steps, WHOLE, (), "dp", sending)
    return progress.start(wire, operation, journal.begin("dp", f"send {tag}"))


def test_a_bucket_is_copied_while_the_one_before_travels(device: _native.Device) -> None:
    """Starting waits for nothing; waiting for the first copies the first alone; looking moves the rest on."""
    box, memory = Mailbox(), DeviceMemory(device, "staged", LIMITS)
    memory.reserve({"dp": Pinned(3, 4 * BLOCK)})
    posts = Posts(box, 0, buffers=pinned(memory, "dp"))
    log, progress = posts.log, Progress(posts, Journal())
    arrays = [_native.Buffer(device, BLOCK, "fp32", "gradients") for _ in range(3)]
    received = [np.zeros(BLOCK, np.float32) for _ in arrays]
    for tag, (buffer, room) in enumerate(zip(arrays, received, strict=True)):
        buffer.array[:] = tag + 1
        MailboxTransport(box, 1).receive(room, 0, tag)
    handles = [started(progress, memory, buffer.array, tag, "whole") for tag, buffer in enumerate(arrays)]
    assert log == []
    handles[0].wait()
    assert log == [(BLOCK, BLOCK)], "the second and third are still on their way"
    progress.poll()
    assert log == [(BLOCK, BLOCK), (BLOCK, 3 * BLOCK), (BLOCK, 3 * BLOCK)], "the look before had them copied"
    assert [room[0] for room in received] == [1, 2, 3]
    assert all(handle.done for handle in handles)


def test_what_must_be_posted_in_order_is_copied_at_once(device: _native.Device) -> None:
    """Messages of one tag between two ranks, and MPI's own collectives."""
    memory = DeviceMemory(device, "staged", LIMITS)
    memory.reserve({"dp": Pinned(1, 4 * BLOCK)})
    posts = Posts(Mailbox(), 0, buffers=pinned(memory, "dp"))
    progress = Progress(posts, Journal())
    buffer = _native.Buffer(device, BLOCK, "fp32", "gradients")
    buffer.array[:] = 1
    started(progress, memory, buffer.array, 0, "now")
    assert posts.log == [(BLOCK, BLOCK)]
