"""Products of two bf16 operands: by instructions for them where the instruction set has any, widened elsewhere.

The reference multiplies the rounded operands in float64. Every table is held to the same bounds, so that a bf16 run
means the same on each.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from pytrain._native import CpuDevice, kernels
from tests.native.arrays import ROUNDING, Array, empty, same_bits, stored, strided, values
from tests.reference_ops import gelu_forward

ISAS: list[str] = kernels.tables()
PAIRED = [isa for isa in ISAS if kernels.block_sizes(isa, "bf16")["word_depth"] == 2]
"""Whose panels hold bf16: a word is a pair. AVX-512 takes one at a step, BFMMLA two."""
TRANSPOSES = list(itertools.product([False, True], repeat=2))
# Around a tile, odd and even depths, a word, a step of two and a vector of words, one block of k and two.
SIZES = [
    (1, 1, 1), (0, 5, 3), (5, 0, 3), (4, 5, 0), (3, 16, 2), (7, 17, 3), (14, 32, 32), (15, 33, 33), (13, 31, 31),
    (33, 8, 63), (29, 200, 65), (48, 96, 1023), (30, 40, 1024), (31, 70, 1025), (17, 35, 2500),
]  # fmt: skip


def random(*shape: int, seed: int) -> Array:
    print("seed", seed)
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def operand(rows: int, columns: int, transpose: bool, seed: int, gap: int = 3) -> Array:
    """The bits of a matrix of op(x) (rows, columns), as stored: its rows lie in wider ones of NaN."""
    shape = (columns, rows) if transpose else (rows, columns)
    return strided(stored(random(*shape, seed=seed), "bf16"), gap)


def exact(x: Array, transpose: bool = False) -> Array:
    doubles = values(np.ascontiguousarray(x), "fp32" if x.dtype == np.float32 else "bf16")
    return doubles.T if transpose else doubles


def bound(a: Array, b: Array, extra: Array | float = 0.0) -> Array:
    """fp32 sums of products that are exact; a shifted element is 100,000 times beyond it."""
    return 2.0**-21 * (np.abs(a) @ np.abs(b) + np.abs(extra)) + 1e-30


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("transpose_a", "transpose_b"), TRANSPOSES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("result", ["fp32", "bf16"])
def test_every_transpose_and_size(
    isa: str, transpose_a: bool, transpose_b: bool, accumulate: bool, result: str
) -> None:
    device = CpuDevice(isa, 2)
    for m, n, k in SIZES:
        a, b = operand(m, k, transpose_a, 1), operand(k, n, transpose_b, 2, gap=1)
        before = stored(random(m, n, seed=3), result)
        c = strided(before if accumulate else empty((m, n), result), 5)
        device.matmul(c, a, b, transpose_a=transpose_a, transpose_b=transpose_b, accumulate=accumulate)
        left, right = exact(a, transpose_a), exact(b, transpose_b)
        extra = exact(before) if accumulate else np.zeros((m, n))
        expected = left @ right + extra
        allowed = bound(left, right, extra) + (ROUNDING["bf16"] * np.abs(expected) if result == "bf16" else 0.0)
        worst = np.max(np.abs(exact(c) - expected) / allowed, initial=0.0)
        assert worst <= 1.0, f"error of {worst:.3g} times the bound at {(m, n, k)}"
        filler = exact(np.ascontiguousarray(c.base))[:, n:]
        assert np.isnan(filler).all(), "wrote beside c"


@pytest.mark.parametrize("isa", ISAS)
def test_epilogue_with_bf16_operands(isa: str) -> None:
    """On both sides of one block of k: sums in the thread's scratch, and in the workspace."""
    device = CpuDevice(isa, 2)
    for m, n, k in [(50, 300, 500), (130, 400, 1500), (2, 70, 30)]:
        a, b = operand(m, k, False, 11), operand(k, n, True, 12)
        bias, residual = stored(random(n, seed=13), "bf16"), stored(random(m, n, seed=14), "bf16")
        c, activated = empty((m, n), "bf16"), empty((m, n), "bf16")
        device.matmul(c, a, b, transpose_b=True, bias=bias, residual=residual, activated=activated)
        extra = exact(bias) + exact(residual)
        left, right = exact(a), exact(b, True)
        expected = left @ right + extra
        error = np.abs(exact(c) - expected)
        assert np.all(error <= bound(left, right, extra) + ROUNDING["bf16"] * np.abs(expected))
        wanted = gelu_forward(exact(c))
        assert np.all(np.abs(exact(activated) - wanted) <= 2 * ROUNDING["bf16"] * np.abs(wanted) + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_bits(isa: str) -> None:
    for (m, n, k), transpose_a in itertools.product([(5, 200, 1500), (120, 333, 600)], [False, True]):
        a, b = operand(m, k, transpose_a, 15), operand(k, n, False, 16)
        results = []
        for threads in (1, 2, 3):
            c = empty((m, n), "bf16")
            CpuDevice(isa, threads).matmul(c, a, b, transpose_a=transpose_a)
            results.append(c)
        assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("result", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [700, 1801])
def test_a_row_does_not_know_its_neighbours(isa: str, result: str, k: int) -> None:
    device = CpuDevice(isa, 2)
    n = 90
    a, b = stored(random(1200, k, seed=17), "bf16"), operand(k, n, True, 18)
    whole = empty((1200, n), result)
    device.matmul(whole, a, b, transpose_b=True)
    for first, last in [(0, 1), (5, 18), (700, 713), (1, 33), (1000, 1033), (1199, 1200)]:
        part = empty((last - first, n), result)
        device.matmul(part, a[first:last], b, transpose_b=True)
        assert same_bits(part, whole[first:last]), (first, last)


@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa: str) -> None:
    """Infinity and NaN arrive; what is below the normal numbers of bf16 may be taken for zero."""
    device = CpuDevice(isa, 1)
    a, b = np.ones((3, 50), np.float32), np.ones((50, 4), np.float32)
    a[0, 7], a[1, 8], b[9, 3] = np.inf, np.nan, 1e-39
    c = empty((3, 4), "fp32")
    device.matmul(c, stored(a, "bf16"), stored(b, "bf16"))
    assert np.isposinf(c[0]).all()
    assert np.isnan(c[1]).all()
    assert np.array_equal(c[2], [50.0, 50.0, 50.0, 49.0])


@pytest.mark.parametrize("isa", PAIRED)
@pytest.mark.parametrize("source_type", ["bf16", "fp32"])
@pytest.mark.parametrize("along", [False, True])
def test_packing_of_pairs(isa: str, source_type: str, along: bool) -> None:
    """Neighbours in k side by side, rounded to nearest even, zeros as padding, nothing beside the panel."""
    device = CpuDevice(isa, 1)
    side = kernels.block_sizes(isa, "bf16")["step_words"]
    for width, panel_width in [
        (1, 1), (3, 5), (8, 8), (10, 10), (11, 12), (12, 12), (14, 14), (9, 14), (16, 16), (20, 24), (32, 32),
        (31, 32), (17, 40),
    ]:  # fmt: skip
        for k in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 65, 101):
            shape = (width, k) if along else (k, width)
            source = strided(stored(random(*shape, seed=26), source_type), 2 + panel_width % 8)
            words = -(-k // (2 * side)) * side
            room = np.full((words + 2, panel_width), np.nan, np.float32)
            before = room.copy()
            device.pack(room[1:-1], source, along, pairs=True)
            vectors = np.zeros((2 * words, panel_width), np.uint16)
            rounded = exact(source).astype(ml_dtypes.bfloat16).view(np.uint16)
            vectors[:k, :width] = rounded.T if along else rounded
            packed = np.ascontiguousarray(room[1:-1]).view(np.uint16).reshape(-1, panel_width, 2 * side)
            expected = vectors.reshape(-1, 2 * side, panel_width).transpose(0, 2, 1)
            assert np.array_equal(packed, expected), (width, panel_width, k)
            assert same_bits(room[[0, -1]], before[[0, -1]]), "wrote beside the panel"


@pytest.mark.parametrize("isa", ISAS)
def test_both_peaks_count_what_they_did(isa: str) -> None:
    device = CpuDevice(isa, 1)
    once = [device.peak_flops(10, dtype) for dtype in ("fp32", "bf16", "fp16")]
    assert once[0] == once[2] > 0
    assert (once[1] == once[0]) == (isa not in PAIRED)
    assert device.peak_flops(30, "bf16") == 3 * once[1]


@pytest.mark.parametrize("isa", ISAS)
def test_gradient_of_logits_over_their_own_rows(isa: str) -> None:
    """bf16 gradients that begin where their row of fp32 logits does; rows longer than a piece."""
    rows, width = 9, 9001
    logits = random(rows, width, seed=27) * 3
    targets = np.array([0, 4096, 4095, 9000, 8192, -1, 77, -1, 3], np.int32)
    device = CpuDevice(isa, 2)
    scalars = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.5])
    doubles = logits.astype(np.float64)
    lse = np.logaddexp.reduce(doubles, axis=1)
    expected = np.exp(doubles - lse[:, None])
    expected[np.arange(rows), np.maximum(targets, 0)] -= 1.0
    expected *= 0.5 * (targets >= 0)[:, None]
    in_place = logits.copy()
    overlaid = in_place.view(np.uint16)[:, :width]
    device.loss_backward(in_place, lse.astype(np.float32), targets, scalars, dlogits=overlaid)
    error = np.abs(values(overlaid.copy(), "bf16") - expected)
    assert np.all(error <= ROUNDING["bf16"] * np.abs(expected) + 1e-6 * np.abs(expected) + 1e-30)
    assert not values(overlaid.copy(), "bf16")[targets < 0].any()
