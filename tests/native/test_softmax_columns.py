"""The softmax over blocks of keys, one query per column, of every instruction set against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain._native import Error, kernels

ISAS: list[str] = kernels.tables()
COLUMNS = 71  # whole vectors and a tail
SCALE = 0.125
LOWEST = np.finfo(np.float32).min

pytestmark = pytest.mark.parametrize("isa", ISAS)


def start() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(maximum, denominator) before the first block."""
    return np.full(COLUMNS, LOWEST, np.float32), np.zeros(COLUMNS, np.float32)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 14, 97, 126])
def test_one_block(isa: str, rows: int, random: np.random.Generator) -> None:
    x = random.normal(-3.0, 20.0, (rows, COLUMNS)).astype(np.float32)
    weights, maximum, denominator, factor, changed = kernels.softmax_columns(isa, x, *start(), SCALE)
    assert changed == (rows > 0)
    if rows == 0:
        for array, value in ((maximum, LOWEST), (denominator, 0), (factor, 1)):
            assert (array == value).all()
        return
    expected = np.exp(SCALE * (x.astype(np.float64) - x.max(axis=0)))
    assert (maximum == x.max(axis=0)).all()
    np.testing.assert_allclose(weights, expected, rtol=3e-6, atol=1e-37)
    np.testing.assert_allclose(denominator, expected.sum(axis=0), rtol=2e-6)
    assert (factor == 0).all()


def test_blocks_carry_on(isa: str, random: np.random.Generator) -> None:
    """Weights of each block under the last maximum, by the factors in between, are those of a softmax of all rows."""
    x = random.normal(0.0, 20.0, (90, COLUMNS)).astype(np.float32)
    x[:, ::2] += np.linspace(0, 300, 90, dtype=np.float32)[:, None]  # maxima that rise in every block
    maximum, denominator = start()
    sums = np.zeros((1, COLUMNS))
    values = random.normal(size=90)
    for begin in (0, 20, 41, 77):
        end = {0: 20, 20: 41, 41: 77, 77: 90}[begin]
        weights, maximum, denominator, factor, _ = kernels.softmax_columns(
            isa, x[begin:end], maximum, denominator, SCALE
        )
        sums = sums * factor + values[begin:end] @ weights.astype(np.float64)
    powers = np.exp(SCALE * (x.astype(np.float64) - x.max(axis=0)))
    np.testing.assert_allclose(denominator, powers.sum(axis=0), rtol=5e-6)
    np.testing.assert_allclose(sums[0], values @ powers, rtol=1e-5, atol=1e-5)


def test_a_block_that_raises_no_maximum_scales_by_exactly_one(isa: str, random: np.random.Generator) -> None:
    """Also where scale times maximum is no float: a query's bits may not depend on blocks that it does not see."""
    maximum = (random.normal(size=COLUMNS) * 1000).astype(np.float32)
    denominator = random.uniform(1, 2, COLUMNS).astype(np.float32)
    hidden = np.full((7, COLUMNS), -np.inf, np.float32)
    scale = float(np.float32(144**-0.5))
    weights, after, total, factor, changed = kernels.softmax_columns(isa, hidden, maximum, denominator, scale)
    assert not changed
    assert (weights == 0).all()
    assert (factor == 1).all()
    assert (after == maximum).all()
    assert (total == denominator).all()


def test_nan_reaches_the_sum(isa: str) -> None:
    x = np.zeros((5, COLUMNS), np.float32)
    x[2, 3] = np.nan
    weights, maximum, denominator, _, _ = kernels.softmax_columns(isa, x, *start(), SCALE)
    assert (maximum == 0).all()
    assert np.isnan(denominator).tolist() == [column == 3 for column in range(COLUMNS)]
    assert np.isnan(weights[2, 3])


def test_scale_columns(isa: str, random: np.random.Generator) -> None:
    y = random.normal(size=(9, COLUMNS)).astype(np.float32)
    factor = random.normal(size=COLUMNS).astype(np.float32)
    assert (kernels.scale_columns(isa, y, factor) == y * factor).all()


def test_shapes_are_checked(isa: str) -> None:
    x, short = np.zeros((2, COLUMNS), np.float32), np.zeros(COLUMNS - 1, np.float32)
    with pytest.raises(Error, match="softmax_columns needs x"):
        kernels.softmax_columns(isa, x, short, short, SCALE)
    with pytest.raises(Error, match="scale_columns needs y"):
        kernels.scale_columns(isa, x, short)
