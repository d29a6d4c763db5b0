"""`pytrain train --dry-run`: what a run would take, without its memory and before its first step."""

import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytrain import checkpoint
from pytrain.checkpoint.pieces import ITEM_BYTES
from pytrain.config import parameter_count
from pytrain.flops import hardware_flops, model_flops
from pytrain.native import native
from pytrain.stage import native_policy, native_shape
from pytrain.training_state import checkpoint_entries

if TYPE_CHECKING:
    from pytrain.config import RunConfig

ASSUMED_SHARE = 0.5  # of the peak, where nothing was measured: between what small and large models reach
PROBE_SECONDS = 0.1  # at least, of the peak


def memory_by_kind(config: "RunConfig") -> dict[str, int]:
    """Bytes that the run will allocate, by kind, planned by the same code that allocates them."""
    policy = native_policy(config.precision)
    shape = native_shape(config.model)
    layout = native().Layout(shape, 0, shape.op_count)
    elements = layout.elements
    return {
        "weights": elements * ITEM_BYTES[policy.weights],
        "gradients": elements * ITEM_BYTES[policy.gradients],
        "master": 0 if policy.master == policy.weights else elements * ITEM_BYTES[policy.master],
        "optimizer": 2 * elements * ITEM_BYTES["fp32"],
        "activations": _plan_arena(config)[0],
    }


def activations_by_lifetime(config: "RunConfig") -> dict[str, int]:
    """Bytes of the activation arena by lifetime (see native/model/arena.h)."""
    totals: dict[str, int] = defaultdict(int)
    for row in _plan_arena(config)[1]:
        totals[row["lifetime"]] += row["bytes"] * row["copies"]
    return dict(totals)


def _plan_arena(config: "RunConfig") -> tuple[int, list[dict[str, Any]]]:
    """Bytes and table of the arena that the stage of this run allocates."""
    shape = native_shape(config.model)
    total, table = native().plan_arena(
        shape,
        native_policy(config.precision),
        first_op=0,
        last_op=shape.op_count,
        batch=config.batch.micro_batch,
        length=config.data.sequence_length,
        recompute=[config.recompute.of_stage(0)] * config.model.layers,
    )
    return total, table


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
    """The dry run as text: parameters, tokens, memory, disk, time."""
    tokens = config.run.steps * config.step_tokens
    memory = memory_by_kind(config)
    policy = native_policy(config.precision)
    shape = native_shape(config.model)
    layout = native().Layout(shape, 0, shape.op_count)
    disk = checkpoint.required_bytes(checkpoint_entries(layout, policy))
    free = checkpoint.free_bytes(config.run.folder)
    started = time.perf_counter()
    peak = config.run.peak_tflops * 1e12 if config.run.peak_tflops else measured_peak()
    flops = hardware_flops(config.model, config.data.sequence_length, config.recompute.of_stage(0)) * tokens
    seconds = flops / (ASSUMED_SHARE * peak)
    source = "configured" if config.run.peak_tflops else f"probed in {time.perf_counter() - started:.1f} s"
    per_token = model_flops(config.model, config.data.sequence_length)
    lines = [
        f"{config.run.folder}: {config.model.family}, {parameter_count(config.model):,} parameters",
        f"tokens:      {tokens:,} in {config.run.steps:,} steps of {config.step_tokens:,} "
        f"({config.micro_batches} micro-batches of {config.batch.micro_batch} sequences)",
        f"memory:      {_bytes(sum(memory.values()))}: "
        + ", ".join(f"{kind} {_bytes(size)}" for kind, size in memory.items() if size),
        "activations: "
        + ", ".join(f"{kind} {_bytes(size)}" for kind, size in activations_by_lifetime(config).items()),
        f"checkpoint:  {_bytes(disk)} each, {_bytes(free)} free at {Path(config.run.folder).absolute()}"
        + ("" if disk <= free else ": TOO LITTLE ROOM for one"),
        f"arithmetic:  {per_token / 1e9:.3f} GFLOP per token, {flops / 1e15:.3f} PFLOP in all",
        f"time:        about {timedelta(seconds=round(seconds))}, at {ASSUMED_SHARE:.0%} of a peak of "
        f"{peak / 1e12:.3f} TFLOP/s ({source}); `pytrain bench step` measures what it really is",
    ]
    return "\n".join(lines)


def _bytes(size: int) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"
