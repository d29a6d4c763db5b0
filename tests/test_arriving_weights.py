"""ZeRO-1 and 2: each part of the weights is gathered behind its update, and no op reads one that has not arrived.

The other replica is a stand-in: its shards of the weights are those of the same training without ZeRO, and a gather
leaves NaN in their place until it is waited for: what does not wait reads NaN, and not by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pytrain import _native
from pytrain.buckets import Part
from pytrain.collectives import Group
from pytrain.collectives.group import Finished
from pytrain.config.run import OptimizerSection
from pytrain.engine import Engine
from pytrain.grid import Grid
from pytrain.optimizer import AdamW
from pytrain.parallel import Groups
from pytrain.schedule import forward_only, one_stage
from pytrain.stage import Stage
from pytrain.train import Trainer
from tests import reference, runs, spine
from tests.reference_cases import GPT2, LLAMA
from tests.runs import Quiet, configuration

SHAPES = {"gpt2": GPT2, "llama": LLAMA, "llama tied": replace(LLAMA, tied_head=True)}
SETTINGS = OptimizerSection(clip=0)  # by no norm, of which this rank would know its shards' part alone
LENGTH, STEPS, LIMIT = 9, 4, 300


class Late:
    """A gather that is done when it is waited for, and not before."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        self.arrive, self.waited = arrive, False

    def test(self) -> bool:
        return self.waited

    def wait(self) -> None:
        if not self.waited:
            self.waited = True
            self.arrive()


class Twin(Group):
    """Two replicas that are given the same samples, of which this process is one.

    Args:
        rank: which.
    """

    size = 2

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.stage: Stage
        self.plain: Stage
        """The same training in one process, a step ahead."""
        self.gathers: list[tuple[int, int, Late]] = []
        """(bucket, first element, handle), in the order of their start."""
        self.updated: list[list[bool]] = []
        """At the start of each gather, which parts' shards this rank had updated."""

    def start_all_reduce(self, array: NDArray[Any], *options: Any, **named: Any) -> Finished:
        array *= 2
        return Finished()

    def start_reduce_scatter(
        self, array: NDArray[Any], bounds: Sequence[int], *options: Any, **named: Any
    ) -> Finished:
        array[bounds[self.rank] : bounds[self.rank + 1]] *= 2
        return Finished()

    def start_all_gather(self, array: NDArray[Any], bounds: Sequence[int], *options: Any) -> Late:
        address = array.ctypes.data
        bucket = next(
            index
            for index, buffer in enumerate(self.stage.weights)
            if 0 <= address - buffer.address < buffer.array.nbytes
        )
        first = (address - self.stage.weights[bucket].address) // array.itemsize
        there = self.plain.weights[bucket].array[first : first + array.size].copy()
        other = slice(bounds[1 - self.rank], bounds[2 - self.rank])
        self.updated.append([self._is_new(part) for part in self.stage.parts])
        array[other] = np.nan

        def arrive() -> None:
            array[other] = 0.0  # padding, which the plain bucket is without
            array[other][: there[other].size] = there[other]

        handle = Late(arrive)
        self.gathers.append((bucket, int(first), handle))
        return handle

    def _is_new(self, part: Part) -> bool:
        half = (part.end - part.begin) // 2
        begin = part.begin + self.rank * half
        new = self.plain.weights[part.bucket].array[begin : begin + half]
        mine: NDArray[Any] = self.stage.weights[part.bucket].array[begin : begin + new.size]
        return np.array_equal(mine, new)


class Watched:
    """A native stage that tells of its forward ops."""

    def __init__(self, native: Any, tell: Callable[[int], None]) -> None:
        self._native, self._tell = native, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def forward(self, slot: int, begin: int, end: int, pass_: str) -> None:
        for op in range(begin, end):
            self._tell(op)
        self._native.forward(slot, begin, end, pass_)


class Pair:
    """The training in one process, and one replica of two with ZeRO, from the same weights."""

    def __init__(self, name: str, zero: int, rank: int) -> None:
        self.shape = SHAPES[name]
        twin = Twin(rank)
        self.twin = twin
        self.plain = self._engine(Groups(), {})
        options = {"shards": 2, "part_elements": LIMIT, "whole_gradients": zero < 2}
        self.sharded = self._engine(Groups(Grid(dp=2, rank=rank), dp=twin), options)
        twin.plain, twin.stage = self.plain.stages[0], self.sharded.stages[0]
        weights = reference.visible_parameters(self.shape, 3)
        for engine in (self.plain, self.sharded):
            engine.stages[0].load_weights(weights)

    def _engine(self, groups: Groups, options: dict[str, Any]) -> Engine:
        stage = Stage(
            _native.CpuDevice(), spine.model_config(self.shape), spine.policy(), batch=2, length=LENGTH, **options
        )
        return Engine({0: stage}, AdamW([stage], SETTINGS, groups), groups)

    def step(self, number: int) -> tuple[float, float]:
        """Losses of one step of one micro-batch, with the weights from before it."""
        batches = [spine.native_batch(reference.random_batch(self.shape, 2, LENGTH, 7 * number))]
        losses = [engine.run(one_stage(1), batches, learning_rate=1e-2).loss for engine in (self.plain, self.sharded)]
        return losses[0], losses[1]


CASES = list(itertools.product(SHAPES, (1, 2), (0, 1)))


@pytest.mark.parametrize(("name", "zero", "rank"), CASES)
def test_no_op_reads_weights_that_have_not_arrived(name: str, zero: int, rank: int) -> None:
    pair = Pair(name, zero, rank)
    state = pair.sharded.optimizer.states[0]  # type: ignore[union-attr]
    seen = set()
    for number in range(STEPS):
        expected, found = pair.step(number)
        assert found == expected
        seen.add(found)
        assert state.arriving
    assert len(seen) == STEPS
    batch = spine.native_batch(reference.random_batch(pair.shape, 2, LENGTH, 99))
    expected, found = (engine.run(forward_only(1), [batch]).loss for engine in (pair.plain, pair.sharded))
    assert found == expected, "an evaluation waits, too"
    assert not state.arriving
    for plain, whole in zip(pair.twin.plain.weights, pair.twin.stage.weights, strict=True):
        np.testing.assert_array_equal(whole.array[: plain.array.size], plain.array)


@pytest.mark.parametrize(("name", "zero", "rank"), CASES)
def test_gathers_run_beside_later_updates_and_the_first_layers(name: str, zero: int, rank: int) -> None:
    pair = Pair(name, zero, rank)
    twin, stage = pair.twin, pair.twin.stage
    parts = [(part.bucket, part.begin) for part in stage.parts]
    assert len(parts) > 2 * len(stage.layout.buckets), "choose a limit that cuts layers"
    pair.step(0)
    assert [(bucket, first) for bucket, first, _ in twin.gathers] == parts, "in the order of forward"
    for number, updated in enumerate(twin.updated):
        assert updated == [index <= number for index in range(len(parts))], "each behind its own update alone"
    assert not any(handle.waited for _, _, handle in twin.gathers)
    first = list(twin.gathers)
    waited: list[tuple[int, list[bool]]] = []
    native = stage.native
    stage.native = Watched(native, lambda op: waited.append((op, [handle.waited for _, _, handle in first])))
    pair.step(1)
    pass_ = waited[: stage.shape.op_count]
    assert [op for op, _ in pass_] == list(range(stage.shape.op_count))
    arrived: set[int] = set()
    for segment in stage.segments:
        arrived |= set(segment.reads)
        for op, done in pass_[segment.first_op : segment.last_op]:
            assert done == [bucket in arrived for bucket, _, _ in first], f"op {op} waits for what it reads alone"


@pytest.mark.parametrize("reader", ["save", "sample", "leave"])
def test_whoever_reads_all_weights_waits_for_all(reader: str, tmp_path: Path) -> None:
    """Checkpoints, samples, and the end of a run that was not asked for a checkpoint."""
    config = configuration(runs.make_corpora(tmp_path / "data"), tmp_path / "run")
    with Trainer(config, progress=Quiet()) as trainer:
        trainer.step()
        state = trainer.optimizer.states[0]
        handles = [Late(lambda: None) for _ in trainer.stage.weights]
        for bucket, handle in enumerate(handles):
            state._arriving[bucket].append(handle)
        if reader == "save":
            trainer.save()
        elif reader == "sample":
            trainer.sample("a", tokens=1)
        assert all(handle.waited for handle in handles) == (reader != "leave")
    assert all(handle.waited for handle in handles)
    assert not state.arriving
