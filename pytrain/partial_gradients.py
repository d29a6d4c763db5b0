"""Gradients that tensor-parallel ranks have parts of: which, and over whom they are summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Group
    from pytrain.parallel import Groups
    from pytrain.stage import Stage


def summing_group(stage: Stage, spec: _native.TensorSpec, groups: Groups) -> Group | None:
    """Over whom a tensor's gradient is summed before its replicas are; None: what a rank has is whole.

    The ranks that share a KV head saw other query heads. Under sequence parallelism each rank saw its rows alone of
    what norms, row-parallel biases and positions are added to.
    """
    if spec.sum_over_sharing:
        return groups.sharing
    if stage.sequence_parallel and spec.partial_with_sequence_parallel:
        return groups.tp
    return None


def sum_partial(stage: Stage, bucket: int, gradients: _native.Buffer, groups: Groups) -> None:
    """Make the gradients of a bucket, in a buffer laid out like it, whole before they are reduced over replicas.

    All tensor-parallel ranks call this for the same buckets in the same order, and get the same bits.
    """
    summing = [
        group.start_all_reduce(stage.slice_of(gradients, spec), stage.half)
        for spec in stage.layout.tensors
        if spec.bucket == bucket and (group := summing_group(stage, spec, groups)) is not None
    ]
    for handle in summing:
        handle.wait()
