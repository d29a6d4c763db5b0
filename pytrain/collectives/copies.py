"""Copies between a GPU and pinned host memory that operations wait for, beside messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from pytrain._native import Device, StartedCopies

Array = NDArray[Any]


class Copies(list["StartedCopies"]):
    """Copies between a GPU and the host that an operation waits for, in place of messages."""

    def done(self) -> bool:
        """Whether all have arrived; does not wait."""
        return all(copy.done() for copy in self)

    def wait(self) -> None:
        """Return when all have arrived: nobody else has to do anything for that."""
        for copy in self:
            copy.wait()


class Outgoing:
    """What an operation sends, on its way from the device to the pinned copy.

    Args:
        device: whose queue copies.
        host: the pinned copy, flat.
        array: the device's, of the same type and size.
    """

    def __init__(self, device: Device, host: Array, array: Array) -> None:
        self._device, self._host, self._array = device, host, array
        self._started: list[tuple[int, int, StartedCopies]] = []

    def fetch(self, parts: Iterable[Array]) -> None:
        """Start to copy views of the pinned copy, in this order."""
        for part in parts:
            if part.size:
                first = self._place(part)
                piece = slice(first, first + part.size)
                self._device.start_copy(self._host[piece], self._array[piece])
                self._started.append((piece.start, piece.stop, self._device.record_copies()))

    def all(self) -> Copies:
        """All copies that were started."""
        return Copies(copy for _, _, copy in self._started)

    def missing(self, part: Array) -> Copies:
        """Copies that a view of the pinned copy has to wait for."""
        if not part.size:
            return Copies()
        first = self._place(part)
        last = first + part.size
        return Copies(copy for begin, end, copy in self._started if begin < last and first < end and not copy.done())

    def _place(self, part: Array) -> int:
        """The first element of a view."""
        distance = part.__array_interface__["data"][0] - self._host.__array_interface__["data"][0]
        return int(distance) // self._host.itemsize
