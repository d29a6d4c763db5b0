"""Bars and rooflines as inline SVG: text that needs no library to be drawn, and no network to be looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#3b6ea5", "#c8743a", "#5b8c5a", "#8a6bb0", "#a8434c", "#6b6b6b")
WIDTH, LABEL, ROW, MARGIN = 860, 250, 22, 60
FARTHEST = 1.6
"""Times the ceiling at which bars are cut off: one outlier would make the others too short to compare."""


class Bar(NamedTuple):
    """One bar with its range."""

    label: str
    value: float
    low: float
    high: float
    text: str
    """Written at its end."""
    series: int = 0
    """Which colour."""


def bars(rows: Sequence[Bar], ceiling: float | None = None) -> str:
    """Horizontal bars from 0, with a line from each smallest to its largest value.

    Args:
        rows: from the top to the bottom.
        ceiling: a value that is marked with a vertical line, if there is one; bars end at FARTHEST times it.
    """
    most = max([bar.high for bar in rows] + ([ceiling] if ceiling else [])) or 1.0
    if ceiling:
        most = min(most, FARTHEST * ceiling)
    scale = (WIDTH - LABEL - 190) / most
    parts = []
    for number, bar in enumerate(rows):
        y = number * ROW + 4
        middle = y + ROW / 2 - 3
        colour = COLOURS[bar.series % len(COLOURS)]
        parts.append(f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>')
        width = min(bar.value, most) * scale
        parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{ROW - 6}" fill="{colour}"/>')
        low, high = LABEL + min(bar.low, most) * scale, LABEL + min(bar.high, most) * scale
        parts.append(f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}" stroke="#222"/>')
        parts.append(f'<text x="{high + 6:.1f}" y="{y + 12}">{escape(bar.text)}</text>')
    height = len(rows) * ROW + 8
    if ceiling:
        x = LABEL + ceiling * scale
        parts.append(f'<path d="M{x:.1f} 0V{height}" stroke="#a8434c" stroke-dasharray="4 3"/>')
    return _svg(height, parts)


class Point(NamedTuple):
    """A kernel in a roofline."""

    label: str
    intensity: float
    """FLOPs per byte."""
    gflops: float
    series: int = 0


def roofline(points: Sequence[Point], peak_gflops: float, gigabytes: float) -> str:
    """Both axes logarithmic: FLOPs per byte to the right, GFLOP/s upwards, under the two ceilings.

    Args:
        points: kernels.
        peak_gflops: of the arithmetic.
        gigabytes: bandwidth of memory, GB/s.
    """
    height = 420
    ridge = peak_gflops / gigabytes
    left = min([ridge / 16, *(point.intensity for point in points)]) / 2
    right = max([ridge * 16, *(point.intensity for point in points)]) * 2
    top = max([peak_gflops, *(point.gflops for point in points)]) * 1.6
    bottom = min([gigabytes * left, *(point.gflops for point in points)]) / 1.6

    def x(value: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * math.log(value / left) / math.log(right / left)

    def y(value: float) -> float:
        return height - MARGIN - (height - 2 * MARGIN) * math.log(value / bottom) / math.log(top / bottom)

    parts = [
        f'<path d="M{x(left):.1f} {y(gigabytes * left):.1f}L{x(ridge):.1f} {y(peak_gflops):.1f}H{x(right):.1f}" '
        'fill="none" stroke="#222" stroke-width="2"/>',
        f'<text x="{x(right) - 4:.1f}" y="{y(peak_gflops) - 6:.1f}" text-anchor="end">'
        f"{peak_gflops:.0f} GFLOP/s</text>",
        f'<text x="{x(left) + 4:.1f}" y="{y(gigabytes * left * 2.2):.1f}">{gigabytes:.0f} GB/s</text>',
        f'<text x="{WIDTH / 2}" y="{height - 10}" text-anchor="middle">FLOPs per byte</text>',
        f'<text x="14" y="{height / 2}" text-anchor="middle" transform="rotate(-90 14 {height / 2})">GFLOP/s</text>',
    ]
    for exponent in range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1):
        parts.append(_tick(f"{10.0**exponent:g}", x(10.0**exponent), height - MARGIN + 16, "middle"))
    for exponent in range(math.ceil(math.log10(bottom)), math.floor(math.log10(top)) + 1):
        parts.append(_tick(f"{10.0**exponent:g}", MARGIN - 6, y(10.0**exponent) + 4, "end"))
    for point in points:
        colour = COLOURS[point.series % len(COLOURS)]
        place = f'cx="{x(point.intensity):.1f}" cy="{y(point.gflops):.1f}"'
        parts.append(f'<circle {place} r="4" fill="{colour}"><title>{escape(point.label)}</title></circle>')
    return _svg(height, parts)


def _tick(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#666">{text}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">' + "".join(parts) + "</svg>"
