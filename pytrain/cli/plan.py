"""The command that looks ahead: plan."""

from pathlib import Path

import click

from pytrain.errors import ExitCode, UserError

_COUNT = click.IntRange(min=1)
_STYLES = {"F": "black on bright_cyan", "B": "black on green", "I": "black on green", "W": "black on yellow"}


@click.command(short_help="Draw a pipeline schedule.")
@click.option("--schedule", required=True, metavar="1f1b|gpipe|interleaved|zero-bubble", help="Which to draw.")
@click.option("--stages", required=True, type=_COUNT, metavar="P", help="Ranks of the pipeline.")
@click.option("--micro-batches", required=True, type=_COUNT, metavar="M", help="Micro-batches in a step.")
@click.option(
    "--chunks", default=1, show_default=True, type=_COUNT, metavar="V", help="Interleaved: stages per rank."
)
@click.option("--svg", "picture", type=click.Path(path_type=Path), metavar="FILE", help="Draw into this, too.")
def plan(schedule: str, stages: int, micro_batches: int, chunks: int, picture: Path | None) -> int:
    """Prove a pipeline schedule and draw it: who computes when, the bubble, and what is kept in memory.

    F takes one unit of time, B two, I and W one each, messages none.

    \b
    Examples:
      pytrain plan --schedule 1f1b --stages 4 --micro-batches 8
      pytrain plan --schedule interleaved --stages 4 --chunks 2 --micro-batches 8
      pytrain plan --schedule zero-bubble --stages 4 --micro-batches 8 --svg zero-bubble.svg
    """
    from rich.console import Console
    from rich.text import Text

    from pytrain.schedule import check, lower, programs_of, timeline

    lowered = lower(programs_of(schedule, stages, micro_batches, chunks))
    report = check(lowered)
    console = Console(highlight=False)
    for block in timeline.text_blocks(lowered, report, console.width if console.is_terminal else None):
        for row in block:
            pieces = ((piece.text, _STYLES[piece.kind.value] if piece.kind else "") for piece in row)
            console.print(Text.assemble(*pieces), soft_wrap=True)
        console.print()
    console.print(timeline.legend(lowered), soft_wrap=True, markup=False)
    console.print("\n".join(timeline.summary(lowered, report)), soft_wrap=True, markup=False)
    if picture is not None:
        try:
            picture.write_text(timeline.svg(lowered, report), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{picture} cannot be written: {error.strerror}") from None
    return ExitCode.OK
