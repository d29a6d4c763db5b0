"""`pytrain info` under mpiexec: about the ranks together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from pytrain.errors import UserError

if TYPE_CHECKING:
    from pytrain.collectives.mpi_group import MpiGroup

ROUNDS = 7


def describe_ranks(ring: bool, table_path: Path | None, largest: int) -> None:
    """Time links and collectives; rank 0 prints, and writes the table.

    Args:
        ring: whether to time links.
        table_path: where the table of collectives goes; None: do not time them.
        largest: array, in MiB.

    Raises:
        UserError: there is one rank, or the table cannot be written.
    """
    from pytrain import launch
    from pytrain.collectives import Settings

    with launch.world(Settings(deterministic=False)) as world:
        if world.size == 1:
            raise UserError(
                "--ring and --collectives are about several ranks; start them, for example with mpiexec -n 4"
            )
        world = cast("MpiGroup", world)
        if world.rank == 0:
            click.echo(f"progress of messages by {world.progress}")
        if ring:
            _ring(world)
        if table_path is not None:
            _collectives(world, table_path, largest)


def progress_of_one_rank() -> str:
    """What would move messages on if this process were the only rank of its node."""
    from pytrain.collectives.process import choose_progress, this_place

    try:
        return str(choose_progress("auto", [this_place(0)], 0))
    except UserError as error:
        return f"unknown: {error}"


def _ring(world: MpiGroup) -> None:
    from pytrain.collectives.neighbours import ring_report

    text = ring_report(world)
    if world.rank == 0:
        click.echo(text)


def _collectives(world: MpiGroup, path: Path, largest: int) -> None:
    from pytrain.collectives.measure import measure_table, report, sizes_up_to

    world.on_root(lambda: _write(path, ""))  # better now than after the measurement
    table, timings = measure_table(world, sizes_up_to(largest), ROUNDS)
    world.on_root(lambda: _write(path, json.dumps(table.as_json(), indent=1) + "\n"))
    if world.rank == 0:
        click.echo(report(timings))
        click.echo(f"wrote {path}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
