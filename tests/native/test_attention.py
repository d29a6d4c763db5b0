"""Tiled attention of every instruction set against the float64 reference, and what it promises about bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain._native import CpuDevice, Error, kernels
from tests import reference_ops as reference
from tests.native.arrays import ROUNDING, Array, Doubles, empty, same_bits, stored, values

ISAS: list[str] = kernels.tables()

pytestmark = pytest.mark.parametrize("isa", ISAS)


@dataclass
class Case:
    """q, k and v side by side, as a model stores them; scores are spread out, so that mistakes show."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_size: int
    documents: bool = False
    dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        print("seed", self.seed)
        generator = np.random.default_rng(self.seed)
        width = (self.heads + 2 * self.kv_heads) * self.head_size
        qkv = generator.normal(size=(self.batch, self.length, width)) * 1.7
        self.qkv = stored(qkv, self.dtype)
        dout = generator.normal(size=(self.batch, self.length, self.heads * self.head_size))
        self.dout = stored(dout, self.dtype)
        self.starts: NDArray[np.int32] | None = None
        if self.documents:
            begins = generator.random((self.batch, self.length)) < 4 / self.length
            begins[:, 0] = True
            starts = np.where(begins, np.arange(self.length), 0)
            self.starts = np.maximum.accumulate(starts, axis=1).astype(np.int32).reshape(-1)
        self.half = "bf16" if self.dtype == "fp32" else self.dtype
        self.sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "half": self.half}

    def split(self, x: Array) -> tuple[Array, Array, Array]:
        ends = np.cumsum([self.heads * self.head_size, self.kv_heads * self.head_size])
        return x[..., : ends[0]], x[..., ends[0] : ends[1]], x[..., ends[1] :]

    def flat(self, x: Array) -> Doubles:
        return values(np.ascontiguousarray(x), self.dtype).reshape(self.batch * self.length, -1)

    def forward(self, device: CpuDevice) -> tuple[Array, Array]:
        out = empty((self.batch, self.length, self.heads * self.head_size), self.dtype)
        lse = np.full((self.batch, self.heads, self.length), np.nan, np.float32)
        device.attention_forward(out, lse, *self.split(self.qkv), document_starts=self.starts, **self.sizes)
        return out, lse

    def backward(self, device: CpuDevice, out: Array, lse: Array) -> tuple[Array, Array, Array]:
        gradients = self.split(empty(self.qkv.shape, self.dtype))
        delta = np.full_like(lse, np.nan)
        tensors = (*gradients, delta, self.dout, out, lse, *self.split(self.qkv))
        device.attention_backward(*tensors, document_starts=self.starts, **self.sizes)
        return gradients

    def expected(self) -> tuple[Doubles, Doubles, tuple[Doubles, Doubles, Doubles]]:
        """out, lse, (dq, dk, dv)."""
        starts = np.zeros(self.batch * self.length, np.int32) if self.starts is None else self.starts
        q, k, v = (self.flat(x) for x in self.split(self.qkv))
        shape = (self.heads, self.kv_heads, self.length, starts)
        out = reference.attention_forward(q, k, v, *shape)
        gradients = reference.attention_backward(self.flat(self.dout), q, k, v, *shape)
        queries = reference.split_heads(q, self.heads, self.length)
        keys = reference.split_heads(k, self.kv_heads, self.length)
        keys = keys.repeat(self.heads // self.kv_heads, axis=1)
        scores = queries @ keys.swapaxes(2, 3) / np.sqrt(self.head_size)
        scores = np.where(reference.visible_keys(starts, self.length)[:, None], scores, -np.inf)
        return out, np.logaddexp.reduce(scores, axis=-1), gradients


def device_of(isa: str, head_size: int, threads: int = 2) -> CpuDevice:
    device = CpuDevice(isa, threads)
    device.reserve(1, 1, head_size)
    return device


def assert_near(actual: Doubles, wanted: Doubles, tolerance: float) -> None:
    """Relative to the largest element, or to 1 where all are smaller: the size of what was summed."""
    error = np.max(np.abs(actual - wanted)) / np.max(np.abs(wanted), initial=1.0)
    assert error <= tolerance, f"error {error:.3g} > {tolerance:g}"


def check(case: Case, isa: str) -> None:
    device = device_of(isa, case.head_size)
    out, lse = case.forward(device)
    gradients = case.backward(device, out, lse)
    expected_out, expected_lse, expected_gradients = case.expected()
    # Gradients use `out` as stored: where it is 16-bit, their delta carries its rounding.
    rounding = 0.0 if case.dtype == "fp32" else ROUNDING[case.dtype]
    assert_near(case.flat(out), expected_out, 2e-6 + 2 * rounding)
    assert np.max(np.abs(lse - expected_lse)) <= 2e-6 * (1 + np.max(np.abs(expected_lse)))
    for name, actual, wanted in zip("qkv", gradients, expected_gradients, strict=True):
        print("d" + name)
        assert_near(case.flat(actual), wanted, 5e-6 + 8 * rounding)


@pytest.mark.parametrize("head_size", [1, 37, 64, 80, 96, 128, 144, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_head_sizes(isa: str, head_size: int, documents: bool) -> None:
    check(Case(1, 150, 2, 1, head_size, documents, seed=1), isa)


@pytest.mark.parametrize("length", [1, 2, 17, 95, 96, 97, 126, 127, 128, 129, 130, 300])
def test_lengths(isa: str, length: int) -> None:
    check(Case(2, length, 2, 2, 16, seed=2), isa)
    check(Case(2, length, 2, 2, 16, documents=True, seed=3), isa)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_grouped_queries(isa: str, heads: int, kv_heads: int) -> None:
    check(Case(2, 140, heads, kv_heads, 24, documents=True, seed=4), isa)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_storage_types(isa: str, dtype: str) -> None:
    check(Case(2, 140, 4, 2, 40, documents=True, dtype=dtype, seed=5), isa)


def test_documents_are_apart(isa: str) -> None:
    """Each document gives the bits that it gives at the same place with nothing real around it."""
    case = Case(1, 300, 2, 1, 32, seed=6)
    case.starts = np.repeat([0, 100, 230], [100, 130, 70]).astype(np.int32)
    out, lse = case.forward(device_of(isa, 32))
    other = Case(1, 300, 2, 1, 32, seed=7)
    other.starts = case.starts
    other.qkv[:, 100:230] = case.qkv[:, 100:230]
    other_out, other_lse = other.forward(device_of(isa, 32))
    assert same_bits(out[:, 100:230].copy(), other_out[:, 100:230].copy())
    assert same_bits(lse[:, :, 100:230].copy(), other_lse[:, :, 100:230].copy())


def test_threads_do_not_change_bits(isa: str) -> None:
    for dtype in ("fp32", "bf16"):
        case = Case(2, 260, 4, 2, 40, documents=True, dtype=dtype, seed=8)
        results = []
        for threads in (1, 2, 3):
            device = device_of(isa, 40, threads)
            out, lse = case.forward(device)
            results.append([out, lse, *(x.copy() for x in case.backward(device, out, lse))])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("documents", [False, True])
def test_a_query_alone_has_the_bits_of_the_whole_sequence(isa: str, documents: bool) -> None:
    """Decoding with a cache: the cache is longer than what is filled, and what is beyond must not be read."""
    case = Case(2, 300, 4, 2, 48, documents, seed=9)
    device = device_of(isa, 48)
    whole, whole_lse = case.forward(device)
    q, _, _ = case.split(case.qkv)
    for first, last in [(0, 1), (64, 65), (127, 128), (128, 129), (200, 213), (299, 300), (150, 300)]:
        cache = np.full((2, 310, case.qkv.shape[2]), np.nan, np.float32)
        cache[:, :last] = case.qkv[:, :last]
        _, keys, key_values = case.split(cache)
        out = empty((2, last - first, q.shape[2]), "fp32")
        lse = np.full((2, 4, last - first), np.nan, np.float32)
        sizes = {**case.sizes, "query_offset": first}
        if case.starts is not None:
            sizes["document_starts"] = case.starts.reshape(2, 300)[:, first:last].reshape(-1).copy()
        device.attention_forward(out, lse, q[:, first:last], keys, key_values, **sizes)
        assert same_bits(out, whole[:, first:last].copy()), (first, last)
        assert same_bits(lse, whole_lse[:, :, first:last].copy()), (first, last)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_later_queries_alone(isa: str, dtype: str) -> None:
    """With an offset, and keys that no query sees: gradients of the queries' share, zero beyond.

    An even offset, no multiple of four: where words hold pairs, sums over queries begin at whole steps of them.
    """
    case = Case(1, 200, 4, 2, 24, dtype=dtype, seed=10)
    device = device_of(isa, 24)
    q, k, v = case.split(case.qkv)
    first, last = 50, 170
    case.dout[:, :first] = case.dout[:, last:] = 0
    _, _, expected = case.expected()
    out, lse = empty((1, last - first, q.shape[2]), dtype), np.empty((1, 4, last - first), np.float32)
    device.attention_forward(out, lse, q[:, first:last], k, v, query_offset=first, **case.sizes)
    dq, dk, dv = case.split(empty(case.qkv.shape, dtype))
    dout, delta = case.dout[:, first:last].copy(), np.empty_like(lse)
    tensors = (dq[:, first:last], dk, dv, delta, dout, out, lse, q[:, first:last], k, v)
    device.attention_backward(*tensors, query_offset=first, **case.sizes)
    dq[:, :first] = dq[:, last:] = 0
    for actual, wanted in zip((dq, dk, dv), expected, strict=True):
        assert_near(case.flat(actual), wanted, 5e-6 + (0.0 if dtype == "fp32" else 8 * ROUNDING[dtype]))
    assert not dk[:, last:].any()
    assert not dv[:, last:].any()


def test_large_scores_do_not_overflow(isa: str) -> None:
    case = Case(1, 140, 1, 1, 16, seed=11)
    case.qkv[:, :, :32] *= 300.0
    out, lse = case.forward(device_of(isa, 16))
    expected_out, expected_lse, _ = case.expected()
    assert np.isfinite(out).all()
    # Weights are exp of differences of scores near 10^6, of which fp32 keeps a tenth: look at the sums alone.
    assert np.max(np.abs(lse - expected_lse) / (1 + np.abs(expected_lse))) < 1e-6
    assert np.max(np.abs(out)) <= np.max(np.abs(expected_out)) * 1.5


def test_bad_arguments_are_named(isa: str) -> None:
    device = CpuDevice(isa, 1)
    case = Case(1, 10, 2, 1, 8, seed=12)
    with pytest.raises(Error, match="attention_forward needs a workspace"):
        Case(1, 10, 2, 1, 4000, seed=13).forward(device)
    q, k, v = case.split(case.qkv)
    out = empty(q.shape, "fp32")
    with pytest.raises(Error, match=r"kv_heads: 3 does not divide 2 heads"):
        device.attention_forward(out, None, q, k, v, heads=2, kv_heads=3)
    with pytest.raises(Error, match=r"k: the shape must be \(1, 10, 16\), not \(1, 10, 8\)"):
        device.attention_forward(out, None, q, k, v, heads=2, kv_heads=2)
    with pytest.raises(Error, match="10 query rows at offset 3 need as many keys, but there are 10 key rows"):
        device.attention_forward(out, None, q, k, v, heads=2, kv_heads=1, query_offset=3)
    starts = np.array([0, 0, 0, 0, 5, 5, 5, 5, 5, 5], np.int32)
    with pytest.raises(Error, match="document_starts: element 4 is 5, but its query is key 4"):
        device.attention_forward(out, None, q, k, v, heads=2, kv_heads=1, document_starts=starts)
    with pytest.raises(Error, match="v: must have the strides of k"):
        device.attention_forward(out, None, q, k, v.copy(), heads=2, kv_heads=1)
