"""Going on from a checkpoint: which one, whether it is of the same run, what it gives, and what changed since."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytrain import checkpoint
from pytrain.data.mixture import Phase
from pytrain.errors import UserError
from pytrain.training_state import optimizer_pieces, weight_pieces

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.config import RunConfig
    from pytrain.config.run import DataSection
    from pytrain.rank import RankModel

CARRIED = ("huggingface",)
"""What an import noted in a checkpoint's state, and what every later checkpoint keeps."""


def find_checkpoint(folder: Path, resume: str, world: Group) -> checkpoint.Checkpoint | None:
    """What `--resume` asks for: "none", "auto" or a path.

    Raises:
        UserError: "none", but the run has checkpoints; or the path has none.
    """

    def newest() -> Path | None:
        found = checkpoint.newest_checkpoint(folder)
        if resume == "none" and found is not None:
            raise UserError(
                f"{folder} already holds {found.name}; go on with --resume auto, or choose another run.folder"
            )
        if found is not None:
            checkpoint.check_whole(found)
        return found

    if resume not in ("none", "auto"):
        return checkpoint.Checkpoint.open(resume, world)
    return None if world.on_root(newest) is None else checkpoint.Checkpoint.open(folder, world)


def check_same_run(found: checkpoint.Checkpoint, config: RunConfig, tokenizer_sha256: str) -> None:
    """Refuse to go on with what would give the samples another order or meaning.

    Raises:
        UserError: another tokenizer, seed or sequence length.
    """
    found.check_tokenizer(tokenizer_sha256, config.tokenizer.path)
    state = found.state
    for section, key, value in (
        ("run", "seed", config.run.seed),
        ("data", "sequence_length", config.data.sequence_length),
    ):
        if state.get("samples") and state.get(key, value) != value:
            raise UserError(
                f"{section}.{key} is {value}, but {found.folder} was trained with {state[key]}: "
                "the order of samples would change; set it back, or start anew from its weights"
            )


def load_tensors(found: checkpoint.Checkpoint, model: RankModel) -> None:
    """Weights and optimizer of this rank, in place; a checkpoint of weights alone starts a new optimizer.

    Raises:
        UserError: the checkpoint is of another model or precision, or damaged.
    """
    found.read_into(weight_pieces(model.optimizer))
    names = found.tensors()
    pieces = optimizer_pieces(model.optimizer)
    if any(piece.tensor in names for piece in pieces):
        found.read_into(pieces)
    else:
        model.optimizer.adopt_weights()
    model.optimizer.updates = int(found.state.get("updates", 0))


def mixture_phases(found: checkpoint.Checkpoint | None, data: DataSection) -> list[Phase]:
    """The weights of the corpora over the samples of the run: a change of weights begins at the checkpoint.

    Other corpora than the checkpoint's begin anew, as one phase: their samples have no place in its order.
    """
    weights = tuple(corpus.weight for corpus in data.train)
    if found is None or not found.state.get("samples"):
        return [Phase(0, weights)]
    before = _corpora(found)
    if [name for name, _ in before] != [corpus.name for corpus in data.train]:
        return [Phase(0, weights)]
    stored = found.state.get("phases", [[0, [weight for _, weight in before]]])
    phases = [Phase(int(start), tuple(map(float, of_phase))) for start, of_phase in stored]
    samples = int(found.state["samples"])
    if _shares(phases[-1].weights) != _shares(weights):
        phases = [phase for phase in phases if phase.start_sample < samples]  # no sample was drawn by a later one
    if _shares(phases[-1].weights) != _shares(weights):
        phases.append(Phase(samples, weights))
    return phases


def stored_phases(phases: Sequence[Phase]) -> list[list[Any]]:
    """As JSON values, for the state of a checkpoint."""
    return [[phase.start_sample, list(phase.weights)] for phase in phases]


def notes(
    found: checkpoint.Checkpoint, config: RunConfig, record: Mapping[str, Any], phases: Sequence[Phase]
) -> Iterator[str]:
    """A line for each way in which the run goes on otherwise than it began.

    Args:
        found: what it goes on from.
        config: what it goes on with.
        record: of this process, see `pytrain.record`.
        phases: of the mixture, see `mixture_phases`.
    """
    before = found.state.get("record", {})
    for key in ("isa", "blocking"):
        then, now = before.get("native", {}).get(key), record["native"].get(key)
        if then is not None and then != now:
            yield f"note: {key} was {then} and is {now} now: results agree, but not bit for bit"
    then, now = before.get("grid"), record["grid"]
    if then is not None and then != now:
        was, is_ = (" x ".join(f"{axis}{size}" for axis, size in grid.items()) for grid in (then, now))
        yield f"note: the grid was {was} and is {is_} now, with the same samples: results agree, but not bit for bit"
    samples = int(found.state.get("samples", 0))
    if not samples:
        return
    batch = _table(found, "batch").get("global_batch", config.batch.global_batch)
    if batch != config.batch.global_batch:
        yield (
            f"note: batch.global_batch was {batch} and is {config.batch.global_batch} from step {found.step + 1} on: "
            f"no sample is left out or repeated, but run.steps and learning_rate count steps, whatever their size"
        )
    trained, training = _contents(_corpora(found), before), _contents(_weights(config.data), record)
    if trained and trained != training:
        yield "note: the corpora are not those that the run began with: samples go on in another order"
    elif phases[-1].start_sample == samples:
        was, is_ = (
            ", ".join(f"{name} {weight:g}" for (name, _), weight in zip(training, phase.weights, strict=True))
            for phase in phases[-2:]
        )
        yield (
            f"note: the weights of the corpora were {was} and are {is_} from sample {samples} on; "
            "each corpus goes on where it was"
        )


def _table(found: checkpoint.Checkpoint, section: str) -> dict[str, Any]:
    """A section of the configuration that the checkpoint was written under."""
    table: dict[str, Any] = tomllib.loads(found.config_text).get(section, {})
    return table


def _corpora(found: checkpoint.Checkpoint) -> list[tuple[str, float]]:
    """Name and weight of each training corpus of the checkpoint's run."""
    return [(corpus["name"], float(corpus["weight"])) for corpus in _table(found, "data").get("train", ())]


def _weights(data: DataSection) -> list[tuple[str, float]]:
    return [(corpus.name, corpus.weight) for corpus in data.train]


def _contents(corpora: Sequence[tuple[str, float]], record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and hash of each corpus, as far as they are known, in the order that the order of samples hangs on."""
    known = record.get("corpora", {})
    return [(name, known.get(name)) for name, _ in corpora]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    return [Fraction(weight) / total for weight in weights]
