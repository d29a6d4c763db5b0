"""Adding what was received: serial code, so that a progress thread may run it beside the kernels.

16-bit numbers are added in fp32 and rounded once, whatever the number of terms.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pytrain._native import Device

Array = NDArray[Any]
Operation = Literal["sum", "max"]


def merge(target: Array, other: Array, operation: Operation, device: "Device | None" = None) -> None:
    """target = target + other, or the larger of the two; float32 or float64 arrays of one shape.

    A device adds float32 arrays that lie in its memory; the bits are the same.
    """
    if operation == "sum" and device is not None and target.dtype == np.float32:
        device.add(target, other)
    elif operation == "sum":
        np.add(target, other, out=target)
    else:
        np.maximum(target, other, out=target)


def merge_in_order(
    own: Array,
    before: Sequence[Array],
    after: Sequence[Array],
    operation: Operation,
    device: "Device | None" = None,
) -> None:
    """own = before[0] + ... + own + after[0] + ..., from the left; overwrites before[0].

    The sum of two is the same either way round, so `own` can take its turn without a copy.
    """
    if before:
        for other in before[1:]:
            merge(before[0], other, operation, device)
        merge(own, before[0], operation, device)
    for other in after:
        merge(own, other, operation, device)


def add_halves_in_order(
    device: "Device", own: Array, before: Sequence[Array], after: Sequence[Array], total: Array, half: str
) -> None:
    """As `merge_in_order` for uint16 arrays of `half` numbers: in fp32, rounded once.

    Args:
        device: of one thread, or the one whose memory the arrays lie in.
        own: the result.
        before: terms of lower ranks.
        after: terms of higher ranks.
        total: float32 scratch of own's shape.
        half: "bf16" or "fp16".
    """
    terms = [*before, own, *after]
    device.convert(total, terms[0], half)
    for term in terms[1:]:
        device.add(total, term, half)
    device.convert(own, total, half)
