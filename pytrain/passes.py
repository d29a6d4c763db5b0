"""Forward and backward of one stage, with what tensor parallelism does at the cuts.

With one tensor-parallel rank a pass is a single native call. With more, a pass stops where a row-parallel product has
left this rank's part (`partial`), where the gradient of a norm's output is one rank's part (`dnorm`), and where the
loss needs the statistics of every vocabulary slice. The sum of `dnorm` travels while the weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.residency import Loans
    from pytrain.stage import Segment, Stage

BucketReady = Callable[[int], None]
"""Called with the index of a bucket once all of its gradients of this micro-batch are there."""

LEAVES_PARTIAL = frozenset(("embed", "attention", "mlp"))
LEAVES_DNORM = frozenset(("attention", "mlp", "head"))


class Passes:
    """Runs a stage's passes.

    Args:
        stage: whose.
        group: its tensor-parallel ranks.
        loans: where weights or gradients come from that are not whole at all times; None if all are.
    """

    def __init__(self, stage: Stage, group: Group, loans: Loans | None = None) -> None:
        self.stage = stage
        self.group = group
        self.loans = loans
        self._kinds = {op: stage.shape.op_name(op).split()[-1] for op in range(stage.first_op, stage.last_op)}
        self._half = stage.half

    def forward(self, slot: int, pass_: str) -> None:
        """All ops of the stage; `pass_` is "train" or "evaluate"."""
        stage = self.stage
        if self.group.size == 1 and self.loans is None:
            stage.forward(slot, pass_)
            return
        for segment, following in zip(stage.segments, (*stage.segments[1:], None), strict=True):
            # With one slice the head takes its gradients while it has the logits, that is in the forward pass.
            fills = pass_ == "train" and self.group.size == 1 and segment.last_op == stage.shape.op_count
            with self._lent(segment, following, fills):
                self._forward_ops(slot, segment.first_op, segment.last_op, pass_)
                if self.group.size > 1 and self.loans is not None:
                    stage.native.finish_segment(slot, segment.last_op)
        if self.group.size > 1 and self.loans is None:
            stage.native.finish_forward(slot)

    def _forward_ops(self, slot: int, begin: int, end: int, pass_: str) -> None:
        """Ops [begin, end), with the cuts between them."""
        stage = self.stage
        if self.group.size == 1:
            for op in range(begin, end):
                stage.native.forward(slot, op, op + 1, pass_)
                self._poll()
            return
        for op in range(begin, end):
            kind = self._kinds[op]
            if kind in LEAVES_PARTIAL:
                stage.native.forward(slot, begin, op + 1, pass_)
                self.group.all_reduce(stage.native.partial, self._half)
            elif kind == "head":
                stage.native.forward(slot, begin, op + 1, pass_)
                self.group.all_gather(stage.native.statistics(slot))
            else:
                continue
            begin = op + 1
        stage.native.forward(slot, begin, end, pass_)

    def backward(self, slot: int, bucket_ready: BucketReady | None = None) -> None:
        """All ops in reverse, each weight gradient straight after its input gradient."""
        stage = self.stage
        if self.group.size == 1 and bucket_ready is None and self.loans is None:
            stage.backward(slot)
            return
        segments = stage.segments
        for segment, following in zip(reversed(segments), (*reversed(segments[:-1]), None), strict=True):
            with self._lent(segment, following, fills=True):
                self._backward_ops(slot, segment.first_op, segment.last_op)
            if bucket_ready is not None:
                bucket_ready(segment.bucket)

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
        for segment in reversed(self.stage.segments):
            self.stage.native.backward_weight(slot, segment.first_op, segment.last_op)
            if bucket_ready is not None:
                bucket_ready(segment.bucket)

    def _backward_ops(self, slot: int, begin: int, end: int) -> None:
        """Ops [begin, end) in reverse, with the cuts between them."""
        stage = self.stage
        if self.group.size == 1 and self.loans is None:
            stage.native.backward(slot, begin, end)
            return
        if self.group.size == 1:
            for op in reversed(range(begin, end)):
                stage.native.backward(slot, op, op + 1)
                self._poll()
            return
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

    def _lent(self, segment: Segment, following: Segment | None, fills: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.loans is None else self.loans.segment(segment, following, fills)

    def _poll(self) -> None:
        if self.loans is not None:
            self.loans.poll()
