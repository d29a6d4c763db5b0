"""Loss, perplexity and bits per byte on held-out text, through the engine that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytrain.data.loader import HeldOut
from pytrain.feeding import replica_batches
from pytrain.metrics import Evaluation
from pytrain.rank import EVALUATION_BATCHES, RankModel


@dataclass(frozen=True)
class HeldOutNote:
    """What every rank knows of a held-out corpus, whether it opens it or not."""

    name: str
    windows: int
    predicted_tokens: int
    utf8_bytes: int | None

    @classmethod
    def of(cls, corpus: HeldOut) -> HeldOutNote:
        """The note of an opened corpus."""
        return cls(corpus.name, corpus.windows, corpus.predicted_tokens, corpus.utf8_bytes)


def evaluate(model: RankModel, note: HeldOutNote, corpus: HeldOut | None, batches: int = 0) -> Evaluation:
    """Run the model over a held-out corpus: loss in nats per token, perplexity, bits per UTF-8 byte.

    Args:
        model: of this rank; all ranks call this together.
        note: of the corpus.
        corpus: the corpus itself, in file order; None on a stage that opens no data.
        batches: micro-batches at most, 0 for the whole corpus; bits per byte are over the same share of the
            bytes.
    """
    config = model.config
    micro, dp = config.batch.micro_batch, model.grid.dp
    remaining = -(-note.windows // micro)
    if batches:
        remaining = min(remaining, batches)
    remaining = -(-remaining // dp)  # of each replica; what is past the end is padding
    loss_sum, count, window = 0.0, 0, 0
    while remaining:
        group = min(remaining, EVALUATION_BATCHES)
        source = None if corpus is None else corpus.batch
        fed = replica_batches(source, model.groups, window, group, micro, config.data.sequence_length)
        result = model.engine.run(model.evaluation_program(group), fed)
        loss_sum += result.loss_sum
        count += result.target_count
        window += group * dp * micro
        remaining -= group
    loss = loss_sum / count if count else math.nan
    bits_per_byte = None
    if note.utf8_bytes and count:
        bits_per_byte = loss_sum / math.log(2) / (note.utf8_bytes * count / note.predicted_tokens)
    return Evaluation(loss, perplexity(loss), bits_per_byte)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
