"""Gradients that travel in another format than they are stored in: half the bytes for fp32 gradients in bf16."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pytrain.buckets import largest_part
from pytrain.collectives.turns import Passage, Turns
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Handle

WIRE_BUFFERS = 2  # parts of buckets of one stage that travel at a time


def wire_elements(layout: _native.Layout, shards: int, limit: int) -> int:
    """Elements of each buffer that parts, of at most `limit` elements, of this stage's buckets travel in."""
    return largest_part(layout, shards, limit)


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
        self._buffers = cycle([native().Buffer(device, elements, wire, "staging") for _ in range(count)])
        self._turns = Turns(WIRE_BUFFERS)
        self._as_stored = count == 0

    def start(
        self,
        whole: NDArray[Any],
        part: slice,
        reduction: Callable[[NDArray[Any], Passage | None], Handle],
    ) -> Handle:
        """Start a reduction of `whole`, after which this rank wants `part` of it; waits for nothing.

        The operation waits for its buffer, and `whole` belongs to it until it has ended. It is rounded and widened
        by the thread that starts operations, when that looks at them or waits, as kernels of many threads do it.
        """
        if self._as_stored:
            return reduction(whole, None)
        travelling = next(self._buffers).array[: whole.size]
        passage = Passage(
            self._turns.take(),
            lambda: self._convert(travelling, whole),
            lambda: self._convert(whole[part], travelling[part]),
        )
        return reduction(travelling, passage)

    def _convert(self, destination: NDArray[Any], source: NDArray[Any]) -> None:
        """Round or widen."""
        self._device.convert(destination, source, self.half)
