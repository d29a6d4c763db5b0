"""What a rank does together with others. In this version a group has one member, and never imports mpi4py."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Group:
    """A group of size one: every collective is the identity.

    Array operations work in place on C-contiguous arrays; object operations return the result.
    """

    rank = 0
    size = 1

    def all_reduce(self, array: NDArray[np.generic]) -> None:
        """array: the sum over members, in rank order, the same bits on all."""

    def barrier(self) -> None:
        """Return when all members have come here."""

    def broadcast(self, value: T) -> T:
        """The value that rank 0 gave."""
        return value

    def gather(self, value: T) -> list[T]:
        """On rank 0 the values of all members, in rank order."""
        return [value]
