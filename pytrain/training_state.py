"""What a checkpoint holds of a stage and its optimizer: runs of elements of global tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from pytrain.checkpoint.pieces import ITEM_BYTES, TensorEntry, TensorPiece
from pytrain.optimizer import AdamW
from pytrain.stage import Stage
from pytrain.zero import Run, StageState

if TYPE_CHECKING:
    from pytrain import _native


def owned_pieces(optimizer: AdamW) -> list[TensorPiece]:
    """What this rank writes: all ranks together cover weights, moments and masters exactly once."""
    return [
        piece
        for state in optimizer.states
        for run in state.runs
        if state.counts(run)
        for piece in (_weight_piece(state, run), *_state_pieces(state, run))
    ]


def weight_pieces(optimizer: AdamW) -> list[TensorPiece]:
    """All weights that this rank holds, whole or as a shard: what it reads."""
    pieces = []
    for state in optimizer.states:
        stage = state.stage
        if stage.whole_weights:
            pieces += stage_pieces(stage)
        else:
            pieces += [_weight_piece(state, run) for run in state.runs]
    return pieces


def stage_pieces(stage: Stage) -> list[TensorPiece]:
    """All weights of a stage that has them whole: what it reads where it only evaluates."""
    return [_piece(stage, spec, "weights", "", stage.policy.weights, 0, array) for spec, array in stage.parameters()]


def optimizer_pieces(optimizer: AdamW) -> list[TensorPiece]:
    """Moments, and the master where it is not the weights themselves, that this rank holds: what it reads."""
    return [piece for state in optimizer.states for run in state.runs for piece in _state_pieces(state, run)]


def _weight_piece(state: StageState, run: Run) -> TensorPiece:
    stage = state.stage
    return _piece(stage, run.spec, "weights", "", stage.policy.weights, run.begin, state.weights_of(run))


def _state_pieces(state: StageState, run: Run) -> Iterator[TensorPiece]:
    buffers = {"m": state.first, "v": state.second} | ({"master": state.master} if state.has_master else {})
    for suffix, of_buckets in buffers.items():
        buffer = of_buckets[run.bucket]
        data = buffer.array[run.in_shard]
        yield _piece(state.stage, run.spec, "optimizer", f".{suffix}", buffer.dtype, run.begin, data)


def _piece(
    stage: Stage,
    spec: _native.TensorSpec,
    kind: str,
    suffix: str,
    dtype: str,
    begin: int,
    data: NDArray[Any],
) -> TensorPiece:
    # The last stage's copy of a tied embedding is the first stage's tensor, which lies in that file.
    bucket = "embed" if spec.tied_copy else stage.layout.buckets[spec.bucket].name
    first = spec.first_element + begin
    return TensorPiece(f"{bucket}.{kind}", spec.name + suffix, dtype, spec.shape, first, data)


def owned_bytes(layout: _native.Layout, policy: _native.Policy, shards: int, part_elements: int) -> int:
    """Bytes of `owned_pieces` of a stage in the first replica, without its memory."""
    states = [policy.weights, "fp32", "fp32", *([policy.master] if policy.master != policy.weights else [])]
    elements = sum(
        piece.end - piece.begin
        for bucket in range(len(layout.buckets))
        for piece in layout.pieces(bucket, 0, shards, part_elements)
        if layout.tensors[piece.tensor].owner
    )
    return elements * sum(ITEM_BYTES[dtype] for dtype in states)


def checkpoint_entries(layout: _native.Layout, policy: _native.Policy) -> list[TensorEntry]:
    """The table of a whole checkpoint of this model, without its memory: for size estimates."""
    entries = []
    for spec in layout.tensors:
        bucket = layout.buckets[spec.bucket].name
        entries.append(TensorEntry(f"{bucket}.weights", spec.name, policy.weights, spec.shape))
        states = [("m", "fp32"), ("v", "fp32")]
        if policy.master != policy.weights:
            states.append(("master", policy.master))
        for suffix, dtype in states:
            entries.append(TensorEntry(f"{bucket}.optimizer", f"{spec.name}.{suffix}", dtype, spec.shape))
    return entries
