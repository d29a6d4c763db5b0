"""Products of fp16 matrices in chains of fp16 multiply-adds: the same bits as a model of them in NumPy.

An instruction set without chains refuses them; that is what the tests then check.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

from pytrain._native import CpuDevice, Error, kernels
from tests.native.arrays import Array, empty, same_bits, stored, strided, values

CHAIN = 64
"""kChain of native/cpu/sve/fp16_chains.h."""
TRANSPOSES = list(itertools.product([False, True], repeat=2))
# Around a tile, odd and even depths, one word, one chain and two, one block of k and more.
SIZES = [
    (0, 5, 3), (5, 0, 3), (4, 5, 0), (1, 1, 1), (3, 16, 2), (7, 17, 3), (12, 32, 126), (13, 33, 127), (12, 64, 128),
    (29, 9, 129), (11, 70, 257), (14, 35, 1100),
]  # fmt: skip

pytestmark = pytest.mark.parametrize("isa", kernels.tables())


def chained(isa: str, threads: int = 1) -> CpuDevice | None:
    """A device with chains, or None where the instruction set has none and says so."""
    if isa.startswith("sve"):
        return CpuDevice(isa, threads, fp16_chains=True)
    with pytest.raises(Error, match=f"need an Arm CPU with SVE; the {isa} kernels have none"):
        CpuDevice(isa, threads, fp16_chains=True)
    return None


def draw(*shape: int, seed: int) -> Array:
    print("seed", seed)
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


@cache
def operands(m: int, n: int, k: int) -> tuple[Array, Array]:
    """The bits of a (m, k) and b (k, n)."""
    return stored(draw(m, k, seed=1), "fp16"), stored(draw(k, n, seed=2), "fp16")


@cache
def chain_sums(m: int, n: int, k: int) -> list[Array]:
    """What each chain, of even and of odd elements of k together, adds to c, in fp32.

    A product and a sum are exact in float64, so that rounding to fp16 is a multiply-add's one rounding.
    """
    a, b = (values(x, "fp16") for x in operands(m, n, k))
    sums = []
    for first in range(0, k, 2 * CHAIN):
        halves = np.zeros((2, m, n), np.float16)
        for p in range(first, min(first + 2 * CHAIN, k)):
            halves[p % 2] = (halves[p % 2].astype(np.float64) + np.outer(a[:, p], b[p])).astype(np.float16)
        sums.append(halves[0].astype(np.float32) + halves[1].astype(np.float32))
    return sums


@pytest.mark.parametrize(("transpose_a", "transpose_b"), TRANSPOSES)
@pytest.mark.parametrize("result", ["fp32", "fp16"])
def test_every_transpose_and_size(isa: str, transpose_a: bool, transpose_b: bool, result: str) -> None:
    device = chained(isa)
    if device is None:
        return
    for (m, n, k), accumulate in itertools.product(SIZES, [False, True]):
        a, b = operands(m, n, k)
        before = stored(draw(m, n, seed=3), result)
        c = strided(before if accumulate else empty((m, n), result), 5)
        stored_a, stored_b = (strided(np.ascontiguousarray(x), gap) for x, gap in
                              ((a.T if transpose_a else a, 3), (b.T if transpose_b else b, 1)))  # fmt: skip
        device.matmul(
            c,
            stored_a,
            stored_b,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            accumulate=accumulate,
            half="fp16",
        )
        added = values(before, result).astype(np.float32) if accumulate else np.zeros((m, n), np.float32)
        expected = added.copy() if result == "fp32" else np.zeros((m, n), np.float32)
        for chain in chain_sums(m, n, k):
            expected = expected + chain
        if result == "fp16" and accumulate:
            expected = expected + added
        found = np.ascontiguousarray(c)
        wanted = expected if result == "fp32" else expected.astype(np.float16).view(np.uint16)
        if k > 512:  # a block of k has its own sum, whose length hangs on the caches
            assert np.allclose(values(found, result), values(wanted, result), rtol=1e-3, atol=1e-4)
        else:
            assert np.array_equal(values(found, result), values(wanted, result)), (m, n, k, accumulate)
        filler = values(np.ascontiguousarray(c.base), result)[:, n:]
        assert np.isnan(filler).all(), "wrote beside c"


@pytest.mark.parametrize("along", [False, True])
def test_packing_of_pairs(isa: str, along: bool) -> None:
    """Neighbours in k side by side, zeros as padding, nothing beside the panel."""
    device = chained(isa)
    if device is None:
        return
    for width, panel_width in [(1, 1), (3, 5), (12, 12), (7, 12), (16, 16), (32, 32), (31, 32), (17, 40)]:
        for k in (1, 2, 3, 15, 16, 17, 33, 63, 101):
            shape = (width, k) if along else (k, width)
            source = strided(stored(draw(*shape, seed=4), "fp16"), 2)
            words = (k + 1) // 2
            room = np.full((words + 2, panel_width), np.nan, np.float32)
            device.pack(room[1:-1], source, along, half="fp16", pairs=True)
            vectors = np.zeros((2 * words, panel_width), np.uint16)
            vectors[:k, :width] = source.T if along else source
            packed = np.ascontiguousarray(room[1:-1]).view(np.uint16).reshape(words, panel_width, 2)
            assert np.array_equal(packed, vectors.reshape(words, 2, panel_width).transpose(0, 2, 1))
            assert np.isnan(room[[0, -1]]).all(), "wrote beside the panel"


def test_the_error_that_the_page_states(isa: str) -> None:
    """Against float64, over the root mean square of c: what native/cpu/sve/README.md says of chains of 64."""
    device = chained(isa)
    if device is None:
        return
    a, b = operands(24, 32, 2048)
    exact = values(a, "fp16") @ values(b, "fp16")
    found = {name: empty((24, 32), "fp32") for name in ("chains", "fp32")}
    device.matmul(found["chains"], a, b, half="fp16")
    CpuDevice(isa, 1).matmul(found["fp32"], a, b, half="fp16")
    scale = np.sqrt(np.mean(exact**2))
    chains, plain = (np.abs(c - exact) / scale for c in found.values())
    print(f"chains: median {np.median(chains):.2e}, worst {chains.max():.2e}; fp32: worst {plain.max():.2e}")
    assert 3e-4 <= np.median(chains) <= 1.2e-3
    assert chains.max() <= 8e-3
    assert plain.max() <= 1e-5, "without chains the sums are fp32"


def test_what_is_too_large_for_fp16_is_infinite(isa: str) -> None:
    """So that the loss scale falls; nothing is clipped in silence."""
    device = chained(isa)
    if device is None:
        return
    a, b, c = np.full((3, 20), 300.0, np.float32), np.full((20, 4), 300.0, np.float32), empty((3, 4), "fp32")
    a[1] = 1.0
    a[2, 5] = np.nan
    device.matmul(c, stored(a, "fp16"), stored(b, "fp16"), half="fp16")
    assert np.isposinf(c[0]).all()
    assert np.array_equal(c[1], np.full(4, 6000.0))
    assert np.isnan(c[2]).all()


def test_other_operands_and_attention_stay_fp32(isa: str) -> None:
    device = chained(isa)
    if device is None:
        return
    plain = CpuDevice(isa, 1)
    whole, half = draw(20, 50, seed=5), stored(draw(50, 40, seed=6), "fp16")
    results = [empty((20, 40), "fp32") for _ in range(2)]
    for one, c in zip((device, plain), results, strict=True):
        one.matmul(c, whole, half, half="fp16")
    assert same_bits(*results)
    outputs: list[Any] = []
    q, k, v = (stored(draw(1, 40, 128, seed=seed), "fp16") for seed in (7, 8, 9))
    for one in (device, plain):
        one.reserve(40, 128, 64)
        out, lse = empty((1, 40, 128), "fp16"), empty((1, 2, 40), "fp32")
        one.attention_forward(out, lse, q, k, v, heads=2, kv_heads=2, half="fp16")
        outputs.append(out)
    assert same_bits(*outputs)


def test_the_peak_counts_two_elements_a_word(isa: str) -> None:
    device = chained(isa)
    if device is not None:
        assert device.peak_flops(10, "fp16") == 2 * device.peak_flops(10, "fp32") > 0
