# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: no script, no font, no network; colours come from the page so that dark mode works.

Every mark has a `<title>`, which browsers show as a tooltip. All names are escaped: device and domain names are not ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from deepfusion.record import ClusterRecord

COLOURS = 8
"""Size of the page's palette: CSS classes c0 to c7 (Okabe and Ito, safe for colour-blind readers)."""


def grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    """One group of bars for each of `groups`, one bar in it for each of `series`; the axis starts at 0."""
    bar, gap, height, left = 15, 24, 230, 52
    width_of_group = bar * len(series) + gap
    width = left + width_of_group * len(groups) + 10
    top = max((v for values in series.values() for v in values if v < float("inf")), default=1.0) or 1.0
    parts = [_grid(left, width, height, top)]
    for g, group in enumerate(groups):
        x0 = left + g * width_of_group + gap / 2
        for s, (name, values) in enumerate(series.items()):
            h = height * min(values[g], top) / top
            title = f"{name}, {group}: {values[g]:.2f} {unit}"
            parts.append(
                f'<rect class="c{s % COLOURS}" x="{x0 + s * bar:.1f}" y="{height - h + 10:.1f}" width="{bar - 2}" '
                f'height="{h:.1f}"><title>{escape(title)}</title></rect>'
            )
        middle = x0 + bar * len(series) / 2
        parts.append(
            f'<text class="tick" x="{middle:.1f}" y="{height + 28}" text-anchor="middle">{escape(_short(group))}</text>'
        )
    return _svg(width, height + 38, parts) + _legend(list(series))


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """Curves over steps; the axes span the data."""
    points = [p for curve in series.values() for p in curve if abs(p[1]) < float("inf")]
    if not points:
        return ""
    width, height, left = 560, 230, 52
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0
    parts: list[str] = []
    for i in range(5):
        y, value = 10 + height * i / 4, y_high - y_span * i / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for s, (name, curve) in enumerate(series.items()):
        path = " ".join(
            f"{left + (width - left) * (x - x_low) / x_span:.1f},{10 + height * (y_high - y) / y_span:.1f}"
            for x, y in curve if abs(y) < float("inf")
        )  # fmt: skip
        last = f"{name}: {curve[-1][1]:.4g} at the end"
        parts.append(f'<polyline class="line s{s % COLOURS}" points="{path}"><title>{escape(last)}</title></polyline>')
    parts.append(
        f'<text class="tick" x="{width}" y="{height + 28}" text-anchor="end">{escape(x_name)} {x_high:.0f}</text>'
    )
    parts.append(f'<text class="tick" x="{left}" y="{height + 28}">{escape(y_name)}</text>')
    return _svg(width, height + 36, parts) + _legend(list(series))


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
    width, height, left, pad = 560, 260, 60, 26
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
    evenly = [10 ** (x_low + 0.1 + (x_high - x_low - 0.2) * step / 3) for step in range(4)]
    for x in sorted({mark.x for mark in marks}) if joined else evenly:
        px, _ = place(x, y_high)
        parts.append(
            f'<text class="tick" x="{px:.1f}" y="{height + 12}" text-anchor="middle">{escape(x_text(x))}</text>'
        )
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
        anchor, aside = ("end", -9) if px > (left + width) / 2 else ("start", 9)
        label = escape(_short(mine[-1].name))
        drawn.append(f'<text class="tick" x="{px + aside:.1f}" y="{py - 7:.1f}" text-anchor="{anchor}">{label}</text>')
        parts.append(f'<g data-m="{group}">{"".join(drawn)}</g>')
    parts.append(f'<text class="tick" x="{width}" y="{height + 30}" text-anchor="end">{escape(x_name)}</text>')
    parts.append(f'<text class="tick" x="{left}" y="{height + 30}">{escape(y_name)}</text>')
    return _svg(width, height + 36, parts)


def stacked_bars(rows: Mapping[str, Mapping[str, float]], text: Callable[[float], str]) -> str:
    """One bar for each of `rows`, made of named parts; the parts keep their colours from row to row."""
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    row, left, width = 24, 12 + max(_text_width(name) for name in rows), 620
    top = max((sum(parts.values()) for parts in rows.values()), default=0.0) or 1.0
    drawn: list[str] = []
    for i, (name, values) in enumerate(rows.items()):
        bars, x = (
            [f'<text class="tick" x="{left - 6}" y="{i * row + 16}" text-anchor="end">{escape(_short(name))}</text>'],
            left,
        )
        for kind, value in values.items():
            w = (width - left - 90) * value / top
            title = f"{name}, {kind}: {text(value)}"
            bars.append(
                f'<rect class="c{kinds.index(kind) % COLOURS}" x="{x:.1f}" y="{i * row + 3}" width="{max(w, 0.5):.1f}" '
                f'height="{row - 6}"><title>{escape(title)}</title></rect>'
            )
            x += w
        bars.append(
            f'<text class="tick" x="{x + 6:.1f}" y="{i * row + 16}">{escape(text(sum(values.values())))}</text>'
        )
        drawn.append(f'<g data-m="{i}">{"".join(bars)}</g>')
    return _svg(width, row * len(rows) + 4, drawn) + _legend(kinds)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], low: float, high: float
) -> str:
    """A cell for each pair; the stronger its colour, the nearer its value is to `high`. Few cells show their numbers."""
    roomy = len(columns) <= 12
    height = 30 if roomy else 16
    width = max(48, 10 + max(_text_width(column) for column in columns)) if roomy else 16
    left = 10 + max(_text_width(row) for row in rows)
    parts: list[str] = []
    for r, row in enumerate(rows):
        middle = r * height + height / 2 + 4
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{middle:.0f}" text-anchor="end">{escape(_short(row))}</text>'
        )
        for c, column in enumerate(columns):
            value, x = values[r][c], left + c * width
            strength = min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))
            parts.append(
                f'<rect class="heat" x="{x}" y="{r * height}" width="{width - 1}" height="{height - 1}" '
                f'fill-opacity="{strength:.3f}"><title>{escape(f"{row}, {column}: {value:.2f}")}</title></rect>'
            )
            if roomy:
                tone = "cell strong" if strength > 0.55 else "cell"
                centre = x + width / 2
                parts.append(
                    f'<text class="{tone}" x="{centre:.0f}" y="{middle:.0f}" text-anchor="middle">{value:.2f}</text>'
                )
    bottom = len(rows) * height
    for c, column in enumerate(columns if roomy else ()):
        x = left + c * width + width / 2
        parts.append(
            f'<text class="tick" x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{escape(_short(column))}</text>'
        )
    return _svg(left + len(columns) * width + 4, bottom + 24, parts)


def cluster_map(clusters: ClusterRecord, architectures: Mapping[str, str]) -> str:
    """Devices on the two main axes of their embeddings: colour is the domain, shape the architecture."""
    width, height, edge = 420, 320, 24
    xs, ys = [p[0] for p in clusters.projection], [p[1] for p in clusters.projection]
    x_low, y_low = min(xs), min(ys)
    x_span, y_span = (max(xs) - x_low) or 1.0, (max(ys) - y_low) or 1.0
    kinds = sorted(set(architectures.values()))
    parts = [f'<rect class="frame" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}"/>']
    for (device, label), x, y in zip(clusters.labels.items(), xs, ys, strict=True):
        px = edge + (width - 2 * edge) * (x - x_low) / x_span
        py = height - edge - (height - 2 * edge) * (y - y_low) / y_span
        kind = kinds.index(architectures[device])
        title = f"{device} ({architectures[device]}), domain {label}"
        parts.append(f'<g class="c{label % COLOURS}">{_mark(kind, px, py)}<title>{escape(title)}</title></g>')
    marks = "".join(
        f'<span class="key"><svg width="14" height="14">{_mark(i, 7, 7)}</svg>{escape(kind)}</span>'
        for i, kind in enumerate(kinds)
    )
    return (
        _svg(width, height, parts)
        + _legend([f"domain {k}" for k in range(clusters.num_clusters)])
        + f'<p class="legend">{marks}</p>'
    )


def horizontal_bars(values: Mapping[str, float], text: Mapping[str, str]) -> str:
    """One bar for each name, its length the value, `text` beside it."""
    if not values:
        return ""
    row, left, width = 20, 12 + max(_text_width(name) for name in values), 620
    top = max(values.values()) or 1.0
    parts: list[str] = []
    for i, (name, value) in enumerate(values.items()):
        w = (width - left - 110) * value / top
        y = i * row
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(_short(name))}</text>')
        parts.append(
            f'<rect class="c0" x="{left}" y="{y + 3}" width="{max(w, 1):.1f}" height="{row - 6}">'
            f"<title>{escape(f'{name}: {text[name]}')}</title></rect>"
        )
        parts.append(f'<text class="tick" x="{left + w + 6:.1f}" y="{y + 14}">{escape(text[name])}</text>')
    return _svg(width, row * len(values) + 4, parts)


def _mark(kind: int, x: float, y: float) -> str:
    if kind % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    if kind % 4 == 1:
        return f'<rect x="{x - 5.5:.1f}" y="{y - 5.5:.1f}" width="11" height="11"/>'
    corners = ((0, -7), (6.5, 5), (-6.5, 5)) if kind % 4 == 2 else ((0, -7.5), (7.5, 0), (0, 7.5), (-7.5, 0))
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def _grid(left: float, width: float, height: float, top: float) -> str:
    parts: list[str] = []
    for i in range(5):
        y = 10 + height * i / 4
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{top * (4 - i) / 4:.3g}</text>')
    return "".join(parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    keys = (f'<span class="key"><i class="b{i % COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{"".join(keys)}</p>'


def _text_width(name: str) -> float:
    return 7 * len(_short(name))


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
