"""What is in pinned memory travels while the next is copied, and nobody waits for more than the next message needs.

A stream of the shim copies nothing until somebody waits for it or looks (which copies one piece): what has been
copied when a message is posted is what was waited for.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _native
from pytrain.collectives import Settings, algorithms
from pytrain.collectives.copies import Copies
from pytrain.collectives.counters import Counters
from pytrain.collectives.device_memory import STAGED_OPERATIONS, WHOLE, DeviceMemory, Pinned, Sending
from pytrain.collectives.journal import Journal
from pytrain.collectives.process import Process, ProgressChoice
from pytrain.collectives.progress import Progress, Running
from pytrain.collectives.staging import Staging
from pytrain.collectives.wire import Limits, Tools, Wire, even_bounds
from pytrain.wire_format import WireFormat
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


PARTS = 8  # of a layer: more than have pinned buffers at a time


def group_of(box: Mailbox, rank: int, device: _native.Device | None) -> Any:
    """A rank's side of a group of two over a mailbox, with three pinned buffers where it computes on a device."""
    from pytrain.collectives.mpi_group import MpiGroup  # imports mpi4py, which other tests can do without

    cpu, journal = _native.CpuDevice(threads=1), Journal()
    transport = MailboxTransport(box, rank)
    process = Process(
        Settings(limits=LIMITS),
        journal,
        Progress(transport, journal),
        Tools(cpu, Staging(cpu), LIMITS),
        [SimpleNamespace(node=0)] * 2,  # type: ignore[list-item]
        ProgressChoice("test", "a test"),
    )
    communicator: Any = SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: 2)
    group = MpiGroup(process, communicator, "dp", (0, 1))
    group.transport = transport  # type: ignore[assignment]
    if device is not None:
        group.use_device(device)
        group.reserve_pinned({"dp": Pinned(STAGED_OPERATIONS, 4 * SIZE)})
    return group


SIZE = 2500  # elements of a part: too many bytes for one round to everybody


def parts_of(random: np.random.Generator) -> list[Array]:
    return [random.standard_normal(SIZE).astype(np.float32) + 10 for _ in range(PARTS)]


def on(device: _native.Device, arrays: list[Array]) -> list[_native.Buffer]:
    buffers = [_native.Buffer(device, array.size, "fp32", "gradients") for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        buffer.array[:] = array
    return buffers


def tags(box: Mailbox) -> set[int]:
    """Of the operations that have posted a message which was not answered."""
    return {ends[2] for ends, queue in (*box.sends.items(), *box.receives.items()) if queue}


def test_a_layer_in_many_parts_does_not_hold_up_its_rank(device: _native.Device, random: np.random.Generator) -> None:
    """All parts are started while no message arrives; the fourth begins when the first has ended, in its buffer."""
    pytest.importorskip("mpi4py")
    box = Mailbox()
    group, other = group_of(box, 0, device), group_of(box, 1, None)
    mine, theirs = parts_of(random), parts_of(random)
    wanted = [own + others for own, others in zip(mine, theirs, strict=True)]
    buffers = on(device, mine)
    pinned_bytes = device.bytes_peak("staging")
    handles = [group.start_all_reduce(buffer.array) for buffer in buffers]
    for _ in range(100):
        group.poll()
    first = min(tags(box))
    assert tags(box) == {first, first + 1, first + 2}, "three of them have posted their messages"
    assert not any(handle.done for handle in handles)
    for number in range(PARTS):
        assert not handles[number].test()
        answer = other.start_all_reduce(theirs[number])
        for _ in range(100):
            other.poll()
            group.poll()
        assert answer.test()
        assert handles[number].test()
        begun = {first + one for one in range(number + 1, min(number + 4, PARTS))}
        assert tags(box) == begun, f"after part {number}"
    for buffer, shared, exact in zip(buffers, theirs, wanted, strict=True):
        assert shared.tobytes() == buffer.array.tobytes() == exact.tobytes()
    assert device.bytes_peak("staging") == pinned_bytes, "more pinned memory than was reserved"


@pytest.mark.parametrize("trial", range(3))
def test_two_ranks_on_gpus_meet_in_every_order(
    device: _native.Device, random: np.random.Generator, trial: int
) -> None:
    """Each starts parts and looks when it likes: sums, also as bf16, gathers, and arrays of the host between them."""
    pytest.importorskip("mpi4py")
    box = Mailbox()
    groups = [group_of(box, rank, device) for rank in range(2)]
    given = [parts_of(random) for _ in range(2)]
    buffers = [on(device, arrays) for arrays in given]
    formats = [WireFormat(device, "fp32", "bf16", SIZE) for _ in groups]
    kinds = random.choice(["sum", "shard", "gather", "host", "bf16", "bf16"], PARTS)
    handles: list[list[Any]] = [[], []]

    def start(rank: int) -> Any:
        number = len(handles[rank])
        array, kind = buffers[rank][number].array, kinds[number]
        if kind == "host":
            return groups[rank].start_all_reduce(given[rank][number])
        if kind == "bf16":
            return formats[rank].start(
                array,
                slice(0, SIZE),
                lambda halves, passage: groups[rank].start_all_reduce(halves, "bf16", passage=passage),
            )
        call = {"sum": "start_all_reduce", "shard": "start_reduce_scatter", "gather": "start_all_gather"}[kind]
        return getattr(groups[rank], call)(array)

    exact = [given[0][number] + given[1][number] for number in range(PARTS)]
    for _ in range(10_000):
        rank = int(random.random() < 0.7)
        if len(handles[rank]) < PARTS and random.random() < 0.5:
            handles[rank].append(start(rank))
        else:
            groups[rank].poll()
        if all(len(one) == PARTS and all(handle.done for handle in one) for one in handles):
            break
    else:
        pytest.fail(f"trial {trial}: {[[handle.done for handle in one] for one in handles]}")
    half = SIZE // 2
    for number, kind in enumerate(kinds):
        found = [given[rank][number] if kind == "host" else buffers[rank][number].array for rank in range(2)]
        if kind in ("sum", "host"):
            assert all(array.tobytes() == exact[number].tobytes() for array in found), kind
        elif kind == "bf16":
            terms = [given[rank][number].astype(ml_dtypes.bfloat16).astype(np.float32) for rank in range(2)]
            wanted = (terms[0] + terms[1]).astype(ml_dtypes.bfloat16).astype(np.float32)
            assert all(array.tobytes() == wanted.tobytes() for array in found)
        elif kind == "shard":
            assert found[0][:half].tobytes() == exact[number][:half].tobytes()
            assert found[1][half:].tobytes() == exact[number][half:].tobytes()
        else:
            wanted = np.concatenate([given[0][number][:half], given[1][number][half:]])
            assert all(array.tobytes() == wanted.tobytes() for array in found)
    assert box.left_over() == 0
