"""One start of MPI, many checks of tensor parallelism with and without sequence parallelism: traffic and replicas.

mpiexec -n 4 python -m tests.parallel.programs.sequence
"""

from __future__ import annotations

import hashlib
import math
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from pytrain.collectives import Group, Settings
from pytrain.collectives.mpi_group import world_group
from pytrain.collectives.table import Measured, Range, Table
from pytrain.config import RunConfig, build
from pytrain.data.loader import Batch
from pytrain.engine import StepResult
from pytrain.rank import RankModel
from tests import reference, spine
from tests.parallel.grid_worker import SHAPES, owned, whole

LENGTH, SEED, CLIP, STEPS = 11, 7, 0.05, 50
# All-reduces that send as much as the best can, (p - 1)/p of the array twice: small ones are exchanged else.
TABLE = Table(tuple(Measured("all_reduce", ranks, 1, False, (Range(math.inf, ("direct",)),)) for ranks in (2, 3, 4)))
LAYERS, HIDDEN = SHAPES["gpt2"].layers, SHAPES["gpt2"].hidden
STREAM = LENGTH * HIDDEN * 4
"""Bytes of (rows, hidden)."""


def run_config(
    shape: str, micro_batches: int, recompute: str = "none", dtype: str = "fp32", **parallel: Any
) -> RunConfig:
    """Micro-batches of one sequence."""
    return build(
        {
            "run": {"folder": "unused", "steps": STEPS},
            "model": spine.model_config(SHAPES[shape]).model_dump(exclude_none=True),
            "tokenizer": {"path": "unused"},
            "data": {"train": ["unused"], "sequence_length": LENGTH},
            "batch": {"micro_batch": 1, "global_batch": micro_batches},
            "learning_rate": {"peak": 1e-3},
            "optimizer": {"clip": CLIP},
            "precision": {"dtype": dtype},
            "recompute": {"policy": recompute},
            "parallel": parallel,
        }
    )


def batches(shape: str, count: int, seed: int) -> list[Batch]:
    """Micro-batches, the same on every rank."""
    return [spine.native_batch(reference.random_batch(SHAPES[shape], 1, LENGTH, seed + m)) for m in range(count)]


def steps(model: RankModel, shape: str, count: int) -> Iterator[StepResult]:
    """Training steps from weights that make mistakes visible."""
    weights = reference.visible_parameters(SHAPES[shape], SEED)
    for stage in model.stages.values():
        for spec, array in stage.parameters():
            part = np.ascontiguousarray(weights[spec.name][slice(*spec.rows)].reshape(-1), np.float32)
            stage.device.convert(array, part, stage.half)
    for state in model.optimizer.states:
        state.adopt_weights()
    for step in range(count):
        parts = batches(shape, model.config.micro_batches, SEED + 100 * step)
        yield model.engine.run(model.training_program, parts, learning_rate=1e-3)


# --- traffic ---------------------------------------------------------------------------------------------


def traffic(group: Group, micro_batches: int, recompute: str, **parallel: Any) -> dict[str, dict[str, int]]:
    """Of one step of gpt2: arrays' bytes on this rank, and bytes that all ranks of its tp group sent, by kind."""
    model = RankModel(run_config("gpt2", micro_batches, recompute, **parallel), group)
    for counted in (model.groups.tp, model.groups.pp):
        counted.counters.reset()
    list(steps(model, "gpt2", 1))
    tp, pp = model.groups.tp, model.groups.pp
    sent, payload = dict(tp.counters.bytes_sent), dict(tp.counters.payload_bytes)
    crossing = pp.counters.payload_bytes.get("send", 0)
    ranks = tp.broadcast(tp.gather((sent, crossing)))
    total = {
        kind: sum(one.get(kind, 0) for one, _ in ranks) for kind in ("all_reduce", "reduce_scatter", "all_gather")
    }
    return {"payload": payload, "sent": total, "crossing": {"send": sum(one for _, one in ranks)}}


def replicated_bytes() -> int:
    """What is summed over slices once a step: norms, row-parallel biases and positions of gpt2, in fp32."""
    return 4 * HIDDEN * (LAYERS * (2 * 2 + 2) + 2 + SHAPES["gpt2"].context)


def check_traffic(group: Group, micro_batches: int, recompute: str) -> None:
    """The formula in passes.py, for a stage that is the whole model and programs that run backward after forward."""
    tp, m = group.size, micro_batches
    statistics = m * tp * LENGTH * 3 * 4
    again = LAYERS if recompute == "full" else 0
    gathered_again = 2 * LAYERS
    sums = m * (4 * LAYERS + 2 + again)
    summed = traffic(group, m, recompute, tp=tp)
    assert summed["payload"]["all_reduce"] == sums * STREAM, summed
    assert summed["payload"]["all_gather"] == statistics, summed
    assert "reduce_scatter" not in summed["payload"], summed
    rows = traffic(group, m, recompute, tp=tp, sequence_parallel=True)
    assert rows["payload"]["reduce_scatter"] == sums * STREAM, rows
    assert rows["payload"]["all_gather"] == (sums + m * gathered_again) * STREAM + statistics, rows
    assert rows["payload"]["all_reduce"] == replicated_bytes(), rows
    # Of each array (p - 1)/p leave a rank: p - 1 times the array those of all ranks, whether it divides or not.
    for found in (summed, rows):
        for kind, size in found["payload"].items():
            assert found["sent"][kind] == size * (tp - 1) * (2 if kind == "all_reduce" else 1), (kind, found)
    beside = (m * gathered_again * STREAM + 2 * replicated_bytes()) * (tp - 1)
    assert sum(rows["sent"].values()) == sum(summed["sent"].values()) + beside


def check_head_gathers_again(group: Group) -> None:
    """Backward of a micro-batch comes after the forward of another: the head's input was overwritten."""
    m = 3
    summed, gathered = (
        traffic(group, m, "none", tp=group.size, schedule="gpipe", sequence_parallel=rows)["payload"]["all_gather"]
        for rows in (False, True)
    )
    assert gathered - summed == m * (4 * LAYERS + 2 + 2 * LAYERS + 1) * STREAM, (gathered, summed)


def check_stages(world: Group) -> None:
    """Between stages each slice sends its rows: all slices together what one sends without. And what zero-bubble's
    late weight gradients gather.
    """
    m = 4
    summed, rows = (
        traffic(world, m, "none", tp=2, pp=2, schedule="zero-bubble", sequence_parallel=rows)
        for rows in (False, True)
    )
    assert [summed["crossing"]["send"], rows["crossing"]["send"]] == [2 * m * STREAM, m * STREAM]
    gathered = [found["payload"].get("all_gather", 0) for found in (summed, rows)]
    total = np.array([gathered], np.float64)
    world.all_reduce(total)  # both stages of both slices
    arrays = 4 * LAYERS + 2 + 2 * LAYERS + 2 * LAYERS
    assert total[0, 1] - total[0, 0] == 2 * m * arrays * STREAM, total


# --- replicas --------------------------------------------------------------------------------------------


def held_by_several(model: RankModel) -> dict[str, str]:
    """Digests of the weights and moments of what other ranks of the tp group hold too, by name and rows."""
    found = {}
    for state in model.optimizer.states:
        for run in state.runs:
            if run.spec.replicated or run.spec.sum_over_sharing:
                buffers = (state.first, state.second, *((state.master,) if state.has_master else ()))
                held = [state.stage.slice_of(state.stage.weights[run.bucket], run.spec)]
                held += [buffer[run.bucket].array[run.in_shard] for buffer in buffers]
                key = f"{run.spec.name} {run.spec.rows}"
                found[key] = hashlib.sha256(b"".join(array.tobytes() for array in held)).hexdigest()
    return found


def check_replicas(group: Group, shape: str, dtype: str, **parallel: Any) -> None:
    """Fifty steps, each clipped: one bit of difference in a norm or a factor would be there at the end."""
    model = RankModel(run_config(shape, 1, dtype=dtype, tp=group.size, **parallel), group)
    start = held_by_several(model)
    for result in steps(model, shape, STEPS):
        assert result.update is not None
        assert result.update.finite
        assert result.update.gradient_norm > CLIP, "a step that is not clipped shows nothing"
    end = held_by_several(model)
    assert all(end[name] != digest for name, digest in start.items()), "everything moved"
    holders: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for rank in group.broadcast(group.gather(end)):
        for name, digest in rank.items():
            holders.setdefault(name, set()).add(digest)
            counts[name] = counts.get(name, 0) + 1
    assert sum(count > 1 for count in counts.values()) > 2 * SHAPES[shape].layers
    wrong = [name for name, digests in holders.items() if len(digests) > 1]
    assert not wrong, wrong


# --- numbers ---------------------------------------------------------------------------------------------


def check_bits(group: Group, shape: str, dtype: str) -> None:
    """Sums that add in the order of ranks are the same bits scattered or whole, and a norm's rows do not depend on
    each other: the loss and what no rank has a part of are the same bits with and without sequence parallelism.
    """
    stages, losses = [], []
    for sequence_parallel in (False, True):
        config = run_config(shape, 2, dtype=dtype, tp=group.size, sequence_parallel=sequence_parallel)
        model = RankModel(config, group)
        losses += [result.loss for result in steps(model, shape, 1)]
        stages.append(model.stages[0])
    assert losses[0] == losses[1], losses
    same = 0
    for spec in stages[0].layout.tensors:
        summed, own = (stage.gradient(spec.name) for stage in stages)
        if spec.partial_with_sequence_parallel:
            assert np.linalg.norm(own - summed) <= 1e-5 * np.linalg.norm(summed), spec.name
        else:
            assert own.tobytes() == summed.tobytes(), spec.name
            same += 1
    assert same > 6 * SHAPES[shape].layers


def check_sixteen_bits(group: Group, shape: str) -> None:
    """Loss and gradients of a step in bf16 beside those of one process."""
    model = RankModel(run_config(shape, 2, dtype="bf16", tp=group.size, sequence_parallel=True), group)
    (found,) = steps(model, shape, 1)
    gradients = whole(SHAPES[shape], group.gather(owned(model, "gradients")))
    if group.rank:
        return
    alone = RankModel(run_config(shape, 2, dtype="bf16"), Group())
    (expected,) = steps(alone, shape, 1)
    assert abs(found.loss / expected.loss - 1) <= 2e-3, (found.loss, expected.loss)
    for name, gradient in whole(SHAPES[shape], [owned(alone, "gradients")]).items():
        if not name.endswith("attention.k.bias"):  # zero in exact arithmetic
            error = np.linalg.norm(gradients[name] - gradient) / np.linalg.norm(gradient)
            assert error <= 25 * 2.0**-8, (name, error)


def main() -> None:
    """All checks, each on the first ranks of the world."""
    world = world_group(Settings(own=True, check="each", table=TABLE), MPI.COMM_WORLD)
    for size in (2, 3, 4):
        inside = world.rank < size
        group = world.subgroup(f"first {size}", list(range(size)) if inside else [world.rank])
        if inside:
            check_traffic(group, 1, "none")
            check_traffic(group, 1, "full")
            check_traffic(group, 2, "selective")
            check_head_gathers_again(group)
        world.barrier()
    check_stages(world)
    for shape, dtype in (("gpt2", "fp32"), ("llama shared key head", "bf16")):
        for sequence_parallel in (False, True):
            check_replicas(world, shape, dtype, sequence_parallel=sequence_parallel)
    for shape in ("gpt2", "llama"):
        check_bits(world, shape, "fp32")
        check_bits(world, shape, "bf16")
        check_sixteen_bits(world, shape)
    if world.rank == 0:
        print("all agree")
    world.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # the other ranks would wait for this one
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
