"""AdamW over the flat buckets of a rank's stages, with the global gradient norm, clipping and ZeRO-1 sharding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pytrain.native import native
from pytrain.parallel import Groups
from pytrain.partial_gradients import sum_partial
from pytrain.stage import Scalar, Stage

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Handle
    from pytrain.config.run import OptimizerSection


@dataclass(frozen=True)
class UpdateResult:
    """What the device says of a finished update."""

    gradient_norm: float
    """Before clipping, over all parameters of the model."""
    finite: bool
    """False: the gradient had an infinity or NaN, and the update was left out."""


class Run(NamedTuple):
    """A run of elements of one tensor that this rank updates."""

    spec: _native.TensorSpec
    bucket: int
    begin: int
    """First element, counted in this rank's part of the tensor."""
    end: int
    shard_begin: int
    """Where it begins in the buffers of the optimizer, which hold this rank's shard of the bucket."""

    @property
    def in_bucket(self) -> slice:
        """Its elements in a buffer laid out like the bucket."""
        return slice(self.spec.offset + self.begin, self.spec.offset + self.end)

    @property
    def in_shard(self) -> slice:
        """Its elements in a buffer laid out like this rank's shard of the bucket."""
        return slice(self.shard_begin, self.shard_begin + self.end - self.begin)


class StageState:
    """Master, moments and gradient reduction of one stage.

    `master` is what is updated: the weights themselves where the storage types agree, else a copy of this
    rank's shard that the weights are rounded from. With one shard a shard is the whole bucket.
    """

    def __init__(self, stage: Stage, groups: Groups) -> None:
        self.stage, self.groups = stage, groups
        self.shards = stage.shards
        self.shard = groups.dp.rank if self.shards > 1 else 0
        layout, policy = stage.layout, stage.policy
        buckets = range(len(layout.buckets))
        self.shard_sizes = [layout.shard_elements(bucket, self.shards) for bucket in buckets]
        self.runs = [
            Run(layout.tensors[piece.tensor], bucket, piece.begin, piece.end, piece.shard_offset)
            for bucket in buckets
            for piece in layout.pieces(bucket, self.shard, self.shards)
        ]
        self.has_master = policy.master != policy.weights
        self.master = self._buffers(policy.master, "master") if self.has_master else []
        self.first = self._buffers("fp32", "optimizer")
        self.second = self._buffers("fp32", "optimizer")
        self._reducing: list[Handle] = []
        self._reduced: set[int] = set()

    def _buffers(self, dtype: str, kind: str) -> list[_native.Buffer]:
        return [native().Buffer(self.stage.device, size, dtype, kind) for size in self.shard_sizes]

    def counts(self, run: Run) -> bool:
        """Whether this rank alone stands for the run: in the gradient norm and on disk."""
        return run.spec.owner and (self.shards > 1 or self.groups.dp.rank == 0)

    def master_of(self, run: Run) -> NDArray[Any]:
        """What the update works on."""
        if self.has_master:
            return self.master[run.bucket].array[run.in_shard]
        return self.stage.weights[run.bucket].array[run.in_bucket]

    def own_part(self, bucket: int, buffer: _native.Buffer) -> NDArray[Any]:
        """This rank's shard of a buffer laid out like the bucket."""
        size = self.shard_sizes[bucket]
        return buffer.array[self.shard * size : (self.shard + 1) * size]

    def _bounds(self, bucket: int) -> list[int]:
        size = self.shard_sizes[bucket]
        return [shard * size for shard in range(self.shards + 1)]

    def round_weights(self) -> None:
        """Weights from the master, where they are two things."""
        for bucket, master in enumerate(self.master):
            part = self.own_part(bucket, self.stage.weights[bucket])
            self.stage.device.convert(part, master.array, self.stage.half)

    def adopt_weights(self) -> None:
        """Master from the weights, where a checkpoint had weights alone."""
        for bucket, master in enumerate(self.master):
            part = self.own_part(bucket, self.stage.weights[bucket])
            self.stage.device.convert(master.array, part, self.stage.half)

    def gather_weights(self) -> None:
        """Every shard of the weights from the rank that updates it."""
        if self.shards > 1:
            handles = [
                self.groups.dp.start_all_gather(buffer.array, self._bounds(bucket))
                for bucket, buffer in enumerate(self.stage.weights)
            ]
            for handle in handles:
                handle.wait()

    # --- gradients -----------------------------------------------------------------------------------

    def start_reduction(self, bucket: int) -> None:
        """Sum the gradients of a bucket over the data-parallel group; `finish_reduction` waits for it."""
        if bucket in self._reduced:
            return
        self._reduced.add(bucket)
        stage = self.stage
        gradients = stage.gradients[bucket]
        sum_partial(stage, bucket, gradients, self.groups)
        dp = self.groups.dp
        if dp.size == 1:
            return
        if self.shards > 1:
            self._reducing.append(dp.start_reduce_scatter(gradients.array, self._bounds(bucket), stage.half))
        else:
            self._reducing.append(dp.start_all_reduce(gradients.array, stage.half))

    def reduce_all(self) -> None:
        """Start the buckets whose reduction has not begun."""
        for bucket in range(len(self.stage.gradients)):
            self.start_reduction(bucket)

    def finish_reduction(self) -> None:
        """Return when every reduction is done."""
        self.reduce_all()
        for handle in self._reducing:
            handle.wait()
        self._reducing.clear()
        self._reduced.clear()


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
        self.updates = 0
        self.native_seconds = 0.0
        """Wall time of the last update inside native calls and waiting for other ranks."""
        self._sum = np.zeros(1, np.float64)

    def state_of(self, stage: Stage) -> StageState:
        """The part of one of the stages."""
        return next(state for state in self.states if state.stage is stage)

    def initialise(self, seed: int) -> None:
        """Draw the initial weights into the master, and round the weights from it."""
        for state in self.states:
            for run in state.runs if state.has_master else ():
                state.stage.draw(run.spec, seed, state.master_of(run), run.begin)
            if state.has_master:
                state.round_weights()
                state.gather_weights()
            else:
                state.stage.initialise(seed)

    def adopt_weights(self) -> None:
        """Masters from the weights, where a checkpoint had weights alone."""
        for state in self.states:
            state.adopt_weights()

    def update(self, learning_rate: float, loss_scale: float = 1.0) -> UpdateResult:
        """Clip by the global norm and take one step; after a gradient that is not finite nothing has changed.

        Args:
            learning_rate: of this step.
            loss_scale: what the gradients were multiplied with.
        """
        self.native_seconds = 0.0
        for state in self.states:
            self._timed(state.finish_reduction)
        self._sum[:] = 0.0
        for state, run in self._runs():
            if state.counts(run):
                gradient = state.stage.gradients[run.bucket].array[run.in_bucket]
                self._timed(partial(state.stage.device.sum_squares, self._sum, gradient, state.stage.half))
        self._timed(partial(self.groups.world.all_reduce, self._sum))
        scalars = self.states[0].stage.scalars
        self.states[0].stage.device.finish_norm(scalars, self._sum, self.settings.clip, loss_scale)
        count = self.updates + 1
        for state, run in self._runs():
            self._update_run(state, run, scalars, learning_rate, count)
        for state in self.states:
            self._timed(state.gather_weights)
        finite = bool(scalars[Scalar.FINITE])
        if finite:
            self.updates = count
        return UpdateResult(float(scalars[Scalar.GRADIENT_NORM]), finite)

    def _runs(self) -> Iterator[tuple[StageState, Run]]:
        for state in self.states:
            for run in state.runs:
                yield state, run

    def _update_run(
        self, state: StageState, run: Run, scalars: NDArray[np.float64], learning_rate: float, count: int
    ) -> None:
        settings, stage = self.settings, state.stage
        update = partial(
            stage.device.adamw,
            stage.weights[run.bucket].array[run.in_bucket],
            state.master_of(run),
            state.first[run.bucket].array[run.in_shard],
            state.second[run.bucket].array[run.in_shard],
            stage.gradients[run.bucket].array[run.in_bucket],
            scalars,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.eps,
            step_size=learning_rate / (1 - settings.beta1**count),
            correction2=1 / math.sqrt(1 - settings.beta2**count),
            decay=learning_rate * settings.weight_decay if run.spec.decay else 0.0,
            half=stage.half,
        )
        self._timed(update)

    def _timed(self, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        self.native_seconds += time.perf_counter() - started
