"""Windows cut from a token stream, against NumPy that looks at every pair of tokens."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _batch

TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64]


def outputs(rows: int, length: int) -> list[NDArray[np.int32]]:
    return [np.full((rows, length), -7, np.int32) for _ in range(4)]


def brute_force(
    stream: NDArray[np.int64],
    lengths: NDArray[np.int64],
    start: int,
    length: int,
    boundaries: bool,
    mask: bool,
) -> list[list[int]]:
    """One row, from the document number of every token."""
    documents = np.repeat(np.arange(len(lengths)), lengths)
    rows: list[list[int]] = [[], [], [], []]
    for t in range(length):
        here = start + t
        inside = here < len(stream)
        target = int(stream[here + 1]) if here + 1 < len(stream) else -1
        document = documents[min(here, len(stream) - 1)]
        first = max(int(np.flatnonzero(documents == document)[0]) - start, 0)
        if boundaries and mask and here + 1 < len(stream) and documents[here + 1] != document:
            target = -1
        begin = first if boundaries else 0
        for row, value in zip(rows, (int(stream[here]) if inside else 0, target, t - begin, begin), strict=True):
            row.append(value)
    return rows


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("boundaries", "mask"), [(False, False), (False, True), (True, False), (True, True)])
def test_matches_brute_force(dtype: type, boundaries: bool, mask: bool, random: np.random.Generator) -> None:
    lengths = random.integers(0, 6, 30)
    starts = np.cumsum(lengths) - lengths
    stream = random.integers(0, 100, lengths.sum())
    length = int(random.integers(1, 12))
    windows = random.integers(0, len(stream), 8)
    windows[0], windows[1] = 0, len(stream) - 1
    rows = random.permutation(8)
    filled = outputs(8, length)
    bad = _batch.fill_windows(stream.astype(dtype), starts, windows, rows, 100, boundaries, mask, *filled)
    assert bad == -1
    for window, row in zip(windows.tolist(), rows.tolist(), strict=True):
        expected = brute_force(stream, lengths, window, length, boundaries, mask)
        assert [output[row].tolist() for output in filled] == expected


def test_worked_example() -> None:
    """Two documents that end with the id 9, and what is and is not predicted."""
    stream = np.array([1, 2, 9, 3, 4, 9, 5], np.uint16)
    filled = outputs(1, 6)
    starts = np.array([0, 3, 6], np.int64)
    zero = np.zeros(1, np.int64)
    _batch.fill_windows(stream, starts, zero, zero, 10, True, True, *filled)
    tokens, targets, positions, document_starts = (output[0].tolist() for output in filled)
    assert tokens == [1, 2, 9, 3, 4, 9]
    assert targets == [2, 9, -1, 4, 9, -1]
    assert positions == [0, 1, 2, 0, 1, 2]
    assert document_starts == [0, 0, 0, 3, 3, 3]


def test_reads_only_maps() -> None:
    stream = np.arange(5, dtype=np.int32)
    stream.flags.writeable = False
    zero = np.zeros(1, np.int64)
    assert _batch.fill_windows(stream, zero, zero, zero, 5, False, False, *outputs(1, 4)) == -1


@pytest.mark.parametrize(("position", "found"), [(2, 2), (6, 6), (7, -1)])
@pytest.mark.parametrize("bad", [10, -1])
def test_foreign_id_is_found_where_it_lies(position: int, found: int, bad: int) -> None:
    """A window of four reads five tokens, the last as a target only."""
    stream = np.ones(9, np.int64)
    stream[position] = bad
    windows = np.array([2], np.int64)
    zero = np.zeros(1, np.int64)
    assert _batch.fill_windows(stream, zero, windows, zero, 10, False, False, *outputs(1, 4)) == found


def test_wrong_arguments() -> None:
    stream = np.ones(9, np.int32)
    zero = np.zeros(1, np.int64)
    good = outputs(2, 3)
    with pytest.raises(ValueError, match=r"positions \[2, 4\] must have the shape of tokens \[2, 3\]"):
        _batch.fill_windows(
            stream, zero, zero, zero, 10, False, False, good[0], good[1], np.zeros((2, 4), np.int32), good[3]
        )
    with pytest.raises(ValueError, match="2 windows for 1 rows"):
        _batch.fill_windows(stream, zero, np.zeros(2, np.int64), zero, 10, False, False, *good)
    for window, row in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="out of range"):
            _batch.fill_windows(stream, zero, np.array([window]), np.array([row]), 10, False, False, *good)
