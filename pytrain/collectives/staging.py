"""Buffers that pieces of arrays are received into: kept, so that a step in its stride allocates nothing."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytrain.native import native

if TYPE_CHECKING:
    from pytrain._native import Buffer, Device

WORD = 4  # bytes of the fp32 elements that native buffers are counted in


class Block:
    """A buffer and its bytes as an array, which takes a moment to make."""

    def __init__(self, buffer: "Buffer") -> None:
        self.buffer = buffer
        self.raw: NDArray[np.uint8] = buffer.array.view(np.uint8)
        self._last: NDArray[Any] = self.raw

    def view(self, dtype: np.dtype[Any], elements: int) -> NDArray[Any]:
        """The first `elements` elements as an array of `dtype`."""
        last = self._last
        if last.dtype != dtype or last.size != elements:  # mostly it is what it was in the step before
            last = self._last = self.raw[: elements * dtype.itemsize].view(dtype)
        return last


class Staging:
    """A pool of native buffers of memory kind "staging"; several may be out at a time."""

    def __init__(self, device: "Device") -> None:
        self._device = device
        self._free: list[Block] = []  # the smallest first

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes: the smallest free one that fits, else a new one."""
        for index, block in enumerate(self._free):
            if block.raw.size >= size:
                return self._free.pop(index)
        if self._free:  # all are too small: the new one replaces the largest, and the pool stays as wide as its use
            self._free.pop()
        return Block(native().Buffer(self._device, max(1, -(-size // WORD)), "fp32", "staging"))

    def give_back(self, block: Block) -> None:
        """Make a block free for the next taker."""
        self._free.append(block)
        if len(self._free) > 1:
            self._free.sort(key=lambda free: free.raw.size)

    @property
    def bytes_peak(self) -> int:
        """Most bytes that were held at a time."""
        return self._device.bytes_peak("staging")
