"""Runs under mpiexec: one training step on each grid, and what every group of every rank sent in it.

    mpiexec -n 4 python -m tests.parallel.wire_worker CASES.json RESULTS.json

Each case has the keys of `[parallel]`, and optionally `dtype`, `recompute` and `model` (keys of `[model]`). Rank 0
writes, per case, a list of what each rank says.
"""

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pytrain.collectives import Group, Settings
from pytrain.collectives.counters import Counters
from pytrain.collectives.mpi_group import MpiGroup
from pytrain.config import RunConfig, build
from pytrain.data.loader import Batch
from pytrain.feeding import replica_batches
from pytrain.rank import RankModel
from pytrain.schedule.actions import WEIGHT_GRADIENT, Action
from pytrain.stage import Stage
from tests.parallel.launch import run_worker

# Large enough that every sum of a layer or of a micro-batch is beyond what goes to everybody at once.
MODEL = {
    "family": "gpt2",
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "vocabulary": 512,
    "context": 32,
    "tied_head": False,
}
GLOBAL_BATCH, MICRO_BATCH, LENGTH = 16, 2, 32


def run_config(case: dict[str, Any]) -> RunConfig:
    """The configuration of a case."""
    dtype = case.get("dtype", "fp32")
    return build(
        {
            "run": {"folder": "unused", "steps": 1},
            "model": MODEL | case.get("model", {}),
            "tokenizer": {"path": "unused"},
            "data": {"train": ["unused"], "sequence_length": LENGTH},
            "batch": {"micro_batch": MICRO_BATCH, "global_batch": GLOBAL_BATCH},
            "learning_rate": {"peak": 1e-3},
            "precision": {"dtype": dtype, "gradients": dtype, "gradient_reduction": dtype},
            "recompute": {"policy": case.get("recompute", "none")},
            "parallel": {key: value for key, value in case.items() if key not in ("dtype", "recompute", "model")},
        }
    )


def samples(first: int, count: int) -> Batch:
    """Some tokens; which does not matter."""
    tokens = np.arange(first, first + count * LENGTH, dtype=np.int32) % MODEL["vocabulary"]
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), count)
    zeros = np.zeros_like(tokens)
    return Batch(tokens, tokens, positions, zeros, np.arange(first, first + count), np.zeros(count, np.int32))


def groups_of(model: RankModel) -> Iterator[tuple[str, MpiGroup]]:
    """The groups with other ranks in them, by name."""
    for name in ("world", "tp", "pp", "dp", "sharing", "tied"):
        group = getattr(model.groups, name)
        if isinstance(group, MpiGroup):
            yield name, group


@dataclass
class Timed(Counters):
    """Also notes in which micro-batch's backward pass an operation was started, None for outside of all."""

    now: int | None = None
    when: list[tuple[str, int, int | None]] = field(default_factory=list)
    """(kind, bytes of the array, micro-batch)."""

    def started(self, kind: str, size: int) -> None:
        super().started(kind, size)
        self.when.append((kind, size, self.now))


def watch(model: RankModel, counters: Timed) -> None:
    """Let these counters of a group know where the engine is."""
    compute = model.engine._compute

    def watched(action: Action, *arguments: Any) -> None:
        counters.now = action.microbatch if action.kind in WEIGHT_GRADIENT else None
        compute(action, *arguments)
        counters.now = None

    model.engine._compute = watched  # type: ignore[method-assign]


def step(case: dict[str, Any], world: Group) -> dict[str, Any]:
    """What this rank sent in one step, by group and kind of operation, and the sizes that it follows from."""
    config = run_config(case)
    model = RankModel(config, world)
    model.optimizer.initialise(1)
    groups = dict(groups_of(model))
    timed = Timed()
    if "dp" in groups:
        groups["dp"].counters = timed
        watch(model, timed)
    for group in groups.values():
        group.counters.reset()
    source = samples if model.needs_tokens else None
    batches = replica_batches(source, model.groups, 0, config.micro_batches, MICRO_BATCH, LENGTH)
    model.engine.run(model.training_program, batches, learning_rate=1e-3)
    model.optimizer.settle()
    history = len(pickle.dumps(groups["world"]._history))  # what the check of the sequence is about to send
    model.groups.world.check_sequence()
    stages = list(model.stages.values())
    limit = int(config.parallel.bucket_mb * 1e6) // (2 if case.get("dtype") == "bf16" else 4)
    return {
        "sent": {name: [list(group.ranks), dict(group.counters.bytes_sent)] for name, group in groups.items()},
        "stages": list(model.stages),
        "layers": [sum(name.endswith("mlp") for name in ops_of(stage)) for stage in stages],
        "buckets": [
            [
                stage.layout.shard_elements(bucket, stage.shards) * stage.shards
                for bucket in range(len(stage.layout.buckets))
            ]
            for stage in stages
        ],
        "parts": [
            [
                [end - begin for begin, end in pairwise(stage.layout.parts(bucket, stage.shards, limit))]
                for bucket in range(len(stage.layout.buckets))
            ]
            for stage in stages
        ],
        "shared": elements_of(stages, lambda spec: spec.sum_over_sharing),
        "by rows": elements_of(stages, lambda spec: spec.partial_with_sequence_parallel),
        "embedding": elements_of(stages, lambda spec: spec.name == "embed.tokens"),
        "history": history,
        "replicas": timed.when,
    }


def elements_of(stages: list[Stage], wanted: Callable[[Any], bool]) -> list[int]:
    """Elements of this rank's part of each tensor that is wanted."""
    return [spec.elements for stage in stages for spec in stage.layout.tensors if wanted(spec)]


def ops_of(stage: Any) -> list[str]:
    """Names of the ops of a stage."""
    return [stage.shape.op_name(op) for op in range(stage.first_op, stage.last_op)]


def main(world: Group) -> None:
    """All cases in turn, each on the first ranks of the world."""
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = []
    for number, case in enumerate(cases):
        size = case.get("dp", 1) * case.get("pp", 1) * case.get("tp", 1)
        inside = world.rank < size
        group = world.subgroup(f"case {number}", list(range(size)) if inside else [world.rank])
        found = world.gather(step(case, group) if inside else None)
        results.append([rank for rank in found if rank is not None])
        world.barrier()
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    run_worker(main, Settings(own=True))
