"""Loss, perplexity and bits per byte on held-out text, through the engine that trains."""

import math
from collections.abc import Iterable
from itertools import islice

from pytrain.data.loader import Batch, HeldOut
from pytrain.engine import Engine
from pytrain.metrics import Evaluation
from pytrain.schedule import forward_only

BATCHES_PER_PROGRAM = 8  # bounds what is in memory at once


def evaluate(engine: Engine, corpus: HeldOut, micro_batch: int, batches: int = 0) -> Evaluation:
    """Run the model over a held-out corpus: loss in nats per token, perplexity, bits per UTF-8 byte.

    Args:
        engine: its stage takes micro-batches of `micro_batch` sequences.
        corpus: in file order.
        micro_batch: sequences at a time.
        batches: micro-batches at most, 0 for the whole corpus; bits per byte are over the same share of the
            bytes.
    """
    remaining: Iterable[Batch] = corpus.batches(micro_batch)
    source = iter(remaining if batches == 0 else islice(remaining, batches))
    loss_sum, count = 0.0, 0
    while group := list(islice(source, BATCHES_PER_PROGRAM)):
        result = engine.run(forward_only(len(group)), group)
        loss_sum += result.loss_sum
        count += result.target_count
    loss = loss_sum / count if count else math.nan
    bits_per_byte = None
    if corpus.utf8_bytes and count:
        bits_per_byte = loss_sum / math.log(2) / (corpus.utf8_bytes * count / corpus.predicted_tokens)
    return Evaluation(loss, perplexity(loss), bits_per_byte)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
