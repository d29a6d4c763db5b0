"""Operations that share a few buffers: starting never waits, turns come in order, and no order of events hangs."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pytrain import _native
from pytrain.collectives import Counters, Limits, algorithms
from pytrain.collectives.journal import Journal
from pytrain.collectives.progress import Progress, Running
from pytrain.collectives.staging import Staging
from pytrain.collectives.turns import Passage, Turns
from pytrain.collectives.wire import Array, Steps, Tools, Wire, even_bounds
from pytrain.wire_format import WIRE_BUFFERS, WireFormat
from tests.parallel.mailbox import Mailbox, MailboxTransport
from tests.parallel.test_group import Switch, Switches

PARTS, BUFFERS, ELEMENTS = 8, 3, 50
Call = Callable[[Wire, Array], Steps]


def test_a_turn_comes_when_the_one_that_many_before_has_ended() -> None:
    turns = Turns(2)
    first, second, third, fourth = (turns.take() for _ in range(4))
    assert [turn.done() for turn in (first, second, third, fourth)] == [True, True, False, False]
    second.end()
    assert [turn.done() for turn in (third, fourth)] == [False, True]  # each buffer has its own succession
    first.end()
    assert third.done()


@dataclass
class Member:
    """One rank of this process, whose operations share buffers."""

    transport: Any
    size: int
    turns: Turns = field(default_factory=lambda: Turns(BUFFERS))
    log: list[str] = field(default_factory=list)
    handles: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = _native.CpuDevice(threads=1)
        self.tools = Tools(device, Staging(device), Limits(block_bytes=64))
        self.progress = Progress(self.transport, Journal())
        self.format = WireFormat(device, "fp32", "bf16", ELEMENTS)

    def start(self, array: Array, call: Call, passage: Passage | None = None) -> Running:
        """The next operation, of which the log tells when it got a buffer and when it ended."""
        number, rank = len(self.handles), getattr(self.transport, "rank", 0)
        half = "bf16" if array.dtype == np.uint16 else None
        wire = Wire(self.transport, range(self.size), rank, number, self.tools, Counters(), "test", half)
        wire.turn = self.turns.take()

        def steps() -> Steps:
            if not wire.turn.done():  # type: ignore[union-attr]
                yield wire.turn  # type: ignore[misc]
            self.log.append(f"+{number}")
            yield from call(wire, array)
            self.log.append(f"-{number}")

        whole = steps() if passage is None else passage.around(steps())
        journal = self.progress.journal
        self.handles.append(self.progress.start(wire, whole, journal.begin("dp", str(number))))
        return self.handles[-1]

    def start_as_bf16(self, array: Array) -> None:
        """The next operation, a sum through the buffers of another format."""
        self.format.start(
            array, slice(0, array.size), lambda halves, passage: self.start(halves, algorithms.direct, passage)
        )

    def most_at_a_time(self) -> int:
        """Operations that had a buffer at the same time."""
        return int(np.cumsum([1 if event[0] == "+" else -1 for event in self.log]).max())


def begun(log: Iterable[str]) -> list[int]:
    return [int(event[1:]) for event in log if event[0] == "+"]


def test_starting_waits_for_nothing() -> None:
    """All parts of a layer are started while no message arrives; then each goes on as the one before it ends."""
    switches = [Switch() for _ in range(PARTS)]
    member = Member(Switches(), 1)
    for switch in switches:
        member.start(np.zeros(1), lambda wire, array, switch=switch: (yield [switch]))  # type: ignore[misc]
    assert member.log == ["+0", "+1", "+2"]
    assert member.transport.waited == [], "starting waited for a message"
    assert not any(switch.done for switch in switches)
    switches[1].done = True
    member.progress.poll()
    assert member.log == ["+0", "+1", "+2", "-1", "+4"]
    switches[0].done = True
    member.progress.poll()
    assert member.log[5:] == ["-0", "+3"]
    assert not member.handles[5].test()


@pytest.mark.parametrize("waited", [0, 3, PARTS - 1])
def test_who_waits_for_one_of_them_gets_it(waited: int) -> None:
    member = Member(Switches(), 1)
    for _ in range(PARTS):
        switch = Switch()
        member.start(np.zeros(1), lambda wire, array, switch=switch: (yield [switch]))  # type: ignore[misc]
    member.handles[waited].wait()
    assert f"-{waited}" in member.log
    assert member.most_at_a_time() == BUFFERS
    for handle in member.handles:
        handle.wait()
    assert begun(member.log) == list(range(PARTS))


def test_a_turn_is_waited_for_by_who_must_post_in_order() -> None:
    member = Member(Switches(), 1)
    for _ in range(BUFFERS + 1):
        switch = Switch()
        member.start(np.zeros(1), lambda wire, array, switch=switch: (yield [switch]))  # type: ignore[misc]
    turn, counters = member.turns.take(), Counters()
    member.progress.until(turn, counters)
    assert turn.done()
    assert "-1" in member.log
    assert "-3" not in member.log, "it waited for more than its turn"
    assert counters.waited_seconds > 0.0


def test_an_operation_that_fails_gives_its_turn_up() -> None:
    def broken(wire: Wire, array: Array) -> Steps:
        yield [failing]
        raise RuntimeError("broken")

    failing, member = Switch(), Member(Switches(), 1)
    member.start(np.zeros(1), broken)
    for _ in range(BUFFERS):
        switch = Switch()
        member.start(np.zeros(1), lambda wire, array, switch=switch: (yield [switch]))  # type: ignore[misc]
    failing.done = True
    member.progress.poll()
    assert begun(member.log) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="broken"):
        member.handles[0].wait()


def test_a_part_is_rounded_when_its_buffer_is_free(random: np.random.Generator) -> None:
    """Starting eight parts waits for no message; two are rounded, and each further one when the one two before it
    has been widened back. Only what the rank asked for is brought back.
    """
    format = WireFormat(_native.CpuDevice(threads=1), "fp32", "bf16", ELEMENTS)
    progress, handles = Progress(Switches(), Journal()), []
    switches, travelled = [Switch() for _ in range(PARTS)], list[Array]()
    arrays = [random.standard_normal(ELEMENTS).astype(np.float32) for _ in range(PARTS)]
    given, own = [array.copy() for array in arrays], slice(10, 30)
    for array, switch in zip(arrays, switches, strict=True):

        def sum_of(halves: Array, passage: Passage | None, switch: Switch = switch) -> Running:
            wire = Wire(progress.transport, range(1), 0, 0, Member(Switches(), 1).tools, Counters(), "test")

            def steps() -> Steps:
                travelled.append(halves.copy())
                yield [switch]
                halves[:] = (halves.view(ml_dtypes.bfloat16) * 2).view(np.uint16)

            assert passage is not None
            return progress.start(wire, passage.around(steps()), progress.journal.begin("dp", "sum"))

        handles.append(format.start(array, own, sum_of))
    assert len(travelled) == WIRE_BUFFERS
    assert progress.transport.waited == []  # type: ignore[attr-defined]
    for number, switch in enumerate(switches):
        assert not handles[number].test()
        switch.done = True
        assert handles[number].test()
        assert len(travelled) == min(number + 1 + WIRE_BUFFERS, PARTS)
        rounded = given[number].astype(ml_dtypes.bfloat16)
        assert travelled[number].tobytes() == rounded.tobytes()
        assert arrays[number][own].tobytes() == (rounded * 2).astype(np.float32)[own].tobytes()
        assert arrays[number][: own.start].tobytes() == given[number][: own.start].tobytes()


def test_a_thread_leaves_to_its_caller_what_many_threads_do() -> None:
    """The thread moves messages on; rounding and widening wait until the caller looks."""
    done = list[int]()
    switch, turns, member = Switch(), Turns(1), Member(Switches(), 1)
    occupied = turns.take()
    passage = Passage(
        turns.take(), lambda: done.append(threading.get_ident()), lambda: done.append(threading.get_ident())
    )
    handle = member.start(np.zeros(1), lambda wire, array: (yield [switch]), passage)
    occupied.end()

    def look() -> None:
        thread = threading.Thread(target=member.progress.poll)
        thread.start()
        thread.join()

    look()
    assert (done, member.log) == ([], [])
    member.progress.poll()
    assert (done, member.log) == ([threading.get_ident()], ["+0"])
    switch.done = True
    look()
    assert (len(done), member.log, handle.done) == (1, ["+0", "-0"], False), "the message was for the thread"
    member.start(np.zeros(1), lambda wire, array: (yield [Switch()]))
    handle.wait()
    assert member.transport.waited == [], "it waited for another's message, and had all of its own"
    assert done == [threading.get_ident()] * 2
    assert turns.take().done()


CALLS: dict[str, Call] = {
    "direct": algorithms.direct,
    "ring": algorithms.ring,
    "gather": lambda wire, array: algorithms.direct_all_gather(wire, array, even_bounds(array.size, wire.size)),
}


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("trial", range(5))
def test_no_order_of_events_hangs(members: int, trial: int, random: np.random.Generator) -> None:
    """Members start operations and look at them when they like, some far ahead of others: all end with the same
    bits, and no member has more under way than it has buffers.
    """
    box = Mailbox()
    ranks = [Member(MailboxTransport(box, rank), members) for rank in range(members)]
    names = random.choice([*CALLS, "bf16", "bf16"], PARTS)
    given = [[random.standard_normal(ELEMENTS).astype(np.float32) for _ in range(PARTS)] for _ in ranks]
    arrays = [[array.copy() for array in of_rank] for of_rank in given]
    weights = random.random(members) + 0.05  # who is fast
    for _ in range(10_000):
        rank = int(random.choice(members, p=weights / weights.sum()))
        member, number = ranks[rank], len(ranks[rank].handles)
        if number < PARTS and random.random() < 0.5:
            if names[number] == "bf16":
                member.start_as_bf16(arrays[rank][number])
            else:
                member.start(arrays[rank][number], CALLS[names[number]])
        else:
            member.progress.poll()
        if all(len(one.handles) == PARTS and all(handle.done for handle in one.handles) for one in ranks):
            break
    else:
        pytest.fail(f"trial {trial}: some have not ended: {[one.log for one in ranks]}")
    assert box.left_over() == 0
    for member in ranks:
        assert member.most_at_a_time() <= BUFFERS
    for number, name in enumerate(names):
        if name == "gather":
            bounds = even_bounds(ELEMENTS, members)
            wanted = np.concatenate([given[r][number][bounds[r] : bounds[r + 1]] for r in range(members)])
            assert all(of_rank[number].tobytes() == wanted.tobytes() for of_rank in arrays)
            continue
        if name == "bf16":
            rounded = [of_rank[number].astype(ml_dtypes.bfloat16).astype(np.float32) for of_rank in given]
            wanted = np.add.accumulate(rounded)[-1].astype(ml_dtypes.bfloat16).astype(np.float32)
            assert all(of_rank[number].tobytes() == wanted.tobytes() for of_rank in arrays)
            continue
        exact = np.sum([np.float64(of_rank[number]) for of_rank in given], axis=0)
        assert len({of_rank[number].tobytes() for of_rank in arrays}) == 1
        np.testing.assert_allclose(arrays[0][number], exact, rtol=0, atol=2e-6)
