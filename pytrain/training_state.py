"""What a checkpoint holds of a stage and its optimizer: runs of elements of global tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytrain.checkpoint.pieces import TensorEntry, TensorPiece
from pytrain.optimizer import AdamW
from pytrain.stage import Stage

if TYPE_CHECKING:
    from pytrain import _native


def weight_pieces(stage: Stage) -> list[TensorPiece]:
    """The weights that this rank owns."""
    return list(_pieces(stage, stage.weights, "weights", ""))


def optimizer_pieces(optimizer: AdamW) -> list[TensorPiece]:
    """Moments, and the master where it is not the weights themselves."""
    stage = optimizer.stage
    pieces = list(_pieces(stage, optimizer.first, "optimizer", ".m"))
    pieces += _pieces(stage, optimizer.second, "optimizer", ".v")
    if optimizer.has_master:
        pieces += _pieces(stage, optimizer.master, "optimizer", ".master")
    return pieces


def _pieces(stage: Stage, buffers: list[_native.Buffer], kind: str, suffix: str) -> Iterator[TensorPiece]:
    for spec in stage.layout.tensors:
        if not spec.owner:
            continue
        buffer = buffers[spec.bucket]
        yield TensorPiece(
            file=f"{stage.layout.buckets[spec.bucket].name}.{kind}",
            tensor=spec.name + suffix,
            dtype=buffer.dtype,
            shape=spec.shape,
            first=spec.first_element,
            data=Stage.slice_of(buffer, spec),
        )


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
