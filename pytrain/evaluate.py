"""Loss, perplexity and bits per byte on held-out text, through the engine that trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytrain.collectives import Group
from pytrain.data.loader import HeldOut
from pytrain.errors import UserError
from pytrain.feeding import open_data, replica_batches
from pytrain.metrics import Evaluation
from pytrain.rank import EVALUATION_BATCHES, RankModel
from pytrain.training_state import stage_pieces

if TYPE_CHECKING:
    from pytrain.checkpoint import Checkpoint
    from pytrain.config import RunConfig


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


def evaluate_checkpoint(
    path: str | Path,
    world: Group | None = None,
    corpora: Sequence[str] = (),
    *,
    tp: int = 1,
    pp: int = 1,
    batches: int = 0,
    device: str | None = None,
) -> dict[str, Evaluation]:
    """A finished checkpoint on held-out corpora, by name, on any grid; all ranks call this together.

    Weights and activations take memory, gradients and optimizer do not. Each rank reads its own bytes of the
    checkpoint, and only stages that need tokens open the corpora.

    Args:
        path: a checkpoint, or a run folder (its newest).
        world: the ranks; what tp * pp leaves of them are replicas.
        corpora: prefixes of held-out corpora; by default the run's own.
        tp: slices of each stage.
        pp: stages.
        batches: micro-batches per corpus at most; 0 for all.
        device: "cpu" or "hip"; None for that of the run.

    Raises:
        UserError: no whole checkpoint or corpus there, or a grid that ranks or model cannot be cut into.
    """
    world = world or Group()
    checkpoint, config = world.on_root(lambda: _opened(path, world.size, corpora, tp, pp, device))
    model = RankModel(config, world, training=False)
    for stage in model.stages.values():
        checkpoint.read_into(stage_pieces(stage))
    sha256, readers = checkpoint.state.get("tokenizer_sha256"), model.groups.readers
    heldout = open_data(model.groups, lambda: open_heldout(config, sha256, readers))
    notes = model.groups.world.broadcast([HeldOutNote.of(corpus) for corpus in heldout or ()])
    return {
        note.name: evaluate(model, note, None if heldout is None else heldout[index], batches)
        for index, note in enumerate(notes)
    }


def open_heldout(config: RunConfig, tokenizer_sha256: str | None, readers: Group) -> list[HeldOut]:
    """The held-out corpora of a run, opened by all `readers` together.

    Raises:
        UserError: one cannot be read, or was made with another tokenizer.
    """
    data = config.data
    return [
        HeldOut(
            corpus.prefix,
            data.sequence_length,
            config.model.vocabulary,
            data.document_boundaries,
            name=corpus.name,
            tokenizer_sha256=tokenizer_sha256,
            on_root=readers.on_root,
        )
        for corpus in data.heldout
    ]


def _opened(
    path: str | Path, ranks: int, corpora: Sequence[str], tp: int, pp: int, device: str | None
) -> tuple[Checkpoint, RunConfig]:
    """A checkpoint, and its run's configuration on another grid, and device if one is named."""
    import tomllib

    from pytrain.checkpoint import Checkpoint
    from pytrain.config import build

    if ranks % (tp * pp):
        raise UserError(f"{ranks} ranks are no multiple of tp * pp = {tp} * {pp}; start as many, or change one")
    checkpoint = Checkpoint.open(path)
    tables = tomllib.loads(checkpoint.config_text)
    dp = ranks // (tp * pp)
    tables["parallel"] = {"dp": dp, "pp": pp, "tp": tp}
    tables["batch"]["global_batch"] = tables["batch"]["micro_batch"] * dp
    if device is not None:
        tables["run"]["device"] = device
    tables.get("collectives", {}).pop("device_buffers", None)  # of the training's machine and device
    tables["run"].pop("hip_products", None)
    tables["recompute"], tables["sample"], tables["evaluation"] = {}, {}, {}
    if corpora:
        tables["data"]["heldout"] = list(corpora)
    config = build(tables, str(checkpoint.folder / "config.toml"))
    if not config.data.heldout:
        raise UserError(f"{checkpoint.folder} was trained without data.heldout; name a corpus to evaluate on")
    return checkpoint, config


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
