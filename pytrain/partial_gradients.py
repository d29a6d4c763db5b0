"""Gradients that tensor-parallel ranks have parts of: which, and over whom they are summed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Group, Handle
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


class PartialSums:
    """Makes the gradients of one stage whole before they are reduced over replicas.

    All tensor-parallel ranks start the sums of the same ops in the same order, whatever parts their buckets are cut
    in, and get the same bits.
    """

    def __init__(self, stage: Stage, groups: Groups) -> None:
        self._stage = stage
        self._of_op: defaultdict[int, list[tuple[_native.TensorSpec, Group]]] = defaultdict(list)
        for spec in stage.layout.tensors:
            if (group := summing_group(stage, spec, groups)) is not None:
                self._of_op[spec.op].append((spec, group))
        self._travelling: defaultdict[int, list[Handle]] = defaultdict(list)

    def start(self, op: int, buffer_of: Callable[[int], _native.Buffer]) -> None:
        """Backward has done an op: sum the gradients of its tensors, which lie in `buffer_of(bucket)`."""
        for spec, group in self._of_op.get(op, ()):
            array = self._stage.slice_of(buffer_of(spec.bucket), spec)
            self._travelling[spec.bucket].append(group.start_all_reduce(array, self._stage.half))

    def finish(self, bucket: int) -> None:
        """Return when the sums that were started in a bucket are done."""
        for handle in self._travelling.pop(bucket, ()):
            handle.wait()
