# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: no script, no font, no network; colours come from the page so that dark mode works.

Every mark has a `<title>`, which browsers show as a tooltip. All names are escaped: device and domain names are not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from markupsafe import Markup

from deepfusion.record import ClusterRecord

COLOURS = 8
"""Size of the page's palette: CSS classes c0 to c7 (Okabe and Ito, safe for colour-blind readers)."""
STRONG = 0.78
"""From this strength of its cell on, a number is read best in the colour of the paper, by light and in the dark."""


def grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    """One group of bars for each of `groups`, one bar in it for each of `series`; the axis starts at 0."""
    height, gap = 230, 20
    bar = max(6.0, min(15.0, (500 / len(groups) - gap) / len(series))) if groups else 15.0
    width_of_group = bar * len(series) + gap
    widest = max((text_width(group) for group in groups), default=0.0)
    aslant = widest > width_of_group
    left = max(52.0, 0.87 * widest - width_of_group / 2 + 4) if aslant else 52.0
    foot = 0.5 * widest + 32 if aslant else 38
    width = left + width_of_group * len(groups) + 10
    top = max((v for values in series.values() for v in values if v < float("inf")), default=1.0) or 1.0
    parts = [_grid(left, width, height, top)]
    for g, group in enumerate(groups):
        x0 = left + g * width_of_group + gap / 2
        for s, (name, values) in enumerate(series.items()):
            h = height * min(values[g], top) / top
            title = f"{name}, {group}: {values[g]:.2f} {unit}"
            parts.append(
                f'<rect class="c{s % COLOURS}" x="{x0 + s * bar:.1f}" y="{height - h + 10:.1f}" width="{bar - 2:.1f}" '
                f'height="{h:.1f}"><title>{escape(title)}</title></rect>'
            )
        middle = x0 + bar * len(series) / 2
        place = f'x="{middle:.1f}" y="{height + 28}" text-anchor="middle"'
        if aslant:
            place = f'transform="translate({middle + 4:.1f} {height + 22}) rotate(-30)" text-anchor="end"'
        parts.append(f'<text class="tick" {place}>{escape(short(group))}</text>')
    return svg(width, height + foot, parts) + _legend(list(series))


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """Curves over steps; the axes span the data. A curve without points keeps its colour from being another's."""
    points = [p for curve in series.values() for p in curve if abs(p[1]) < float("inf")]
    if not points:
        return ""
    width, height, left = 560, 230, 52
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    if y_low == y_high:  # level at mid-height, and below 0 only what is there
        y_low, y_high = min(0.0, 2 * y_low), max(0.0, 2 * y_high) or 1.0
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
        if not path:
            continue
        if " " not in path:
            x, y = path.split(",")
            parts.append(f'<circle class="c{s % COLOURS}" cx="{x}" cy="{y}" r="3"/>')
        last = f"{name}: {curve[-1][1]:.4g} at the end"
        parts.append(f'<polyline class="line s{s % COLOURS}" points="{path}"><title>{escape(last)}</title></polyline>')
    middle = (x_low + x_high) / 2
    if all(float(p[0]).is_integer() for p in points):
        middle = float(round(middle))
    for value, anchor in ((x_low, "start"), (middle, "middle"), (x_high, "end"))[: 3 if x_low < x_high else 1]:
        x = left + (width - left) * (value - x_low) / x_span
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height + 26}" text-anchor="{anchor}">{value:.4g}</text>')
    parts.append(f'<text class="tick" x="{width}" y="{height + 44}" text-anchor="end">{escape(x_name)}</text>')
    parts.append(f'<text class="tick" x="{left}" y="{height + 44}">{escape(y_name)}</text>')
    shown = {name: s for s, (name, curve) in enumerate(series.items()) if curve}
    return svg(width, height + 50, parts) + _legend(shown)


def stacked_bars(rows: Mapping[str, Mapping[str, float]], text: Callable[[float], str]) -> str:
    """One bar for each of `rows`, made of named parts; the parts keep their colours from row to row.

    Where there are more kinds of parts than colours, the smallest are one, `other`.
    """
    rows = _few_kinds(rows)
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    row, left, width = 24, 12 + max(text_width(name) for name in rows), 620
    top = max((sum(parts.values()) for parts in rows.values()), default=0.0) or 1.0
    drawn: list[str] = []
    for i, (name, values) in enumerate(rows.items()):
        bars, x = (
            [f'<text class="tick" x="{left - 6}" y="{i * row + 16}" text-anchor="end">{escape(short(name))}</text>'],
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
    return svg(width, row * len(rows) + 4, drawn) + _legend(kinds)


def _few_kinds(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    largest: dict[str, float] = {}
    for parts in rows.values():
        for kind, value in parts.items():
            largest[kind] = max(value, largest.get(kind, 0.0))
    if len(largest) <= COLOURS:
        return {name: dict(parts) for name, parts in rows.items()}
    kept = sorted(largest, key=lambda kind: -largest[kind])[: COLOURS - 1]
    few = {name: {kind: parts[kind] for kind in kept if kind in parts} for name, parts in rows.items()}
    for name, parts in rows.items():
        if rest := sum(value for kind, value in parts.items() if kind not in kept):
            few[name]["other"] = rest
    return few


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], low: float, high: float
) -> str:
    """A cell for each pair; the stronger its colour, the nearer its value is to `high`. Few cells show their numbers."""
    roomy = len(columns) <= 12
    height = 30 if roomy else 16
    width = max(48, 10 + max(text_width(column) for column in columns)) if roomy else 16
    left = 10 + max(text_width(row) for row in rows)
    parts: list[str] = []
    for r, row in enumerate(rows):
        middle = r * height + height / 2 + 4
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{middle:.0f}" text-anchor="end">{escape(short(row))}</text>'
        )
        for c, column in enumerate(columns):
            value, x = values[r][c], left + c * width
            strength = min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))
            parts.append(
                f'<rect class="heat" x="{x}" y="{r * height}" width="{width - 1}" height="{height - 1}" '
                f'fill-opacity="{strength:.3f}"><title>{escape(f"{row}, {column}: {value:.2f}")}</title></rect>'
            )
            if roomy:
                tone = "cell strong" if strength > STRONG else "cell"
                centre = x + width / 2
                parts.append(
                    f'<text class="{tone}" x="{centre:.0f}" y="{middle:.0f}" text-anchor="middle">{value:.2f}</text>'
                )
    bottom = len(rows) * height
    for c, column in enumerate(columns if roomy else ()):
        x = left + c * width + width / 2
        parts.append(
            f'<text class="tick" x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{escape(short(column))}</text>'
        )
    return svg(left + len(columns) * width + 4, bottom + 24, parts)


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
        svg(width, height, parts)
        + _legend([f"domain {k}" for k in range(clusters.num_clusters)])
        + f'<p class="legend">{marks}</p>'
    )


def horizontal_bars(values: Mapping[str, float], text: Mapping[str, str]) -> str:
    """One bar for each name, its length the value, `text` beside it."""
    if not values:
        return ""
    row, left, width = 20, 12 + max(text_width(name) for name in values), 620
    top = max(values.values()) or 1.0
    parts: list[str] = []
    for i, (name, value) in enumerate(values.items()):
        w = (width - left - 110) * value / top
        y = i * row
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(short(name))}</text>')
        parts.append(
            f'<rect class="c0" x="{left}" y="{y + 3}" width="{max(w, 1):.1f}" height="{row - 6}">'
            f"<title>{escape(f'{name}: {text[name]}')}</title></rect>"
        )
        parts.append(f'<text class="tick" x="{left + w + 6:.1f}" y="{y + 14}">{escape(text[name])}</text>')
    return svg(width, row * len(values) + 4, parts)


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


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """A drawing out of its parts."""
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">{"".join(parts)}</svg>'


def named(chart: str, name: str) -> Markup:
    """A chart for a page, with the name that a screen reader says."""
    return Markup(chart.replace('role="img"', f'role="img" aria-label="{escape(name)}"', 1))


def titled(drawn: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, Markup]]:
    """(title, about, chart) of the charts that show anything, each named by its title."""
    return [(title, about, named(chart, title)) for title, about, chart in drawn if chart]


def _legend(names: Sequence[str] | Mapping[str, int]) -> str:
    """Names beside their colours: in their order, or those that are given."""
    colours = names if isinstance(names, Mapping) else {name: i for i, name in enumerate(names)}
    keys = (f'<span class="key"><i class="b{i % COLOURS}"></i>{escape(name)}</span>' for name, i in colours.items())
    return f'<p class="legend">{"".join(keys)}</p>'


def text_width(name: str) -> float:
    """Room that a label takes, in user units, at most."""
    return 7 * len(short(name))


def short(name: str) -> str:
    """A name as labels show it; tooltips hold it whole."""
    return name if len(name) <= 24 else name[:23] + "…"
