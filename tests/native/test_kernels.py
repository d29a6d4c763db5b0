"""Every row kernel of every instruction set that runs here against float64 NumPy, with and without tails."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain._native import Error, kernels
from tests import reference_ops as reference

ISAS: list[str] = kernels.tables()
SIZES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 100, 257, 511, 513, 1100, 5000]
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

pytestmark = pytest.mark.parametrize("isa", ISAS)


class Random:
    """float32 rows of normal numbers; the seed is part of the test's name, so a failure can be repeated."""

    def __init__(self, *seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        print("seed", seed)

    def row(self, n: int, deviation: float = 1.0, mean: float = 0.0) -> Floats:
        return self.generator.normal(mean, deviation, n).astype(np.float32)


def double(x: Floats) -> Doubles:
    return x.astype(np.float64)


def assert_close(actual: object, expected: object, tolerance: float, floor: float = 0.0) -> None:
    """|actual - expected| <= tolerance * max(|expected|, floor), element by element, NaN equal to NaN."""
    got = np.asarray(actual, dtype=np.float64)
    wanted = np.asarray(expected, dtype=np.float64)
    assert got.shape == wanted.shape
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    finite = np.isfinite(wanted)
    assert np.array_equal(got[~finite & ~np.isnan(wanted)], wanted[~finite & ~np.isnan(wanted)])
    error = np.abs(got[finite] - wanted[finite]) / np.maximum(np.abs(wanted[finite]), max(floor, 1e-300))
    worst = error.max(initial=0.0)
    assert worst <= tolerance, f"worst relative error {worst:.3g} > {tolerance:g}"


def test_no_pointer_is_still_scalar(isa: str) -> None:
    fields = kernels.is_scalar(isa)
    if isa == "scalar":
        assert len(fields) == 29, "is_scalar no longer sees every field"
    else:
        assert fields == []


def test_unknown_isa_lists_the_right_ones(isa: str) -> None:
    with pytest.raises(Error, match=f"there is no such instruction set.*{isa}"):
        kernels.add("avx1024", np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_block_sizes_are_whole_tiles(isa: str) -> None:
    sizes = kernels.block_sizes(isa)
    assert all(size > 0 for size in sizes.values())
    assert sizes["block_rows"] % sizes["tile_rows"] == 0
    assert sizes["block_columns"] % sizes["tile_columns"] == 0


# Storage types


def values_of(bits: NDArray[np.uint16], dtype: str) -> Floats:
    """The float32 values that ml_dtypes and NumPy read from the bits (which complain of signalling NaNs)."""
    with np.errstate(invalid="ignore"):
        return bits.view(DTYPES[dtype]).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_widen_of_every_value(isa: str, dtype: str) -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    expected = values_of(bits, dtype)
    actual = kernels.widen(isa, bits, dtype)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(actual), ~numbers)
    assert np.array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_undoes_widen(isa: str, dtype: str) -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    x = values_of(bits, dtype)
    numbers = ~np.isnan(x)
    again = kernels.narrow(isa, x, dtype)
    assert np.array_equal(again[numbers], bits[numbers])
    assert np.isnan(values_of(again[~numbers], dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_rounds_to_nearest_even(isa: str, dtype: str) -> None:
    bits = np.random.default_rng(11).integers(0, 2**32, 400_000, dtype=np.uint32)
    # Halfway points and their neighbours, for every 16-bit value; and both ends of what rounds to infinity.
    below = np.arange(65536, dtype=np.uint32) << 16
    halves = np.concatenate([below + offset for offset in (0x7FFF, 0x8000, 0x8001)])
    # fp16's range in half units of its last place, and the neighbours of each.
    coarse = np.arange(0x33000000, 0x47900000, 0x1000, dtype=np.uint32)
    edges = np.concatenate([coarse - np.uint32(1), coarse, coarse + np.uint32(1)])
    x = np.concatenate([bits, halves, edges, edges | np.uint32(0x80000000)]).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(DTYPES[dtype]).view(np.uint16)
    actual = kernels.narrow(isa, x, dtype)
    numbers = ~np.isnan(x)
    assert np.array_equal(actual[numbers], expected[numbers])
    assert np.isnan(values_of(actual[~numbers], dtype)).all()


@pytest.mark.parametrize("n", SIZES)
def test_storage_tails(isa: str, n: int) -> None:
    x = Random(12, n).row(n)
    for narrowing in (False, True):
        assert np.array_equal(kernels.copy_fp32(isa, x, narrowing), x)
    for dtype, stored in DTYPES.items():
        bits = kernels.narrow(isa, x, dtype)
        assert np.array_equal(bits, x.astype(stored).view(np.uint16))
        assert np.array_equal(kernels.widen(isa, bits, dtype), x.astype(stored).astype(np.float32))


# Elementwise


@pytest.mark.parametrize("n", SIZES)
def test_add_and_scale(isa: str, n: int) -> None:
    random = Random(20, n)
    y, x = random.row(n), random.row(n)
    assert np.array_equal(kernels.add(isa, y, x), y + x)
    assert np.array_equal(kernels.scale(isa, y, 0.37), y * np.float32(0.37))


@pytest.mark.parametrize("n", SIZES)
def test_gelu(isa: str, n: int) -> None:
    random = Random(21, n)
    x, dy = random.row(n, 2.0), random.row(n)
    assert_close(kernels.gelu_forward(isa, x), reference.gelu_forward(double(x)), 2e-6, 1e-2)
    expected = reference.gelu_backward(double(dy), double(x))
    dx, y = kernels.gelu_backward(isa, dy, x)
    assert_close(dx, expected, 2e-6, 1e-1)
    assert y.tobytes() == kernels.gelu_forward(isa, x).tobytes()


def assert_same_floats(actual: Floats, expected: Floats) -> None:
    """Bit for bit, but for which NaN it is."""
    assert np.where(np.isnan(actual), 0, actual).tobytes() == np.where(np.isnan(expected), 0, expected).tobytes()
    assert (np.isnan(actual) == np.isnan(expected)).all()


def test_gelu_far_out(isa: str) -> None:
    x = np.array([-3e38, -1e10, -50, -10, -0.0, 0.0, 10, 50, 1e10, 3e38, np.inf, np.nan], np.float32)
    y = kernels.gelu_forward(isa, x)
    assert_close(y, np.where(x > 0, x, np.where(np.isnan(x), np.nan, 0.0)), 1e-6, 1e-6)
    expected = np.where(x > 0, 1.0, np.where(x == 0, 0.5, 0.0))
    expected[np.isnan(x)] = np.nan
    dx, again = kernels.gelu_backward(isa, np.ones_like(x), x)
    assert_close(dx, expected, 1e-6, 1.0)
    assert_same_floats(again, y)


@pytest.mark.parametrize("n", SIZES)
def test_swiglu(isa: str, n: int) -> None:
    random = Random(22, n)
    gate, up, dy = random.row(n, 3.0), random.row(n), random.row(n)
    y = kernels.swiglu_forward(isa, gate, up)
    assert_close(y, reference.swiglu_forward(double(gate), double(up)), 2e-6, 1e-2)
    gradients = reference.swiglu_backward(double(dy), double(gate), double(up))
    dgate, dup, again = kernels.swiglu_backward(isa, dy, gate, up)
    for actual, wanted in zip((dgate, dup), gradients, strict=True):
        assert_close(actual, wanted, 2e-6, 1e-1)
    assert again.tobytes() == y.tobytes()


def test_swiglu_far_out(isa: str) -> None:
    gate = np.array([-3e38, -200, -100, 100, 200, 3e38, np.inf, np.nan], np.float32)
    one = np.ones_like(gate)
    expected = np.where(gate > 0, gate, np.where(np.isnan(gate), np.nan, 0.0))
    y = kernels.swiglu_forward(isa, gate, one)
    assert_close(y, expected, 1e-6, 1e-6)
    assert_same_floats(kernels.swiglu_backward(isa, one, gate, one)[2], y)
    dgate, dup, _ = kernels.swiglu_backward(isa, one[:6], gate[:6], one[:6])
    assert_close(dgate, (gate[:6] > 0).astype(float), 1e-6, 1.0)
    assert_close(dup, expected[:6], 1e-6, 1e-6)


@pytest.mark.parametrize("head_size", [2, 6, 14, 16, 30, 32, 34, 64, 80, 96, 128, 144, 200])
def test_rope(isa: str, head_size: int) -> None:
    heads = 3
    x = Random(23, head_size).row(heads * head_size).reshape(heads, head_size)
    frequencies = reference.rope_frequencies(head_size, 10000.0)
    position = np.array([913], np.int32)
    angles = position[0] * frequencies
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    row = double(x).reshape(1, -1)
    forward = reference.rope_forward(row, position, frequencies).reshape(heads, head_size)
    backward = reference.rope_backward(row, position, frequencies).reshape(heads, head_size)
    assert_close(kernels.rope(isa, x, table, 1.0), forward, 1e-6, 1.0)
    assert_close(kernels.rope(isa, x, table, -1.0), backward, 1e-6, 1.0)


# Norms

NORM_SIZES = [n for n in SIZES if n > 0]


@pytest.mark.parametrize("n", NORM_SIZES)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layernorm(isa: str, n: int, mean: float) -> None:
    random = Random(30, n)
    x, weight, bias, dy = random.row(n, 2.0, mean), random.row(n), random.row(n), random.row(n)
    eps = 1e-5
    y, center, rstd = kernels.layernorm_forward(isa, x, weight, bias, eps)
    expected = reference.layernorm_forward(double(x)[None], double(weight), double(bias), eps)[0]
    # The rounding of x - mean, relative to the deviation, is what limits the result.
    condition = 1.0 + mean / max(float(double(x).std()), 1e-2)
    assert_close(y, expected, 2e-6 * condition, 1.0)
    assert_close(center, double(x).mean(), 3e-7, 1.0)
    assert_close(rstd, 1.0 / np.sqrt(double(x).var() + eps), 2e-6 * condition)

    sums = random.row(n), random.row(n), random.row(n)
    gradients = reference.layernorm_backward(double(dy)[None], double(x)[None], double(weight), eps)
    actual = kernels.layernorm_backward(isa, *sums, dy, x, weight, center, rstd)
    for got, before, gradient in zip(actual, sums, gradients, strict=True):
        scale = max(1.0, float(np.abs(gradient).max()))
        assert_close(got, double(before) + gradient.reshape(-1), 6e-6 * condition, scale)


@pytest.mark.parametrize("n", NORM_SIZES)
def test_rmsnorm(isa: str, n: int) -> None:
    random = Random(31, n)
    x, weight, dy = random.row(n, 2.0, 1.0), random.row(n), random.row(n)
    eps = 1e-5
    y, rstd = kernels.rmsnorm_forward(isa, x, weight, eps)
    assert_close(y, reference.rmsnorm_forward(double(x)[None], double(weight), eps)[0], 1e-6, 1e-3)
    assert_close(rstd, 1.0 / np.sqrt((double(x) ** 2).mean() + eps), 2e-7)

    sums = random.row(n), random.row(n)
    gradients = reference.rmsnorm_backward(double(dy)[None], double(x)[None], double(weight), eps)
    actual = kernels.rmsnorm_backward(isa, *sums, dy, x, weight, rstd)
    for got, before, gradient in zip(actual, sums, gradients, strict=True):
        scale = max(1.0, float(np.abs(gradient).max()))
        assert_close(got, double(before) + gradient.reshape(-1), 3e-6, scale)


def test_norms_of_a_constant_row_are_finite(isa: str) -> None:
    x, one, zero = np.full(33, 5.0, np.float32), np.ones(33, np.float32), np.zeros(33, np.float32)
    y, mean, rstd = kernels.layernorm_forward(isa, x, one, zero, 1e-5)
    assert (y == 0).all()
    assert mean == 5.0
    assert_close(rstd, 1e-5**-0.5, 1e-6)
    y, rstd = kernels.rmsnorm_forward(isa, zero, one, 1e-5)
    assert (y == 0).all()
    assert_close(rstd, 1e-5**-0.5, 1e-6)


# Softmax pieces


@pytest.mark.parametrize("n", SIZES)
def test_maximum(isa: str, n: int) -> None:
    x = Random(40, n).row(n, 1.0, -100.0)  # all negative: a tail filled with 0 would win
    assert kernels.maximum(isa, x) == (x.max() if n else -np.inf)
    for place in {0, n // 2, n - 1} if n else set():
        peak = x.copy()
        peak[place] = 7.0
        assert kernels.maximum(isa, peak) == 7.0


@pytest.mark.parametrize("n", SIZES)
def test_exp_sum(isa: str, n: int) -> None:
    x = Random(41, n).row(n, 4.0)
    y, total = kernels.exp_sum(isa, x, 0.125, 0.5)
    expected = np.exp(0.125 * double(x) - 0.5)
    assert_close(y, expected, 4e-7)
    assert_close(total, expected.sum(), 3e-7)


def test_exp_sum_of_a_vocabulary(isa: str) -> None:
    x = Random(42).row(50257, 3.0)
    _, total = kernels.exp_sum(isa, x, 1.0, float(x.max()))
    assert_close(total, np.exp(double(x) - double(x.max())).sum(), 4e-7)


def test_exponential_is_accurate_over_its_range(isa: str) -> None:
    x = np.concatenate([np.linspace(-87.3, 88.7, 200_001), np.linspace(-1, 1, 20_001)]).astype(np.float32)
    y, _ = kernels.exp_sum(isa, x, 1.0, 0.0)
    expected = np.exp(double(x))
    ulps = np.abs(y - expected) / np.spacing(expected.astype(np.float32)).astype(np.float64)
    assert ulps.max() <= 1.5


def test_exponential_at_the_edges(isa: str) -> None:
    x = np.array([-np.inf, -3e38, -1000, -104, -103, -95, -88, 0, 88.7, 89, 1000, np.inf, np.nan], np.float32)
    y, total = kernels.exp_sum(isa, x, 1.0, 0.0)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(x.astype(np.float64)).astype(np.float32)
    subnormal = np.float64(np.finfo(np.float32).smallest_subnormal)
    normal = np.abs(expected) >= np.finfo(np.float32).tiny
    small = ~normal & ~np.isnan(expected)
    assert_close(y[~small], expected[~small], 4e-7)
    assert np.abs(double(y[small]) - double(expected[small])).max() <= subnormal
    assert (y[:4] == 0).all()
    assert np.isnan(total), "NaN must reach the sum, and with it the loss"


@pytest.mark.parametrize("n", SIZES)
def test_softmax_backward(isa: str, n: int) -> None:
    random = Random(43, n)
    dp, scores = random.row(n), random.row(n, 4.0)
    gradient, p = kernels.softmax_backward(isa, dp, scores, 0.5, 0.3, 0.125)
    weights = np.exp(0.125 * double(scores) - 0.5)
    assert_close(p, weights, 4e-7)
    expected = weights * (double(dp) - np.float64(np.float32(0.3))) * 0.125
    assert_close(gradient, expected, 1e-6, 1e-2)


@pytest.mark.parametrize("n", SIZES)
def test_dot(isa: str, n: int) -> None:
    random = Random(44, n)
    x, y = random.row(n), random.row(n)
    magnitude = float(np.abs(double(x) * double(y)).sum())
    assert_close(kernels.dot(isa, x, y), double(x) @ double(y), 2e-7, magnitude)


# Optimizer


@pytest.mark.parametrize("n", SIZES)
def test_sum_squares(isa: str, n: int) -> None:
    x = Random(50, n).row(n)
    assert_close(kernels.sum_squares(isa, x), (double(x) ** 2).sum(), 1e-14)


def test_sum_squares_does_not_overflow(isa: str) -> None:
    x = np.full(65, 1e30, np.float32)
    assert_close(kernels.sum_squares(isa, x), (double(x) ** 2).sum(), 1e-14)
    x[64] = np.nan
    assert np.isnan(kernels.sum_squares(isa, x))
    x[64] = np.inf
    assert kernels.sum_squares(isa, x) == np.inf


@pytest.mark.parametrize("n", SIZES)
def test_adamw(isa: str, n: int) -> None:
    random = Random(51, n)
    master, m, v, gradient = random.row(n), random.row(n, 0.1), random.row(n, 0.1) ** 2, random.row(n)
    beta1, beta2, eps, step_size, correction2, decay, factor = 0.9, 0.95, 1e-8, 3e-3, 1.7, 1e-3, 0.6
    row = (beta1, beta2, 1 - beta1, 1 - beta2, eps, step_size, correction2, decay, factor)
    actual = kernels.adamw(isa, master, m, v, gradient, row)
    g = double(gradient) * factor
    new_m = beta1 * double(m) + (1 - beta1) * g
    new_v = beta2 * double(v) + (1 - beta2) * g * g
    update = new_m / (np.sqrt(new_v) * correction2 + eps)
    new_master = double(master) * (1 - decay) - step_size * update
    assert_close(actual[0], new_master, 2e-7, 1e-1)
    assert_close(actual[1], new_m, 1e-6, 1e-1)
    assert_close(actual[2], new_v, 1e-6, 1e-3)


def test_adamw_without_gradients_stays_finite(isa: str) -> None:
    zero, one = np.zeros(19, np.float32), np.ones(19, np.float32)
    row = (0.9, 0.95, 0.1, 0.05, 1e-8, 1e-3, 1.0, 0.0, 1.0)
    master, m, v = kernels.adamw(isa, one, zero, zero, zero, row)
    assert np.array_equal(master, one)
    assert not m.any()
    assert not v.any()


# Subnormals: a kernel alone keeps them; only parallel_for flushes.


def test_subnormals_pass_through(isa: str) -> None:
    tiny = np.full(17, 1e-40, np.float32)
    assert np.array_equal(kernels.add(isa, tiny, tiny), tiny + tiny)
    assert kernels.maximum(isa, -tiny) == -tiny[0]
    assert_close(kernels.sum_squares(isa, tiny), 17 * float(tiny[0]) ** 2, 1e-12)
