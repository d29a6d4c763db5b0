"""Buffers that pieces of arrays are received into: kept, so that a step in its stride allocates nothing."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytrain.native import native

if TYPE_CHECKING:
    from pytrain._native import Buffer, CpuDevice

WORD = 4  # bytes of the fp32 elements that native buffers are counted in


class Staging:
    """A pool of native buffers of memory kind "staging"; several may be out at a time."""

    def __init__(self, device: "CpuDevice") -> None:
        self._device = device
        self._free: list[Buffer] = []

    def take(self, size: int) -> "Buffer":
        """A buffer of at least `size` bytes: the smallest free one that fits, else a new one."""
        fitting = [buffer for buffer in self._free if buffer.elements * WORD >= size]
        if fitting:
            found = min(fitting, key=lambda buffer: buffer.elements)
            self._free.remove(found)
            return found
        if self._free:  # it was too small: the new one replaces it, so that the pool stays as wide as its use
            self._free.remove(max(self._free, key=lambda buffer: buffer.elements))
        made: Buffer = native().Buffer(self._device, max(1, -(-size // WORD)), "fp32", "staging")
        return made

    def give_back(self, buffer: "Buffer") -> None:
        """Make a buffer free for the next taker."""
        self._free.append(buffer)

    @property
    def bytes_peak(self) -> int:
        """Most bytes that were held at a time."""
        return self._device.bytes_peak("staging")


def view(buffer: "Buffer", dtype: np.dtype[Any], elements: int) -> NDArray[Any]:
    """The first `elements` elements of a buffer as an array of `dtype`."""
    raw: NDArray[Any] = buffer.array.view(np.uint8)[: elements * dtype.itemsize]
    return raw.view(dtype)
