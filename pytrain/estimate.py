"""`pytrain train --dry-run`: what a run would take, without its memory and before its first step."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pytrain import checkpoint, inputs
from pytrain.checkpoint.pieces import ITEM_BYTES
from pytrain.config import parameter_count
from pytrain.flops import hardware_flops, model_flops
from pytrain.native import native
from pytrain.pinned import pinned_buffers
from pytrain.rank import Plan, StagePlan
from pytrain.residency import Extent, gradient_buffers, weight_buffers
from pytrain.saving import snapshot_bytes
from pytrain.stage import native_policy, native_shape, segments_of
from pytrain.training_state import checkpoint_entries, owned_bytes
from pytrain.wire_format import WIRE_BUFFERS, wire_elements

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.config import RunConfig

ASSUMED_SHARE = 0.5  # of the peak, where nothing was measured: between what small and large models reach
PROBE_SECONDS = 0.1  # at least, of the peak


@dataclass(frozen=True)
class RankMemory:
    """What the ranks at one place of the pipeline and of the tensor slices will allocate."""

    pp_rank: int
    tp_rank: int
    by_kind: Mapping[str, int]
    """Bytes by kind, as the device counts them."""
    by_lifetime: Mapping[str, int]
    """Bytes of the activation arenas by lifetime (see native/model/arena.h)."""
    pinned: int
    """Bytes of all that lie in host memory where the run computes on a GPU; 0 on the CPU."""

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.by_kind.values())


def largest_rank(config: "RunConfig") -> RankMemory:
    """The memory of the rank that takes most, planned by the same code that allocates it."""
    plan = Plan(config)
    grid = config.parallel
    ranks = [rank_memory(plan, pp_rank, tp_rank) for pp_rank in range(grid.pp) for tp_rank in range(grid.tp)]
    return max(ranks, key=lambda rank: rank.total)


def rank_memory(plan: Plan, pp_rank: int, tp_rank: int) -> RankMemory:
    """The memory of the ranks at these coordinates in the first replica.

    In the others only the snapshot differs: they save nothing without ZeRO, and with it other padding.
    """
    config = plan.config
    policy, shape = native_policy(config.precision), native_shape(config.model)
    kinds = dict.fromkeys(("weights", "gradients", "master", "optimizer", "activations", "staging"), 0)
    owned = 0
    lifetimes: dict[str, int] = defaultdict(int)
    rows = config.batch.micro_batch * config.data.sequence_length
    extents: list[Extent] = []
    zero = 0
    for stage in plan.stages_of(pp_rank, tp_rank):
        layout = native().Layout(shape, stage.first_op, stage.last_op, stage.tp_rank, stage.tp_size)
        extents.append((layout, segments_of(shape, layout, stage.first_op, stage.last_op), stage.shards))
        zero = stage.zero
        shard = sum(layout.shard_elements(bucket, stage.shards) for bucket in range(len(layout.buckets)))
        kinds["weights"] += shard * (stage.shards if zero < 3 else 1) * ITEM_BYTES[policy.weights]
        kinds["gradients"] += _gradient_elements(layout, stage) * ITEM_BYTES[policy.gradients]
        if policy.gradient_reduction != policy.gradients and config.parallel.dp > 1:
            size = ITEM_BYTES[policy.gradient_reduction]
            kinds["staging"] += WIRE_BUFFERS * wire_elements(layout, stage.shards, stage.part_elements) * size
        kinds["master"] += 0 if policy.master == policy.weights else shard * ITEM_BYTES[policy.master]
        owned += owned_bytes(layout, policy, stage.shards, stage.part_elements)
        kinds["optimizer"] += 2 * shard * ITEM_BYTES["fp32"]
        first, last = native().balanced(rows, stage.tp_rank, stage.tp_size) if stage.sequence_parallel else (0, rows)
        stream = (last - first) * config.model.hidden * ITEM_BYTES[policy.activations]
        kinds["staging"] += stage.gradient_buffers * stream
        arena, table = native().plan_arena(
            shape,
            policy,
            first_op=stage.first_op,
            last_op=stage.last_op,
            batch=config.batch.micro_batch,
            length=config.data.sequence_length,
            recompute=[stage.recompute] * config.model.layers,
            tp_rank=stage.tp_rank,
            tp_size=stage.tp_size,
            slots=stage.slots,
            defer_weight=stage.defer_weight,
            sequence_parallel=stage.sequence_parallel,
            gradient_shards=stage.shards if stage.reuse_activations else 0,
        )
        kinds["activations"] += arena
        for row in table:
            lifetimes[row["lifetime"]] += row["bytes"] * row["copies"]
    if zero >= 2:
        kinds["gradients"] += sum(gradient_buffers(extents)) * ITEM_BYTES[policy.gradients]
    if zero == 3:
        kinds["weights"] += sum(weight_buffers(extents)) * ITEM_BYTES[policy.weights]
    layouts = [(layout, shards) for layout, _, shards in extents]
    pinned = pinned_buffers(config, plan.training.ranks[pp_rank], layouts, pp_rank, tp_rank)
    host = sum(count * size for count, size in pinned.values())
    kinds["staging"] += host
    kinds["snapshot"] = snapshot_bytes(config.checkpoint, owned)
    host = 0 if config.run.device == "cpu" else host + kinds["snapshot"]
    return RankMemory(pp_rank, tp_rank, kinds, dict(lifetimes), host)


def _gradient_elements(layout: "_native.Layout", stage: StagePlan) -> int:
    """Elements of the gradients that a stage keeps apart from its activations."""
    return sum(
        layout.shard_elements(index, stage.shards) * (stage.shards if stage.zero < 2 else 1)
        for index, bucket in enumerate(layout.buckets)
        if not (stage.reuse_activations and bucket.follows_backward)
    )


def measured_peak() -> float:
    """FLOP/s of fused multiply-adds on all threads, probed for a fraction of a second."""
    device = native().CpuDevice()
    repeats, seconds, flops = 10_000, 0.0, 0.0
    while seconds < PROBE_SECONDS:
        repeats *= 4
        started = time.perf_counter()
        flops = device.peak_flops(repeats)
        seconds = time.perf_counter() - started
    return flops / seconds


def report(config: "RunConfig") -> str:
    """The dry run as text: parameters, tokens, data, memory, disk, time.

    Raises:
        UserError: tokenizer or corpora are here and training would refuse them. That they are missing is a line.
    """
    data = inputs.describe(config)
    tokens = config.run.steps * config.step_tokens
    memory = largest_rank(config)
    ranks = config.parallel.dp * config.parallel.pp * config.parallel.tp
    policy = native_policy(config.precision)
    shape = native_shape(config.model)
    layout = native().Layout(shape, 0, shape.op_count)
    disk = checkpoint.required_bytes(checkpoint_entries(layout, policy))
    free = checkpoint.free_bytes(config.run.folder)
    flops = hardware_flops(config.model, config.data.sequence_length, config.recompute.of_stage(0)) * tokens
    per_token = model_flops(config.model, config.data.sequence_length)
    whose = "" if ranks == 1 else f" on the rank that takes most (pp {memory.pp_rank}, tp {memory.tp_rank})"
    lines = [
        f"{config.run.folder}: {config.model.family}, {parameter_count(config.model):,} parameters",
        f"tokens:      {tokens:,} in {config.run.steps:,} steps of {config.step_tokens:,} "
        f"({config.micro_batches} micro-batches of {config.batch.micro_batch} sequences)",
        *data,
        f"memory:      {_bytes(memory.total)}{whose}: "
        + ", ".join(f"{kind} {_bytes(size)}" for kind, size in memory.by_kind.items() if size)
        + (f"; {_bytes(memory.pinned)} of it pinned in host memory, the rest on the GPU" if memory.pinned else ""),
        "activations: " + ", ".join(f"{kind} {_bytes(size)}" for kind, size in memory.by_lifetime.items()),
        f"checkpoint:  {_bytes(disk)} each, {_bytes(free)} free at {Path(config.run.folder).absolute()}"
        + ("" if disk <= free else ": TOO LITTLE ROOM for one"),
        f"arithmetic:  {_flop(per_token)} per token, {_flop(flops)} in all",
        f"time:        {_time(config, flops, ranks)}; `pytrain bench step` measures what it really is",
    ]
    return "\n".join(lines)


def _time(config: "RunConfig", flops: float, ranks: int) -> str:
    """How long the ranks take for their arithmetic. Only the CPU's peak is probed: a GPU's has to be given."""
    started = time.perf_counter()
    if config.run.peak_tflops:
        peak, source = config.run.peak_tflops * 1e12, "configured"
    elif config.run.device != "cpu":
        return "n/a: give the peak of the GPU as run.peak_tflops"
    else:
        peak = measured_peak()
        source = f"probed in {time.perf_counter() - started:.1f} s"
    seconds = flops / ranks / (ASSUMED_SHARE * peak)
    length = "under a second" if seconds < 1 else f"about {timedelta(seconds=round(seconds))}"
    rate = f"{ASSUMED_SHARE:.0%} of a peak of {peak / 1e12:.3f} TFLOP/s ({source})"
    together = "" if ranks == 1 else f" on each of {ranks:,} ranks, waits not counted"
    return f"{length}, at {rate}{together}"


def _flop(count: float) -> str:
    for factor, unit in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= factor:
            return f"{count / factor:.3f} {unit}"
    return f"{count / 1e6:.3f} MFLOP"


def _bytes(size: int) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"
