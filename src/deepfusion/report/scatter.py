# SPDX-License-Identifier: Apache-2.0
"""Marks over a logarithmic axis, as inline SVG like the other charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from deepfusion.report.charts import COLOURS, short, svg, text_width

HEIGHT = 260


@dataclass(frozen=True)
class Point:
    """A mark of `points`, with a bar of `spread` up and down. Those of equal `group` share a colour and can be hidden."""

    group: int
    name: str
    x: float
    y: float
    spread: float = 0.0


def points(
    marks: Sequence[Point], x_name: str, y_name: str, x_text: Callable[[float], str], *, joined: bool = False
) -> str:
    """Marks over a logarithmic axis.

    Args:
        x_text: an x for people.
        joined: the marks of a group are joined by a line, in their order.
    """
    marks = [mark for mark in marks if mark.x > 0 and abs(mark.y) < math.inf]
    if not marks:
        return ""
    width, height, left, pad = 560, HEIGHT, 60, 26
    logs = [math.log10(mark.x) for mark in marks]
    x_low, x_high = min(logs) - 0.1, max(logs) + 0.1
    y_low, y_high = min(m.y - m.spread for m in marks), max(m.y + m.spread for m in marks)
    y_span = (y_high - y_low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        return left + pad + (width - left - 2 * pad) * across, 14 + (height - 28) * (y_high - y) / y_span

    parts: list[str] = []
    for i in range(5):
        y, value = 14 + (height - 28) * i / 4, y_high - y_span * i / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    edge = 0.0
    for x in sorted({mark.x for mark in marks}) if joined else ticks(10**x_low, 10**x_high):
        (px, _), text = place(x, y_high), x_text(x)
        if px - text_width(text) / 2 < edge:
            continue
        edge = px + text_width(text) / 2 + 4
        parts.append(f'<text class="tick" x="{px:.1f}" y="{height + 12}" text-anchor="middle">{escape(text)}</text>')
    spots = [place(mark.x, mark.y) for mark in marks]
    labels = [(px - 6, px + 6, py + 4) for px, py in spots]
    for group in sorted({mark.group for mark in marks}):
        mine = [mark for mark in marks if mark.group == group]
        drawn: list[str] = []
        if joined:
            path = " ".join("{:.1f},{:.1f}".format(*place(mark.x, mark.y)) for mark in mine)
            drawn.append(f'<polyline class="line s{group % COLOURS}" points="{path}"/>')
        for mark in mine:
            px, py = place(mark.x, mark.y)
            top, low = (place(mark.x, mark.y + sign * mark.spread)[1] for sign in (1, -1))
            stroke, fill = f"line s{group % COLOURS}", f"c{group % COLOURS}"
            title = escape(f"{mark.name}: {mark.y:.4g} {y_name} at {x_text(mark.x)}")
            if mark.spread:
                drawn.append(f'<line class="{stroke}" x1="{px:.1f}" x2="{px:.1f}" y1="{top:.1f}" y2="{low:.1f}"/>')
            drawn.append(f'<circle class="{fill}" cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{title}</title></circle>')
        px, py = place(mine[-1].x, mine[-1].y)
        drawn.append(_label(short(mine[-1].name), px, py - 7, px > (left + width) / 2, labels))
        parts.append(f'<g data-m="{group}">{"".join(drawn)}</g>')
    parts.append(f'<text class="tick" x="{width}" y="{height + 30}" text-anchor="end">{escape(x_name)}</text>')
    parts.append(f'<text class="tick" x="{left}" y="{height + 30}">{escape(y_name)}</text>')
    return svg(width, height + 36, parts)


def _label(name: str, x: float, y: float, before: bool, taken: list[tuple[float, float, float]]) -> str:
    """A label beside a mark, moved until it covers none of those before it: left and right ends and baselines, in `taken`."""
    x = x - 9 if before else x + 9
    low, high = (x - text_width(name) - 4, x) if before else (x, x + text_width(name) + 4)
    free = [
        base for base in range(10, HEIGHT, 2)
        if not any(low < right and start < high and abs(base - other) < 13 for start, right, other in taken)
    ]  # fmt: skip
    y = min(free, key=lambda base: abs(base - y), default=y)
    taken.append((low, high, y))
    anchor = "end" if before else "start"
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis: decades, else with more between, else four that are even apart."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return [low * (high / low) ** (step / 3) for step in range(4)]
