"""Runs of elements of global tensors: what a trainer hands to a checkpoint, and asks back from it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pytrain.errors import UserError

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "bf16": 2, "fp16": 2})


class TensorEntry(NamedTuple):
    """One line of the global table: a tensor, its dtype ("fp32", "bf16", "fp16"), global shape, and file."""

    file: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return self.elements * ITEM_BYTES[self.dtype]


class Piece(Protocol):
    """What `save` needs of a piece; `data` is asked for once, so that it may be made at that moment."""

    @property
    def entry(self) -> TensorEntry:
        """The tensor this piece belongs to."""

    @property
    def first(self) -> int:
        """First element in the flattened global tensor."""

    @property
    def count(self) -> int:
        """Number of elements."""

    @property
    def data(self) -> NDArray[Any]:
        """[count], contiguous; float32 for fp32, uint16 for the 16-bit types."""


@dataclass(frozen=True)
class TensorPiece:
    """A run of elements of one global tensor, in this process's memory.

    file: name without suffix: "embed.weights", "layer_003.weights", "layer_003.optimizer", "head.weights";
    loading
        ignores it, because a tensor's name is unique.
    tensor: global name; optimizer state is "<name>.master", "<name>.m", "<name>.v".
    dtype: "fp32", "bf16" or "fp16". shape: global. first: first element in the flattened global tensor.
    data: [count], contiguous float32, or uint16 for the 16-bit types; saved from, or loaded into in place.

    Raises ValueError where these contradict each other: that is a mistake in the program, not in its input.
    """

    file: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    data: NDArray[Any]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"piece of {self.tensor}: unknown dtype {self.dtype!r}")
        storage, data = storage_dtype(self.dtype), self.data
        if data.dtype != storage or data.ndim != 1 or not data.flags.c_contiguous:
            raise ValueError(
                f"piece of {self.tensor}: {self.dtype} takes a contiguous vector of {storage}, "
                f"not {data.dtype} {data.shape}"
            )
        end = self.first + self.count
        if self.first < 0 or end > math.prod(self.shape):
            raise ValueError(
                f"piece of {self.tensor}: elements {self.first} to {end} are not all in shape {self.shape}"
            )

    @property
    def entry(self) -> TensorEntry:
        """The tensor this piece belongs to."""
        return TensorEntry(self.file, self.tensor, self.dtype, self.shape)

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.data.size


Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type in which a dtype is kept: float32, or uint16 for the 16-bit types."""
    return np.dtype(np.float32 if dtype == "fp32" else np.uint16)


def value_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type that knows a dtype's values: float32, float16 or ml_dtypes.bfloat16."""
    if dtype == "bf16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(np.float32 if dtype == "fp32" else np.float16)


def convert(data: NDArray[Any], source: str, target: str, tensor: str) -> NDArray[Any]:
    """Numbers kept as dtype `source`, rounded to nearest and kept as `target`; both in their storage dtypes.

    Raises:
        UserError: a finite number is beyond the range of `target`; `tensor` names it.
    """
    if source == target:
        return data
    values = data.view(value_dtype(source))
    wide = values.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(value_dtype(target))
    if np.any(np.isfinite(wide) & np.isinf(narrow.astype(np.float32))):
        largest = float(np.abs(wide[np.isfinite(wide)]).max())
        raise UserError(f"{tensor} has values up to {largest:g}, beyond the range of {target}")
    return narrow.view(storage_dtype(target))
