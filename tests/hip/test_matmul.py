"""Products on emulated matrix units: the tests of the CPU's, and what is particular to tiles of 128."""

import itertools
from typing import Any

import numpy as np
import pytest

from pytrain import _native
from tests.native import test_matmul as native_tests
from tests.native.arrays import empty, same_bits, stored, values

TYPES = ["fp32", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def on_hip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tests build their own devices: they get this one."""
    monkeypatch.setattr(native_tests, "CpuDevice", lambda isa, threads: _native.hip_device(0))


@pytest.mark.parametrize(("transpose_a", "transpose_b"), native_tests.TRANSPOSES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_transpose_and_size(transpose_a: bool, transpose_b: bool, accumulate: bool) -> None:
    native_tests.test_every_transpose_and_size("hip", transpose_a, transpose_b, accumulate)


@pytest.mark.parametrize(
    ("type_a", "type_b", "type_c"),
    [types for types in itertools.product(TYPES, repeat=3) if len({*types} - {"fp32"}) == 1],
)
@pytest.mark.parametrize(("transpose_a", "transpose_b"), native_tests.TRANSPOSES)
def test_storage_types(type_a: str, type_b: str, type_c: str, transpose_a: bool, transpose_b: bool) -> None:
    native_tests.test_storage_types("hip", type_a, type_b, type_c, transpose_a, transpose_b)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_16_bit_results_are_rounded_once(half: str) -> None:
    native_tests.test_16_bit_results_are_rounded_once("hip", half)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("with_bias", "with_residual", "with_activation"), list(itertools.product([False, True], repeat=3))
)
def test_epilogue(dtype: str, with_bias: bool, with_residual: bool, with_activation: bool) -> None:
    native_tests.test_epilogue("hip", dtype, with_bias, with_residual, with_activation)


@pytest.mark.parametrize("transpose_b", [False, True])
def test_a_row_does_not_know_its_neighbours(transpose_b: bool) -> None:
    native_tests.test_a_row_does_not_know_its_neighbours("hip", transpose_b)


def test_a_column_does_not_know_its_neighbours() -> None:
    native_tests.test_a_column_does_not_know_its_neighbours("hip")


def test_not_a_number_reaches_the_result() -> None:
    native_tests.test_not_a_number_reaches_the_result("hip")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("transpose_a", "transpose_b"), native_tests.TRANSPOSES)
def test_tiles(
    device: _native.Device, random: np.random.Generator, dtype: str, transpose_a: bool, transpose_b: bool
) -> None:
    """Aligned operands, which go by chunks, around the edges of the tiles of 128 x 128 and of the steps of k."""
    for m, n, k in [
        (128, 128, 64),
        (136, 264, 160),
        (1160, 8, 40),
        (64, 200, 72),
        (129, 130, 33),
        (40, 24, 96),
        (8, 16, 128),
    ]:
        a = stored(random.normal(size=(k, m) if transpose_a else (m, k)), dtype)
        b = stored(random.normal(size=(n, k) if transpose_b else (k, n)), dtype)
        c = empty((m, n), "fp32")
        half = "bf16" if dtype == "fp32" else dtype
        device.matmul(c, a, b, transpose_a=transpose_a, transpose_b=transpose_b, half=half)
        exact = values(a, dtype).T if transpose_a else values(a, dtype)
        other = values(b, dtype).T if transpose_b else values(b, dtype)
        native_tests.assert_product(c.astype(np.float64), exact, other)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_order_of_threads_changes_no_bit(device: _native.Device, random: np.random.Generator, dtype: str) -> None:
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    a, b = stored(random.normal(size=(200, 100)), dtype), stored(random.normal(size=(100, 140)), dtype)
    results = []
    for order in ("ascending", "descending", "shuffled", "shuffled"):
        shim.set_order(order, len(results))
        results.append(empty((200, 140), dtype))
        device.matmul(results[-1], a, b, half="bf16" if dtype == "fp32" else dtype)
    assert np.isfinite(values(results[0], dtype)).all()
    assert all(same_bits(results[0], other) for other in results[1:])


def weight_gradient(
    device: _native.Device, random: np.random.Generator, dtype: str, shape: tuple[int, int, int], half: str
) -> int:
    """Checks c += left^T right, as of a weight's gradient; how many kernels it took."""
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    m, n, k = shape
    left, right = stored(random.normal(size=(k, m)), dtype), stored(random.normal(size=(k, n)), dtype)
    c = random.normal(size=(m, n)).astype(np.float32)
    exact = c.astype(np.float64) + values(left, dtype).T @ values(right, dtype)
    before = shim.counts()["launches"]
    device.matmul(c, left, right, transpose_a=True, accumulate=True, half=half)
    scale = np.sqrt(k) * 1e-5
    assert np.max(np.abs(c - exact)) <= scale
    return int(shim.counts()["launches"] - before)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_long_k_with_few_tiles_is_cut(device: _native.Device, random: np.random.Generator, dtype: str) -> None:
    """Gradients of weights from many rows; whole chunks and not, slices of equal length and a shorter last one."""
    half = "bf16" if dtype == "fp32" else dtype
    for shape in [(136, 40, 1030), (33, 7, 1030)]:
        assert weight_gradient(device, random, dtype, shape, half) == 2, "the slices, and their sum"
    assert weight_gradient(device, random, dtype, (40, 24, 96), half) == 1, "too short"


def test_only_gradients_of_weights_are_cut(device: _native.Device, random: np.random.Generator) -> None:
    """Elsewhere rows are rows of a batch, and how many of them there are may not change one's bits."""
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    for transpose_a, transpose_b in [(False, False), (False, True), (True, True)]:
        a = random.normal(size=(1030, 8) if transpose_a else (8, 1030)).astype(np.float32)
        b = random.normal(size=(8, 1030) if transpose_b else (1030, 8)).astype(np.float32)
        before = shim.counts()["launches"]
        device.matmul(empty((8, 8), "fp32"), a, b, transpose_a=transpose_a, transpose_b=transpose_b)
        assert shim.counts()["launches"] - before == 1


def test_the_order_of_threads_changes_no_bit_of_slices(device: _native.Device, random: np.random.Generator) -> None:
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    left, right = (stored(random.normal(size=(1030, 40)), "bf16") for _ in range(2))
    results = []
    for order in ("ascending", "descending", "shuffled"):
        shim.set_order(order, len(results))
        results.append(empty((40, 40), "fp32"))
        device.matmul(results[-1], left, right, transpose_a=True)
    assert np.isfinite(results[0]).all()
    assert all(same_bits(results[0], other) for other in results[1:])
