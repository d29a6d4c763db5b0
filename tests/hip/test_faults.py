"""What the other tests notice: every barrier of every kernel, left out in turn, fails one of them, and so do two
exchanged rows in the results of any kernel's matrix instructions.

The shim leaves the barrier out (or exchanges the rows) in one kernel at a time; nothing is compiled anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.hip import readable
from pytrain import _native
from tests.hip import test_attention, test_matmul, test_operations
from tests.native import test_attention as native_attention
from tests.native import test_device as native_device
from tests.native import test_matmul as native_matmul
from tests.native.test_attention import Case as AttentionCase
from tests.native.test_device import Case

SHIM: Any = getattr(_native, "hip_shim", None)
ORDERS = 2
"""Of threads, tried for each fault: the other tests go through many more."""
Check = Callable[[_native.Device, np.random.Generator], object]


@pytest.fixture(autouse=True)
def fibers() -> None:
    """Instead of the folder's: with a barrier less, threads may disagree about the next one."""


@pytest.fixture(autouse=True)
def on_hip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's tests build their own devices: they get this one. Afterwards nothing is left out."""
    for module in (native_attention, native_device, native_matmul):
        monkeypatch.setattr(module, "CpuDevice", lambda isa, threads: _native.hip_device(0))
    yield
    SHIM.no_fault()
    SHIM.set_order("ascending")


def attention(head_size: int, dtype: str, length: int = 140, heads: int = 2) -> Check:
    case = AttentionCase(1, length, heads, 1, head_size, documents=True, dtype=dtype, seed=1)
    return lambda device, random: test_attention.check(device, case)


def operation(check: Callable[..., None], *arguments: object) -> Check:
    return lambda device, random: check(Case("hip", "fp32", seed=1), *arguments)


def product(dtype: str, *transposes: bool) -> Check:
    return lambda device, random: test_matmul.test_tiles(device, random, dtype, *transposes)


def long_product(device: _native.Device, random: np.random.Generator) -> None:
    test_matmul.test_a_long_k_with_few_tiles_is_cut(device, random, "bf16")


# By kernel, tests of the other files that together need every barrier of it; those that cost least come first.
FIRST_KEYS = test_attention.scattered_first_keys("bf16")
ATTENTION: list[Check] = [
    attention(40, "bf16"),
    attention(256, "fp32", 70, 1),
    lambda device, random: test_attention.check(device, FIRST_KEYS),
]
CHECKS: dict[str, list[Check]] = {
    "matmul_kernel": [product("bf16", False, True), product("fp32", True, False), long_product],
    "attention_forward_kernel": ATTENTION,
    "attention_dq_kernel": ATTENTION,
    "attention_dkv_kernel": ATTENTION,
    "head_statistics_kernel": [operation(test_operations.test_head_statistics, 5000)],
    "loss_forward_kernel": [operation(test_operations.test_the_loss_of_many_rows, 600)],
    "loss_backward_kernel": [
        lambda device, random: test_operations.test_16_bit_gradients_over_fp32_logits(device, random, "bf16", 5000)
    ],
    "embed_backward_kernel": [operation(native_device.test_embedding)],
    "norm_sums_kernel": [operation(native_device.test_norm, "layernorm", *native_device.NORM_SHAPES[-1])],
    "bias_sums_kernel": [operation(native_device.test_bias_backward, 257, 65)],
    "sum_squares_kernel": [operation(native_device.test_sum_squares, 5000)],
    "finish_sum_kernel": [operation(native_device.test_sum_squares, 70_001)],
}


def noticed(checks: list[Check], device: _native.Device, seed: int) -> bool:
    """Whether one of the tests fails."""
    for order, check in itertools.product(range(ORDERS), checks):
        SHIM.set_order("shuffled", seed + order)
        try:
            check(device, np.random.default_rng(seed))
        except (AssertionError, _native.Error):
            return True
    return False


@pytest.mark.parametrize("kernel", CHECKS)
def test_every_barrier_is_missed(device: _native.Device, kernel: str, seed: int) -> None:
    assert not noticed(CHECKS[kernel], device, seed), "without a fault"
    sites = {site[1:] for site in SHIM.barriers_reached() if readable(site[0]).split()[0] == kernel}
    assert sites
    unnoticed = []
    for file, line in sorted(sites):
        SHIM.leave_out_barrier(kernel, file, line)
        if not noticed(CHECKS[kernel], device, seed):
            unnoticed.append(f"{Path(file).name}:{line}")
        SHIM.no_fault()
    assert unnoticed == []


@pytest.mark.parametrize("kernel", [kernel for kernel in CHECKS if kernel.startswith(("matmul", "attention"))])
def test_exchanged_rows_of_a_matrix_product_are_noticed(device: _native.Device, kernel: str, seed: int) -> None:
    # Without matrix units (fp32 on warps of 32) there is no row to exchange.
    for check in CHECKS[kernel][: 2 if SHIM.lanes == 64 else 1]:
        assert not noticed([check], device, seed), "without a fault"
        SHIM.exchange_rows(kernel)
        assert noticed([check], device, seed)
        SHIM.no_fault()


def test_no_other_kernel_has_a_barrier() -> None:
    """Run after the others of this folder, or alone: every kernel that reached a barrier so far is in the table."""
    kernels = {readable(symbol).split()[0] for symbol, _, _ in SHIM.barriers_reached() if "shim" not in symbol}
    assert kernels <= set(CHECKS)
