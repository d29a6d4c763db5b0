"""The mixture against a walk from the first sample in plain Python."""

from collections.abc import Sequence

import numpy as np
import pytest

from pytrain import _order
from pytrain.data.mixture import Mixture, Phase, cumulative_weights
from pytrain.errors import UserError

BLOCK = 64


def reference_counts(samples: int, weights: Sequence[int]) -> list[int]:
    """Exact whole numbers: split by halves of the corpora, rounding down for the first half."""
    if len(weights) == 1:
        return [samples]
    middle = len(weights) // 2
    first, total = sum(weights[:middle]), sum(weights)
    left = samples * first // total if total else 0
    return reference_counts(left, weights[:middle]) + reference_counts(samples - left, weights[middle:])


def reference_block(block: int, weights: Sequence[int], seed: int, phase: int) -> list[int]:
    before = reference_counts(block * BLOCK, weights)
    after = reference_counts((block + 1) * BLOCK, weights)
    labels = [corpus for corpus in range(len(weights)) for _ in range(after[corpus] - before[corpus])]
    for slot in range(BLOCK - 1, 0, -1):
        counter = block | slot // 4 << 64 | 2 << 128
        # NumPy counts up before it draws.
        words = np.random.Philox(counter=counter - 1, key=seed | phase << 64).random_raw(4)
        other = int(words[slot % 4]) * (slot + 1) >> 64
        labels[slot], labels[other] = labels[other], labels[slot]
    return labels


def reference_walk(count: int, sizes: Sequence[int], phases: Sequence[Phase], seed: int) -> list[tuple[int, int]]:
    """Every sample from the first on, keeping one running count a corpus."""
    drawn = [0] * len(sizes)
    samples = []
    for number, phase in enumerate(phases):
        end = phases[number + 1].start_sample if number + 1 < len(phases) else count
        weights = np.diff(cumulative_weights(phase.weights).astype(object)).tolist()
        for local in range(end - phase.start_sample):
            corpus = reference_block(local // BLOCK, weights, seed, number)[local % BLOCK]
            epoch, position = divmod(drawn[corpus], sizes[corpus])
            drawn[corpus] += 1
            samples.append((corpus, int(_order.permute(position, 1, sizes[corpus], seed, corpus, epoch)[0])))
    return samples[:count]


def test_matches_the_walk(random: np.random.Generator) -> None:
    for corpora in (1, 2, 3, 5):
        sizes = random.integers(1, 40, corpora).tolist()
        phases = [
            Phase(0, tuple(random.random(corpora).tolist())),
            Phase(37, tuple(random.random(corpora).tolist())),
            Phase(128, (0.0,) * (corpora - 1) + (1.0,)),
        ]
        seed = int(random.integers(0, 1 << 63))
        expected = reference_walk(200, sizes, phases, seed)
        mixture = Mixture(sizes, phases, seed)
        assert [mixture(sample) for sample in range(200)] == expected
        first, count = 30, 150
        ids, samples = mixture.locate(first, count)
        assert list(zip(ids.tolist(), samples.tolist(), strict=True)) == expected[first : first + count]
        for samples_seen in (0, 1, 36, 37, 38, 100, 199):
            chosen = [corpus for corpus, _ in expected[:samples_seen]]
            assert mixture.counts(samples_seen).tolist() == [chosen.count(corpus) for corpus in range(corpora)]


def test_golden_values() -> None:
    """A change here changes the data order of every run: it needs a new major version."""
    mixture = Mixture([100, 7], [Phase(0, (3.0, 1.0))], 1234)
    expected = [(1, 4), (1, 0), (0, 87), (0, 15), (1, 5), (1, 3), (0, 22), (0, 80)]
    assert [mixture(sample) for sample in range(8)] == expected
    assert mixture(10**15) == (0, 89)


def test_block_quotas_are_exact() -> None:
    mixture = Mixture([1000] * 4, [Phase(0, (5, 1, 1, 1))], 0)
    ids, _ = mixture.locate(0, 10 * BLOCK)
    for block in ids.reshape(10, BLOCK):
        assert np.bincount(block).tolist() == [40, 8, 8, 8]
    assert len({tuple(block) for block in ids.reshape(10, BLOCK).tolist()}) == 10


def test_counts_follow_the_weights_and_never_fall(random: np.random.Generator) -> None:
    weights = random.random(9) ** 4
    mixture = Mixture([10**6] * 9, [Phase(0, tuple(weights.tolist()))], 1)
    share = weights / weights.sum()
    before = np.zeros(9, np.int64)
    for block in range(500):
        counts = mixture.counts(block * BLOCK)
        assert counts.sum() == block * BLOCK
        assert (counts >= before).all()
        assert np.abs(counts - share * block * BLOCK).max() < 5
        before = counts
    far = 10**14
    assert np.abs(mixture.counts(far) / far - share).max() < 1e-9


def test_tiny_weight_is_drawn_and_zero_weight_is_not() -> None:
    mixture = Mixture([10, 10, 10], [Phase(0, (1.0, 1e-6, 0.0))], 3)
    counts = mixture.counts(64 * 10**6)
    assert counts[1] == pytest.approx(64, abs=2)
    assert counts[2] == 0
    assert np.diff(cumulative_weights((1.0, 1e-300, 0.0))).tolist() == [1 << 40, 1, 0]


def test_an_epoch_draws_each_sample_once_in_a_new_order() -> None:
    mixture = Mixture([50], [Phase(0, (1.0,))], 11)
    _, samples = mixture.locate(0, 150)
    epochs = samples.reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_a_later_phase_leaves_the_past_and_repeats_nothing() -> None:
    first = Mixture([1000, 1000], [Phase(0, (1, 1))], 5)
    second = Mixture([1000, 1000], [Phase(0, (1, 1)), Phase(77, (1, 3))], 5)
    assert [first(sample) for sample in range(77)] == [second(sample) for sample in range(77)]
    seen = [second(sample) for sample in range(600)]
    assert len(set(seen)) == 600


@pytest.mark.parametrize(
    ("sizes", "phases", "seed", "sentence"),
    [
        ([], [Phase(0, ())], 0, "no corpus"),
        ([5, 0], [Phase(0, (1, 1))], 0, "wiki has no whole sample"),
        ([5, 5], [], 0, "first phase must start at sample 0"),
        ([5, 5], [Phase(1, (1, 1))], 0, "first phase must start at sample 0"),
        ([5, 5], [Phase(0, (1, 1)), Phase(0, (1, 1))], 0, "rising samples"),
        ([5, 5], [Phase(0, (1,))], 0, "1 weights for 2 corpora"),
        ([5, 5], [Phase(0, (1, -1))], 0, "weight of wiki must be a number of at least 0"),
        ([5, 5], [Phase(0, (1, float("nan")))], 0, "weight of wiki must be a number of at least 0"),
        ([5, 5], [Phase(0, (0, 0))], 0, "all weights .* are 0"),
        ([5, 5], [Phase(0, (1, 1))], -1, "seed must be in"),
        ([5, 5], [Phase(0, (1, 1))], 1 << 64, "seed must be in"),
    ],
)
def test_bad_input(sizes: list[int], phases: list[Phase], seed: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Mixture(sizes, phases, seed, ["books", "wiki"][: len(sizes)])


def test_a_negative_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Mixture([5], [Phase(0, (1,))], 0)(-1)
