"""Arrays in a GPU's memory on their way to MPI: through pinned host memory, or as they are.

"staged" is for any MPI: an operation copies what it sends into a pinned buffer, runs on the host's copy, and copies
back what others sent. The copies run on the communication queue, and are steps of the operation like its messages:
whoever starts it may compute meanwhile, and where the algorithm sends blocks, the first is on the wire while the next
are copied. Sums are added there, by the CPU: the numbers are in its memory already, and would cross the link to the
GPU twice more in every round; the bits are those of ranks on CPUs.

"direct" is for an MPI that knows GPUs: it gets the device's addresses. Sums are added by the device, out of scratch
in its own memory, so that nothing crosses to the host.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from numpy.typing import NDArray

from pytrain.collectives.copies import Copies, Outgoing
from pytrain.collectives.staging import Staging
from pytrain.collectives.wire import Limits, Steps, Tools, Wire
from pytrain.errors import UserError
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain._native import Device, PinnedBuffer

Array = NDArray[Any]
DeviceBuffers = Literal["staged", "direct"]
Sending = Literal["parts", "whole", "now"]
"""How an operation's array leaves the GPU: in the parts and the order that its algorithm asks for (`Wire.fetch`);
whole, before its first message; or at once, before whoever starts it goes on, where messages must be posted in the
order in which they were started."""
STAGED_OPERATIONS = 3
"""Operations of one group, at most, whose arrays are in pinned memory at a time; of messages between two ranks there
are as many as the program has under way. More may be started: they wait for their turn (see `turns`)."""
WHOLE = (slice(None),)
NOTHING: tuple[slice, ...] = ()
MPIX_GPU_SUPPORT_HIP = 2  # of MPICH's mpi_proto.h


class Pinned(NamedTuple):
    """Pinned buffers of one group, all of one size: any of its operations fits in any of them."""

    buffers: int
    bytes: int


class DeviceMemory:
    """How the groups of a process communicate arrays of one device.

    Args:
        device: whose.
        how: see above.
        limits: of messages.
    """

    def __init__(self, device: Device, how: DeviceBuffers, limits: Limits) -> None:
        self._device = device
        self.staged = how == "staged"
        self.tools = Tools(device, Staging(device), limits, sums_on_device=True)
        """Of operations that MPI is given the device's addresses for."""
        self._free: defaultdict[str, list[PinnedBuffer]] = defaultdict(list)  # by group, the smallest first

    def reserve(self, groups: Mapping[str, Pinned]) -> None:
        """Take the pinned buffers of groups, by name, before the first step; others take theirs as they go."""
        if self.staged:
            for group, (count, size) in groups.items():
                self._free[group] = [native().PinnedBuffer(self._device, size) for _ in range(count)]

    def holds(self, array: Array) -> bool:
        """Whether an array lies in the device's memory."""
        return self._device.is_device_memory(array)

    def through_host(
        self,
        wire: Wire,
        array: Array,
        steps_of: Callable[[Array], Steps],
        out: Iterable[slice],
        back: Iterable[slice],
        group: str,
        sending: Sending = "whole",
    ) -> Steps:
        """The steps of an operation on a pinned copy of a flat array.

        Args:
            wire: the operation.
            array: belongs to the operation until it ends.
            steps_of: makes the steps that work on the copy.
            out: what the operation sends or adds to.
            back: what is copied when the last message is complete.
            group: whose buffers are taken.
            sending: how `out` is copied.
        """
        if wire.turn is not None and not wire.turn.done():
            yield wire.turn
        buffer = self._take(group, array.nbytes)
        host = buffer.array[: array.nbytes].view(array.dtype)
        outgoing = Outgoing(self._device, host, array)
        if sending == "parts":
            wire.outgoing = outgoing
        else:
            outgoing.fetch(host[part] for part in out)
            copies = outgoing.all()
            if copies and sending == "whole":
                yield copies
            copies.wait()
        result = yield from steps_of(host)
        if any(host[part].size for part in back):
            for part in back:
                self._device.start_copy(array[part], host[part])
            yield Copies([self._device.record_copies()])
        free = self._free[group]
        free.append(buffer)
        free.sort(key=lambda one: one.bytes)
        return result

    def _take(self, group: str, size: int) -> PinnedBuffer:
        """The smallest free buffer that fits, else a new one in place of the largest."""
        free = self._free[group]
        for index, buffer in enumerate(free):
            if buffer.bytes >= size:
                return free.pop(index)
        if free:
            free.pop()
        taken: PinnedBuffer = native().PinnedBuffer(self._device, size)
        return taken


def outside(piece: slice, elements: int) -> tuple[slice, slice]:
    """What lies before and behind a piece of so many elements."""
    return slice(0, piece.start), slice(piece.stop, elements)


def knows_gpus(library: ctypes.CDLL) -> bool:
    """Whether an MPI library, which has been started, says that it takes addresses of AMD GPUs."""
    if hasattr(library, "MPIX_GPU_query_support"):  # MPICH and those made of it
        answer = ctypes.c_int(0)
        status = library.MPIX_GPU_query_support(ctypes.c_int(MPIX_GPU_SUPPORT_HIP), ctypes.byref(answer))
        return int(status) == 0 and answer.value != 0
    if hasattr(library, "MPIX_Query_rocm_support"):  # Open MPI from 5.0 on
        return int(library.MPIX_Query_rocm_support()) != 0
    return False


def refuse_unless_gpu_aware(path: str) -> None:
    """Refuse `collectives.device_buffers = "direct"` where MPI would read GPU addresses as its own.

    Args:
        path: of the MPI library that is loaded.

    Raises:
        UserError: it does not say that it takes them.
    """
    try:
        aware = knows_gpus(ctypes.CDLL(path))
    except OSError:
        aware = False
    if not aware:
        raise UserError(
            f'collectives.device_buffers = "direct" needs an MPI that takes addresses of AMD GPUs, and {path} does '
            'not say that it does (Cray MPICH: MPICH_GPU_SUPPORT_ENABLED=1); use "staged"'
        )
