"""The product's own trainer as a worker of `bench.step`: data, clipping, metrics and progress as in `pytrain train`.

    python -m bench._trainer '{"config": "RUN.toml"}'

Under mpiexec all ranks do the same steps; the first one reads requests and answers.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._profile import Recorder, watch
from ._worker import answer, peak_rss_bytes, run, serve, take_over_output

if TYPE_CHECKING:
    from pytrain.collectives import Group
    from pytrain.train import Trainer

WHOLE_STEPS = 5
"""Whose median gives Python's share."""


@dataclass(frozen=True)
class WatchedStep:
    """One step with what its native calls took."""

    recorder: Recorder
    begin: float
    end: float
    waited: float
    """Seconds in which this rank stood still for others."""
    collectives: int
    """Operations between ranks."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.end - self.begin

    @property
    def python_seconds(self) -> float:
        """Outside native calls, and not waiting for other ranks."""
        return self.seconds - self.recorder.seconds - self.waited


class TrainerSteps:
    """Steps of a trainer, and what is in them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def steps(self, count: int) -> dict[str, Any]:
        """`count` steps as `pytrain train` does them, metrics and progress included."""
        seconds, losses, reported = [], [], []
        for _ in range(count):
            begin = time.perf_counter()
            metrics = self.trainer.advance()
            seconds.append(time.perf_counter() - begin)
            losses.append(metrics.loss)
            reported.append(metrics.step_s)
        device = self.trainer.device
        return {
            "seconds": seconds,
            "loss": losses,
            "reported_seconds": reported,
            "peak_rss_bytes": peak_rss_bytes(),
            "memory": {kind: size for kind in device.memory_kinds if (size := device.bytes_peak(kind))},
        }

    def profile(self) -> dict[str, Any]:
        """Python's part of a few whole steps, and the ops of one that is run op by op."""
        whole = [self._watched(split=False) for _ in range(WHOLE_STEPS)]
        middle = sorted(whole, key=lambda step: step.python_seconds)[WHOLE_STEPS // 2]
        apart = self._watched(split=True)
        ops = apart.recorder.by_name()
        if apart.waited:
            ops["waiting"] = apart.waited
        ops["python"] = apart.python_seconds
        return {
            "ops": ops,
            "ops_step_seconds": apart.seconds,
            "python_share": middle.python_seconds / middle.seconds,
            "python_seconds": middle.python_seconds,
            "native_calls": middle.recorder.calls,
            "collectives": middle.collectives,
            "spans": [
                (span.name, span.begin - apart.begin, span.end - apart.begin, span.detail)
                for span in apart.recorder.spans
            ],
        }

    def _watched(self, split: bool) -> WatchedStep:
        recorder = Recorder(split)
        with watch(self.trainer.model.stages.values(), recorder):
            begin = time.perf_counter()
            self.trainer.advance()
            end = time.perf_counter()
        groups = self.trainer.groups
        counters = [group.counters for group in (groups.world, groups.tp, groups.pp, groups.dp) if group.size > 1]
        return WatchedStep(
            recorder,
            begin,
            end,
            waited=sum(counter.waited_seconds for counter in counters),
            collectives=sum(sum(counter.operations.values()) for counter in counters),
        )


def _follow(steps: TrainerSteps, world: Group) -> None:
    """The other ranks: what the first one was asked for."""
    while (request := world.broadcast(None)) is not None:
        answer(steps, request)


class _Leading:
    """The first rank: passes each request on before it does it."""

    def __init__(self, steps: TrainerSteps, world: Group) -> None:
        self._steps, self._world = steps, world

    def steps(self, count: int) -> dict[str, Any]:
        self._world.broadcast({"do": "steps", "count": count})
        return self._steps.steps(count)

    def profile(self) -> dict[str, Any]:
        self._world.broadcast({"do": "profile"})
        return self._steps.profile()


def work(spec: dict[str, Any]) -> None:
    """Build the run of `spec["config"]` (a TOML file) and serve its steps."""
    from pytrain import config, launch
    from pytrain.progress import PlainProgress
    from pytrain.train import Trainer

    answers = take_over_output()
    settings = config.load(Path(spec["config"]))
    ranks = settings.parallel.dp * settings.parallel.pp * settings.parallel.tp
    with launch.world(lambda: launch.settings_of(settings), ranks) as world:
        progress = PlainProgress(settings.run.steps, sys.stderr) if world.rank == 0 else None
        with Trainer(settings, progress=progress, world=world) as trainer:
            steps = TrainerSteps(trainer)
            if world.rank > 0:
                _follow(steps, world)
                return
            serve(_Leading(steps, world), answers)
            world.broadcast(None)


if __name__ == "__main__":
    run(work)
