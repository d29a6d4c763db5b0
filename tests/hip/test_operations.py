"""Rows, norms, embedding, loss and optimizer on the HIP device: the tests of the CPU's, and order of threads."""

from typing import Any

import numpy as np
import pytest

from pytrain import _native
from tests.native import test_device as native_tests
from tests.native.arrays import Array, same_bits
from tests.native.test_device import Case


@pytest.fixture(autouse=True)
def on_hip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tests build their own devices: they get this one."""
    monkeypatch.setattr(native_tests, "CpuDevice", lambda isa, threads: _native.hip_device(0))


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def case(on_hip: None, request: pytest.FixtureRequest) -> Case:
    return Case("hip", request.param, seed=len(request.node.name))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 4097])
def test_convert_add_fill_copy(case: Case, n: int) -> None:
    native_tests.test_convert_add_fill_copy(case, n)


def test_fill_normal_is_the_same_in_any_pieces(case: Case) -> None:
    native_tests.test_fill_normal_is_the_same_in_any_pieces(case)


def test_embedding(case: Case) -> None:
    native_tests.test_embedding(case)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 64), (257, 65), (2100, 20)])
def test_bias_backward(case: Case, m: int, n: int) -> None:
    native_tests.test_bias_backward(case, m, n)


def test_residual_add(case: Case) -> None:
    native_tests.test_residual_add(case)


@pytest.mark.parametrize(("rows", "width"), native_tests.NORM_SHAPES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm(case: Case, kind: str, rows: int, width: int) -> None:
    native_tests.test_norm(case, kind, rows, width)


def test_gelu(case: Case) -> None:
    native_tests.test_gelu(case)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 131), (3, 1000)])
def test_swiglu(case: Case, rows: int, width: int) -> None:
    native_tests.test_swiglu(case, rows, width)


@pytest.mark.parametrize(("heads", "head_size"), [(1, 2), (3, 64), (5, 200), (70, 128)])
def test_rope(case: Case, heads: int, head_size: int) -> None:
    native_tests.test_rope(case, heads, head_size)


@pytest.mark.parametrize("cuts", [[0, 9001], [0, 4000, 4001, 9001]])
def test_loss(case: Case, cuts: list[int]) -> None:
    native_tests.test_loss(case, cuts)


@pytest.mark.parametrize("place", ["over", "elsewhere"])
@pytest.mark.parametrize("width", [70, 4097])
def test_loss_and_gradient_in_one(case: Case, width: int, place: str) -> None:
    native_tests.test_loss_and_gradient_in_one(case, width, place)


def test_loss_and_gradient_in_one_refuses_16_bit_logits() -> None:
    native_tests.test_loss_and_gradient_in_one_refuses_16_bit_logits("hip")


@pytest.mark.parametrize("width", [5, 2049, 5000, 9001])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_gradients_over_fp32_logits(
    device: _native.Device, random: np.random.Generator, dtype: str, width: int
) -> None:
    """As the head stores them: each row begins where its logits begin. A block takes one round or several."""
    rows = 9
    logits = random.normal(0.0, 3.0, (rows, width)).astype(np.float32)
    targets = random.integers(0, width, rows).astype(np.int32)
    targets[[0, 5]] = -1
    exact = logits.astype(np.float64)
    lse = np.log(np.exp(exact).sum(axis=1))
    expected = np.exp(exact - lse[:, None])
    expected[np.arange(rows), targets] -= 1.0
    expected[targets < 0] = 0.0
    over = logits.view(np.uint16)[:, :width]
    scalars = np.array([0.0, 0, 0, 0, 0, 1.0])
    device.loss_backward(logits, lse.astype(np.float32), targets, scalars, 0, dtype, over)
    got = np.empty((rows, width), np.float32)
    device.convert(got, np.ascontiguousarray(over), dtype)
    np.testing.assert_allclose(got, expected, rtol=5e-3 if dtype == "bf16" else 1e-3, atol=1e-7)


@pytest.mark.parametrize("width", [5, 300, 5000])
def test_head_statistics(case: Case, width: int) -> None:
    """The maximum is exact; the loss alone would not know it from another shift."""
    rows = 20
    logits = case.normal(rows, width, deviation=3.0)
    targets = np.full(rows, -1, np.int32)
    targets[[0, 2]] = [0, width - 1]
    maximum, total, chosen = native_tests.statistics_of(case, logits, targets, [0, width])[0].T
    exact = case.value(logits)
    np.testing.assert_array_equal(maximum, exact.max(axis=1))
    np.testing.assert_allclose(total, np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(chosen, np.where(targets < 0, 0.0, exact[np.arange(rows), targets]))


@pytest.mark.parametrize("rows", [70, 600])
def test_the_loss_of_many_rows(case: Case, rows: int) -> None:
    """One block adds all of them: more than a wave of rows, and more than a block."""
    logits = case.normal(rows, 9)
    targets = case.generator.integers(-1, 9, rows).astype(np.int32)
    found = np.zeros(rows, np.float32)
    scalars = np.zeros(6)
    statistics = native_tests.statistics_of(case, logits, targets, [0, 9])
    case.device.loss_forward(scalars, found, statistics, targets)
    exact = case.value(logits)
    lse = np.log(np.exp(exact).sum(axis=1))
    counted = targets >= 0
    loss = (lse - exact[np.arange(rows), np.maximum(targets, 0)])[counted].sum()
    np.testing.assert_allclose(scalars[:2], [loss, counted.sum()], rtol=1e-6)
    np.testing.assert_allclose(found, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_logit_makes_the_loss_nan(bad: float) -> None:
    native_tests.test_a_bad_logit_makes_the_loss_nan("hip", bad)


@pytest.mark.parametrize("n", [0, 1, 5000, 70_001])
def test_sum_squares(case: Case, n: int) -> None:
    native_tests.test_sum_squares(case, n)


@pytest.mark.parametrize(
    ("total", "limit", "scale", "norm", "clip", "finite"),
    [
        (16.0, 1.0, 1.0, 4.0, 0.25, 1.0),
        (64.0, 1.0, 4.0, 2.0, 0.125, 1.0),
        (0.0, 1.0, 2.0, 0.0, 0.5, 1.0),
        (np.inf, 1.0, 1.0, np.inf, 0.0, 0.0),
    ],
)
def test_finish_norm(total: float, limit: float, scale: float, norm: float, clip: float, finite: float) -> None:
    native_tests.test_finish_norm("hip", total, limit, scale, norm, clip, finite)


def test_a_nan_gradient_is_not_finite() -> None:
    native_tests.test_a_nan_gradient_is_not_finite("hip")


def test_adamw(case: Case) -> None:
    native_tests.test_adamw(case)


def test_the_order_of_threads_changes_no_bit(device: _native.Device) -> None:
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    results: list[list[Array]] = []
    for order in ("ascending", "descending", "shuffled", "shuffled"):
        shim.set_order(order, len(results))
        results.append(native_tests.every_sum(device))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_counted_by_kind(device: _native.Device) -> None:
    before = device.bytes_in_use("workspace")
    device.reserve(64, 30_000, 64)
    assert device.bytes_in_use("workspace") > before
    buffer = _native.Buffer(device, 1000, "bf16", "weights")
    assert buffer.address % 4096 == 0
    assert not buffer.array.any()
    assert (device.bytes_in_use("weights"), device.name) == (2000, "hip")
    del buffer
    assert (device.bytes_in_use("weights"), device.bytes_peak("weights")) == (0, 2000)


def test_a_width_beyond_the_reserved_is_refused(device: _native.Device) -> None:
    x, rstd = np.zeros((2, 40_000), np.float32), np.zeros(2, np.float32)
    with pytest.raises(_native.Error, match="norm_backward needs a workspace of"):
        device.norm_backward(x, x[0].copy(), None, x, None, rstd, x, x[0].copy())
