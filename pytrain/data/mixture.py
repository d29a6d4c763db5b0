"""Which corpus, and which draw of it, each training sample is.

The loader's whole state is one integer, the samples consumed, beside an immutable list of phases. Sample g
lies in the last phase that starts at or before it; inside a phase each block of 64 samples holds an exact
quota of every corpus in shuffled order (`pytrain._order.interleave`). Draws of a corpus count on through the
phases, so that changing the weights never repeats or skips a sample; draw m of a corpus of n samples is
element m % n of the permutation of its epoch m // n.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pytrain import _order
from pytrain.errors import UserError

# Weights become integers of this sum, so that counts are exact in 128-bit arithmetic and equal on every
# machine.
WEIGHT_SUM = 1 << 40


@dataclass(frozen=True, slots=True)
class Phase:
    """From sample `start_sample` on, corpora are drawn in proportion to `weights` (one each, 0 leaves one
    out).
    """

    start_sample: int
    weights: tuple[float, ...]


def cumulative_weights(weights: Sequence[float]) -> NDArray[np.uint64]:
    """Running sum uint64 [corpora + 1] of the weights scaled to integers of sum about 2^40; positive ones
    stay >= 1.
    """
    total = sum(Fraction(weight) for weight in weights)
    scaled = [max(1, round(Fraction(weight) * WEIGHT_SUM / total)) if weight else 0 for weight in weights]
    return np.cumsum([0, *scaled], dtype=np.uint64)


class Mixture:
    """Interleaves corpora of `sizes` samples each (their samples per epoch) by the weights of the phases.

    All samples have the same number of tokens, so weights by samples are weights by tokens. Raises UserError
    for weights or phases that make no sense; `names` (one per corpus) is used in the sentences.
    """

    def __init__(self, sizes: Sequence[int], phases: Sequence[Phase], seed: int, names: Sequence[str] = ()) -> None:
        self.sizes = tuple(sizes)
        self.phases = tuple(phases)
        self.seed = seed
        self._names = tuple(names) or tuple(f"corpus {index}" for index in range(len(self.sizes)))
        if not 0 <= seed < 1 << 64:
            raise UserError(f"the seed must be in 0..2^64 - 1, not {seed}")
        self._check()
        self._starts = [phase.start_sample for phase in self.phases]
        self._cumulative = [cumulative_weights(phase.weights) for phase in self.phases]
        # Draws of each corpus before each phase.
        self._bases = [np.zeros(len(self.sizes), np.int64)]
        for number, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            counts = _order.interleaved_counts(end - start, self._cumulative[number], seed, number)
            self._bases.append(self._bases[-1] + counts)

    def _check(self) -> None:
        if not self.sizes:
            raise UserError("there is no corpus to draw from")
        for name, size in zip(self._names, self.sizes, strict=True):
            if size < 1:
                raise UserError(f"{name} has no whole sample")
        if not self.phases or self.phases[0].start_sample != 0:
            raise UserError("the first phase must start at sample 0")
        for before, after in zip(self.phases, self.phases[1:], strict=False):
            if after.start_sample <= before.start_sample:
                raise UserError(
                    f"phases must start at rising samples, but {after.start_sample} follows {before.start_sample}"
                )
        for phase in self.phases:
            self._check_weights(phase)

    def _check_weights(self, phase: Phase) -> None:
        if len(phase.weights) != len(self.sizes):
            raise UserError(
                f"the phase from sample {phase.start_sample} has {len(phase.weights)} weights for "
                f"{len(self.sizes)} corpora"
            )
        for name, weight in zip(self._names, phase.weights, strict=True):
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"the weight of {name} must be a number of at least 0, not {weight}")
        if not any(phase.weights):
            raise UserError(f"all weights of the phase from sample {phase.start_sample} are 0")

    def locate(self, first_sample: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Corpus int32 [count] and sample within the corpus int64 [count] of `count` samples from
        `first_sample` on.

        Cost O(count + 64), wherever `first_sample` lies.
        """
        corpora, draws = self._draws(first_sample, count)
        if len(self.sizes) == 1:
            return corpora, _order.ordinals_to_samples(draws, self.sizes[0], self.seed, 0)
        samples = np.empty(count, np.int64)
        for corpus in np.unique(corpora):
            chosen = corpora == corpus
            samples[chosen] = _order.ordinals_to_samples(
                draws[chosen], self.sizes[int(corpus)], self.seed, int(corpus)
            )
        return corpora, samples

    def __call__(self, sample: int) -> tuple[int, int]:
        """Corpus and sample within the corpus of one sample."""
        corpora, samples = self.locate(sample, 1)
        return int(corpora[0]), int(samples[0])

    def counts(self, samples: int) -> NDArray[np.int64]:
        """How many of the first `samples` samples each corpus gave, int64 [corpora]; O(1)."""
        number = self._phase_of(samples)
        within = samples - self._starts[number]
        return self._bases[number] + _order.interleaved_counts(within, self._cumulative[number], self.seed, number)

    def _phase_of(self, sample: int) -> int:
        if sample < 0:
            raise ValueError(f"sample {sample} is negative")
        return bisect.bisect_right(self._starts, sample) - 1

    def _draws(self, first_sample: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        corpora = np.empty(count, np.int32)
        draws = np.empty(count, np.int64)
        done = 0
        while done < count:
            sample = first_sample + done
            number = self._phase_of(sample)
            end = self._starts[number + 1] if number + 1 < len(self._starts) else first_sample + count
            part = slice(done, min(count, end - first_sample))
            within = sample - self._starts[number]
            corpora[part], local = _order.interleave(
                within, part.stop - done, self._cumulative[number], self.seed, number
            )
            draws[part] = local + self._bases[number][corpora[part]]
            done = part.stop
        return corpora, draws
