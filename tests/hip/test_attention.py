"""Attention on emulated matrix units: the tests of the CPU's, at the head sizes that kernels are compiled for."""

from typing import Any

import numpy as np
import pytest

from pytrain import _native
from tests.native import test_attention as native_tests
from tests.native.arrays import same_bits
from tests.native.test_attention import Case, assert_near

HEAD_SIZES = [1, 37, 64, 80, 96, 128, 144, 200, 256]
# Errors seen, times about three. In 16-bit formats the weights are rounded before they meet the values.
TOLERANCE = {"fp32": 5e-6, "bf16": 1.5e-2, "fp16": 2e-3}


@pytest.fixture(autouse=True)
def on_hip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's tests build their own devices: they get this one."""
    monkeypatch.setattr(native_tests, "CpuDevice", lambda isa, threads: _native.hip_device(0))


def check(device: _native.Device, case: Case) -> None:
    out, lse = case.forward(device)
    gradients = case.backward(device, out, lse)
    expected_out, expected_lse, expected_gradients = case.expected()
    tolerance = TOLERANCE[case.dtype]
    assert_near(case.flat(out), expected_out, tolerance)
    assert np.max(np.abs(lse - expected_lse)) <= 4e-6 * (1 + np.max(np.abs(expected_lse)))
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_near(case.flat(actual), wanted, tolerance)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(device: _native.Device, head_size: int, dtype: str) -> None:
    check(device, Case(1, 70, 2, 1, head_size, documents=True, dtype=dtype, seed=1))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, 200])
def test_lengths(device: _native.Device, length: int) -> None:
    check(device, Case(2, length, 2, 2, 16, seed=2))
    check(device, Case(1, length, 2, 2, 16, documents=True, dtype="bf16", seed=3))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 1), (6, 2), (6, 6)])
def test_grouped_queries(device: _native.Device, heads: int, kv_heads: int) -> None:
    check(device, Case(2, 140, heads, kv_heads, 24, documents=True, seed=4))


def scattered_first_keys(dtype: str) -> Case:
    """Queries see themselves alone, but one of each sequence sees all: the least first key can be anywhere."""
    case = Case(8, 256, 1, 1, 16, documents=True, dtype=dtype, seed=5)
    starts = np.tile(np.arange(256, dtype=np.int32), (8, 1))
    starts[np.arange(8), 128 + np.array([1, 40, 63, 64, 77, 95, 100, 127])] = 0
    case.starts = starts.reshape(-1)
    return case


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_first_keys(device: _native.Device, dtype: str) -> None:
    check(device, scattered_first_keys(dtype))


def test_documents_are_apart() -> None:
    native_tests.test_documents_are_apart("hip")


@pytest.mark.parametrize("documents", [False, True])
def test_a_query_alone_has_the_bits_of_the_whole_sequence(documents: bool) -> None:
    native_tests.test_a_query_alone_has_the_bits_of_the_whole_sequence("hip", documents)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_later_queries_alone(dtype: str) -> None:
    native_tests.test_gradients_of_later_queries_alone("hip", dtype)


def test_large_scores_do_not_overflow() -> None:
    native_tests.test_large_scores_do_not_overflow("hip")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_order_of_threads_changes_no_bit(device: _native.Device, dtype: str) -> None:
    shim: Any = _native.hip_shim  # type: ignore[attr-defined]
    case = Case(1, 140, 2, 1, 40, documents=True, dtype=dtype, seed=8)
    results = []
    for order in ("ascending", "descending", "shuffled", "shuffled"):
        shim.set_order(order, len(results))
        out, lse = case.forward(device)
        results.append([out, lse, *(x.copy() for x in case.backward(device, out, lse))])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_a_gpu_cannot_do_is_refused(device: _native.Device) -> None:
    with pytest.raises(_native.Error, match="on a GPU head_size must be between 1 and 256, not 257"):
        Case(1, 10, 2, 1, 257, seed=13).forward(device)
    case = Case(1, 10, 2, 1, 8, seed=14)
    q, k, v = case.split(case.qkv)
    with pytest.raises(_native.Error, match="on a GPU q, k, v and out must be stored in one type"):
        device.attention_forward(np.zeros(q.shape, np.uint16), None, q, k, v, heads=2, kv_heads=1)
