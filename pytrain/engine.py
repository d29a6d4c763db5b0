"""The one interpreter of step programs, for training and evaluation, on every grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pytrain.buckets import chunks
from pytrain.native import native
from pytrain.parallel import Groups
from pytrain.passes import GradientsReady, Passes
from pytrain.schedule import Action, Kind, Program, early_receives
from pytrain.schedule.actions import WEIGHT_GRADIENT
from pytrain.stage import Scalar, Stage

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.collectives import Handle
    from pytrain.data.loader import Batch
    from pytrain.optimizer import AdamW, UpdateResult
    from pytrain.zero import StageState

T = TypeVar("T")
_WAITS_FOR = {
    Kind.WAIT_SEND_FORWARD: Kind.SEND_FORWARD,
    Kind.WAIT_SEND_BACKWARD: Kind.SEND_BACKWARD,
}


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss_sum: float
    """Sum over the targets of all micro-batches of all ranks, in nats."""
    target_count: int
    """Targets that counted in the loss."""
    update: UpdateResult | None
    """None in evaluation."""
    native_seconds: float
    """Wall time inside native calls and waiting for other ranks; the rest of the step is Python's."""
    executed: Program
    """The actions, in the order in which they were done."""
    in_flight: int
    """Most micro-batches, summed over this rank's stages, that were between their forward pass and the end of their
    backward pass at once."""

    @property
    def loss(self) -> float:
        """Mean loss per target, in nats; NaN if there was none."""
        return self.loss_sum / self.target_count if self.target_count else float("nan")


class Engine:
    """Runs this rank's programs over its stages.

    Args:
        stages: by number in the pipeline (virtual stages; one process has stage 0).
        optimizer: None for evaluation alone.
        groups: whom this rank works with.
        gradient_buffers: per stage, how many buffers for gradients that cross stages its programs use.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        optimizer: AdamW | None,
        groups: Groups,
        gradient_buffers: Mapping[int, int] | None = None,
    ) -> None:
        self.stages, self.optimizer, self.groups = stages, optimizer, groups
        self.last_stage = max(stages) if groups.grid.pp_rank == groups.grid.pp - 1 else None
        self._loans = {number: optimizer.loans_of(stage) if optimizer else None for number, stage in stages.items()}
        arrivals = {number: optimizer.arrivals_of(stage) if optimizer else None for number, stage in stages.items()}
        self._passes = {
            number: Passes(stage, groups.tp, self._loans[number], arrivals[number])
            for number, stage in stages.items()
        }
        self._crossing = {
            number: [_stream_buffer(stages[number]) for _ in range(count)]
            for number, count in (gradient_buffers or {}).items()
        }
        self._sends: dict[tuple[Kind, int, int | None], Handle] = {}
        self._receives: dict[tuple[Kind, int, int | None], Handle] = {}
        self._native_seconds = 0.0
        self._in_flight: set[tuple[int, int]] = set()
        self._most_in_flight = 0

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
        batch, whatever the split into micro-batches and ranks. One without evaluates and leaves the model as
        it is.

        Args:
            program: this rank's; see `pytrain.schedule`.
            batches: micro-batch m is batches[m].
            learning_rate: of the update.
            loss_scale: factor on the loss while gradients are in a 16-bit type.
        """
        training = any(action.kind is Kind.UPDATE for action in program)
        self._native_seconds = 0.0
        self._in_flight.clear()
        self._most_in_flight = 0
        executed: list[Action] = []
        self._prepare(batches, loss_scale, training)
        last_weight = {action.stage: index for index, action in enumerate(program) if action.kind in WEIGHT_GRADIENT}
        early = early_receives(program) if training else {}
        update = None
        for index, action in enumerate(program):
            for receive in early.get(index, ()):
                self._start_receive(receive)
            if action.kind is Kind.UPDATE:
                update = self._update(learning_rate, loss_scale)
            elif action.kind in WEIGHT_GRADIENT or action.kind in (Kind.FORWARD, Kind.BACKWARD_INPUT):
                final = last_weight.get(action.stage) == index
                self._compute(action, batches, "train" if training else "evaluate", final)
            else:
                self._timed(lambda action=action: self._exchange(action))  # type: ignore[misc]
            executed.append(action)
        sums = self._own_sums()
        self.groups.world.all_reduce(sums)
        return StepResult(
            float(sums[0]), int(sums[1]), update, self._native_seconds, tuple(executed), self._most_in_flight
        )

    def _prepare(self, batches: Sequence[Batch], loss_scale: float, training: bool) -> None:
        count = np.array([sum(int(np.count_nonzero(batch.targets >= 0)) for batch in batches)], np.float64)
        self.groups.dp.all_reduce(count)
        for stage in self.stages.values():
            stage.scalars[:] = 0.0
            stage.scalars[Scalar.GRADIENT_SCALE] = loss_scale / max(count[0], 1.0)
            if training:
                self._timed(self._state_of(stage).start_gradients)

    def _own_sums(self) -> NDArray[np.float64]:
        """Loss and count that this rank adds to the world's: each replica's last stage speaks once."""
        if self.last_stage is None or self.groups.tp.rank:
            return np.zeros(2)
        sums: NDArray[np.float64] = self.stages[self.last_stage].scalars[[Scalar.LOSS_SUM, Scalar.TARGET_COUNT]]
        return sums

    def _state_of(self, stage: Stage) -> StageState:
        assert self.optimizer is not None, "a program that trains needs an optimizer"
        return self.optimizer.state_of(stage)

    def _update(self, learning_rate: float, loss_scale: float) -> UpdateResult:
        assert self.optimizer is not None, "a program with an UPDATE needs an optimizer"
        result = self.optimizer.update(learning_rate, loss_scale)
        self._native_seconds += self.optimizer.native_seconds
        return result

    # --- computation ---------------------------------------------------------------------------------

    def _compute(self, action: Action, batches: Sequence[Batch], pass_: str, final: bool) -> None:
        assert action.microbatch is not None
        stage, passes = self.stages[action.stage], self._passes[action.stage]
        slot = action.microbatch % stage.native.slots if action.slot is None else action.slot
        ready = self._gradients_ready(action.stage, final)
        key = (action.stage, action.microbatch)
        if action.kind is Kind.FORWARD:
            self._in_flight.add(key)
            self._most_in_flight = max(self._most_in_flight, len(self._in_flight))
            stage.load_batch(slot, batches[action.microbatch])
            self._timed(lambda: passes.forward(slot, pass_))
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self._timed(lambda: passes.backward_weight(slot, ready))
        else:
            self._timed(lambda: self._backward(action, slot, ready))
        self.groups.world.poll()  # messages that have arrived are done, and are not waited for later
        if action.kind in WEIGHT_GRADIENT or pass_ == "evaluate":
            self._in_flight.remove(key)

    def _backward(self, action: Action, slot: int, ready: GradientsReady | None) -> None:
        """B or I: the gradient of what left the stage becomes that of what entered it."""
        stage, passes = self.stages[action.stage], self._passes[action.stage]
        crossing = None if action.gradient is None else self._crossing[action.stage][action.gradient].array
        stream = stage.native.dresidual.reshape(-1)
        if crossing is not None and action.stage != self.last_stage:
            stage.device.copy(stream, crossing)
        if action.kind is Kind.BACKWARD:
            passes.backward(slot, ready)
        else:
            passes.backward_input(slot)
        if crossing is not None and action.stage > 0:
            stage.device.copy(crossing, stream)

    def _gradients_ready(self, number: int, final: bool) -> GradientsReady | None:
        """Starts the reduction of gradients while the rest of backward runs; a tied bucket waits for its other half.

        Whole gradients are reduced once, after the last micro-batch (`final`); borrowed ones whenever they come
        back.
        """
        stage, loans = self.stages[number], self._loans[number]
        if loans is not None and not stage.whole_gradients:
            return loans.close
        if self.optimizer is None or self.groups.dp.size == 1 or not final:
            return None
        state = self.optimizer.state_of(stage)
        tied = _tied_bucket(stage) if self.groups.tied.size > 1 else None

        def ready(bucket: int, ops: range) -> None:
            if bucket != tied:
                state.start_reduction(ops)
            self.groups.world.poll()  # moves on what was started before

        return ready

    # --- what crosses ranks ----------------------------------------------------------------------------

    def _exchange(self, action: Action) -> None:
        key = (action.kind, action.stage, action.microbatch)
        if action.kind in _WAITS_FOR:
            self._sends.pop((_WAITS_FOR[action.kind], action.stage, action.microbatch)).wait()
        elif action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            assert action.peer is not None
            self._sends[key] = self.groups.pp.start_send(self._message(action), action.peer)
        elif action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
            if key not in self._receives:
                self._start_receive(action)
            self._receives.pop(key).wait()
        elif action.kind is Kind.TIED:
            stage = self.stages[action.stage]
            gradient = stage.gradient("embed.tokens").reshape(-1)
            parts = [gradient[chunk] for chunk in chunks(gradient.size, stage.part_elements)]
            for handle in [self.groups.tied.start_all_reduce(part, stage.half) for part in parts]:
                handle.wait()
        elif action.kind is Kind.REDUCE and self.optimizer is not None:
            self.optimizer.state_of(self.stages[action.stage]).reduce_all()

    def _start_receive(self, action: Action) -> None:
        assert action.peer is not None
        key = (action.kind, action.stage, action.microbatch)
        self._receives[key] = self.groups.pp.start_receive(self._message(action), action.peer)

    def _message(self, action: Action) -> NDArray[Any]:
        """The array that a SEND or RECV moves."""
        stage = self.stages[action.stage]
        if action.gradient is not None:
            return self._crossing[action.stage][action.gradient].array
        assert action.slot is not None
        if action.kind is Kind.SEND_FORWARD:
            return stage.native.output(action.slot)
        return stage.native.input(action.slot)

    def _timed(self, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        self._native_seconds += time.perf_counter() - started
        return result


def _stream_buffer(stage: Stage) -> _native.Buffer:
    """Room for one gradient of the residual stream, (rows * hidden,)."""
    elements = stage.native.dresidual.size
    buffer: _native.Buffer = native().Buffer(stage.device, elements, stage.policy.activations, "staging")
    return buffer


def _tied_bucket(stage: Stage) -> int | None:
    """The bucket that holds the embedding, whose gradient first and last stage have yet to add."""
    index = stage.layout.find("embed.tokens")
    return None if index < 0 else stage.layout.tensors[index].bucket
