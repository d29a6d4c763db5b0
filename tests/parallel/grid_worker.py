"""Runs under mpiexec: trains the same small model on one grid after another, and compares with one process.

    mpiexec -n 4 python -m tests.parallel.grid_worker CASES.json RESULTS.json [staged|direct [auto|thread|test]]

Each case is an object with the keys of `[parallel]`, a `shape` (see SHAPES) and optionally `recompute`, `steps` and
`fails on`, a rank that raises. Rank 0 writes a list of results; the test that started this decides.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytrain.collectives import Group, Settings
from pytrain.config import RunConfig, build
from pytrain.data.loader import Batch
from pytrain.estimate import rank_memory
from pytrain.feeding import replica_batches
from pytrain.rank import RankModel
from pytrain.schedule import check
from pytrain.zero import StageState
from tests import reference, spine
from tests.parallel.launch import run_worker
from tests.reference_cases import GPT2, LLAMA

SHAPES = {
    # Five layers, and head counts, widths and a vocabulary that do not divide by 2, 3 or 4.
    "gpt2": dataclasses.replace(GPT2, layers=5, hidden=20, heads=5, kv_heads=5, head_size=4, ffn=27, vocabulary=23),
    "llama": dataclasses.replace(LLAMA, layers=5, heads=6, kv_heads=3, head_size=4, ffn=21, vocabulary=23),
    "llama tied": dataclasses.replace(LLAMA, layers=5, kv_heads=4, vocabulary=23, tied_head=True),
    "llama shared key head": dataclasses.replace(LLAMA, layers=5, heads=5, kv_heads=1, vocabulary=23),
}
WIDE = "llama wide"  # enough layers and heads for eight ranks along one axis
SHAPES[WIDE] = dataclasses.replace(LLAMA, layers=9, heads=9, kv_heads=9, head_size=4, ffn=21, vocabulary=23)
GLOBAL_BATCH, LENGTH, SEED = 8, 11, 5


def run_config(case: dict[str, Any], grid: bool) -> RunConfig:
    """The configuration of a case; without `grid`, of the same training in one process."""
    keys = ("dp", "pp", "tp", "zero", "schedule", "chunks", "rank_order", "sequence_parallel", "bucket_mb")
    parallel = {key: case[key] for key in keys if key in case}
    model = spine.model_config(SHAPES[case["shape"]]).model_dump(exclude_none=True)
    return build(
        {
            "run": {"folder": "unused", "steps": 20, "device": case.get("device", "cpu") if grid else "cpu"},
            "model": model,
            "tokenizer": {"path": "unused"},
            "data": {"train": ["unused"], "sequence_length": LENGTH},
            "batch": {"micro_batch": 1, "global_batch": GLOBAL_BATCH},
            "learning_rate": {"peak": 1e-3},
            "precision": {
                "dtype": case.get("dtype", "fp32"),
                "gradient_reduction": case.get("gradient_reduction", "fp32") if grid else "fp32",
            },
            "recompute": {"policy": case.get("recompute", "none")},
            "parallel": parallel if grid else {},
        }
    )


def source_of(shape: reference.Shape) -> Any:
    """Samples by number: the same for every grid."""
    batch = reference.random_batch(shape, GLOBAL_BATCH, LENGTH, SEED)
    arrays = [np.asarray(array, np.int32).reshape(GLOBAL_BATCH, LENGTH) for array in batch[:4]]

    def take(first: int, count: int) -> Batch:
        picked = [np.ascontiguousarray(array[first : first + count]).reshape(-1) for array in arrays]
        return Batch(*picked, np.arange(first, first + count), np.zeros(count, np.int32))

    return take


def train(case: dict[str, Any], world: Group, grid: bool) -> dict[str, Any]:
    """Twenty clipped steps; what this rank owns of gradients (of step 1) and weights (before and after)."""
    if grid and case.get("fails on") == world.rank:
        raise RuntimeError("this rank was asked to fail")
    config = run_config(case, grid)
    shape = SHAPES[case["shape"]]
    model = RankModel(config, world)
    weights = reference.visible_parameters(shape, SEED)
    for state in model.optimizer.states:
        load(state, weights)
    start = owned(model, "weights")
    source = source_of(shape) if model.needs_tokens else None
    losses, gradients, executed, in_flight = [], {}, None, 0
    for step in range(int(case.get("steps", 20))):
        batches = replica_batches(source, model.groups, 0, config.micro_batches, 1, LENGTH)
        result = model.engine.run(model.training_program, batches, learning_rate=1e-3 * min(1, (step + 1) / 5))
        losses.append(result.loss)
        executed = [str(action) for action in result.executed]
        in_flight = result.in_flight
        if step == 0:
            gradients = owned(model, "gradients")
    evaluated = model.engine.run(
        model.evaluation_program(config.micro_batches),
        replica_batches(source, model.groups, 0, config.micro_batches, 1, LENGTH),
    )
    replicas = [copy for state in model.optimizer.states for copy in replicated(model, state)]
    planned = rank_memory(model.plan, model.grid.pp_rank, model.grid.tp_rank).by_kind
    held = {kind: model.device.bytes_in_use(kind) for kind in planned}
    return {
        "memory": held == planned,
        "bytes": {kind: (held[kind], planned[kind]) for kind in planned},
        "losses": losses,
        "evaluated": evaluated.loss,
        "gradients": gradients,
        "start": start,
        "weights": owned(model, "weights"),
        "replicated": replicas,
        "executed": executed,
        "in_flight": in_flight,
        "planned_in_flight": check(model.plan.training).peaks[model.grid.pp_rank].forward_weight,
        "program": [str(action) for action in model.training_program],
    }


def load(state: StageState, weights: Mapping[str, NDArray[Any]]) -> None:
    """Set a stage's weights from whole tensors, or its shards of them."""
    if state.stage.whole_weights:
        state.stage.load_weights(weights)
        return
    for run in state.runs:
        first = run.spec.first_element + run.begin
        state.weights_of(run)[:] = weights[run.spec.name].reshape(-1)[first : first + run.end - run.begin]


def replicated(model: RankModel, state: StageState) -> Iterator[tuple[str, str, int, bytes]]:
    """(tensor, whose copy, first element, weights) of what tensor-parallel ranks hold alike.

    A copy is that of one rank, or where weights lie as shards that of all replicas of one slice together.
    """
    grid, stage = model.grid, state.stage
    if stage.whole_weights:
        for spec, array in stage.parameters():
            if spec.replicated:
                yield spec.name, grid.label, 0, array.tobytes()
        return
    for run in state.runs:
        if run.spec.replicated:
            yield run.spec.name, f"tp {grid.tp_rank}", run.begin, state.weights_of(run).tobytes()


def different_copies(ranks: list[dict[str, Any]]) -> int:
    """How many kinds of bits the copies of one replicated tensor have, at most."""
    parts: dict[tuple[str, str], list[tuple[int, bytes]]] = {}
    for name, owner, begin, data in (part for rank in ranks for part in rank["replicated"]):
        parts.setdefault((name, owner), []).append((begin, data))
    kinds: dict[str, set[bytes]] = {}
    for (name, _), found in parts.items():
        kinds.setdefault(name, set()).add(b"".join(data for _, data in sorted(found)))
    return max(len(copies) for copies in kinds.values())


def owned(model: RankModel, what: str) -> list[tuple[str, int, NDArray[np.float64]]]:
    """(tensor, first element, values) of every run that this rank alone stands for."""
    runs = []
    for state in model.optimizer.states:
        for run in state.runs:
            if state.counts(run):
                data = (state.weights_of(run) if what == "weights" else state.gradient_of(run)).astype(np.float64)
                runs.append((run.spec.name, run.spec.first_element + run.begin, data))
    return runs


def whole(shape: reference.Shape, parts: list[list[tuple[str, int, NDArray[np.float64]]]]) -> dict[str, Any]:
    """Tensors from the runs of all ranks; NaN where nobody spoke."""
    tensors = {name: np.full(int(np.prod(size)), np.nan) for name, size in reference.parameter_shapes(shape).items()}
    for part in parts:
        for name, first, data in part:
            assert np.isnan(tensors[name][first : first + data.size]).all(), f"{name} has two owners"
            tensors[name][first : first + data.size] = data
    return tensors


def compare(case: dict[str, Any], ranks: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """The numbers that the test judges."""
    shape = SHAPES[case["shape"]]
    gathered = {key: whole(shape, [rank[key] for rank in ranks]) for key in ("gradients", "start", "weights")}
    single = {key: whole(shape, [alone[key]]) for key in ("gradients", "start", "weights")}
    errors = reference.gradient_error(gathered["gradients"], single["gradients"])
    worst = max(errors, key=lambda name: errors[name])
    moved = drifted = 0.0
    for name, weights in single["weights"].items():
        if name.endswith("attention.k.bias"):
            continue  # its gradient is zero in exact arithmetic, and Adam makes noise of any size into steps
        moved += float(((weights - single["start"][name]) ** 2).sum())
        drifted += float(((gathered["weights"][name] - weights) ** 2).sum())
    return {
        "case": case,
        "losses": ranks[0]["losses"],
        "replicas": different_copies(ranks),
        "loss": abs(ranks[0]["losses"][0] / alone["losses"][0] - 1),
        "last_loss": abs(ranks[0]["losses"][-1] / alone["losses"][-1] - 1),
        "fell": alone["losses"][0] - alone["losses"][-1],
        "evaluated": abs(ranks[0]["evaluated"] / alone["evaluated"] - 1),
        "gradient": errors[worst],
        "worst": worst,
        "drift": (drifted / moved) ** 0.5,
        "memory": all(rank["memory"] for rank in ranks),
        "bytes": [rank["bytes"] for rank in ranks],
        "same_losses": all(rank["losses"] == ranks[0]["losses"] for rank in ranks),
        "executed": all(rank["executed"] == rank["program"] for rank in ranks),
        "in_flight": [rank["in_flight"] for rank in ranks],
        "planned_in_flight": [rank["planned_in_flight"] for rank in ranks],
    }


def main(world: Group) -> None:
    """All cases in turn, each on the first ranks of the world."""
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    results, alone = [], {}
    for number, case in enumerate(cases):
        size = case.get("dp", 1) * case.get("pp", 1) * case.get("tp", 1)
        inside = world.rank < size
        group = world.subgroup(f"case {number}", list(range(size)) if inside else [world.rank])
        found = train(case, group, grid=True) if inside else None
        ranks = world.gather(found)
        if world.rank == 0:
            key = (case["shape"], case.get("dtype", "fp32"))
            alone.setdefault(key, train(case, Group(), grid=False))
            result = compare(case, [rank for rank in ranks if rank is not None], alone[key])
            results.append(result | {"progress": world.progress.split(":")[0]})
        world.barrier()
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    how: Any = sys.argv[3] if len(sys.argv) > 3 else "staged"  # for arrays in a GPU's memory
    progress: Any = sys.argv[4] if len(sys.argv) > 4 else "auto"
    run_worker(main, Settings(own=True, check="each", device_buffers=how, progress=progress))
