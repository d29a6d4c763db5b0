"""Groups of several ranks over MPI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from pytrain.collectives import algorithms, mpi_transport
from pytrain.collectives.checking import compare, receive_checked, send_checked
from pytrain.collectives.counters import Counters
from pytrain.collectives.device_memory import (
    NOTHING,
    STAGED_OPERATIONS,
    WHOLE,
    DeviceMemory,
    Pinned,
    Sending,
    outside,
)
from pytrain.collectives.group import Array, Group, Handle
from pytrain.collectives.journal import CollectiveMismatchError, History, Journal, differences
from pytrain.collectives.mpi_transport import MpiTransport
from pytrain.collectives.objects import barrier, broadcast_object, gather_objects
from pytrain.collectives.process import (
    Process,
    ProgressChoice,
    choose_progress,
    crowding,
    share_cores,
    sharing,
    this_place,
)
from pytrain.collectives.progress import Progress
from pytrain.collectives.settings import Settings
from pytrain.collectives.staging import Staging
from pytrain.collectives.sums import Operation
from pytrain.collectives.table import ALGORITHMS, Choice
from pytrain.collectives.turns import Passage, Turns
from pytrain.collectives.wire import Steps, Tools, Wire, even_bounds
from pytrain.native import native

if TYPE_CHECKING:
    from mpi4py import MPI

    from pytrain._native import Device

T = TypeVar("T")

# Tags: those of the callers' messages, then checks and then collectives, each in turn.
CALLER_TAGS, CHECK_TAGS, LAST_TAG = 1024, 2048, 32768  # MPI promises tags up to 32767
ALL_REDUCE = {
    "exchange": algorithms.exchange,
    "direct": algorithms.direct,
    "ring": algorithms.ring,
    "halving_doubling": algorithms.halving_doubling,
    "mpi": mpi_transport.mpi_all_reduce,
}
REDUCE_SCATTER = {
    "direct": algorithms.direct_reduce_scatter,
    "ring": algorithms.ring_reduce_scatter,
    "mpi": mpi_transport.mpi_reduce_scatter,
}
ALL_GATHER = {
    "direct": algorithms.direct_all_gather,
    "ring": algorithms.ring_all_gather,
    "mpi": mpi_transport.mpi_all_gather,
}
BROADCAST = {"tree": algorithms.tree_broadcast, "mpi": mpi_transport.mpi_broadcast}


IN_PARTS = ("direct", "ring")  # sums that say in which order they read an array
MOST_PLANS = 1024  # kept per group: a step in its stride needs far fewer


class _Plan(NamedTuple):
    """How arrays of one type and size are summed."""

    call: Callable[[Wire, Array], Steps]
    half: str | None
    text: str
    """The operation's name in histories and journals."""
    sending: Sending


class MpiGroup(Group):
    """Several ranks. See `Group` for the operations; `world_group` makes the first one.

    Args:
        process: shared with all other groups.
        communicator: of the members, in their order; the group frees it.
        name: for messages and logs.
        ranks: of the members in the world.
    """

    def __init__(self, process: Process, communicator: MPI.Intracomm, name: str, ranks: Sequence[int]) -> None:
        self.process = process
        self.communicator = communicator
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()
        self.counters = Counters()
        self.transport = MpiTransport(communicator, process.spin)
        self._members = range(self.size)
        self._history = History(self.ranks, self.rank)
        self._key = f"{name} ({', '.join(map(str, self.ranks))})"
        self._checks = 0
        self._choices: dict[tuple[str, bool], Choice] = {}
        self._permitted: set[tuple[str, str, str | None]] = set()
        self._each = process.settings.check == "each"
        self._overlap = process.settings.overlap
        self._turns = Turns(STAGED_OPERATIONS)  # of collectives on pinned copies
        self._plans = lru_cache(maxsize=MOST_PLANS)(self._plan)
        process.journal.histories[self._key] = self._history

    @property
    def label(self) -> str:
        """Names this process on lines that come from one rank."""
        return self.process.journal.label

    @label.setter
    def label(self, text: str) -> None:
        self.process.journal.label = text

    @property
    def phase(self) -> str:
        """What this process is doing, for the watchdog's report; setting it is a sign of life."""
        return self.process.journal.phase

    @phase.setter
    def phase(self, text: str) -> None:
        self.process.journal.phase = text

    @property
    def progress(self) -> str:
        """What moves operations on while this process computes, and why."""
        return str(self.process.progress_choice)

    # --- arrays ------------------------------------------------------------------------------------

    def start_all_reduce(
        self,
        array: Array,
        half: str | None = None,
        operation: Operation = "sum",
        algorithm: str | None = None,
        passage: Passage | None = None,
    ) -> Handle:
        return self._all_reduce(array, half, operation, algorithm, not self._overlap, passage)

    def all_reduce(
        self,
        array: Array,
        half: str | None = None,
        operation: Operation = "sum",
        algorithm: str | None = None,
    ) -> None:
        self._all_reduce(array, half, operation, algorithm, wait=True)

    def _all_reduce(
        self,
        array: Array,
        half: str | None,
        operation: Operation,
        algorithm: str | None,
        wait: bool,
        passage: Passage | None = None,
    ) -> Handle:
        flat = _flat(array)
        plan = self._plans(flat.dtype.char, flat.size, half, operation, algorithm)
        wire = self._wire("all_reduce", plan.half, operation)
        wire.passage = passage
        steps = self._steps(wire, flat, partial(plan.call, wire), WHOLE, WHOLE, plan.sending)
        return self._start(wire, steps, flat.nbytes, plan.text, wait)

    def _plan(
        self, dtype: str, elements: int, half: str | None, operation: Operation, algorithm: str | None
    ) -> _Plan:
        """What is the same whenever an array of this type and size is summed."""
        kind = np.dtype(dtype)
        half = _summable(kind, half, operation)
        name = algorithm or self._algorithm("all_reduce", half, elements * kind.itemsize)
        call: Callable[[Wire, Array], Steps]
        if name == "two_level":
            call = partial(algorithms.two_level, nodes=self._nodes())
        else:
            call = ALL_REDUCE[self._allowed(name, "all_reduce", half)]
        return _Plan(
            call, half, f"all_reduce {half or kind} x {elements} {operation} by {name}", _sending(name, sums=True)
        )

    def start_reduce_scatter(
        self,
        array: Array,
        bounds: Sequence[int] | None = None,
        half: str | None = None,
        algorithm: str | None = None,
        passage: Passage | None = None,
    ) -> Handle:
        flat, half = _flat(array), _summable(array.dtype, half, "sum")
        cuts = self._bounds(flat, bounds)
        name = algorithm or self._algorithm("reduce_scatter", half, flat.nbytes)
        wire = self._wire("reduce_scatter", half)
        wire.passage = passage
        call = REDUCE_SCATTER[self._allowed(name, "reduce_scatter", half)]
        own = slice(cuts[self.rank], cuts[self.rank + 1])
        steps = self._steps(
            wire, flat, lambda array: call(wire, array, cuts), WHOLE, (own,), _sending(name, sums=True)
        )
        return self._start_named(wire, steps, flat, f"by {name}")

    def start_all_gather(
        self, array: Array, bounds: Sequence[int] | None = None, algorithm: str | None = None
    ) -> Handle:
        flat = _flat(array)
        cuts = self._bounds(flat, bounds)
        name = algorithm or self._algorithm("all_gather", None, flat.nbytes)
        wire = self._wire("all_gather")
        call = ALL_GATHER[self._allowed(name, "all_gather", None)]
        own = slice(cuts[self.rank], cuts[self.rank + 1])
        back = outside(own, flat.size)
        steps = self._steps(wire, flat, lambda array: call(wire, array, cuts), (own,), back, _sending(name))
        return self._start_named(wire, steps, flat, f"by {name}")

    def start_broadcast_array(self, array: Array, root: int = 0, algorithm: str | None = None) -> Handle:
        flat = _flat(array)
        name = algorithm or self._algorithm("broadcast", None, flat.nbytes)
        wire = self._wire("broadcast")
        call, source = BROADCAST[self._allowed(name, "broadcast", None)], self._member(root)
        out, back = (WHOLE, NOTHING) if self.rank == root else (NOTHING, WHOLE)
        steps = self._steps(wire, flat, lambda array: call(wire, array, source), out, back, _sending(name))
        return self._start_named(wire, steps, flat, f"from {root} by {name}")

    def start_send(self, array: Array, to: int, tag: int = 0) -> Handle:
        flat = _flat(array, write=False)
        wire = self._wire("send", tag=self._caller_tag(tag))
        text = f"send {_name(flat.dtype)} x {flat.size}"
        stream = self._history.sent.setdefault((self._member(to), tag), type(self._history.collective)())
        stream.add(text)
        if self._each:
            header = self._wire("check", tag=tag)
            described = f"{stream.count}: {text}"
            steps = self._steps(
                wire, flat, lambda array: send_checked(header, array, to, described, wire), WHOLE, NOTHING, "now"
            )
        else:
            steps = self._steps(wire, flat, lambda array: _one(lambda: wire.send(array, to)), WHOLE, NOTHING, "now")
        return self._run(wire, steps, flat.nbytes, f"{text} to {self.ranks[to]} tag {tag}")

    def start_receive(self, array: Array, source: int, tag: int = 0) -> Handle:
        flat = _flat(array)
        wire = self._wire("receive", tag=self._caller_tag(tag))
        text = f"send {_name(flat.dtype)} x {flat.size}"  # both ends hash the same words
        stream = self._history.received.setdefault((self._member(source), tag), type(self._history.collective)())
        stream.add(text)
        if self._each:
            header = self._wire("check", tag=tag)
            described, rank = f"{stream.count}: {text}", self.ranks[source]
            steps = self._steps(
                wire,
                flat,
                lambda array: receive_checked(header, array, source, described, wire, self._key, rank),
                NOTHING,
                WHOLE,
                "now",
            )
        else:
            steps = self._steps(
                wire, flat, lambda array: _one(lambda: wire.receive(array, source)), NOTHING, WHOLE, "now"
            )
        shown = f"receive {_name(flat.dtype)} x {flat.size} from {self.ranks[source]} tag {tag}"
        return self._run(wire, steps, flat.nbytes, shown)

    # --- objects -----------------------------------------------------------------------------------

    def barrier(self) -> None:
        wire = self._wire("barrier")
        self._start(wire, barrier(wire), 0, "barrier", wait=True)

    def broadcast(self, value: T) -> T:
        wire = self._wire("broadcast")
        result: T = self._start(wire, broadcast_object(wire, value), 0, "broadcast object", wait=True).wait()
        return result

    def gather(self, value: T) -> list[T]:
        wire = self._wire("gather")
        result: list[T] = self._start(wire, gather_objects(wire, value), 0, "gather objects", wait=True).wait()
        return result

    # --- housekeeping ------------------------------------------------------------------------------

    def subgroup(self, name: str, ranks: Sequence[int]) -> Group:
        members = list(ranks)
        split = self.communicator.Split(min(members), members.index(self.rank))
        communicator = type(self.communicator)(split)  # Split forgets what class it was
        if len(members) == 1:
            communicator.Free()
            return Group()
        return MpiGroup(self.process, communicator, name, [self.ranks[member] for member in members])

    def use_device(self, device: Device) -> None:
        settings = self.process.settings
        self.process.device_memory = (
            None if device.name == "cpu" else DeviceMemory(device, settings.device_buffers, settings.limits)
        )

    def reserve_pinned(self, groups: Mapping[str, Pinned]) -> None:
        if self.process.device_memory is not None:
            self.process.device_memory.reserve(groups)

    def poll(self) -> None:
        self.process.progress.poll()

    def check_sequence(self) -> None:
        found = self._internal(gather_objects, self._history)
        told = differences(self._key, dict(enumerate(found))) if found else []
        told = self._internal(broadcast_object, told)
        if told:
            raise CollectiveMismatchError("; ".join(told))

    def close(self) -> None:
        del self.process.journal.histories[self._key]
        self.communicator.Free()

    # --- inside ------------------------------------------------------------------------------------

    def _nodes(self) -> list[int]:
        return [self.process.places[rank].node for rank in self.ranks]

    def _member(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise ValueError(f"group {self._key} has no member {index}")
        return index

    def _caller_tag(self, tag: int) -> int:
        if not 0 <= tag < CALLER_TAGS:
            raise ValueError(f"the tag of a message must be 0 to {CALLER_TAGS - 1}, not {tag}")
        return tag

    def _bounds(self, flat: Array, bounds: Sequence[int] | None) -> Sequence[int]:
        if bounds is None:
            return even_bounds(flat.size, self.size)
        cuts = [int(bound) for bound in bounds]
        if len(cuts) != self.size + 1 or cuts != sorted(cuts) or (cuts[0], cuts[-1]) != (0, flat.size):
            raise ValueError(
                f"group {self._key}: bounds must be {self.size + 1} rising numbers from 0 to {flat.size}, not {cuts}"
            )
        return cuts

    def _algorithm(self, kind: str, half: str | None, size: int) -> str:
        """What the table says."""
        key = (kind, half is not None)
        choice = self._choices.get(key)
        if choice is None:
            settings, nodes = self.process.settings, len(set(self._nodes()))
            choice = settings.table.choice(kind, self.size, nodes, key[1], settings.eligible)
            self._choices[key] = choice
        return choice.of(size)

    def _allowed(self, name: str, kind: str, half: str | None) -> str:
        """The name, if the settings allow what a caller asked for."""
        if (name, kind, half) in self._permitted:
            return name
        settings = self.process.settings
        if name not in ALGORITHMS[kind]:
            raise ValueError(f"{kind} has no algorithm {name!r}: there are {', '.join(ALGORITHMS[kind])}")
        if not settings.eligible.allows(name, kind, 2, half is not None):
            raise ValueError(
                f"{kind} by {name!r} of {half or 'full'} numbers is not allowed: it needs own = false, "
                "deterministic = false for sums, and numbers that are not 16-bit"
            )
        self._permitted.add((name, kind, half))
        return name

    def _wire(self, kind: str, half: str | None = None, operation: Operation = "sum", tag: int | None = None) -> Wire:
        if tag is None:
            tag = CHECK_TAGS + self._history.collective.count % (LAST_TAG - CHECK_TAGS)
        tools = self.process.tools
        return Wire(self.transport, self._members, self.rank, tag, tools, self.counters, kind, half, operation)

    def _steps(
        self,
        wire: Wire,
        flat: Array,
        steps_of: Callable[[Array], Steps],
        out: Sequence[slice],
        back: Sequence[slice],
        sending: Sending,
    ) -> Steps:
        """The steps of an operation on an array; see `DeviceMemory` for one in a GPU's memory."""
        memory, wire.in_order = self.process.device_memory, sending == "now"
        if memory is None or not memory.holds(flat):
            return steps_of(flat)
        if memory.staged:
            wire.staged = True
            return memory.through_host(wire, flat, steps_of, out, back, self.name, sending)
        wire.tools = memory.tools
        return steps_of(flat)

    def _start_named(self, wire: Wire, steps: Steps, flat: Array, detail: str) -> Handle:
        text = f"{wire.kind} {wire.half or _name(flat.dtype)} x {flat.size} {detail}"
        return self._start(wire, steps, flat.nbytes, text, wait=not self._overlap)

    def _start(self, wire: Wire, steps: Steps, size: int, text: str, wait: bool) -> Handle:
        """Begin a collective: note it in the history that all members must share."""
        collective = self._history.collective
        collective.add(text)
        if self._each:
            header = self._wire("check", tag=wire.tag)
            steps = compare(header, self._key, self.ranks, f"{collective.count}: {text}", steps)
        if wire.staged:
            wire.turn = self._turns.take()
        passage = wire.passage
        if passage is not None:
            steps = passage.around(steps)
        if wire.in_order:
            for turn in (wire.turn, passage.turn if passage else None):
                self.process.progress.until(turn, self.counters)
        return self._run(wire, steps, size, text, wait)

    def _run(self, wire: Wire, steps: Steps, size: int, text: str, wait: bool = False) -> Handle:
        process = self.process
        self.counters.started(wire.kind, size)
        entry = process.journal.begin(self._key, text)
        if wait:
            return process.progress.run(wire, steps, entry)
        return process.progress.start(wire, steps, entry)

    def _internal(self, operation: Any, value: Any) -> Any:
        """An operation that is no part of the history: it compares histories."""
        tag = CALLER_TAGS + self._checks % (CHECK_TAGS - CALLER_TAGS)
        self._checks += 1
        wire = self._wire("check", tag=tag)
        return self._run(wire, operation(wire, value), 0, "compare histories", wait=True).wait()


def world_group(settings: Settings, communicator: MPI.Intracomm, nodes: Sequence[int] | None = None) -> MpiGroup:
    """The group of all ranks of a communicator; all of them call it.

    Args:
        settings: the same on all ranks.
        communicator: duplicated, so that nobody else's messages meet ours.
        nodes: number of each rank's node; None: as MPI knows it.
    """
    own = communicator.Dup()
    journal = Journal()
    device = native().CpuDevice(threads=1)
    tools = Tools(device, Staging(device), settings.limits)
    progress = Progress(MpiTransport(own, spin=False), journal)
    process = Process(settings, journal, progress, tools, [], ProgressChoice("test", "until all places are known"))
    journal.label = f"rank {own.Get_rank()} of {own.Get_size()}"
    first = MpiGroup(process, own, "world", range(own.Get_size()))
    node = mpi_transport.node_of(own) if nodes is None else nodes[first.rank]
    found = this_place(node)
    places = share_cores(first.broadcast(first.gather(found)))
    process.places += places
    process.sharing = sharing(found, places[first.rank])
    if process.sharing is not None:
        native().kernels.set_default_threads(places[first.rank].threads)
    process.spin = settings.spin if settings.spin is not None else crowding(places, node) is None
    first.transport.spin = progress.transport.spin = process.spin  # type: ignore[attr-defined]
    process.progress_choice = choose_progress(settings.progress, places, first.rank)
    if process.progress_choice.mode == "thread":
        progress.start_thread()
    return first


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype)  # which takes NumPy longer than the rest of starting an operation


def _sending(name: str, sums: bool = False) -> Sending:
    """How an array leaves a GPU for an algorithm: MPI's own must start in one order on all ranks."""
    if name == "mpi":
        return "now"
    return "parts" if sums and name in IN_PARTS else "whole"


def _one(post: Callable[[], list[Any]]) -> Steps:
    yield post()


def _flat(array: Array, write: bool = True) -> Array:
    """The array as one dimension, in place."""
    flags = array.flags
    if not flags.c_contiguous or (write and not flags.writeable):
        raise ValueError("collectives work on C-contiguous arrays that may be written to")
    return array if array.ndim == 1 else array.reshape(-1)


def _summable(dtype: np.dtype[Any], half: str | None, operation: Operation) -> str | None:
    """What the numbers of an array that is to be added are if they have 16 bits."""
    kind = _name(dtype)
    if kind == "uint16":
        if half not in ("bf16", "fp16") or operation != "sum":
            raise ValueError("uint16 arrays are summed as half = 'bf16' or 'fp16' numbers, and only summed")
        return half
    if kind not in ("float32", "float64"):
        raise ValueError(f"sums are of float32, float64, bf16 and fp16 arrays, not of {kind}")
    return None
