"""Arrays of the storage types for tests of the device: uint16 bits on its side, float64 values on ours."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Doubles = NDArray[np.float64]

TYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
# Half a unit in the last place of 1, for values that were rounded once.
ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def stored(x: Array, dtype: str) -> Array:
    """float32, or the bits of x rounded to bf16 or fp16 as uint16, C-contiguous."""
    rounded = np.ascontiguousarray(x.astype(TYPES[dtype]))
    return rounded if dtype == "fp32" else rounded.view(np.uint16)


def values(x: Array, dtype: str) -> Doubles:
    """What stored numbers stand for."""
    return (x if dtype == "fp32" else x.view(TYPES[dtype])).astype(np.float64)


def empty(shape: tuple[int, ...], dtype: str) -> Array:
    """An array of NaN, which shows wherever a kernel forgets to write."""
    return stored(np.full(shape, np.nan), dtype)


def strided(x: Array, gap: int) -> Array:
    """The same matrix inside a wider one, whose other columns are NaN (0xffff as 16 bits, too)."""
    filler = np.array(np.nan if x.dtype == np.float32 else 0xFFFF, x.dtype)
    wide = np.full((x.shape[0], x.shape[1] + gap), filler, x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bytes: NaN equals itself, and 0 is not -0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
