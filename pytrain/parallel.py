"""Whom a rank works with: one group per kind of exchange, built from its place in the grid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytrain.collectives import Group
from pytrain.grid import Grid
from pytrain.native import native

if TYPE_CHECKING:
    from pytrain import _native


@dataclass(frozen=True)
class Groups:
    """The groups of one rank; by default it is alone in all of them."""

    grid: Grid = field(default_factory=Grid)
    world: Group = field(default_factory=Group)
    tp: Group = field(default_factory=Group)
    """Slices of the same stage and replica."""
    pp: Group = field(default_factory=Group)
    """Stages of the same replica and slice, in the order of the pipeline."""
    dp: Group = field(default_factory=Group)
    """Replicas of the same stage and slice."""
    sharing: Group = field(default_factory=Group)
    """Slices that hold the same KV head."""
    tied: Group = field(default_factory=Group)
    """First and last stage, which both hold a tied embedding; alone on the others."""
    readers: Group = field(default_factory=Group)
    """All ranks of first and last stages, which open the data; alone on the others."""


def build_groups(grid: Grid, world: Group, shape: _native.Shape, tied_head: bool) -> Groups:
    """Split the world; all ranks call this together."""
    if world.size == 1:
        return Groups(grid)
    tp_ranks = grid.tp_group()
    readers = [rank for rank in range(world.size) if replace(grid, rank=rank).needs_tokens]
    first, last = native().head_range(shape, grid.tp_rank, grid.tp)[2]
    return Groups(
        grid,
        world,
        tp=world.subgroup("tp", tp_ranks),
        pp=world.subgroup("pp", grid.pp_group()),
        dp=world.subgroup("dp", grid.dp_group()),
        sharing=world.subgroup("kv", tp_ranks[first:last]),
        tied=world.subgroup("tied", grid.embedding_group() if tied_head else [grid.rank]),
        readers=world.subgroup("readers", readers if grid.needs_tokens else [grid.rank]),
    )
