"""The shim itself: what it computes, and that it notices what it is there to notice."""

from typing import Any

import numpy as np
import pytest

from pytrain import _native

SHIM: Any = getattr(_native, "hip_shim", None)
ORDERS = ["ascending", "descending", "shuffled"]


@pytest.fixture(autouse=True)
def fibers() -> None:
    """Instead of the folder's: divergence is what these tests ask for."""


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(order: str, seed: int) -> None:
    SHIM.set_order(order, seed)
    values = [float(i) for i in range(256)]
    assert SHIM.reverse(values, True) == values[::-1]
    assert np.isnan(SHIM.reverse(values, False)).any()


@pytest.mark.parametrize(("kind", "counted"), [("barrier", 1), ("shuffle", 1), ("lds", 0)])
def test_what_a_gpu_would_hang_on_is_an_error(kind: str, counted: int) -> None:
    before = SHIM.counts()["divergent_barriers"]
    with pytest.raises(_native.Error, match="not all threads reached a barrier or an exchange, LDS exceeds"):
        SHIM.diverge(kind)
    assert SHIM.counts()["divergent_barriers"] == before + counted
    values = [float(i) for i in range(256)]
    assert SHIM.reverse(values, True) == values[::-1], "the machine is as new"


@pytest.mark.parametrize("format_", ["bf16", "fp16", "fp32"])
def test_matrix_products(format_: str, random: np.random.Generator) -> None:
    """Small integers are exact in every format: any exchanged row, column or k would show."""
    a, b = random.integers(-8, 9, (2, 512)).astype(np.float32)
    before = SHIM.counts()["products"]
    c = SHIM.matrix_product(a.tolist(), b.tolist(), format_)
    expected = a.reshape(32, 16) @ b.reshape(16, 32)
    assert np.array_equal(np.array(c).reshape(32, 32), expected)
    steps = 8 if format_ == "fp32" else 2
    of_a_step = 1 if SHIM.lanes == 64 else 0 if format_ == "fp32" else 8  # warps: two, which take four each
    assert SHIM.counts()["products"] - before == 4 * steps * of_a_step, "four waves, so many steps each"
