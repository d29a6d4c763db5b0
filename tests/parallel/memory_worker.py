"""Runs under mpiexec: trains two steps per case, and prints what the device counted at its peak, by kind.

    mpiexec -n 4 python -m tests.parallel.memory_worker CASES.json RESULTS.json

A case is one of grid_worker. A result is a list of objects, one per rank: bytes by kind.
"""

import json
import sys
from pathlib import Path

from pytrain.collectives import Group, Settings
from pytrain.feeding import replica_batches
from pytrain.rank import RankModel
from tests.parallel.grid_worker import LENGTH, SHAPES, run_config, source_of
from tests.parallel.launch import run_worker

KINDS = ("weights", "gradients", "master", "optimizer", "activations")


def main(world: Group) -> None:
    """All cases in turn; each takes the whole world."""
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results = []
    for case in cases:
        config = run_config(case, grid=True)
        model = RankModel(config, world)
        model.optimizer.initialise(1)
        source = source_of(SHAPES[case["shape"]]) if model.needs_tokens else None
        for _ in range(2):
            batches = replica_batches(source, model.groups, 0, config.micro_batches, 1, LENGTH)
            model.engine.run(model.training_program, batches, learning_rate=1e-3)
        model.optimizer.settle()
        results.append(world.gather({kind: model.device.bytes_peak(kind) for kind in KINDS}))
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    run_worker(main, Settings(own=True, check="each"))
