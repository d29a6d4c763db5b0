"""Forward and backward of one stage, with what tensor parallelism does at the cuts.

With one tensor-parallel rank a pass is a single native call. With more, a pass stops where a row-parallel product has
left this rank's part (`partial`), where the gradient of a norm's output is one rank's part (`dnorm`), and where the
loss needs the statistics of every vocabulary slice. The sum of `dnorm` travels while the weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.stage import Stage

BucketReady = Callable[[int], None]
"""Called with the index of a bucket once all of its gradients of this micro-batch are there."""

LEAVES_PARTIAL = frozenset(("embed", "attention", "mlp"))
LEAVES_DNORM = frozenset(("attention", "mlp", "head"))


class Passes:
    """Runs a stage's passes; `group` is its tensor-parallel group."""

    def __init__(self, stage: Stage, group: Group) -> None:
        self.stage = stage
        self.group = group
        self._kinds = {op: stage.shape.op_name(op).split()[-1] for op in range(stage.first_op, stage.last_op)}
        self._half = stage.half

    def forward(self, slot: int, pass_: str) -> None:
        """All ops of the stage; `pass_` is "train" or "evaluate"."""
        stage = self.stage
        if self.group.size == 1:
            stage.forward(slot, pass_)
            return
        begin = stage.first_op
        for op, kind in self._kinds.items():
            if kind in LEAVES_PARTIAL:
                stage.native.forward(slot, begin, op + 1, pass_)
                self.group.all_reduce(stage.native.partial, self._half)
            elif kind == "head":
                stage.native.forward(slot, begin, op + 1, pass_)
                self.group.all_gather(stage.native.statistics(slot))
            else:
                continue
            begin = op + 1
        stage.native.forward(slot, begin, stage.last_op, pass_)
        stage.native.finish_forward(slot)

    def backward(self, slot: int, bucket_ready: BucketReady | None = None) -> None:
        """All ops in reverse, each weight gradient straight after its input gradient."""
        stage = self.stage
        if self.group.size == 1 and bucket_ready is None:
            stage.backward(slot)
            return
        for bucket, begin, end in reversed(self._bucket_ranges()):
            if self.group.size == 1:
                stage.native.backward(slot, begin, end)
            else:
                self._backward_with_cuts(slot, begin, end)
            if bucket_ready is not None:
                bucket_ready(bucket)

    def backward_input(self, slot: int) -> None:
        """Input gradients of all ops in reverse; `backward_weight` has to follow some time."""
        stage = self.stage
        if self.group.size == 1:
            stage.native.backward_input(slot, stage.first_op, stage.last_op)
            return
        for op in reversed(self._kinds):
            stage.native.backward_input(slot, op, op + 1)
            if self._kinds[op] in LEAVES_DNORM:
                self.group.all_reduce(stage.native.dnorm, self._half)

    def backward_weight(self, slot: int, bucket_ready: BucketReady | None = None) -> None:
        """Weight gradients of all ops in reverse. Nothing of it crosses ranks."""
        for bucket, begin, end in reversed(self._bucket_ranges()):
            self.stage.native.backward_weight(slot, begin, end)
            if bucket_ready is not None:
                bucket_ready(bucket)

    def _backward_with_cuts(self, slot: int, begin: int, end: int) -> None:
        stage = self.stage
        for op in reversed(range(begin, end)):
            kind = self._kinds[op]
            if kind == "mlp":
                self._recompute_layer(slot, op)
            stage.native.backward_input(slot, op, op + 1)
            if kind not in LEAVES_DNORM:
                stage.native.backward_weight(slot, op, op + 1)
                continue
            summing = self.group.start_all_reduce(stage.native.dnorm, self._half)
            stage.native.backward_weight(slot, op, op + 1)
            summing.wait()

    def _recompute_layer(self, slot: int, mlp: int) -> None:
        """The forward of a layer again, with its cut, where the policy keeps only the layer's input."""
        stage = self.stage
        if stage.recompute != "full":
            return
        begin = max(mlp - 3, stage.first_op)
        for op in range(begin, mlp + 1):
            stage.native.recompute(slot, op, op + 1)
            if self._kinds[op] == "attention":
                self.group.all_reduce(stage.native.partial, self._half)

    def _bucket_ranges(self) -> list[tuple[int, int, int]]:
        """(bucket, first op, past its last op) in the order of the ops."""
        layers = self.stage.model.layers
        ranges: list[tuple[int, int, int]] = []
        before: int | None = None
        for op in self._kinds:
            owner = -1 if op == 0 else min((op - 1) // 4, layers)
            if owner == before:
                bucket, begin, _ = ranges.pop()
                ranges.append((bucket, begin, op + 1))
            else:
                ranges.append((len(ranges), op, op + 1))
            before = owner
        return ranges
