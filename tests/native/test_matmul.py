"""Products of every instruction set against float64 NumPy, and what they promise about bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pytrain._native import CpuDevice, Error, kernels
from tests.native.arrays import ROUNDING, Array, Doubles, empty, same_bits, stored, strided, values
from tests.reference_ops import gelu_forward

ISAS: list[str] = kernels.tables()
TYPES = ["fp32", "bf16", "fp16"]
TRANSPOSES = [(False, False), (False, True), (True, False), (True, True)]
# Around one tile of every table, around its block of k, and empty.
SIZES = [
    (1, 1, 1), (0, 5, 3), (5, 0, 3), (4, 5, 0), (1, 40, 700), (3, 16, 7), (6, 16, 256), (7, 17, 257),
    (14, 32, 384), (15, 33, 385), (29, 47, 31), (33, 8, 2), (48, 96, 130), (131, 77, 300), (60, 67, 1000),
]  # fmt: skip

pytestmark = pytest.mark.parametrize("isa", ISAS)


def random(*shape: int, seed: int) -> Array:
    print("seed", seed)
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def operand(rows: int, columns: int, transpose: bool, seed: int, dtype: str = "fp32", gap: int = 3) -> Array:
    """A matrix of op(x) (rows, columns), as stored, with strided rows."""
    shape = (columns, rows) if transpose else (rows, columns)
    return strided(stored(random(*shape, seed=seed), dtype), gap)


def exact(x: Array, transpose: bool, dtype: str = "fp32") -> Doubles:
    doubles = values(np.ascontiguousarray(x), dtype)
    return doubles.T if transpose else doubles


def assert_product(c: Doubles, a: Doubles, b: Doubles, extra: Doubles | float = 0.0, rounding: float = 0.0) -> None:
    """Errors are bounded by the terms' magnitudes: a shifted element is 100,000 times beyond it."""
    expected = a @ b + extra
    bound = 2.0**-21 * (np.abs(a) @ np.abs(b) + np.abs(extra)) + rounding * np.abs(expected) + 1e-30
    worst = np.max(np.abs(c - expected) / bound, initial=0.0)
    assert worst <= 1.0, f"error of {worst:.3g} times the bound"


@pytest.mark.parametrize(("transpose_a", "transpose_b"), TRANSPOSES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_transpose_and_size(isa: str, transpose_a: bool, transpose_b: bool, accumulate: bool) -> None:
    device = CpuDevice(isa, 2)
    for m, n, k in SIZES:
        a = operand(m, k, transpose_a, 1)
        b = operand(k, n, transpose_b, 2, gap=1)
        before = random(m, n, seed=3)
        c = strided(before if accumulate else empty((m, n), "fp32"), 5)
        device.matmul(c, a, b, transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate)
        extra = before.astype(np.float64) if accumulate else 0.0
        assert_product(exact(c, False), exact(a, transpose_a), exact(b, transpose_b), extra)
        assert np.isnan(c.base[:, n:]).all(), "wrote beside c"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("along", [False, True])
def test_packing(isa: str, dtype: str, along: bool) -> None:
    """Exact values, zeros as padding, nothing else: the source ends in NaN, the panel lies between others."""
    device = CpuDevice(isa, 1)
    for width, panel_width in [
        (1, 1),
        (3, 5),
        (6, 6),
        (14, 14),
        (9, 14),
        (16, 16),
        (20, 24),
        (32, 32),
        (17, 40),
    ]:
        for k in (1, 2, 15, 16, 17, 50):
            shape = (width, k) if along else (k, width)
            source = strided(stored(random(*shape, seed=26), dtype), 2)
            room = np.full((k + 2, panel_width), np.nan, np.float32)
            device.pack(room[1:-1], source, along, half="bf16" if dtype == "fp32" else dtype)
            expected = np.zeros((k, panel_width))
            expected[:, :width] = exact(source, along, dtype)
            assert np.array_equal(room[1:-1], expected), (width, panel_width, k)
            assert np.isnan(room[[0, -1]]).all(), "wrote beside the panel"


def test_more_than_one_region(isa: str) -> None:
    """With one block of k, whose panels serve several regions of either operand, and with more."""
    device = CpuDevice(isa, 2)
    for m, n, k in [(1100, 37, 20), (40, 3200, 20), (2500, 3100, 3), (1100, 37, 600), (40, 3200, 600)]:
        a, b, c = operand(m, k, False, 4), operand(k, n, True, 5), empty((m, n), "fp32")
        device.matmul(c, a, b, transpose_b=True)
        assert_product(exact(c, False), exact(a, False), exact(b, True))


@pytest.mark.parametrize(
    ("type_a", "type_b", "type_c"),
    [types for types in itertools.product(TYPES, repeat=3) if len({*types} - {"fp32"}) == 1],
)
@pytest.mark.parametrize(("transpose_a", "transpose_b"), TRANSPOSES)
def test_storage_types(isa: str, type_a: str, type_b: str, type_c: str, transpose_a: bool, transpose_b: bool) -> None:
    half = next(t for t in (type_a, type_b, type_c) if t != "fp32")
    device = CpuDevice(isa, 2)
    for m, n, k in [(3, 19, 40), (45, 50, 401)]:
        a = operand(m, k, transpose_a, 6, type_a)
        b = operand(k, n, transpose_b, 7, type_b)
        for accumulate in (False, True):
            before = stored(random(m, n, seed=8), type_c)
            c = strided(before if accumulate else empty((m, n), type_c), 2)
            transposes = {"transpose_a": transpose_a, "transpose_b": transpose_b}
            device.matmul(c, a, b, **transposes, accumulate=accumulate, half=half)
            extra = values(before, type_c) if accumulate else 0.0
            rounding = ROUNDING[type_c] if type_c != "fp32" else 0.0
            factors = exact(a, transpose_a, type_a), exact(b, transpose_b, type_b)
            assert_product(exact(c, False, type_c), *factors, extra, rounding)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_16_bit_results_are_rounded_once(isa: str, half: str) -> None:
    """Three blocks of k: rounding between them would show."""
    device = CpuDevice(isa, 2)
    a, b = random(37, 1000, seed=9), random(70, 1000, seed=10)
    full, rounded = empty((37, 70), "fp32"), empty((37, 70), half)
    device.matmul(full, a, b, transpose_b=True)
    device.matmul(rounded, a, b, transpose_b=True, half=half)
    assert same_bits(rounded, stored(full, half))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("with_bias", "with_residual", "with_activation"), list(itertools.product([False, True], repeat=3))
)
def test_epilogue(isa: str, dtype: str, with_bias: bool, with_residual: bool, with_activation: bool) -> None:
    half = "bf16" if dtype == "fp32" else dtype
    device = CpuDevice(isa, 2)
    for m, n, k in [(2, 70, 30), (50, 300, 500), (40, 21, 0), (3, 3100, 10)]:
        a, b = random(m, k, seed=11), random(k, n, seed=12)
        bias, residual = stored(random(n, seed=13), dtype), strided(stored(random(m, n, seed=14), dtype), 4)
        c, activated = strided(empty((m, n), dtype), 1), strided(empty((m, n), dtype), 3)
        device.matmul(
            c, a, b, bias=bias if with_bias else None, residual=residual if with_residual else None,
            activated=activated if with_activation else None, half=half,
        )  # fmt: skip
        extra = np.zeros((m, n))
        extra += values(bias, dtype) if with_bias else 0.0
        extra += exact(residual, False, dtype) if with_residual else 0.0
        rounding = ROUNDING[dtype] if dtype != "fp32" else 0.0
        assert_product(exact(c, False, dtype), exact(a, False), exact(b, False), extra, rounding)
        if with_activation:
            expected = gelu_forward(exact(c, False, dtype))
            error = np.abs(exact(activated, False, dtype) - expected)
            assert np.all(error <= 2.0 * ROUNDING[dtype] * np.abs(expected) + 1e-6)
            again = empty((m, n), dtype)
            device.gelu_forward(again, np.ascontiguousarray(c), half=half)
            assert same_bits(again, np.ascontiguousarray(activated)), "computed again from c"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_threads_do_not_change_bits(isa: str, dtype: str) -> None:
    shapes = [(5, 200, 900), (120, 333, 600)]
    for (m, n, k), (transpose_a, transpose_b) in itertools.product(shapes, TRANSPOSES):
        a, b = operand(m, k, transpose_a, 15), operand(k, n, transpose_b, 16)
        results = []
        for threads in (1, 2, 3):
            c = empty((m, n), dtype)
            CpuDevice(isa, threads).matmul(c, a, b, transpose_a=transpose_a, transpose_b=transpose_b)
            results.append(c)
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])


@pytest.mark.parametrize("transpose_b", [False, True])
def test_a_row_does_not_know_its_neighbours(isa: str, transpose_b: bool) -> None:
    """Rows computed alone, in a few and in many, on both sides of the skinny path and at other places."""
    device = CpuDevice(isa, 2)
    k, n = 801, 90
    a, b, bias = random(1200, k, seed=17), operand(k, n, transpose_b, 18), random(n, seed=19)
    whole = empty((1200, n), "fp32")
    device.matmul(whole, a, b, transpose_b=transpose_b, bias=bias)
    for first, last in [(0, 1), (0, 2), (5, 18), (700, 713), (1, 33), (1000, 1033), (40, 140), (1199, 1200)]:
        part = empty((last - first, n), "fp32")
        device.matmul(part, a[first:last], b, transpose_b=transpose_b, bias=bias)
        assert same_bits(part, whole[first:last]), (first, last)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_any_number_of_rows(isa: str, dtype: str, transpose_a: bool) -> None:
    """The last panels are as low as what is left of the rows: the bits are those of whole ones, nothing lies beside.

    Two blocks of k, a last panel of b that is cut off, and rows of `a` behind the last that are not numbers.
    """
    devices = [CpuDevice(isa, threads) for threads in (1, 2, 3)]
    most, n, k = 60, 45, kernels.block_sizes(isa, dtype)["block_depth"] + 37
    a, b = operand(200, k, transpose_a, 27, dtype), operand(k, n, not transpose_a, 28, dtype)
    transposes = {"transpose_a": transpose_a, "transpose_b": not transpose_a}
    whole = empty((200, n), "fp32")
    devices[1].matmul(whole, a, b, **transposes)
    assert_product(exact(whole, False), exact(a, transpose_a, dtype), exact(b, not transpose_a, dtype))
    expected = stored(whole, dtype)
    not_a_number = stored(np.array([np.nan], np.float32), dtype)[0]
    for m in range(most, 0, -1):
        used = a[:, :m] if transpose_a else a[:m]
        if transpose_a:
            a[:, m:] = not_a_number
        else:
            a[m:] = not_a_number
        c = strided(empty((m + 16, n), dtype), 2)
        before = c.base.copy()
        devices[m % 3].matmul(c[:m], used, b, **transposes)
        assert same_bits(np.ascontiguousarray(c[:m]), expected[:m]), m
        assert same_bits(c.base[m:], before[m:]), "wrote below c"
        assert same_bits(c.base[:, n:], before[:, n:]), "wrote beside c"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_column_blocks(isa: str, dtype: str, transpose_b: bool) -> None:
    """Column blocks that their tasks pack, and those that are packed for all: how many depends on the threads.

    More rows than fit a thread's scratch at once, a last column block that is cut off, one block of k and two.
    """
    sizes = kernels.block_sizes(isa, dtype)
    m, n = sizes["block_rows"] + 21, 5 * sizes["block_columns"] + sizes["tile_columns"] + 3
    for k in (sizes["block_depth"] - 3, sizes["block_depth"] + 5):
        a, b = operand(m, k, False, 29, dtype), operand(k, n, transpose_b, 30, dtype)
        bias, before = random(n, seed=31), stored(random(m, n, seed=32), dtype)
        results = []
        for threads in (1, 2, 3, 8):
            c = strided(before, 4)
            CpuDevice(isa, threads).matmul(c, a, b, transpose_b=transpose_b, bias=bias, accumulate=True)
            results.append(np.ascontiguousarray(c))
        extra = values(before, dtype) + bias.astype(np.float64)
        rounding = ROUNDING[dtype] if dtype != "fp32" else 0.0
        factors = exact(a, False, dtype), exact(b, transpose_b, dtype)
        assert_product(values(results[0], dtype), *factors, extra, rounding)
        assert all(same_bits(result, results[0]) for result in results)


def test_a_column_does_not_know_its_neighbours(isa: str) -> None:
    """What lets a tensor-parallel slice of a column-parallel product equal the whole one's columns."""
    device = CpuDevice(isa, 2)
    a, b = random(50, 500, seed=20), random(200, 500, seed=21)
    whole = empty((50, 200), "fp32")
    device.matmul(whole, a, b, transpose_b=True)
    for first, last in [(0, 1), (3, 120), (120, 200)]:
        part = empty((50, last - first), "fp32")
        device.matmul(part, a, b[first:last], transpose_b=True)
        assert same_bits(part, np.ascontiguousarray(whole[:, first:last]))


def test_not_a_number_reaches_the_result(isa: str) -> None:
    device = CpuDevice(isa, 2)
    a, b, c = random(20, 50, seed=22), random(50, 40, seed=23), empty((20, 40), "fp32")
    a[7, 3] = np.nan
    device.matmul(c, a, b)
    assert np.isnan(c[7]).all()
    assert np.isfinite(np.delete(c, 7, axis=0)).all()


def test_bad_arguments_are_named(isa: str) -> None:
    device = CpuDevice(isa, 1)
    a, b, c = random(3, 4, seed=24), random(4, 5, seed=25), empty((3, 5), "fp32")
    with pytest.raises(Error, match=r"b: transposed \(4, 5\) does not fit a \(3, 4\)"):
        device.matmul(c, a, b, transpose_b=True)
    with pytest.raises(Error, match=r"c: the shape must be \(3, 5\), not \(5, 3\)"):
        device.matmul(c.T.copy(), a, b)
    with pytest.raises(Error, match=r"bias: the shape must be \(5,\), not \(3,\)"):
        device.matmul(c, a, b, bias=a[:, 0].copy())
    with pytest.raises(Error, match="a: the dtype must be float32 or uint16, not float64"):
        device.matmul(c, a.astype(np.float64), b)
    with pytest.raises(Error, match="b: the last dimension must be contiguous"):
        device.matmul(c, a, np.asfortranarray(b))
    with pytest.raises(Error, match="residual may not be c"):
        device.matmul(c, a, b, residual=c)
    c.flags.writeable = False
    with pytest.raises(Error, match="c: the array is read-only"):
        device.matmul(c, a, b)
