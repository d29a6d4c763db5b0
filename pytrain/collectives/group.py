"""What a rank does together with others, and the group of one, for which all of it is nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from numpy.typing import NDArray

from pytrain.collectives.counters import Counters
from pytrain.collectives.sums import Operation
from pytrain.errors import UserError

if TYPE_CHECKING:
    from pytrain._native import Device
    from pytrain.collectives.device_memory import Pinned
    from pytrain.collectives.turns import Passage

T = TypeVar("T")
Array = NDArray[Any]


class SharedError(UserError):
    """A `UserError` of rank 0 that all ranks raise: rank 0 alone need print it."""


class Handle(Protocol):
    """An operation that was started; its array belongs to it until it is done."""

    def test(self) -> bool:
        """Whether it is done; moves it on if that is possible without waiting."""

    def wait(self) -> Any:
        """Return when it is done."""


class Finished:
    """The handle of what needed no doing."""

    def test(self) -> bool:
        """Yes."""
        return True

    def wait(self) -> None:
        """At once."""


class Group:
    """A group of one: every collective is the identity. `MpiGroup` has many, and the same methods.

    Operations on arrays work in place on C-contiguous arrays of any shape, taken as flat; each has a form
    that `start_`s it and gives a handle. All members call them in the same order with the same sizes, dtypes
    and options. Sums are of float32, float64, or uint16 arrays that hold `half` ("bf16" or "fp16") numbers,
    which are added in fp32 and rounded once (once a level by "two_level"); of other arrays `half` says
    nothing. Every member gets the same bits.

    `bounds` cuts an array into one piece per member: array[bounds[i] : bounds[i + 1]] is that of member i; by
    default nearly equal pieces. `algorithm` overrides the table (see `pytrain.collectives.table`).
    """

    name = "alone"
    rank = 0
    """Which member this process is."""
    size = 1
    ranks: tuple[int, ...] = (0,)
    """Rank in the world of each member."""

    def __init__(self) -> None:
        self.counters = Counters()
        self._label = ""

    @property
    def label(self) -> str:
        """Names this process on lines that come from one rank."""
        return self._label

    @label.setter
    def label(self, text: str) -> None:
        self._label = text

    @property
    def phase(self) -> str:
        """What this process is doing, for the watchdog's report; setting it is a sign of life."""
        return ""

    @phase.setter
    def phase(self, text: str) -> None:
        pass

    @property
    def progress(self) -> str:
        """What moves operations on while this process computes, and why."""
        return "not needed: one rank"

    # --- arrays ------------------------------------------------------------------------------------

    def all_reduce(
        self,
        array: Array,
        half: str | None = None,
        operation: Operation = "sum",
        algorithm: str | None = None,
    ) -> None:
        """array: the sum (or the largest) over members, the same bits on all."""
        self.start_all_reduce(array, half, operation, algorithm).wait()

    def start_all_reduce(
        self,
        array: Array,
        half: str | None = None,
        operation: Operation = "sum",
        algorithm: str | None = None,
        passage: "Passage | None" = None,
    ) -> Handle:
        """As `all_reduce`, without waiting; with `passage`, for the array's turn at its buffer neither."""
        return Finished()

    def reduce_scatter(
        self,
        array: Array,
        bounds: Sequence[int] | None = None,
        half: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        """This member's piece: its sum over members; what the other pieces hold afterwards is undefined."""
        self.start_reduce_scatter(array, bounds, half, algorithm).wait()

    def start_reduce_scatter(
        self,
        array: Array,
        bounds: Sequence[int] | None = None,
        half: str | None = None,
        algorithm: str | None = None,
        passage: "Passage | None" = None,
    ) -> Handle:
        """As `reduce_scatter`, without waiting; with `passage`, for the array's turn at its buffer neither."""
        return Finished()

    def all_gather(self, array: Array, bounds: Sequence[int] | None = None, algorithm: str | None = None) -> None:
        """array: every member's piece as that member has it. Any dtype."""
        self.start_all_gather(array, bounds, algorithm).wait()

    def start_all_gather(
        self, array: Array, bounds: Sequence[int] | None = None, algorithm: str | None = None
    ) -> Handle:
        """As `all_gather`, without waiting."""
        return Finished()

    def broadcast_array(self, array: Array, root: int = 0, algorithm: str | None = None) -> None:
        """array: as member `root` has it. Any dtype."""
        self.start_broadcast_array(array, root, algorithm).wait()

    def start_broadcast_array(self, array: Array, root: int = 0, algorithm: str | None = None) -> Handle:
        """As `broadcast_array`, without waiting."""
        return Finished()

    def send(self, array: Array, to: int, tag: int = 0) -> None:
        """Return when the array may be changed again; member `to` must receive it, with the same tag."""
        self.start_send(array, to, tag).wait()

    def start_send(self, array: Array, to: int, tag: int = 0) -> Handle:
        """As `send`, without waiting."""
        raise ValueError("a group of one has nobody to send to")

    def receive(self, array: Array, source: int, tag: int = 0) -> None:
        """array: what member `source` sends with this tag (0 to 1023), in the order in which it sends."""
        self.start_receive(array, source, tag).wait()

    def start_receive(self, array: Array, source: int, tag: int = 0) -> Handle:
        """As `receive`, without waiting."""
        raise ValueError("a group of one has nobody to receive from")

    # --- objects -----------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Return when all members have come here."""

    def broadcast(self, value: T) -> T:
        """The value that member 0 gave."""
        return value

    def gather(self, value: T) -> list[T]:
        """On member 0 the values of all members, in order; elsewhere an empty list."""
        return [value]

    def on_root(self, call: Callable[[], T]) -> T:
        """What `call` gives on member 0, where alone it is called: for reading files once.

        Raises:
            SharedError: on all members, where it raised a `UserError`.
        """
        outcome: tuple[T | None, str | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (call(), None)
            except UserError as error:
                outcome = (None, str(error))
        value, sentence = self.broadcast(outcome)
        if sentence is not None:
            raise SharedError(sentence)
        return value  # type: ignore[return-value]

    # --- housekeeping ------------------------------------------------------------------------------

    def subgroup(self, name: str, ranks: Sequence[int]) -> "Group":
        """The group of these members, this one of them. All members call it, each with its own group's list;
        the lists of two members are the same or have no member in common.
        """
        return self

    def use_device(self, device: "Device") -> None:
        """Say what all groups of this process compute on: arrays in a GPU's memory take another way to MPI."""

    def reserve_pinned(self, groups: "Mapping[str, Pinned]") -> None:
        """Take the pinned host memory of this process's groups, by name, that staged operations pass through."""

    def poll(self) -> None:
        """Move on what is under way in all groups of this process, without waiting."""

    def check_sequence(self) -> None:
        """Compare what all members have done so far, once a step.

        Raises:
            CollectiveMismatchError: on all members, naming those that differ and their last operations.
        """

    def close(self) -> None:
        """Free what MPI keeps for the group; all members call it. A closed world ends its threads."""
