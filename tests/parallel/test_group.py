"""The group of one, handles of several operations at a time, and what is kept between operations."""

import subprocess
import sys
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from pytrain import _native
from pytrain.collectives import Counters, Group, Limits, SharedError
from pytrain.collectives.journal import Journal
from pytrain.collectives.progress import Progress
from pytrain.collectives.staging import Staging
from pytrain.collectives.wire import Steps, Tools, Wire
from pytrain.errors import UserError


def test_a_group_of_one_changes_nothing() -> None:
    group = Group()
    array = np.arange(5.0)
    for operation in (group.all_reduce, group.reduce_scatter, group.all_gather, group.broadcast_array):
        operation(array)
    assert group.start_all_reduce(array).test()
    group.start_all_reduce(array).wait()
    assert array.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert group.broadcast("x") == "x"
    assert group.gather("x") == ["x"]
    assert group.on_root(lambda: 7) == 7
    group.barrier()
    group.check_sequence()
    assert group.subgroup("tp", [0]) is group
    for call in (group.send, group.receive):
        with pytest.raises(ValueError, match="a group of one has nobody"):
            call(array, 0)


def test_an_error_of_the_root_is_shared() -> None:
    def refuse() -> None:
        raise UserError("no")

    with pytest.raises(SharedError, match="no"):
        Group().on_root(refuse)


def test_a_group_of_one_never_imports_mpi() -> None:
    code = (
        "import sys, pytrain.collectives, pytrain.launch, pytrain.grid\n"
        "with pytrain.launch.world() as group: group.all_reduce(None)\n"
        "print([name for name in sys.modules if name.startswith('mpi4py')])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_staging_keeps_its_buffers_and_counts_them() -> None:
    staging = Staging(_native.CpuDevice(threads=1))
    first = staging.take(4096)
    second = staging.take(100)
    assert first.buffer.address != second.buffer.address
    staging.give_back(first)
    staging.give_back(second)
    assert staging.take(50) is second  # the smallest that fits
    assert staging.take(200) is first
    held = staging.bytes_peak
    assert held >= 4096 + 100
    staging.give_back(first)
    staging.give_back(second)
    bigger = staging.take(10_000)  # replaces the largest instead of joining it
    staging.give_back(bigger)
    assert len(staging._free) == 2
    numbers = bigger.view(np.dtype(np.uint16), 3)
    numbers[:] = 9
    assert (numbers.dtype, numbers.size) == (np.uint16, 3)
    assert bigger.view(np.dtype(np.float32), 3).dtype == np.float32  # the same size in another type
    assert bigger.view(np.dtype(np.float32), 4).size == 4
    assert np.shares_memory(bigger.view(np.dtype(np.uint16), 3), numbers)


# --- progress, on messages that complete when the test says so -------------------------------------


class Switch:
    """A message."""

    done = False


class Switches:
    """A transport that completes the oldest message when somebody waits, so that waiting always ends."""

    def __init__(self) -> None:
        self.waited: list[list[Switch]] = []

    def send(self, data: Any, to: int, tag: int) -> Switch:
        raise NotImplementedError

    receive = send

    def wait_all(self, requests: list[Switch]) -> None:
        self.waited.append(requests)
        for request in requests:
            request.done = True

    def wait_some(self, requests: list[Switch]) -> None:
        self.waited.append(requests)
        next(request for request in requests if not request.done).done = True

    def test_all(self, requests: list[Switch]) -> bool:
        return all(request.done for request in requests)


def operation(switches: list[Switch], log: list[str], name: str) -> Generator[list[Any], None, str]:
    for number, switch in enumerate(switches):
        yield [switch]
        log.append(f"{name}{number}")
    return name


@pytest.fixture
def wire() -> Wire:
    device = _native.CpuDevice(threads=1)
    return Wire(Switches(), range(1), 0, 0, Tools(device, Staging(device), Limits()), Counters(), "test")


def test_who_waits_for_one_operation_moves_the_others_on(wire: Wire) -> None:
    journal, log = Journal(), list[str]()
    progress = Progress(wire.transport, journal)
    sets = [[Switch(), Switch()] for _ in range(2)]
    first, second = (
        progress.start(wire, operation(switches, log, name), journal.begin("g", name))
        for name, switches in zip("ab", sets, strict=True)
    )
    assert not second.test()
    assert second.wait() == "b"
    assert {"a0", "a1"} & set(log), "only the one that was waited for moved"
    assert second.test()
    assert first.wait() == "a"
    assert sorted(log) == ["a0", "a1", "b0", "b1"]
    assert not journal.waiting


def test_polling_moves_on_what_is_there(wire: Wire) -> None:
    journal, log = Journal(), list[str]()
    progress = Progress(wire.transport, journal)
    switches = [Switch(), Switch()]
    handle = progress.start(wire, operation(switches, log, "a"), journal.begin("g", "a"))
    assert not progress.poll()
    switches[0].done = True
    assert progress.poll()
    assert log == ["a0"]
    switches[1].done = True
    assert handle.test()
    assert wire.counters.waited_seconds == 0.0
    assert wire.counters.hidden_seconds == wire.counters.open_seconds > 0.0


def test_the_thread_finishes_what_nobody_waits_for(wire: Wire) -> None:
    import threading

    journal, log, finished = Journal(), list[str](), threading.Event()
    progress = Progress(wire.transport, journal, threaded=True)

    def steps() -> Steps:
        yield from operation(switches, log, "a")
        finished.set()

    switches = [Switch()]
    progress.start(wire, steps(), journal.begin("g", "a"))
    switches[0].done = True
    assert finished.wait(30), "the thread did not move it on"
    progress.close()


def test_an_error_of_an_operation_reaches_who_waits(wire: Wire) -> None:
    def steps() -> Steps:
        yield [Switch()]
        raise RuntimeError("broken")

    journal = Journal()
    progress = Progress(wire.transport, journal)
    handle = progress.start(wire, steps(), journal.begin("g", "a"))
    with pytest.raises(RuntimeError, match="broken"):
        handle.wait()
    with pytest.raises(RuntimeError, match="broken"):
        handle.test()


# --- what is waited for at once ----------------------------------------------------------------------


def test_an_operation_that_is_waited_for_at_once(wire: Wire) -> None:
    journal, log = Journal(), list[str]()
    progress = Progress(wire.transport, journal)
    switches = [Switch(), Switch()]
    wire.scratch(np.dtype(np.float32), 10)
    handle = progress.run(wire, operation(switches, log, "a"), journal.begin("g", "a"))
    assert (handle.test(), handle.wait(), log) == (True, "a", ["a0", "a1"])
    assert wire.counters.waited_seconds == wire.counters.open_seconds > 0.0
    assert not journal.waiting
    assert len(wire.tools.staging._free) == 1


def test_it_moves_on_what_was_started_before(wire: Wire) -> None:
    journal, log = Journal(), list[str]()
    progress = Progress(wire.transport, journal)
    first = progress.start(wire, operation([Switch()], log, "a"), journal.begin("g", "a"))
    handle = progress.run(wire, operation([Switch()], log, "b"), journal.begin("g", "b"))
    assert handle.wait() == "b"
    assert first.wait() == "a"
    assert sorted(log) == ["a0", "b0"]
    assert not journal.waiting


def test_its_error_is_raised_and_it_is_over(wire: Wire) -> None:
    def steps() -> Steps:
        yield [Switch()]
        raise RuntimeError("broken")

    journal = Journal()
    progress = Progress(wire.transport, journal)
    with pytest.raises(RuntimeError, match="broken"):
        progress.run(wire, steps(), journal.begin("g", "a"))
    assert not journal.waiting
    assert progress.run(wire, operation([Switch()], [], "b"), journal.begin("g", "b")).wait() == "b"
