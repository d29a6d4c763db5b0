"""Pinned host memory that a rank's messages pass through where it computes on a GPU: how much, before it is taken."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

from pytrain.buckets import largest_part, part_elements
from pytrain.checkpoint.pieces import ITEM_BYTES
from pytrain.collectives.device_memory import STAGED_OPERATIONS, Pinned
from pytrain.native import native
from pytrain.schedule import early_receives
from pytrain.schedule.actions import Kind
from pytrain.stage import native_policy, native_shape

if TYPE_CHECKING:
    from pytrain import _native
    from pytrain.config import RunConfig
    from pytrain.schedule import Program

STATISTICS = 3  # float32 numbers of a row and slice of the vocabulary, see native/device.h
_SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
_SENT = (Kind.WAIT_SEND_FORWARD, Kind.WAIT_SEND_BACKWARD)
_RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


def pinned_buffers(
    config: RunConfig, program: Program, stages: Iterable[tuple[_native.Layout, int]], pp_rank: int, tp_rank: int
) -> dict[str, Pinned]:
    """The pinned buffers of the groups of a rank at these coordinates, by the groups' names.

    A group's buffers are all as large as the largest array that it sums, gathers or sends in training. None where the
    run computes on the CPU, or MPI is given the GPU's addresses.

    Args:
        config: the whole run.
        program: the rank's part of a training step.
        stages: of the rank: the layout, and into how many shards its buckets are cut.
        pp_rank, tp_rank: the rank's place.
    """
    if config.run.device == "cpu" or config.collectives.device_buffers == "direct":
        return {}
    parallel, shape = config.parallel, native_shape(config.model)
    sizes = dict.fromkeys(("dp", "tp", "pp", "kv", "tied"), 0)
    for layout, shards in stages:
        for group, size in _largest(config, layout, shards, tp_rank).items():
            sizes[group] = max(sizes[group], size)
    first, last = native().head_range(shape, tp_rank, parallel.tp)[2]
    present = {
        "dp": parallel.dp > 1,
        "tp": parallel.tp > 1,
        "kv": last - first > 1,
        "tied": config.model.tied_head and parallel.pp > 1 and pp_rank in (0, parallel.pp - 1),
    }
    buffers = {group: Pinned(STAGED_OPERATIONS, sizes[group]) for group, there in present.items() if there}
    if parallel.pp > 1:
        buffers["pp"] = Pinned(_messages(program), sizes["pp"])
    return {group: pinned for group, pinned in buffers.items() if pinned.bytes}


def _largest(config: RunConfig, layout: _native.Layout, shards: int, tp_rank: int) -> dict[str, int]:
    """Bytes of the largest array of a stage that each group works on."""
    tp, sequence_parallel = config.parallel.tp, config.parallel.sequence_parallel
    policy = native_policy(config.precision)
    rows, hidden = config.batch.micro_batch * config.data.sequence_length, config.model.hidden
    stream = rows * hidden * ITEM_BYTES[policy.activations]
    first, last = native().balanced(rows, tp_rank, tp) if sequence_parallel else (0, rows)
    item = ITEM_BYTES[policy.gradients]
    limit = part_elements(config)
    travelling = ITEM_BYTES[policy.gradient_reduction]
    if shards > 1:
        travelling = max(travelling, ITEM_BYTES[policy.weights])  # which are gathered after an update, or for use
    shared = [spec.elements for spec in layout.tensors if spec.sum_over_sharing]
    partial = [
        spec.elements
        for spec in layout.tensors
        if sequence_parallel and spec.partial_with_sequence_parallel and not spec.sum_over_sharing
    ]
    embedding = layout.find("embed.tokens")
    return {
        "dp": largest_part(layout, shards, limit) * travelling,
        "tp": max([stream, tp * rows * STATISTICS * ITEM_BYTES["fp32"], *(n * item for n in partial)]),
        "pp": (last - first) * hidden * ITEM_BYTES[policy.activations],
        "kv": max(shared, default=0) * item,
        "tied": 0 if embedding < 0 else min(layout.tensors[embedding].elements, limit) * item,
    }


def _messages(program: Program) -> int:
    """Messages between stages that a program has under way at a time, at most."""
    early = early_receives(program)
    posted = {id(receive) for receives in early.values() for receive in receives}
    changes = []
    for index, action in enumerate(program):
        changes.append(len(early.get(index, ())))
        if action.kind in _SENDS or (action.kind in _RECEIVES and id(action) not in posted):
            changes.append(1)
        if action.kind in _SENT or action.kind in _RECEIVES:
            changes.append(-1)
    return max(accumulate(changes), default=0)
