"""AdamW over what a rank updates of its stages, with the global gradient norm and clipping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytrain.buckets import Part
from pytrain.parallel import Groups
from pytrain.residency import CollectedGradients, GatheredWeights, Loans
from pytrain.stage import Scalar, Stage
from pytrain.zero import Run, StageState

if TYPE_CHECKING:
    from pytrain.config.run import OptimizerSection


@dataclass(frozen=True)
class UpdateResult:
    """What the device says of a finished update."""

    gradient_norm: float
    """Before clipping, over all parameters of the model."""
    finite: bool
    """False: the gradient had an infinity or NaN, and the update was left out."""


class _Arrays:
    """What an update works on of one stage: views of buffers that stay where they are, made once."""

    def __init__(self, state: StageState) -> None:
        self.state, self.stage = state, state.stage
        self.counted = [state.gradient_of(run) for run in state.runs if state.counts(run)]
        """Gradients of which this rank adds the squares."""
        self.updated: list[tuple[Part | None, list[Any]]] = [(None, [_updated(state, run) for run in state.runs])]
        """What is updated at once: where weights are gathered a part, in the order in which forward needs them."""
        if state.gathers:
            self.updated = [
                (part, [_updated(state, run) for run in state.runs if state.lies_in(run, part)])
                for part in self.stage.parts
            ]


def _updated(state: StageState, run: Run) -> tuple[Any, ...]:
    """Weights, master, moments and gradient of a run, and whether it decays."""
    return (
        state.weights_of(run),
        state.master_of(run),
        state.first[run.bucket].array[run.in_shard],
        state.second[run.bucket].array[run.in_shard],
        state.gradient_of(run),
        run.spec.decay,
    )


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) on matrices and embeddings; moments in fp32.

    Args:
        stages: of this rank.
        settings: see `pytrain config optimizer`.
        groups: whom this rank reduces with.
    """

    def __init__(self, stages: Sequence[Stage], settings: OptimizerSection, groups: Groups) -> None:
        self.settings, self.groups = settings, groups
        self.states = [StageState(stage, groups) for stage in stages]
        self._weights = None if stages[0].whole_weights else GatheredWeights(self.states)
        self._gradients = None if stages[0].whole_gradients else CollectedGradients(self.states)
        self.updates = 0
        self.native_seconds = 0.0
        """Wall time of the last update inside native calls and waiting for other ranks."""
        self._sum = np.zeros(1, np.float64)
        self._arrays = [_Arrays(state) for state in self.states]

    def state_of(self, stage: Stage) -> StageState:
        """The part of one of the stages."""
        return next(state for state in self.states if state.stage is stage)

    def loans_of(self, stage: Stage) -> Loans | None:
        """What the passes of a stage have to borrow; None if everything is whole at all times."""
        if self._weights is None and self._gradients is None:
            return None
        return Loans(self.state_of(stage), self._weights, self._gradients)

    def arrivals_of(self, stage: Stage) -> Loans | None:
        """What a pass has to wait for after an update that gathers weights; None if no update does."""
        state = self.state_of(stage)
        return Loans(state, None, None) if state.gathers else None

    def settle(self) -> None:
        """Return when all weights are there that the last update gathers: before anybody but a pass reads them."""
        for state in self.states:
            state.settle()

    def initialise(self, seed: int) -> None:
        """Draw the initial weights into the master, and round the weights from it."""
        for state in self.states:
            state.initialise(seed)

    def adopt_weights(self) -> None:
        """Masters from the weights, where a checkpoint had weights alone."""
        for state in self.states:
            state.adopt_weights()

    def update(self, learning_rate: float, loss_scale: float = 1.0) -> UpdateResult:
        """Clip by the global norm and take one step; after a gradient that is not finite nothing has changed.

        Whole weights of which this rank updates a shard may still be on their way when this returns: a pass waits
        for what it needs, and `settle` for all.

        Args:
            learning_rate: of this step.
            loss_scale: what the gradients were multiplied with.
        """
        self.native_seconds = 0.0
        self._timed(self.settle)
        self._timed(self._finish_reductions)
        self._sum[:] = 0.0
        for arrays in self._arrays:
            self._timed(partial(arrays.stage.device.sum_squares_each, self._sum, arrays.counted, arrays.stage.half))
        self._timed(partial(self.groups.world.all_reduce, self._sum))
        scalars = self.states[0].stage.scalars
        self.states[0].stage.device.finish_norm(scalars, self._sum, self.settings.clip, loss_scale)
        count = self.updates + 1
        for arrays in self._arrays:
            self._update_stage(arrays, scalars, learning_rate, count)
        if self._weights is not None:
            self._timed(self._weights.forget)
        finite = bool(scalars[Scalar.FINITE])
        if finite:
            self.updates = count
        return UpdateResult(float(scalars[Scalar.GRADIENT_NORM]), finite)

    def _finish_reductions(self) -> None:
        if self._gradients is not None:
            self._gradients.finish()
        for state in self.states:
            state.finish_reduction()

    def _update_stage(self, arrays: _Arrays, scalars: NDArray[np.float64], learning_rate: float, count: int) -> None:
        settings, stage = self.settings, arrays.stage
        update = partial(
            stage.device.adamw_each,
            scalars=scalars,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            step_size=learning_rate / (1 - settings.beta1**count),
            correction2=1 / math.sqrt(1 - settings.beta2**count),
            decay=learning_rate * settings.weight_decay,
            half=stage.half,
        )
        for part, updated in arrays.updated:
            if updated:
                self._timed(partial(update, updated))
            if part is not None:
                self._timed(partial(arrays.state.renew, part))
                self._timed(self.groups.world.poll)

    def _timed(self, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        self.native_seconds += time.perf_counter() - started
