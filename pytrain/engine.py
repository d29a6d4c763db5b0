"""The one interpreter of step programs, for training and evaluation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pytrain.collectives import Group
from pytrain.data.loader import Batch
from pytrain.optimizer import AdamW, UpdateResult
from pytrain.schedule import Action, Kind, Program
from pytrain.stage import Scalar, Stage

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss_sum: float
    """Sum over the targets of all micro-batches, in nats."""
    target_count: int
    """Targets that counted in the loss."""
    update: UpdateResult | None
    """None in evaluation."""
    native_seconds: float
    """Wall time inside native calls; the rest of the step is Python's."""

    @property
    def loss(self) -> float:
        """Mean loss per target, in nats; NaN if there was none."""
        return self.loss_sum / self.target_count if self.target_count else float("nan")


class Engine:
    """Runs programs of actions over one stage. `group` is the data-parallel group."""

    def __init__(self, stage: Stage, optimizer: AdamW | None, group: Group) -> None:
        self.stage = stage
        self.optimizer = optimizer
        self.group = group
        self._native_seconds = 0.0

    def run(
        self,
        program: Program,
        batches: Sequence[Batch],
        *,
        learning_rate: float = 0.0,
        loss_scale: float = 1.0,
    ) -> StepResult:
        """Run one program over the micro-batches of a step.

        A program with an UPDATE trains: gradients are those of the mean loss over all targets of the global
        batch, whatever the split into micro-batches. One without evaluates and leaves the model as it is.

        Args:
            program: see `pytrain.schedule`.
            batches: micro-batch m is batches[m].
            learning_rate: of the update.
            loss_scale: factor on the loss while gradients are in a 16-bit type.
        """
        training = any(action.kind is Kind.UPDATE for action in program)
        self._native_seconds = 0.0
        count = np.array([sum(int(np.count_nonzero(batch.targets >= 0)) for batch in batches)], np.float64)
        self.group.all_reduce(count)
        scalars = self.stage.scalars
        scalars[:] = 0.0
        scalars[Scalar.GRADIENT_SCALE] = loss_scale / max(count[0], 1.0)
        if training:
            self._timed(self.stage.zero_gradients)
        update = None
        for action in program:
            if action.kind is Kind.UPDATE:
                update = self._timed(lambda: self._update(learning_rate, loss_scale))
            else:
                self._run_pass(action, batches, "train" if training else "evaluate")
        sums = scalars[[Scalar.LOSS_SUM, Scalar.TARGET_COUNT]]
        self.group.all_reduce(sums)
        return StepResult(float(sums[0]), int(sums[1]), update, self._native_seconds)

    def _update(self, learning_rate: float, loss_scale: float) -> UpdateResult:
        assert self.optimizer is not None, "a program with an UPDATE needs an optimizer"
        return self.optimizer.update(learning_rate, loss_scale)

    def _run_pass(self, action: Action, batches: Sequence[Batch], pass_: str) -> None:
        assert action.microbatch is not None
        slot = action.microbatch % self.stage.native.slots
        if action.kind is Kind.FORWARD:
            self.stage.load_batch(slot, batches[action.microbatch])
            self._timed(lambda: self.stage.forward(slot, pass_))
        elif action.kind is Kind.BACKWARD:
            self._timed(lambda: self.stage.backward(slot))
        elif action.kind is Kind.BACKWARD_INPUT:
            self._timed(
                lambda: self.stage.native.backward_input(slot, self.stage.first_op, self.stage.last_op)
            )
        else:
            self._timed(
                lambda: self.stage.native.backward_weight(slot, self.stage.first_op, self.stage.last_op)
            )

    def _timed(self, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        self._native_seconds += time.perf_counter() - started
        return result
