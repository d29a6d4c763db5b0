"""Attention backward goes by heads or by tiles, as heads and threads suggest: the bits may not tell which."""

import numpy as np
import pytest

from pytrain._native import kernels
from tests.native.arrays import empty, same_bits
from tests.native.test_attention import Case, device_of

pytestmark = pytest.mark.parametrize("isa", kernels.tables())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("documents", [False, True])
def test_both_ways_give_the_same_bits(isa: str, dtype: str, heads: int, kv_heads: int, documents: bool) -> None:
    case = Case(2, 270, heads, kv_heads, 40, documents, dtype=dtype, seed=21)
    results = []
    for threads in (1, 2, 16):  # one thread: by heads; sixteen for so few heads: by tiles
        device = device_of(isa, 40, threads)
        out, lse = case.forward(device)
        results.append([x.copy() for x in case.backward(device, out, lse)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_ways_with_an_offset(isa: str, dtype: str) -> None:
    """Fewer queries than keys, the last keys seen by none."""
    case = Case(1, 300, 2, 1, 24, dtype=dtype, seed=22)
    q, k, v = case.split(case.qkv)
    first, last = 90, 280
    results = []
    for threads in (1, 16):
        device = device_of(isa, 24, threads)
        out, lse = empty((1, last - first, q.shape[2]), dtype), np.empty((1, 2, last - first), np.float32)
        sizes = {**case.sizes, "query_offset": first}
        device.attention_forward(out, lse, q[:, first:last], k, v, **sizes)
        dq, dk, dv = case.split(empty(case.qkv.shape, dtype))
        dout, delta = case.dout[:, first:last].copy(), np.empty_like(lse)
        tensors = (dq[:, first:last], dk, dv, delta, dout, out, lse, q[:, first:last], k, v)
        device.attention_backward(*tensors, **sizes)
        results.append([dq.copy(), dk.copy(), dv.copy()])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][1][:, last:].any()


@pytest.mark.parametrize("documents", [False, True])
def test_a_bf16_query_alone_has_the_bits_of_the_whole_sequence(isa: str, documents: bool) -> None:
    """Weights are rounded in pairs of keys: an odd number of visible ones may not show."""
    case = Case(2, 300, 4, 2, 48, documents, dtype="bf16", seed=23)
    device = device_of(isa, 48)
    whole, whole_lse = case.forward(device)
    q, _, _ = case.split(case.qkv)
    for first, last in [(0, 1), (64, 65), (127, 128), (200, 213), (299, 300), (150, 299)]:
        cache = np.full((2, 310, case.qkv.shape[2]), 0xFFFF, np.uint16)  # NaN, where nothing is filled
        cache[:, :last] = case.qkv[:, :last]
        _, keys, key_values = case.split(cache)
        out = empty((2, last - first, q.shape[2]), "bf16")
        lse = np.full((2, 4, last - first), np.nan, np.float32)
        sizes = {**case.sizes, "query_offset": first}
        if case.starts is not None:
            sizes["document_starts"] = case.starts.reshape(2, 300)[:, first:last].reshape(-1).copy()
        device.attention_forward(out, lse, q[:, first:last], keys, key_values, **sizes)
        assert same_bits(out, whole[:, first:last].copy()), (first, last)
        assert same_bits(lse, whole_lse[:, :, first:last].copy()), (first, last)
