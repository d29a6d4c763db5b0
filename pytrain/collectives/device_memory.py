"""Arrays in a GPU's memory on their way to MPI: through pinned host memory, or as they are.

"staged" is for any MPI: an operation copies what it sends into a pinned buffer, waits on an event, runs on the host's
copy, and copies back what others sent. Sums are added there, by the CPU: the numbers are in its memory already, and
would cross the link to the GPU twice more in every round; the bits are those of ranks on CPUs.

"direct" is for an MPI that knows GPUs: it gets the device's addresses. Sums are added by the device, out of scratch
in its own memory, so that nothing crosses to the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from pytrain.collectives.staging import Staging
from pytrain.collectives.wire import Limits, Steps, Tools
from pytrain.errors import UserError
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain._native import Device, PinnedBuffer

Array = NDArray[Any]
DeviceBuffers = Literal["staged", "direct"]
WHOLE = (slice(None),)
NOTHING: tuple[slice, ...] = ()
MPIX_GPU_SUPPORT_HIP = 2  # of MPICH's mpi_proto.h


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
        self._free: list[PinnedBuffer] = []  # the smallest first

    def holds(self, array: Array) -> bool:
        """Whether an array lies in the device's memory."""
        return self._device.is_device_memory(array)

    def through_host(
        self, array: Array, steps_of: Callable[[Array], Steps], out: Iterable[slice], back: Iterable[slice]
    ) -> Steps:
        """The steps of an operation on a pinned copy of a flat array.

        Args:
            array: belongs to the operation until it ends.
            steps_of: makes the steps that work on the copy.
            out: what is copied before the first message is given to MPI.
            back: what is copied when the last one is complete.
        """
        buffer = self._take(array.nbytes)
        host = buffer.array[: array.nbytes].view(array.dtype)
        self._copy((host[part], array[part]) for part in out)
        result = yield from steps_of(host)
        self._copy((array[part], host[part]) for part in back)
        self._free.append(buffer)
        self._free.sort(key=lambda free: free.bytes)
        return result

    def _copy(self, pairs: Iterable[tuple[Array, Array]]) -> None:
        started = False
        for to, source in pairs:
            if to.size:
                self._device.start_copy(to, source)
                started = True
        if started:
            self._device.finish_copies()

    def _take(self, size: int) -> PinnedBuffer:
        """The smallest free buffer that fits, else a new one in place of the largest."""
        for index, buffer in enumerate(self._free):
            if buffer.bytes >= size:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
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
