"""Runs under mpiexec: saves on every grid, loads on every other, saves again.

    mpiexec -n 4 python -m tests.parallel.reshard_worker RUN.toml FOLDER GRIDS.json

GRIDS.json is a list of `[parallel]` tables. FOLDER/from-I gets three steps trained on grid I and their checkpoint;
FOLDER/from-I-to-J what grid J saved right after loading that. Rank 0 prints which ranks of each grid opened the
data, and "done" at the end.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pytrain.collectives import Group, Settings
from pytrain.config import RunConfig, build
from pytrain.config.load import read_toml
from pytrain.progress import NoProgress
from pytrain.train import Trainer
from tests.parallel.launch import run_worker


def config_for(run: Path, folder: Path, parallel: dict[str, Any]) -> RunConfig:
    """The run on another grid, in another folder."""
    tables = read_toml(run)
    tables["run"]["folder"] = str(folder)
    return build({**tables, "parallel": parallel}, str(run))


def group_of(world: Group, name: str, grid: dict[str, Any]) -> Group | None:
    """The first ranks of the world, as many as the grid has; None on the others."""
    size = grid.get("dp", 1) * grid.get("pp", 1) * grid.get("tp", 1)
    inside = world.rank < size
    group = world.subgroup(name, list(range(size)) if inside else [world.rank])
    return group if inside else None


def main(world: Group) -> None:
    """All pairs of grids in turn."""
    run, folder, grids = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text("utf-8"))
    groups = [group_of(world, f"grid {number}", grid) for number, grid in enumerate(grids)]
    for one, (grid, group) in enumerate(zip(grids, groups, strict=True)):
        if group is not None:
            with Trainer(config_for(run, folder / f"from-{one}", grid), "none", NoProgress(), group) as trainer:
                trainer.run()
                opened = group.gather(trainer.loader is not None)
            if group.rank == 0:
                print("opened", one, json.dumps(opened))
        world.barrier()
        for other, (target, loading) in enumerate(zip(grids, groups, strict=True)):
            if loading is not None:
                config = config_for(run, folder / f"from-{one}-to-{other}", target)
                source = str(folder / f"from-{one}/checkpoints/step-000003")
                with Trainer(config, source, NoProgress(), loading) as trainer:
                    trainer.save()
            world.barrier()
    if world.rank == 0:
        print("done")


if __name__ == "__main__":
    run_worker(main, Settings(own=True, check="each"))
