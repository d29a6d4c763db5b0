"""Pipelines to test with."""

from collections.abc import Iterator
from random import Random

from pytrain.schedule import SCHEDULES, Lowered, Programs, forward_only_pipeline, lower, programs_of

# (schedule, ranks, micro-batches, chunks per rank)
Grid = tuple[str, int, int, int]


def build(grid: Grid) -> Programs:
    schedule, ranks, micro_batches, chunks = grid
    if schedule == "forward-only":
        return forward_only_pipeline(ranks, micro_batches, chunks)
    return programs_of(schedule, ranks, micro_batches, chunks)


def all_grids() -> Iterator[Grid]:
    """Hundreds: every schedule, up to 8 ranks, 3 chunks and 17 micro-batches, odd numbers included."""
    for schedule in (*SCHEDULES, "forward-only"):
        for ranks in (1, 2, 3, 4, 5, 8):
            for micro_batches in (1, 2, 3, 4, 5, 7, 8, 12, 16, 17):
                several = schedule in ("interleaved", "forward-only") and ranks > 1
                for chunks in (1, 2, 3) if several else (1,):
                    yield schedule, ranks, micro_batches, chunks


def random_lowered(random: Random, *, schedules: tuple[str, ...] = (*SCHEDULES, "forward-only")) -> Lowered:
    """A small pipeline of at least 2 ranks, with or without a tied head."""
    schedule = random.choice(schedules)
    chunks = random.randint(1, 3) if schedule in ("interleaved", "forward-only") else 1
    grid = (schedule, random.randint(2, 4), random.randint(1, 8), chunks)
    return lower(build(grid), tied=random.random() < 0.5)
