"""The native permutation against slow Python built on NumPy's Philox, fixed answers and statistics."""

import itertools
import math

import numpy as np
import pytest

from pytrain import _order

MASK = (1 << 64) - 1
ROUNDS = 24


def philox_words(counter: int, key0: int, key1: int, blocks: int = 1) -> list[int]:
    # NumPy counts up before it draws.
    source = np.random.Philox(counter=(counter - 1) % (1 << 256), key=key0 | key1 << 64)
    return [int(word) for word in source.random_raw(4 * blocks)]


def scramble(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def reference_element(position: int, size: int, seed: int, stream: int, epoch: int) -> int:
    keys = philox_words(epoch << 64 | 1 << 128, seed, stream, ROUNDS // 4)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        right, left = divmod(position, rows)
        for turn in range(0, ROUNDS, 2):
            left = (left + (scramble(right ^ keys[turn]) * rows >> 64)) % rows
            right = (right + (scramble(left ^ keys[turn + 1]) * columns >> 64)) % columns
        position = right * rows + left
        if position < size:
            return position


def test_philox_is_numpys(random: np.random.Generator) -> None:
    counter = [int(word) for word in random.integers(0, 1 << 63, 4)]
    key0, key1 = (int(word) for word in random.integers(0, 1 << 63, 2))
    whole = sum(word << 64 * index for index, word in enumerate(counter))
    assert _order.philox_block(counter, key0, key1).tolist() == philox_words(whole, key0, key1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 100, 101, 1 << 12, 99991])
def test_is_a_permutation(size: int) -> None:
    elements = _order.permute(0, size, size, 7, 1, 2)
    assert np.array_equal(np.sort(elements), np.arange(size))


def test_matches_reference(random: np.random.Generator) -> None:
    for size in [1, 2, 3, 7, 50, 1000, 10**6 + 3, 10**12, 1 << 40, 1 << 62]:
        seed, stream, epoch = (int(each) for each in random.integers(0, 1 << 63, 3))
        first = int(random.integers(0, size))
        count = min(5, size - first)
        expected = [reference_element(first + i, size, seed, stream, epoch) for i in range(count)]
        assert _order.permute(first, count, size, seed, stream, epoch).tolist() == expected, size


def test_golden_values() -> None:
    """A change here changes the data order of every run: it needs a new major version."""
    assert _order.permute(0, 8, 1000, 1234, 0, 0).tolist() == [113, 929, 999, 354, 217, 839, 145, 683]
    far = _order.permute(10**12 - 3, 3, 10**12, 2**64 - 1, 7, 2**40)
    assert far.tolist() == [594414799353, 771488875969, 875219135443]


def test_seek_equals_walk() -> None:
    whole = _order.permute(0, 1000, 1000, 3, 0, 0)
    assert np.array_equal(_order.permute(617, 100, 1000, 3, 0, 0), whole[617:717])


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_keys_matter(other: tuple[int, int, int]) -> None:
    first = _order.permute(0, 1000, 1000, 1, 0, 0)
    assert np.count_nonzero(first == _order.permute(0, 1000, 1000, *other)) < 12


def standard_score(counts: np.ndarray, expected: float, freedom: int) -> float:
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_few_elements_are_equally_likely(size: int) -> None:
    """Fixed keys, so the score is fixed; twelve rounds instead of twenty-four give 4.2 at size 5."""
    orders = {order: index for index, order in enumerate(itertools.permutations(range(size)))}
    draws = 400 * len(orders)
    counts = np.zeros(len(orders))
    for epoch in range(draws):
        counts[orders[tuple(_order.permute(0, size, size, 1, 0, epoch).tolist())]] += 1
    assert abs(standard_score(counts, 400, len(orders) - 1)) < 3.5


@pytest.mark.parametrize("size", [16, 37])
def test_places_and_neighbours_are_uniform(size: int) -> None:
    epochs = 3000
    places = np.zeros((size, size))
    neighbours = np.zeros((size, size))
    for epoch in range(epochs):
        elements = _order.permute(0, size, size, 99, 1, epoch)
        places[np.arange(size), elements] += 1
        neighbours[elements[:-1], elements[1:]] += 1
    # Sums of rows and columns are fixed: (n - 1)^2 degrees of freedom, at n / (n - 1) times the variance.
    scale = math.sqrt((size - 1) / size)
    scaled = epochs / size + (places - epochs / size) * scale
    assert abs(standard_score(scaled, epochs / size, (size - 1) ** 2)) < 3.5
    pairs = neighbours[~np.eye(size, dtype=bool)]
    assert abs(standard_score(pairs, epochs / size, len(pairs) - 1)) < 3.5


def test_long_range_is_without_trend() -> None:
    """Means over runs of the order of a large range lie where those of independent draws would."""
    size = 10**9 + 7
    draws = _order.permute(123456, 100_000, size, 5, 0, 0) / size
    means = draws.reshape(100, 1000).mean(axis=1)
    assert np.abs((means - 0.5) * math.sqrt(12 * 1000)).max() < 4.5
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / math.sqrt(len(draws))


def test_draws_run_through_epochs() -> None:
    draws = np.array([0, 9, 10, 25, 3, 10**15], np.int64)
    expected = [_order.permute(draw % 10, 1, 10, 42, 3, draw // 10)[0] for draw in draws.tolist()]
    assert _order.ordinals_to_samples(draws, 10, 42, 3).tolist() == expected


@pytest.mark.parametrize(("first", "count", "size"), [(-1, 2, 5), (4, 2, 5), (0, -1, 5), (0, 0, 0), (0, 1, 1 << 63)])
def test_refuses_what_lies_outside(first: int, count: int, size: int) -> None:
    with pytest.raises(ValueError, match="permutation"):
        _order.permute(first, count, size, 1, 0, 0)


def test_refuses_a_negative_draw() -> None:
    with pytest.raises(ValueError, match="draw -1 is negative"):
        _order.ordinals_to_samples(np.array([-1], np.int64), 10, 0, 0)
