"""A stage's ops on one of several tensor-parallel ranks, with what these exchange at the cuts between ops.

`WholeRows` keeps the residual stream whole on every rank, `OwnRows` is sequence parallelism: each rank keeps its
rows of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytrain.collectives.group import Finished
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.collectives.group import Handle
    from pytrain.stage import Array, Stage

LEAVES_PARTIAL = frozenset(("embed", "attention", "mlp"))
LEAVES_DNORM = frozenset(("attention", "mlp", "head"))
NORMS = frozenset(("norm1", "norm2", "norm"))
DONE: Handle = Finished()


class WholeRows:
    """Row-parallel products and gradients of norm outputs are all-reduced.

    Args:
        stage: whose ops.
        group: of the tensor-parallel ranks.
    """

    cuts = LEAVES_PARTIAL | {"head"}
    """Kinds of ops after which forward stops."""

    def __init__(self, stage: Stage, group: Group) -> None:
        self.stage, self.group = stage, group
        self.half = stage.half
        self.kinds = {op: stage.shape.op_name(op).split()[-1] for op in range(stage.first_op, stage.last_op)}

    def forward(self, slot: int, begin: int, end: int, pass_: str) -> None:
        """Ops [begin, end); what the last of them leaves for the next is summed or gathered."""
        for op in range(begin, end):
            if self.kinds[op] in self.cuts:
                self.stage.native.forward(slot, begin, op + 1, pass_)
                self._after(slot, op)
                begin = op + 1
        self.stage.native.forward(slot, begin, end, pass_)

    def backward(self, slot: int, begin: int, end: int) -> None:
        """Ops [begin, end) in reverse, each weight gradient straight after its input gradient."""
        for op in reversed(range(begin, end)):
            if self.kinds[op] == "mlp":
                self._recompute_layer(slot, op)
            self._backward_op(slot, op)

    def backward_input(self, slot: int, begin: int, end: int) -> None:
        """Input gradients of ops [begin, end) in reverse; `backward_weight` has to follow some time."""
        for op in reversed(range(begin, end)):
            self.stage.native.backward_input(slot, op, op + 1)
            if self.kinds[op] in LEAVES_DNORM:
                self._start_sum(self.stage.native.dnorm).wait()

    def backward_weight(self, slot: int, begin: int, end: int) -> None:
        """Weight gradients of ops [begin, end) in reverse. Nothing of it crosses ranks."""
        self.stage.native.backward_weight(slot, begin, end)

    def _start_sum(self, rows: Array) -> Handle:
        """rows: (rows, hidden), this rank's part of a sum."""
        return self.group.start_all_reduce(rows, self.half)

    def _after(self, slot: int, op: int) -> None:
        """The cut after an op in forward."""
        if self.kinds[op] == "head":
            self.group.all_gather(self.stage.native.statistics(slot))
        else:
            self._start_sum(self.stage.native.partial).wait()

    def _backward_op(self, slot: int, op: int) -> None:
        native_stage = self.stage.native
        native_stage.backward_input(slot, op, op + 1)
        summing = self._start_sum(native_stage.dnorm) if self.kinds[op] in LEAVES_DNORM else DONE
        native_stage.backward_weight(slot, op, op + 1)
        summing.wait()

    def _recompute_layer(self, slot: int, mlp: int) -> None:
        """The forward of a layer again, with its cuts, where the policy keeps only the layer's input."""
        if self.stage.recompute != "full":
            return
        for op in range(max(mlp - 3, self.stage.first_op), mlp + 1):
            self.stage.native.recompute(slot, op, op + 1)
            if self.kinds[op] in self.cuts and op != mlp:  # whose product backward has no use for
                self._after(slot, op)


class OwnRows(WholeRows):
    """Sums are reduce-scattered, and norm outputs and gradients of the stream gathered where all rows are needed.

    In backward a norm's output travels while the input gradient is computed, and the gradient of a norm's output
    while the weight gradient is. Where weight gradients come late, nothing hides what they gather.
    """

    cuts = WholeRows.cuts | NORMS

    def __init__(self, stage: Stage, group: Group) -> None:
        super().__init__(stage, group)
        rows, hidden = stage.native.partial.shape
        starts = [native().balanced(rows, rank, group.size)[0] for rank in range(group.size)]
        self.bounds = [start * hidden for start in (*starts, rows)]

    def backward_input(self, slot: int, begin: int, end: int) -> None:
        for op in reversed(range(begin, end)):
            kind = self.kinds[op]
            if kind == "head":
                self._start_gather_norm(slot, op).wait()
            elif kind in LEAVES_DNORM:
                self._start_gather(self.stage.native.dresidual_rows(slot, op)).wait()
            self.stage.native.backward_input(slot, op, op + 1)
            if kind in LEAVES_DNORM:
                self._start_sum(self.stage.native.dnorm).wait()

    def backward_weight(self, slot: int, begin: int, end: int) -> None:
        """Weight gradients of ops [begin, end) in reverse, once what they need of other ranks is there."""
        for op in reversed(range(begin, end)):
            kind = self.kinds[op]
            if kind not in LEAVES_PARTIAL:
                continue
            dresidual = self._start_gather(self.stage.native.dresidual_rows(slot, op, late=True))
            if kind != "embed":
                self._start_gather_norm(slot, op).wait()
            dresidual.wait()
            self.stage.native.backward_weight(slot, op, op + 1)

    def _start_sum(self, rows: Array) -> Handle:
        """rows: (rows, hidden), this rank's part of a sum; of the sum it gets its rows."""
        return self.group.start_reduce_scatter(rows, self.bounds, self.half)

    def _start_gather(self, rows: Array) -> Handle:
        """rows: (rows, hidden), of which each rank has its own."""
        return self.group.start_all_gather(rows, self.bounds)

    def _start_gather_norm(self, slot: int, op: int) -> Handle:
        """The norm output that an op multiplies with."""
        rebuilt = self.stage.native.rebuild_gathered(slot, op)
        return self._start_gather(self.stage.native.gathered) if rebuilt else DONE

    def _after(self, slot: int, op: int) -> None:
        if self.kinds[op] in NORMS:
            self._start_gather(self.stage.native.gathered).wait()
        else:
            super()._after(slot, op)

    def _backward_op(self, slot: int, op: int) -> None:
        native_stage, kind = self.stage.native, self.kinds[op]
        dresidual = self._start_gather(native_stage.dresidual_rows(slot, op)) if kind in LEAVES_PARTIAL else DONE
        output = self._start_gather_norm(slot, op) if kind in LEAVES_DNORM else DONE
        dresidual.wait()
        if kind == "head":  # which makes its logits again
            output.wait()
        native_stage.backward_input(slot, op, op + 1)
        output.wait()
        summing = self._start_sum(native_stage.dnorm) if kind in LEAVES_DNORM else DONE
        native_stage.backward_weight(slot, op, op + 1)
        summing.wait()


def sliced_ops(stage: Stage, group: Group) -> WholeRows:
    """The ops of a stage of several slices, as the stage was built."""
    return (OwnRows if stage.sequence_parallel else WholeRows)(stage, group)
