"""Whom a rank works with: one group per kind of exchange, built from its place in the grid."""

from __future__ import annotations

from dataclasses import dataclass, field
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


def build_groups(grid: Grid, world: Group, shape: _native.Shape, tied_head: bool) -> Groups:
    """Split the world; all ranks call this together."""
    if world.size == 1:
        return Groups(grid)
    everyone = [Grid(grid.dp, grid.pp, grid.tp, rank) for rank in range(grid.size)]
    replica = [one for one in everyone if one.dp_rank == grid.dp_rank]
    tp_ranks = [one.rank for one in replica if one.pp_rank == grid.pp_rank]
    pp_ranks = [one.rank for one in replica if one.tp_rank == grid.tp_rank]
    dp_ranks = [one.rank for one in everyone if (one.pp_rank, one.tp_rank) == (grid.pp_rank, grid.tp_rank)]
    first, last = native().head_range(shape, grid.tp_rank, grid.tp)[2]
    at_an_end = tied_head and grid.pp > 1 and grid.pp_rank in (0, grid.pp - 1)
    return Groups(
        grid,
        world,
        tp=world.subgroup("tp", tp_ranks),
        pp=world.subgroup("pp", pp_ranks),
        dp=world.subgroup("dp", dp_ranks),
        sharing=world.subgroup("kv", tp_ranks[first:last]),
        tied=world.subgroup("tied", [pp_ranks[0], pp_ranks[-1]] if at_an_end else [grid.rank]),
    )
