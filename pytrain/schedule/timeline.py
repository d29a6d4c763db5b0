"""A checked schedule as a picture: text for the terminal, SVG for a page."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from pytrain.schedule.actions import Kind, Lowered
from pytrain.schedule.check import Report
from pytrain.schedule.simulate import Span

MEANING = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward, input gradients",
    Kind.BACKWARD_WEIGHT: "backward, weight gradients",
}
_FILL = {
    Kind.FORWARD: "#9ecae9",
    Kind.BACKWARD: "#a1d99b",
    Kind.BACKWARD_INPUT: "#a1d99b",
    Kind.BACKWARD_WEIGHT: "#fdd0a2",
}
# Pixels of the SVG
_UNIT, _ROW, _MARGIN, _LEFT = 28, 30, 16, 64
_LETTER = 7.5  # of 12 px monospace, generously


@dataclass(frozen=True)
class Piece:
    """Some characters of a row: part of an action, or (without a kind) waiting."""

    text: str
    kind: Kind | None


Row = list[Piece]


def text_blocks(lowered: Lowered, report: Report, width: int | None = None) -> list[list[Row]]:
    """The timeline as text: blocks of one row per rank, to be printed one below the other.

    Args:
        lowered: what was checked.
        report: from `check`.
        width: characters at most in a row, if at least one unit of time fits; None for a single block.
    """
    unit, characters = _text_scale(lowered, report)
    head = len(_head(lowered, len(lowered.ranks) - 1))
    columns = math.ceil(report.makespan / unit) * characters
    step = columns if width is None else max((width - head) // characters, 1) * characters
    rows = [_row(lowered, spans, unit, characters, columns) for spans in report.spans]
    return [
        [[Piece(_head(lowered, rank), None), *_cut(row, first, first + step)] for rank, row in enumerate(rows)]
        for first in range(0, columns, step)
    ]


def legend(lowered: Lowered) -> str:
    """One line that explains the letters of the timeline."""
    kinds = {action.kind for program in lowered.ranks for action in program}
    letters = ", ".join(f"{kind.value} {meaning}" for kind, meaning in MEANING.items() if kind in kinds)
    chunk = "" if lowered.chunks_per_rank == 1 else ".chunk of the rank"
    return f"{letters}; then micro-batch{chunk}"


def summary(lowered: Lowered, report: Report) -> list[str]:
    """Lines that say how long it takes, how much of it is waiting, and what is kept in memory."""
    chunks = "" if lowered.chunks_per_rank == 1 else f" of {lowered.chunks_per_rank} stages"
    lines = [
        f"{lowered.schedule}: {_count(len(lowered.ranks), 'rank')}{chunks}, "
        f"{_count(lowered.micro_batches, 'micro-batch', 'es')}",
        f"time {report.makespan:g}, of which {report.work:g} computing: bubble {report.bubble:.1%} of the work",
        "micro-batches kept at most, by lifetime (summed over the rank's stages); slots of each stage:",
        f"  {'rank':>4}  {'F to B':>6}  {'F to W':>6}  {'I to W':>6}  slots",
    ]
    for rank, peaks in enumerate(report.peaks):
        slots = " ".join(map(str, lowered.slots[rank :: len(lowered.ranks)]))
        lines.append(
            f"  {rank:>4}  {peaks.forward_backward:>6}  {peaks.forward_weight:>6}  "
            f"{peaks.backward_weight:>6}  {slots}"
        )
    return lines


def svg(lowered: Lowered, report: Report) -> str:
    """The timeline as an SVG picture, complete with title and legend; hovering over a box explains it."""
    scale = _UNIT / _shortest(report)
    title, times = summary(lowered, report)[:2]
    legend_width = sum(_LETTER * (len(meaning) + 4) + _ROW for meaning in MEANING.values())
    width = _LEFT + max(report.makespan * scale, legend_width, _LETTER * len(times)) + _MARGIN
    top = _MARGIN + 2 * _ROW
    height = top + (len(lowered.ranks) + 1) * _ROW + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="monospace" font-size="12">',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        _svg_text(_MARGIN, _MARGIN + 12, title, "start", "bold"),
        _svg_text(_MARGIN, _MARGIN + 30, times, "start"),
    ]
    for rank, spans in enumerate(report.spans):
        y = top + rank * _ROW
        parts.append(_svg_text(_MARGIN, y + 18, f"rank {rank}", "start"))
        length = report.makespan * scale
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{length:g}" height="{_ROW - 4}" fill="#eeeeee"/>')
        for span in spans:
            parts.extend(_svg_box(lowered, span, scale, y))
    parts.extend(_svg_legend(lowered, top + len(lowered.ranks) * _ROW + 8))
    return "\n".join((*parts, "</svg>", ""))


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _label(lowered: Lowered, span: Span) -> str:
    chunk = "" if lowered.chunks_per_rank == 1 else f".{span.action.stage // len(lowered.ranks)}"
    return f"{span.action.kind.value}{span.action.microbatch}{chunk}"


def _head(lowered: Lowered, rank: int) -> str:
    return f"rank {rank:>{len(str(len(lowered.ranks) - 1))}} | "


def _shortest(report: Report) -> float:
    return min(span.end - span.start for spans in report.spans for span in spans if span.end > span.start)


def _text_scale(lowered: Lowered, report: Report) -> tuple[float, int]:
    """(time, characters) of a unit: the shortest action; every label fits, with a blank after it."""
    unit = _shortest(report)
    characters = max(
        math.ceil((len(_label(lowered, span)) + 1) / max((span.end - span.start) / unit, 1))
        for spans in report.spans
        for span in spans
    )
    return unit, characters


def _row(lowered: Lowered, spans: tuple[Span, ...], unit: float, characters: int, columns: int) -> Row:
    """`columns` characters: an action is its label drawn out with dashes, and a blank."""
    row: Row = []
    column = 0
    for span in spans:
        start, end = (round(time / unit * characters) for time in (span.start, span.end))
        if start > column:
            row.append(Piece(" " * (start - column), None))
        row.append(Piece(_label(lowered, span).ljust(end - start - 1, "-"), span.action.kind))
        row.append(Piece(" ", None))
        column = end
    return [*row, Piece(" " * (columns - column), None)]


def _cut(row: Row, first: int, end: int) -> Iterator[Piece]:
    """Characters [first, end) of a row."""
    column = 0
    for piece in row:
        text = piece.text[max(first - column, 0) : max(end - column, 0)]
        column += len(piece.text)
        if text:
            yield Piece(text, piece.kind)


def _svg_text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222">'
        f"{escape(text)}</text>"
    )


def _svg_box(lowered: Lowered, span: Span, scale: float, y: float) -> Iterator[str]:
    x, width = _LEFT + span.start * scale, (span.end - span.start) * scale
    label = _label(lowered, span)
    action = span.action
    opacity = 1 - 0.6 * (action.stage // len(lowered.ranks)) / lowered.chunks_per_rank  # later chunks fade
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_ROW - 4}" fill="{_FILL[action.kind]}" '
        f'fill-opacity="{opacity:g}" stroke="#ffffff"><title>{label}: {MEANING[action.kind]} of micro-batch '
        f"{action.microbatch} on stage {action.stage}, {span.start:g} to {span.end:g}</title></rect>"
    )
    # Where the letter does not fit too, the colour says it.
    for text in (label, label[1:]):
        if len(text) * _LETTER <= width:
            yield _svg_text(x + width / 2, y + 18, text, "middle")
            break


def _svg_legend(lowered: Lowered, y: float) -> Iterator[str]:
    kinds = {action.kind for program in lowered.ranks for action in program}
    x: float = _LEFT
    for kind, meaning in MEANING.items():
        if kind not in kinds:
            continue
        text = f"{kind.value} {meaning}"
        yield f'<rect x="{x:g}" y="{y:g}" width="14" height="14" fill="{_FILL[kind]}"/>'
        yield _svg_text(x + 20, y + 12, text, "start")
        x += len(text) * _LETTER + _ROW
