"""Gradients that travel in another format than they are stored in: half the bytes for fp32 gradients in bf16."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pytrain.buckets import largest_part
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Handle

WIRE_BUFFERS = 2  # parts of buckets of one stage that travel at a time


def wire_elements(layout: _native.Layout, shards: int, limit: int) -> int:
    """Elements of each buffer that parts, of at most `limit` elements, of this stage's buckets travel in."""
    return largest_part(layout, shards, limit)


class _Converted:
    """The handle of a reduction in another format: `wait` brings the sum back."""

    def __init__(self, format: WireFormat, whole: NDArray[Any], part: slice, buffer: _native.Buffer) -> None:
        self._format, self._whole, self._part, self._buffer = format, whole, part, buffer
        self.inner: Handle
        self._done = False

    def test(self) -> bool:
        return self._done or self.inner.test()

    def wait(self) -> None:
        if self._done:
            return
        self.inner.wait()
        self._format.convert(self._whole[self._part], self._buffer.array[self._part])
        self._format.give_back(self, self._buffer)
        self._done = True


class WireFormat:
    """How the gradients of one stage travel.

    Args:
        device: where they lie.
        stored, wire: their formats; at most one 16-bit type between them.
        elements: of the largest part of a bucket, padding included.
    """

    def __init__(self, device: _native.Device, stored: str, wire: str, elements: int) -> None:
        self._device = device
        self.half = next((dtype for dtype in (wire, stored) if dtype != "fp32"), "bf16")
        count = 0 if stored == wire else WIRE_BUFFERS
        self._free = [native().Buffer(device, elements, wire, "staging") for _ in range(count)]
        self._busy: deque[_Converted] = deque()
        self._as_stored = count == 0

    def start(self, whole: NDArray[Any], part: slice, reduction: Callable[[NDArray[Any]], Handle]) -> Handle:
        """Start a reduction of `whole`, after which this rank wants `part` of it."""
        if self._as_stored:
            return reduction(whole)
        if not self._free:
            self._busy[0].wait()
        buffer = self._free.pop()
        travelling = buffer.array[: whole.size]
        self.convert(travelling, whole)
        handle = _Converted(self, whole, part, buffer)
        self._busy.append(handle)
        handle.inner = reduction(travelling)
        return handle

    def convert(self, destination: NDArray[Any], source: NDArray[Any]) -> None:
        """Round or widen."""
        self._device.convert(destination, source, self.half)

    def give_back(self, handle: _Converted, buffer: _native.Buffer) -> None:
        """The reduction is done with its buffer."""
        self._busy.remove(handle)
        self._free.append(buffer)
