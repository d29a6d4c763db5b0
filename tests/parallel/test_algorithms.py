"""Every algorithm on simulated members: sums, bits, bytes, cuts, and that none can hang."""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from pytrain.collectives import Limits, algorithms
from pytrain.collectives.wire import Array, Steps, Wire, even_bounds
from tests.parallel.mailbox import Outcome, simulate

Algorithm = Callable[[Wire, Array], Steps]
MEMBERS = (1, 2, 3, 4, 5, 7, 8)
SIZES = (0, 1, 2, 3, 13, 64, 1001)
SMALL = Limits(message_bytes=64, block_bytes=96)
HALVES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def two_level(per_node: int) -> Algorithm:
    return lambda wire, array: algorithms.two_level(wire, array, [i // per_node for i in range(wire.size)])


ALL_REDUCE: dict[str, Algorithm] = {
    "exchange": algorithms.exchange,
    "direct": algorithms.direct,
    "ring": algorithms.ring,
    "halving_doubling": algorithms.halving_doubling,
    "two_level_1": two_level(1),
    "two_level_2": two_level(2),
    "two_level_3": two_level(3),  # the last node has fewer members
}
IN_ORDER = ("exchange", "direct")
REDUCE_SCATTER = {"direct": algorithms.direct_reduce_scatter, "ring": algorithms.ring_reduce_scatter}
ALL_GATHER = {"direct": algorithms.direct_all_gather, "ring": algorithms.ring_all_gather}


def numbers(random: np.random.Generator, members: int, size: int, dtype: str = "float32") -> list[Array]:
    """Of very different magnitude, so that another order of addition gives other bits."""
    return [
        (random.standard_normal(size) * 10.0 ** random.integers(-3, 4, size)).astype(dtype) for _ in range(members)
    ]


def in_rank_order(arrays: list[Array]) -> Array:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total = total + array
    return total


def assert_same_bits(outcome: Outcome) -> None:
    for array in outcome.arrays[1:]:
        assert array.tobytes() == outcome.arrays[0].tobytes()


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_all_reduce_is_the_sum_with_the_same_bits_everywhere(
    name: str, members: int, random: np.random.Generator
) -> None:
    for size in SIZES:
        for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-14)):
            given = numbers(random, members, size, dtype)
            exact = np.sum([array.astype(np.longdouble) for array in given], axis=0)
            scale = np.sum(np.abs(given), axis=0)
            outcome = simulate(ALL_REDUCE[name], [array.copy() for array in given], limits=SMALL, order=random)
            assert_same_bits(outcome)
            assert np.all(np.abs(outcome.arrays[0] - exact) <= tolerance * scale)
            if name in IN_ORDER:
                assert outcome.arrays[0].tobytes() == in_rank_order(given).tobytes()


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_bits_do_not_depend_on_cuts_or_timing(name: str, random: np.random.Generator) -> None:
    given = numbers(random, 5, 777)
    found = {
        simulate(ALL_REDUCE[name], [a.copy() for a in given], limits=limits, order=order).arrays[0].tobytes()
        for limits in (Limits(), SMALL, Limits(message_bytes=4, block_bytes=4))
        for order in (None, random)
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", ["exchange", "direct", "ring", "halving_doubling", "two_level_2"])
def test_the_largest(name: str, random: np.random.Generator) -> None:
    given = numbers(random, 6, 101)
    outcome = simulate(ALL_REDUCE[name], [array.copy() for array in given], operation="max")
    assert_same_bits(outcome)
    np.testing.assert_array_equal(outcome.arrays[0], np.max(given, axis=0))


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("members", [2, 3, 8])
@pytest.mark.parametrize("name", IN_ORDER)
def test_halves_are_added_in_fp32_and_rounded_once(
    name: str, members: int, half: str, random: np.random.Generator
) -> None:
    given = [
        (random.standard_normal(517) * 2.0 ** random.integers(-4, 5, 517)).astype(HALVES[half])
        for _ in range(members)
    ]
    once = in_rank_order([array.astype(np.float32) for array in given]).astype(HALVES[half])
    outcome = simulate(ALL_REDUCE[name], [a.view(np.uint16).copy() for a in given], limits=SMALL, half=half)
    assert_same_bits(outcome)
    assert outcome.arrays[0].tobytes() == once.tobytes()
    if members > 2:  # the test can tell: rounding at every addition gives something else
        assert in_rank_order(given).tobytes() != once.tobytes()


def test_two_levels_round_halves_once_a_level(random: np.random.Generator) -> None:
    given = [random.standard_normal(300).astype(ml_dtypes.bfloat16) for _ in range(6)]
    nodes = [
        in_rank_order([a.astype(np.float32) for a in given[first : first + 3]]).astype(ml_dtypes.bfloat16)
        for first in (0, 3)
    ]
    twice = in_rank_order([a.astype(np.float32) for a in nodes]).astype(ml_dtypes.bfloat16)
    outcome = simulate(two_level(3), [a.view(np.uint16).copy() for a in given], half="bf16")
    assert_same_bits(outcome)
    assert outcome.arrays[0].tobytes() == twice.tobytes()


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("name", REDUCE_SCATTER)
def test_reduce_scatter_with_pieces_of_any_size(name: str, members: int, random: np.random.Generator) -> None:
    for size in SIZES:
        bounds = [0, *sorted(int(cut) for cut in random.integers(0, size + 1, members - 1)), size]
        given = numbers(random, members, size)
        outcome = simulate(
            lambda wire, array, bounds=bounds: REDUCE_SCATTER[name](wire, array, bounds),  # type: ignore[misc]
            [array.copy() for array in given],
            limits=SMALL,
            order=random,
        )
        exact, scale = np.sum(np.asarray(given, np.float64), axis=0), np.sum(np.abs(given), axis=0)
        for member, array in enumerate(outcome.arrays):
            piece = slice(bounds[member], bounds[member + 1])
            assert np.all(np.abs(array[piece] - exact[piece]) <= 1e-6 * scale[piece])


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("name", ALL_GATHER)
def test_all_gather_with_pieces_of_any_size(name: str, members: int, random: np.random.Generator) -> None:
    for size in SIZES:
        bounds = [0, *sorted(int(cut) for cut in random.integers(0, size + 1, members - 1)), size]
        whole = random.integers(-1000, 1000, size)
        arrays = [np.full(size, -7777) for _ in range(members)]
        for member, array in enumerate(arrays):
            piece = slice(bounds[member], bounds[member + 1])
            array[piece] = whole[piece]
        outcome = simulate(
            lambda wire, array, bounds=bounds: ALL_GATHER[name](wire, array, bounds),  # type: ignore[misc]
            arrays,
            limits=SMALL,
            order=random,
        )
        for array in outcome.arrays:
            np.testing.assert_array_equal(array, whole)


@pytest.mark.parametrize("members", MEMBERS)
def test_broadcast_from_every_root(members: int, random: np.random.Generator) -> None:
    for root in range(members):
        arrays = [random.standard_normal(33) for _ in range(members)]
        wanted = arrays[root].copy()
        outcome = simulate(partial(_broadcast, root=root), arrays, limits=SMALL, order=random)
        for array in outcome.arrays:
            np.testing.assert_array_equal(array, wanted)


def _broadcast(wire: Wire, array: Array, root: int) -> Steps:
    return algorithms.tree_broadcast(wire, array, root)


@pytest.mark.parametrize("members", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["direct", "ring", "halving_doubling"])
def test_bytes_are_the_least_there_are(name: str, members: int, random: np.random.Generator) -> None:
    """Every all-reduce sends at least 2 N (n - 1)/n bytes from each member."""
    size = 840
    outcome = simulate(ALL_REDUCE[name], numbers(random, members, size), limits=SMALL)
    sent = [counters.bytes_sent["test"] for counters in outcome.counters]
    least = 2 * size * 4 * (members - 1) // members
    if name != "halving_doubling" or members & (members - 1) == 0:
        assert sent == [least] * members
    else:  # three members: one is a guest of the first
        assert sent == [size * 4 + size * 4, size * 4, size * 4]
    outcome = simulate(
        lambda wire, array: algorithms.direct_reduce_scatter(wire, array, even_bounds(size, members)),
        numbers(random, members, size),
    )
    assert [counters.bytes_sent["test"] for counters in outcome.counters] == [least // 2] * members


def test_halves_take_half_the_bytes(random: np.random.Generator) -> None:
    full = simulate(algorithms.direct, numbers(random, 4, 800))
    halves = simulate(algorithms.direct, [np.ones(800, np.uint16) for _ in range(4)], half="bf16")
    for before, after in zip(full.counters, halves.counters, strict=True):
        assert after.bytes_sent["test"] * 2 == before.bytes_sent["test"]


def test_two_levels_send_each_byte_between_nodes_once(random: np.random.Generator) -> None:
    """Two nodes of four: within the node 2 N 3/4, between nodes the quarter that the member holds."""
    size = 800
    outcome = simulate(two_level(4), numbers(random, 8, size))
    within, between = 2 * size * 4 * 3 // 4, 2 * (size // 4) * 4 // 2
    assert [c.bytes_sent["test"] for c in outcome.counters] == [within + between] * 8


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_no_message_exceeds_the_limit(name: str, random: np.random.Generator) -> None:
    given = numbers(random, 4, 1001)
    wanted = in_rank_order([array.astype(np.float64) for array in given])
    outcome = simulate(ALL_REDUCE[name], given, limits=Limits(message_bytes=52, block_bytes=10**9))
    assert outcome.largest_message <= 52
    np.testing.assert_allclose(outcome.arrays[0], wanted, rtol=1e-5, atol=1e-4)


def test_a_hang_is_found() -> None:
    """The simulation itself: two members that both wait for the other's message first."""

    def crossed(wire: Wire, array: Array) -> Steps:
        yield wire.receive(array.copy(), 1 - wire.index)
        yield wire.send(array, 1 - wire.index)

    with pytest.raises(AssertionError, match="deadlock"):
        simulate(crossed, [np.zeros(3), np.zeros(3)])
