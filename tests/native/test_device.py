"""Operations of the CPU device on rows against float64 NumPy, in every storage type, with any thread count.

Kernels are tested one by one in test_kernels.py, products and attention in their own files: here it is rows,
strides, chunks, storage types and sums over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain._native import CpuDevice, Error, kernels
from tests import reference_ops as reference

Doubles = NDArray[np.float64]
Array = NDArray[Any]

HALVES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
# Half a unit in the last place, and a little for the arithmetic before it.
ROUNDING = {"fp32": 3e-6, "bf16": 1.02 * 2**-8, "fp16": 1.02 * 2**-11}
EPS = 1e-5


class Case:
    """A device, random tensors in one storage type, and their exact values."""

    def __init__(self, isa: str, dtype: str, seed: int) -> None:
        print("seed", seed)
        self.dtype = dtype
        self.half = "bf16" if dtype == "fp32" else dtype
        self.device = CpuDevice(isa, 2)
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape: int, deviation: float = 1.0) -> Array:
        return self.store(self.generator.normal(0.0, deviation, shape))

    def store(self, values: Doubles) -> Array:
        x = values.astype(np.float32)
        return x if self.dtype == "fp32" else x.astype(HALVES[self.dtype]).view(np.uint16)

    def value(self, stored: Array) -> Doubles:
        if stored.dtype == np.float32:
            return stored.astype(np.float64)
        return stored.view(HALVES[self.half]).astype(np.float64)

    def close(self, stored: Array, expected: Doubles, floor: float = 1.0) -> None:
        actual = self.value(stored)
        assert actual.shape == expected.shape
        tolerance = ROUNDING["fp32" if stored.dtype == np.float32 else self.dtype]
        error = np.abs(actual - expected) / np.maximum(np.abs(expected), floor)
        assert error.max(initial=0.0) <= tolerance, f"worst error {error.max():.3g} > {tolerance:.3g}"

    def call(self, operation: str, *arguments: object, **options: object) -> None:
        getattr(self.device, operation)(*arguments, **options, half=self.half)


@pytest.fixture(params=kernels.tables())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def case(isa: str, request: pytest.FixtureRequest) -> Case:
    return Case(isa, request.param, seed=len(request.node.name))


# Plain data


@pytest.mark.parametrize("n", [0, 1, 4095, 4097, 40_001])
def test_convert_add_fill_copy(case: Case, n: int) -> None:
    x, y = case.normal(n), case.normal(n)
    wide = np.zeros(n, np.float32)
    case.call("convert", wide, x)
    assert np.array_equal(wide, case.value(x).astype(np.float32))
    again = np.empty_like(x)
    case.call("convert", again, wide)
    assert np.array_equal(again, x)
    expected = case.value(x) + case.value(y)
    case.call("add", x, y)
    case.close(x, expected)
    case.device.copy(again, x)
    assert np.array_equal(again, x)
    case.call("fill", x, 1.5)
    assert (case.value(x) == 1.5).all()


def test_fill_normal_is_the_same_in_any_pieces(case: Case) -> None:
    n = 20_011
    whole = np.zeros(n, np.float32)
    case.call("fill_normal", whole, 7, 2**63 + 5, 0, 0.02)
    words = [kernels.philox_normals(7, 2**63 + 5, block) for block in range(n // 4 + 1)]
    assert np.array_equal(whole, (np.float64(np.float32(0.02)) * np.ravel(words)[:n]).astype(np.float32))
    for first, last in [(0, 1), (1, 2), (3, 4097), (4097, n)]:
        part = case.store(np.zeros(last - first))
        case.call("fill_normal", part, 7, 2**63 + 5, first, 0.02)
        assert np.array_equal(part, case.store(whole[first:last].astype(np.float64)))


def test_memory_is_counted_by_kind(isa: str) -> None:
    device = CpuDevice(isa, 2)
    before = device.bytes_in_use("workspace")
    assert before > 0
    device.reserve(64, 30_000, 64)
    assert device.bytes_in_use("workspace") > before
    assert device.bytes_peak("workspace") >= device.bytes_in_use("workspace")
    assert device.bytes_in_use("weights") == 0


# Embedding and sums over rows


def test_embedding(case: Case) -> None:
    rows, hidden, context = 301, 131, 40
    begin, slice_rows = 10, 23
    tokens = case.generator.integers(0, 50, rows).astype(np.int32)
    positions = case.generator.integers(0, context, rows).astype(np.int32)
    table, places = case.normal(slice_rows, hidden), case.normal(context, hidden)
    local = (tokens >= begin) & (tokens < begin + slice_rows)
    picked = np.where(local, tokens - begin, 0)
    out = case.store(np.zeros((rows, hidden)))
    for position_table in (None, places):
        case.call("embed_forward", out, table, position_table, tokens, positions, begin)
        expected = case.value(table)[picked] * local[:, None]
        case.close(out, expected + (0 if position_table is None else case.value(places)[positions]))

    dout = case.normal(rows, hidden)
    gradients = case.generator.normal(size=(2, context, hidden)).astype(np.float32)
    dtable, dplaces = gradients[0, :slice_rows].copy(), gradients[1].copy()
    case.call("embed_backward", dtable, dplaces, dout, tokens, positions, begin)
    added = case.value(dout)
    summed = reference.embedding_backward(added[local], picked[local].astype(np.int32), slice_rows)
    case.close(dtable, gradients[0, :slice_rows] + summed, 10.0)
    case.close(dplaces, gradients[1] + reference.embedding_backward(added, positions, context), 10.0)
    untouched = dtable.copy()
    case.call("embed_backward", None, dplaces, dout, tokens, positions, begin)
    assert np.array_equal(dtable, untouched)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 64), (257, 65), (64, 200)])
def test_bias_backward(case: Case, m: int, n: int) -> None:
    wide = case.normal(m, n + 5)
    start = case.generator.normal(size=n).astype(np.float32)
    dbias = start.copy()
    case.call("bias_backward", dbias, wide[:, :n])
    case.close(dbias, start + case.value(wide)[:, :n].sum(axis=0), 10.0)


def test_residual_add(case: Case) -> None:
    x, partial, bias = case.normal(37, 131), case.normal(37, 131), case.normal(131)
    expected = case.value(x) + case.value(partial)
    y = x.copy()
    case.call("residual_add", y, partial, None)
    case.close(y, expected)
    case.call("residual_add", x, partial, bias)
    case.close(x, expected + case.value(bias))


# Norms

NORM_SHAPES = [(1, 1), (3, 131), (200, 65), (2500, 33), (5, 5000)]


@pytest.mark.parametrize(("rows", "width"), NORM_SHAPES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm(case: Case, kind: str, rows: int, width: int) -> None:
    case.device.reserve(rows, width, 64)
    centered = kind == "layernorm"
    x, weight, dy = case.normal(rows, width), case.normal(width), case.normal(rows, width)
    bias = case.normal(width) if centered else None
    y = case.store(np.zeros((rows, width)))
    mean = np.zeros(rows, np.float32) if centered else None
    rstd = np.zeros(rows, np.float32)
    case.call("norm_forward", y, mean, rstd, x, weight, bias, EPS)
    exact = case.value(x), case.value(weight)
    if centered:
        case.close(y, reference.layernorm_forward(*exact, case.value(bias), EPS))
        gradients: tuple[Doubles, ...] = reference.layernorm_backward(case.value(dy), *exact, EPS)
    else:
        case.close(y, reference.rmsnorm_forward(*exact, EPS))
        gradients = reference.rmsnorm_backward(case.value(dy), *exact, EPS)

    dx = case.normal(rows, width)
    dweight, dbias = case.generator.normal(size=(2, width)).astype(np.float32)
    expected = [case.value(dx) + gradients[0], dweight + gradients[1]]
    expected += [dbias + gradients[2]] if centered else []
    case.call("norm_backward", dx, dweight, dbias if centered else None, dy, mean, rstd, x, weight)
    condition = float(rstd.max())  # what the rounding of a small row is multiplied by
    for actual, wanted in zip((dx, dweight, dbias), expected, strict=False):
        case.close(actual, wanted, max(1.0, condition, float(np.abs(wanted).max())))


@pytest.mark.parametrize(("rows", "width"), [(3, 131), (64, 520), (25, 768), (7, 9001)])
def test_a_norm_of_rows_has_the_bits_of_each_row_alone(case: Case, rows: int, width: int) -> None:
    """Rows whose kernels share walks over memory share no numbers; the last of an odd number has no neighbour."""
    case.device.reserve(rows, width, 64)
    x = case.store(
        case.generator.normal(size=(rows, width)) * np.arange(1, rows + 1)[:, None] + np.arange(rows)[:, None]
    )
    weight, bias = case.normal(width), case.normal(width)
    y, alone = np.zeros((2, rows, width), x.dtype)
    statistics, apart = np.zeros((2, 2, rows), np.float32)
    for means in (statistics[0], None):
        apart_means = None if means is None else apart[0]
        case.call("norm_forward", y, means, statistics[1], x, weight, None if means is None else bias, EPS)
        for row in range(rows):
            one = slice(row, row + 1)
            own = None if apart_means is None else apart_means[one]
            case.call(
                "norm_forward", alone[one], own, apart[1, one], x[one], weight, None if own is None else bias, EPS
            )
        np.testing.assert_array_equal(y, alone)
        np.testing.assert_array_equal(statistics, apart)


def test_a_norm_wider_than_reserved_is_refused(isa: str) -> None:
    device = CpuDevice(isa, 2)
    x = np.zeros((2, 1_000_000), np.float32)  # products have reserved room for narrower ones
    with pytest.raises(Error, match="norm_forward needs a workspace"):
        device.norm_forward(x, None, np.zeros(2, np.float32), x, x[0], None, EPS)


# Activations and rotations


def test_gelu(case: Case) -> None:
    x, dy = case.normal(9001, deviation=2.0), case.normal(9001)
    y = np.empty_like(x)
    case.call("gelu_forward", y, x)
    case.close(y, reference.gelu_forward(case.value(x)), 0.1)
    expected = reference.gelu_backward(case.value(dy), case.value(x))
    dx, again = np.empty_like(x), np.zeros_like(x)
    case.call("gelu_backward", dx, dy, x, again)
    assert again.tobytes() == y.tobytes()
    case.call("gelu_backward", dy, dy, x)  # in place, and the gradient alone
    case.close(dy, expected, 0.1)
    assert dx.tobytes() == dy.tobytes()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 131), (3, 5000)])
def test_swiglu(case: Case, rows: int, width: int) -> None:
    gate_up, dy = case.normal(rows, 2 * width), case.normal(rows, width)
    y, dgate_up = np.empty_like(dy), np.empty_like(gate_up)
    gate, up = case.value(gate_up)[:, :width], case.value(gate_up)[:, width:]
    case.call("swiglu_forward", y, gate_up)
    case.close(y, reference.swiglu_forward(gate, up))
    again = np.zeros_like(y)
    case.call("swiglu_backward", dgate_up, dy, gate_up, again)
    assert again.tobytes() == y.tobytes()
    dgate_up[...] = 0
    case.call("swiglu_backward", dgate_up, dy, gate_up)
    case.close(dgate_up, np.concatenate(reference.swiglu_backward(case.value(dy), gate, up), axis=1))


@pytest.mark.parametrize(("heads", "head_size"), [(1, 2), (3, 64), (5, 200), (70, 128)])
def test_rope(case: Case, heads: int, head_size: int) -> None:
    rows, context, rotated = 19, 50, heads * head_size
    positions = case.generator.integers(0, context, rows).astype(np.int32)
    frequencies = reference.rope_frequencies(head_size, 10000.0)
    angles = np.arange(context)[:, None] * frequencies
    table = np.stack([np.cos(angles), np.sin(angles)], axis=2).astype(np.float32)
    for inverse, expected in ((False, reference.rope_forward), (True, reference.rope_backward)):
        wide = case.normal(rows, rotated + 3)
        before = wide.copy()
        case.call("rope", wide, heads, head_size, positions, table, inverse)
        assert np.array_equal(wide[:, rotated:], before[:, rotated:])
        case.close(wide[:, :rotated], expected(case.value(before)[:, :rotated], positions, frequencies))


# Head and loss


def statistics_of(case: Case, logits: Array, targets: Array, cuts: list[int]) -> Array:
    slices = []
    for begin, end in pairwise(cuts):
        part = np.zeros((len(targets), 3), np.float32)
        case.call("head_statistics", part, np.ascontiguousarray(logits[:, begin:end]), targets, begin)
        slices.append(part)
    return np.stack(slices)


@pytest.mark.parametrize("cuts", [[0, 9001], [0, 4000, 4001, 9001]])
def test_loss(case: Case, cuts: list[int]) -> None:
    rows, vocabulary = 33, cuts[-1]
    logits = case.normal(rows, vocabulary, deviation=3.0)
    targets = case.generator.integers(0, vocabulary, rows).astype(np.int32)
    targets[[0, 5]] = -1
    targets[1:4] = [0, 4000, vocabulary - 1]
    exact = case.value(logits)
    log_probability = reference.log_softmax(exact)
    counted = targets >= 0
    losses = -log_probability[np.arange(rows), targets] * counted

    scalars = np.array([1.0, 2.0, 0, 0, 0, 0.25])  # what earlier chunks of rows left, and the gradient scale
    lse = np.zeros(rows, np.float32)
    case.device.loss_forward(scalars, lse, statistics_of(case, logits, targets, cuts), targets)
    np.testing.assert_allclose(scalars[:2], [1.0 + losses.sum(), 2.0 + counted.sum()], rtol=1e-6)
    np.testing.assert_allclose(lse, exact[:, 0] - log_probability[:, 0], rtol=1e-6)

    expected = np.exp(log_probability)
    expected[np.arange(rows)[counted], targets[counted]] -= 1.0
    expected *= 0.25 * counted[:, None]
    for begin, end in pairwise(cuts):
        part = np.ascontiguousarray(logits[:, begin:end])
        case.call("loss_backward", part, lse, targets, scalars, begin)
        case.close(part, expected[:, begin:end], 1e-3 if case.dtype == "fp32" else 1e-2)
        assert not case.value(part)[~counted].any()


def gradient_place(logits: Array, dtype: str, place: str) -> Array | None:
    """Where the gradient goes: in place of fp32 logits, at the beginning of each row of theirs, or somewhere else."""
    if place == "elsewhere":
        room = np.full((len(logits), logits.shape[1] + 3), 7, np.float32 if dtype == "fp32" else np.uint16)
        return room[:, : logits.shape[1]]
    return None if dtype == "fp32" else logits.view(np.uint16)[:, : logits.shape[1]]


@pytest.mark.parametrize("place", ["over", "elsewhere"])
@pytest.mark.parametrize("width", [1, 70, 4097, 20_011])
def test_loss_and_gradient_in_one(case: Case, width: int, place: str) -> None:
    """Targets at both ends of a row and of a piece of it, ignored rows, and one that is nearly certain."""
    rows = 9
    logits = case.generator.normal(0.0, 3.0, (rows, width)).astype(np.float32)
    targets = case.generator.integers(0, width, rows).astype(np.int32)
    targets[[0, 5]] = -1
    targets[1:4] = [0, width - 1, min(width - 1, 4096)]
    logits[6, targets[6]] = 14.0
    exact = logits.astype(np.float64)
    log_probability = reference.log_softmax(exact)
    counted = targets >= 0
    picked = (np.arange(rows)[counted], targets[counted])
    expected = np.exp(log_probability) * counted[:, None]
    expected[picked] = np.expm1(log_probability[picked])

    parts = statistics_of(case, logits, targets, [0, width])
    scalars = np.array([1.0, 2.0, 0, 0, 0, 0.25])  # what earlier chunks of rows left, and the gradient scale
    apart, lse_apart = scalars.copy(), np.zeros(rows, np.float32)
    case.device.loss_forward(apart, lse_apart, parts, targets)
    lse, statistics = np.zeros(rows, np.float32), np.zeros((rows, 3), np.float32)
    gradient = gradient_place(logits, case.dtype, place)
    case.call("loss_forward_backward", scalars, lse, statistics, logits, targets, dlogits=gradient)
    np.testing.assert_array_equal(statistics, parts[0])
    np.testing.assert_array_equal(lse, lse_apart)
    np.testing.assert_array_equal(scalars, apart)
    np.testing.assert_allclose(scalars[:2], [1.0 - log_probability[picked].sum(), 2.0 + counted.sum()], rtol=1e-6)
    got = case.value(np.ascontiguousarray(logits if gradient is None else gradient))
    assert not got[~counted].any()
    # A probability near 1 is off by a rounding of 1; fp16 has subnormals.
    floor = np.full((rows, width), 1e-7 if case.dtype == "fp16" else 1e-38)
    floor[picked] = 1e-7
    relative = {"fp32": 3e-6, "bf16": 2.0**-8, "fp16": 2.0**-10}[case.dtype]
    assert (np.abs(got - 0.25 * expected) <= relative * np.abs(0.25 * expected) + floor).all()
    if gradient is not None and place == "elsewhere":
        assert (gradient.base[:, width:] == 7).all()


def test_loss_and_gradient_in_one_refuses_16_bit_logits(isa: str) -> None:
    case = Case(isa, "bf16", 1)
    logits, targets, lse = case.normal(2, 5), np.zeros(2, np.int32), np.zeros(2, np.float32)
    with pytest.raises(Error, match="loss_forward_backward: logits must be fp32, not bf16"):
        case.call("loss_forward_backward", np.zeros(6), lse, np.zeros((2, 3), np.float32), logits, targets)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_logit_makes_the_loss_nan(isa: str, bad: float) -> None:
    case = Case(isa, "fp32", 5)
    logits = case.normal(3, 70)
    logits[1, 69] = bad
    targets = np.array([1, 2, 3], np.int32)
    scalars, lse = np.zeros(6), np.zeros(3, np.float32)
    case.device.loss_forward(scalars, lse, statistics_of(case, logits, targets, [0, 70]), targets)
    assert np.isnan(scalars[0])
    assert np.isfinite(lse[[0, 2]]).all()
    scalars[:] = [0, 0, 0, 0, 0, 1]
    case.device.loss_forward_backward(scalars, lse, np.zeros((3, 3), np.float32), logits, targets)
    assert np.isnan(scalars[0])
    assert np.isfinite(lse[[0, 2]]).all()
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


# Optimizer


@pytest.mark.parametrize("n", [0, 1, 5000, 70_001])
def test_sum_squares(case: Case, n: int) -> None:
    x = case.normal(n)
    total = np.array([3.0])
    case.call("sum_squares", total, x)
    np.testing.assert_allclose(total, 3.0 + (case.value(x) ** 2).sum(), rtol=1e-13)


@pytest.mark.parametrize(
    ("total", "limit", "scale", "norm", "clip", "finite"),
    [
        (16.0, 0.0, 1.0, 4.0, 1.0, 1.0),
        (16.0, 1.0, 1.0, 4.0, 0.25, 1.0),
        (16.0, 5.0, 1.0, 4.0, 1.0, 1.0),
        (64.0, 1.0, 4.0, 2.0, 0.125, 1.0),
        (0.0, 1.0, 2.0, 0.0, 0.5, 1.0),
        (np.inf, 1.0, 1.0, np.inf, 0.0, 0.0),
    ],
)
def test_finish_norm(
    isa: str, total: float, limit: float, scale: float, norm: float, clip: float, finite: float
) -> None:
    scalars = np.zeros(6)
    CpuDevice(isa, 1).finish_norm(scalars, np.array([total]), limit, scale)
    assert scalars[2:5].tolist() == [norm, clip, finite]


def test_a_nan_gradient_is_not_finite(isa: str) -> None:
    scalars = np.zeros(6)
    CpuDevice(isa, 1).finish_norm(scalars, np.array([np.nan]), 1.0, 1.0)
    assert scalars[4] == 0.0


ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step_size": 3e-3, "correction2": 1.3, "decay": 1e-3}


def test_adamw(case: Case) -> None:
    n = 9001
    master, m, gradient = case.generator.normal(size=(3, n)).astype(np.float32)
    v = case.generator.normal(size=n).astype(np.float32) ** 2
    slope = case.store(gradient.astype(np.float64))
    weights = case.store(np.zeros(n))
    before = master.copy(), m.copy(), v.copy()
    scalars = np.array([0, 0, 0, 0.5, 0.0, 0])
    case.call("adamw", weights, master, m, v, slope, scalars, **ADAMW)
    assert all(np.array_equal(now, old) for now, old in zip((master, m, v), before, strict=True))
    assert not weights.any(), "a step that is not finite must change nothing"

    scalars[4] = 1.0
    case.call("adamw", weights, master, m, v, slope, scalars, **ADAMW)
    g = case.value(slope) * 0.5
    new_m, new_v = 0.9 * before[1] + 0.1 * g, 0.95 * before[2] + 0.05 * g * g
    expected = before[0] * (1 - 1e-3) - 3e-3 * new_m / (np.sqrt(new_v) * 1.3 + 1e-8)
    case.close(m, new_m)
    case.close(v, new_v)
    case.close(master, expected)
    assert np.array_equal(weights, case.store(master.astype(np.float64)))
    same = master.copy()
    case.call("adamw", same, same, m, v, slope, scalars, **ADAMW)
    assert not np.array_equal(same, master)


# Threads and subnormals


def results(operation: Callable[[CpuDevice], list[Array]], isa: str) -> list[list[Array]]:
    return [operation(CpuDevice(isa, threads)) for threads in (1, 2, 3, 7)]


def every_sum(device: CpuDevice) -> list[Array]:
    """The operations that add over rows or elements, where the order could depend on the threads."""
    generator = np.random.default_rng(77)
    rows, width = 777, 203
    x, dy, dx = generator.normal(size=(3, rows, width)).astype(np.float32)
    weight, bias, dweight, dbias = generator.normal(size=(4, width)).astype(np.float32)
    y, mean, rstd = np.empty_like(x), np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    device.norm_forward(y, mean, rstd, x, weight, bias, EPS)
    device.norm_backward(dx, dweight, dbias, dy, mean, rstd, x, weight)
    tokens = generator.integers(0, 11, rows).astype(np.int32)
    dtable, dplaces = np.zeros((2, 11, width), np.float32)
    device.embed_backward(dtable, dplaces, dy, tokens, tokens[::-1].copy())
    column_sums, total = np.zeros(width, np.float32), np.zeros(1)
    device.bias_backward(column_sums, dy)
    device.sum_squares(total, x)
    statistics, lse, scalars = np.zeros((1, rows, 3), np.float32), np.zeros(rows, np.float32), np.ones(6)
    device.head_statistics(statistics[0], x, tokens)
    device.loss_forward(scalars, lse, statistics, tokens)
    at_once, both = x.copy(), np.ones(6)
    device.loss_forward_backward(both, np.zeros_like(lse), np.zeros_like(statistics[0]), at_once, tokens)
    device.loss_backward(x, lse, tokens, scalars)
    sums = [dtable, dplaces, column_sums, total, statistics, lse, scalars, x, at_once, both]
    return [y, mean, rstd, dx, dweight, dbias, *sums]


def test_results_do_not_depend_on_the_threads(isa: str) -> None:
    first, *others = results(every_sum, isa)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a.tobytes() == b.tobytes()


def test_subnormals_are_flushed_inside_and_survive_outside(isa: str) -> None:
    n = 100_000  # several tasks, so that several threads take part
    tiny = np.full(n, 1e-40, np.float32)
    total = tiny.copy()
    CpuDevice(isa, 3).add(total, tiny)
    assert not total.any(), "subnormals slow an operation down: it should flush them"
    assert (tiny + tiny > tiny).all(), "a native call left its flush mode behind"
