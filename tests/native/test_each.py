"""One call for many tensors does what a call for each does, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain.native import native

OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "step_size": 1e-2, "correction2": 1.5}
SIZES = (1, 7, 4097, 70000)


def runs_of(random: np.random.Generator, half: bool) -> list[tuple[Any, ...]]:
    """(weights, master, m, v, gradient, whether it decays) of tensors of odd sizes."""
    runs = []
    for index, size in enumerate(SIZES):
        master, m, v, gradient = (random.standard_normal(size, dtype=np.float32) for _ in range(4))
        weights = np.zeros(size, np.uint16) if half else master
        runs.append((weights, master, m, np.abs(v), gradient, index % 2 == 0))
    return runs


def copied(runs: list[tuple[Any, ...]], half: bool) -> list[tuple[Any, ...]]:
    copies = [tuple(array.copy() for array in run[:5]) + run[5:] for run in runs]
    return copies if half else [(run[1], *run[1:]) for run in copies]


@pytest.mark.parametrize("half", [False, True])
def test_adamw_each(half: bool, random: np.random.Generator) -> None:
    device = native().CpuDevice()
    scalars: NDArray[np.float64] = np.array([0, 0, 1.0, 0.5, 1.0, 1.0])
    first = runs_of(random, half)
    second = copied(first, half)
    before = copied(first, half)
    for *arrays, decays in first:
        device.adamw(*arrays, scalars, **OPTIONS, decay=0.1 if decays else 0.0)
    device.adamw_each(second, scalars, **OPTIONS, decay=0.1)
    for one, other, old in zip(first, second, before, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))
        assert not np.array_equal(one[1], old[1])
    scalars[4] = 0.0  # not finite: nothing changes
    kept = copied(second, half)
    device.adamw_each(second, scalars, **OPTIONS, decay=0.1)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(second, kept, strict=True))


def test_sum_squares_each(random: np.random.Generator) -> None:
    device = native().CpuDevice()
    arrays = [random.standard_normal(size, dtype=np.float32) for size in SIZES]
    one, together = np.full(1, 0.25), np.full(1, 0.25)
    for array in arrays:
        device.sum_squares(one, array)
    device.sum_squares_each(together, arrays)
    assert one[0] == together[0] > 0.25
    device.sum_squares_each(together, [])
    assert one[0] == together[0]


def test_a_wrong_array_is_named() -> None:
    module = native()
    device, sums = module.CpuDevice(), np.zeros(1)
    with pytest.raises(module.Error, match="arrays: the dtype must be float32 or uint16, not float64"):
        device.sum_squares_each(sums, [np.ones(2, np.float32), np.ones(2)])  # type: ignore[list-item]
    run = [np.ones(2, np.float32) for _ in range(5)]
    run[3] = np.ones(3, np.float32)
    with pytest.raises(module.Error, match=r"v: the shape must be \(2,\), not \(3,\)"):
        device.adamw_each([(*run, True)], np.ones(6), **OPTIONS, decay=0.0)
    assert sums[0] == 0
