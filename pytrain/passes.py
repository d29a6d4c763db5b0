"""Forward and backward of one stage, with what tensor parallelism does at the cuts.

With one tensor-parallel rank a pass is a single native call. With more, a pass stops where a row-parallel product has
left this rank's part (`partial`), where the gradient of a norm's output is one rank's part (`dnorm`), and where the
loss needs the statistics of every vocabulary slice. The sum of `dnorm` travels while the weight gradient is computed.

What this costs on the wire, per micro-batch and stage, in arrays of (rows, hidden) activations that all tp ranks send
(tp - 1)/tp of: a reduce-scatter or an all-gather is one such array, an all-reduce by the best algorithms two.

                        all-reduce                     sequence parallelism
    forward, a layer    2 (attention, mlp)    = 4      2 reduce-scatters, 2 gathers of norm outputs    = 4
    backward, a layer   2                     = 4      2 gathers of the stream's gradient,
                                                       2 reduce-scatters                               = 4
                                                       2 norm outputs gathered again                   + 2
    embedding           1 forward             = 2      1 reduce-scatter, 1 gather in backward          = 2
    head                1 backward            = 2      1 gather, 1 reduce-scatter in backward          = 2
                                                       1 norm output gathered again, unless this
                                                       micro-batch's backward follows its forward      (+ 1)
    full recompute      1 a layer more        = 2      1 reduce-scatter, 1 gather: of the 2 norm
                                                       outputs only attention's is gathered yet again  = 2
    late weight         0                              2 gathers of the stream's gradient a layer,
    gradients                                          which is kept in parts until then               + 2

So sequence parallelism sends 8 L + 4 arrays as the all-reduce does, and 2 L (+ 1) beside them, or 4 L where weight
gradients come late: that is the price of keeping norm outputs on no rank (Megatron-LM's, arXiv 2205.05198). Once a
step the gradients of replicated tensors are summed over the ranks (`pytrain.partial_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

from pytrain.slices import WholeRows, sliced_ops

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.residency import Loans
    from pytrain.stage import Segment, Stage

GradientsReady = Callable[[int, range], None]
"""Called with the index of a bucket and some ops once all that they add to it in this micro-batch is there; of a pass
all ops, the last ones first."""


class Passes:
    """Runs a stage's passes.

    Args:
        stage: whose.
        group: its tensor-parallel ranks.
        loans: where weights or gradients come from that are not whole at all times; None if all are.
        arrivals: whole weights that may still be on their way after an update; None if they never are.
    """

    def __init__(self, stage: Stage, group: Group, loans: Loans | None = None, arrivals: Loans | None = None) -> None:
        self.stage = stage
        self.group = group
        self.loans, self.arrivals = loans, arrivals
        self._sliced: WholeRows | None = sliced_ops(stage, group) if group.size > 1 else None
        # Slices stop at every op, in whatever parts each one's gradients travel: all sum the same tensors at the same
        # place, see `PartialSums`.
        ops = range(stage.first_op, stage.last_op)
        self._cuts = frozenset(part.op for part in stage.parts) if self._sliced is None else frozenset(ops)

    def forward(self, slot: int, pass_: str) -> None:
        """All ops of the stage; `pass_` is "train" or "evaluate"."""
        stage = self.stage
        if self.loans is not None:
            self._forward_on_loan(slot, pass_, self.loans)
        elif self.arrivals is not None and self.arrivals.arriving:
            self._forward_on_loan(slot, pass_, self.arrivals)
        elif self._sliced is not None:
            self._sliced.forward(slot, stage.first_op, stage.last_op, pass_)
            stage.native.finish_forward(slot)
        else:
            stage.forward(slot, pass_)

    def _forward_on_loan(self, slot: int, pass_: str, loans: Loans) -> None:
        """A segment at a time, since no more of the weights may be there."""
        stage = self.stage
        for segment, following in zip(stage.segments, (*stage.segments[1:], None), strict=True):
            # With one slice the head takes its gradients while it has the logits, that is in the forward pass.
            fills = pass_ == "train" and self._sliced is None and segment.last_op == stage.shape.op_count
            with loans.segment(segment, following, fills):
                if self._sliced is not None:
                    self._sliced.forward(slot, segment.first_op, segment.last_op, pass_)
                    stage.native.finish_segment(slot, segment.last_op)
                    continue
                for op in range(segment.first_op, segment.last_op):
                    stage.native.forward(slot, op, op + 1, pass_)
                    loans.poll()

    def backward(self, slot: int, ready: GradientsReady | None = None) -> None:
        """All ops in reverse, each weight gradient straight after its input gradient."""
        stage, loans = self.stage, self.loans
        if self._sliced is None and ready is None and loans is None:
            stage.backward(slot)
            return
        segments = stage.segments
        for segment, following in zip(reversed(segments), (*reversed(segments[:-1]), None), strict=True):
            with nullcontext() if loans is None else loans.segment(segment, following, fills=True):
                for ops in self._spans(segment):
                    self._backward_ops(slot, ops)
                    if ready is not None:
                        ready(segment.bucket, ops)

    def _spans(self, segment: Segment) -> Iterator[range]:
        """The ops of a segment, the last ones first, cut where gradients may travel."""
        inner = (op for op in range(segment.first_op + 1, segment.last_op) if op in self._cuts)
        edges = (segment.first_op, *inner, segment.last_op)
        return (range(begin, end) for begin, end in reversed(tuple(pairwise(edges))))

    def _backward_ops(self, slot: int, ops: range) -> None:
        native = self._sliced or self.stage.native
        if self.loans is None or self._sliced is not None:
            native.backward(slot, ops.start, ops.stop)
            return
        for op in reversed(ops):
            native.backward(slot, op, op + 1)
            self.loans.poll()

    def backward_input(self, slot: int) -> None:
        """Input gradients of all ops in reverse; `backward_weight` has to follow some time."""
        stage = self.stage
        (self._sliced or stage.native).backward_input(slot, stage.first_op, stage.last_op)

    def backward_weight(self, slot: int, ready: GradientsReady | None = None) -> None:
        """Weight gradients of all ops in reverse."""
        for segment in reversed(self.stage.segments):
            for ops in self._spans(segment):
                (self._sliced or self.stage.native).backward_weight(slot, ops.start, ops.stop)
                if ready is not None:
                    ready(segment.bucket, ops)
