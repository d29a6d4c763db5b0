"""How attention is cut into tiles, and which way round its products are: the bits may not tell."""

from __future__ import annotations

import numpy as np
import pytest

from pytrain._native import kernels
from tests.native.arrays import empty, same_bits
from tests.native.test_attention import Case, check, device_of

pytestmark = pytest.mark.parametrize("isa", kernels.tables())


@pytest.mark.parametrize("documents", [False, True])
def test_several_tiles_of_keys_backward(isa: str, documents: bool) -> None:
    """A tile of keys is about 256: two whole ones and a thin third."""
    check(Case(1, 530, 2, 1, 24, documents, seed=31), isa)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("head_size", [64, 520])
def test_tiles_of_queries_do_not_change_bits(isa: str, dtype: str, head_size: int) -> None:
    """One tile, several, and as many as groups, the last of which has one query; wide heads have smaller tiles."""
    case = Case(1, 481 if head_size == 64 else 193, 1, 1, head_size, dtype=dtype, seed=32)
    out, lse = case.forward(device_of(isa, head_size, 1))
    for threads in (2, 3, 40):
        other_out, other_lse = case.forward(device_of(isa, head_size, threads))
        assert same_bits(out, other_out), threads
        assert same_bits(lse, other_lse), threads


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("head_size", [40, 64])
def test_few_and_many_queries_have_the_same_bits(isa: str, dtype: str, documents: bool, head_size: int) -> None:
    """Up to a tile's rows, queries are rows of the products; above, columns, but for a few left over.

    One alone has a way of its own, which reads fp32 values where they lie if the head is whole tiles wide.
    """
    case = Case(1, 290, 2, 1, head_size, documents, dtype=dtype, seed=33)
    device = device_of(isa, head_size)
    whole, whole_lse = case.forward(device)
    q, k, v = case.split(case.qkv)
    for first, rows in [(first, rows) for first in (0, 125, 126, 241) for rows in (1, 2, 4, 5, 6, 7, 13, 14, 15, 33)]:
        last = first + rows
        out, lse = empty((1, rows, q.shape[2]), dtype), np.full((1, 2, rows), np.nan, np.float32)
        sizes = {**case.sizes, "query_offset": first}
        if case.starts is not None:
            sizes["document_starts"] = case.starts[first:last].copy()
        device.attention_forward(out, lse, q[:, first:last], k[:, :last], v[:, :last], **sizes)
        assert same_bits(out, whole[:, first:last].copy()), (first, last)
        assert same_bits(lse, whole_lse[:, :, first:last].copy()), (first, last)


def test_gradients_do_not_depend_on_how_many_heads_are_under_way(isa: str) -> None:
    """Each thread sums dq of one head at a time in room of its own."""
    case = Case(3, 70, 4, 4, 24, seed=34)
    results = []
    for threads in (1, 2, 4, 12):
        device = device_of(isa, 24, threads)
        results.append([x.copy() for x in case.backward(device, *case.forward(device))])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
