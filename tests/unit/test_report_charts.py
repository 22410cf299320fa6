# SPDX-License-Identifier: Apache-2.0
"""Charts: labels can be read, colours tell apart what they are to tell apart, and a single point is seen."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest

from deepfusion.report import charts
from deepfusion.report.rows import size
from deepfusion.report.scatter import Point, points, ticks


def labels(svg: str) -> list[tuple[float, float, float, str]]:
    """Left end, right end and baseline of each upright label, and its text."""
    found: list[tuple[float, float, float, str]] = []
    for x, y, anchor, text in re.findall(
        r'<text class="tick" x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?>(.*?)</text>', svg
    ):
        width = 6.5 * len(text)
        left = float(x) - width * {"end": 1.0, "middle": 0.5}.get(anchor, 0.0)
        found.append((left, left + width, float(y), text))
    return found


def covered(svg: str) -> list[tuple[str, str]]:
    """Pairs of labels of which one covers the other."""
    return [
        (a[3], b[3]) for a, b in combinations(labels(svg), 2) if a[0] < b[1] and b[0] < a[1] and abs(a[2] - b[2]) < 11
    ]


def test_no_label_of_equally_good_methods_covers_another() -> None:
    marks = [
        Point(n, name, 1.2e9 + n * 3e7, 5.57 + n / 1000) for n, name in enumerate(("fedavg", "fedjets", "hfedmoe"))
    ]
    svg = points([*marks, Point(3, "centralised", 3e7, 3.7), Point(4, "ofa", 3.01e7, 3.7)], "bytes", "nats", size)
    assert {"fedavg", "fedjets", "hfedmoe", "centralised", "ofa"} <= {text for *_, text in labels(svg)}
    assert covered(svg) == []


@pytest.mark.parametrize(("low", "high"), [(2.4e7, 2.6e9), (4.7e7, 1.59e8), (1.0, 1e9), (3e7, 3.2e7)])
def test_a_logarithmic_axis_has_round_ticks_that_do_not_touch(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 6
    assert all(low <= x <= high * (1 + 1e-9) for x in found)
    if high > 2 * low:
        assert all(float(f"{x:.1e}") == pytest.approx(x) for x in found)
    svg = points([Point(0, "a", 1.26 * low, 1.0), Point(1, "b", high / 1.26, 2.0)], "bytes", "nats", size)
    assert covered(svg) == []


@pytest.mark.parametrize("num_series", [1, 2, 6])
def test_bars_of_domains_with_long_names_stand_apart_without_shrinking_the_letters(num_series: int) -> None:
    names = ["code", "finance_openqa", "finance_tableqa", "medical_mcqa", "medical_openqa", "physics", "a" * 80]
    svg = charts.grouped_bars(names, {f"model {n}": [1.0] * len(names) for n in range(num_series)}, "perplexity")
    assert covered(svg) == []
    assert float(re.findall(r'viewBox="0 0 (\d+)', svg)[0]) <= 640
    places = [float(x) for x in re.findall(r"translate\(([\d.]+) ", svg)]
    assert len(places) == len(names)
    assert min(b - a for a, b in pairwise(places)) > 12 / 0.5  # the height of a letter, at 30 degrees
    assert places[-1] - 0.87 * charts.text_width(names[-1]) > 0


def test_parts_beyond_the_palette_share_one_colour_and_no_other_does() -> None:
    rows = {"a": {f"kind {n}": float(n + 1) for n in range(12)}, "b": {"kind 11": 1.0, "kind 0": 2.0}}
    svg = charts.stacked_bars(rows, lambda value: f"{value:.0f} B")
    keys = re.findall(r'<i class="(b\d)"></i>([\w ]+)', svg)
    assert len(dict(keys)) == len(keys) == charts.COLOURS
    assert "other" in dict(keys).values()
    assert ">78 B</text>" in svg
    assert ">3 B</text>" in svg


def test_a_curve_keeps_its_colour_beside_one_without_points() -> None:
    curve = [(0.0, 1.0), (5.0, 2.0)]
    svg = charts.lines({"none": [], "price": curve}, "slot", "$")
    assert '<i class="b1"></i>price' in svg
    assert "none" not in svg
    assert 'class="line s1"' in svg


def test_one_point_is_seen_and_a_level_curve_does_not_fall_below_zero() -> None:
    assert "<circle" in charts.lines({"price": [(1.0, 4.4)], "reserve": [(1.0, 3.0)]}, "slot", "$")
    level = [text for *_, text in labels(charts.lines({"accuracy": [(0.5, 0.0), (1.0, 0.0)]}, "sigma", "share"))]
    assert not any(text.startswith("-") for text in level)
    assert {"0.5", "0.75", "1"} <= set(level)
    steps = [text for *_, text in labels(charts.lines({"loss": [(0, 1.0), (49, 2.0)]}, "step", "nats"))]
    assert {"0", "24", "49"} <= set(steps)


def test_numbers_on_cells_stand_out_from_their_colour() -> None:
    def light(colour: tuple[float, ...]) -> float:
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def rgb(code: str) -> tuple[float, ...]:
        return tuple(int(code[n : n + 2], 16) / 255 for n in (0, 2, 4))

    for ink, card, heat in (("1d2530", "ffffff", "0072b2"), ("e8ebef", "1c2229", "4aa3df")):
        for step in range(101):
            cell = [h * step / 100 + c * (1 - step / 100) for h, c in zip(rgb(heat), rgb(card), strict=True)]
            text = rgb(card if step / 100 > charts.STRONG else ink)
            dark, bright = sorted((light(tuple(cell)), light(text)))
            assert (bright + 0.05) / (dark + 0.05) > 3, (ink, step)


def test_a_chart_has_its_title_as_its_name_and_one_that_shows_nothing_is_left_out() -> None:
    drawn = charts.lines({"a": [(0, 1), (1, 2)]}, "step", "nats")
    shown = charts.titled([("Loss & <co>", "about", drawn), ("Nothing", "about", "")])
    assert [(title, about) for title, about, _ in shown] == [("Loss & <co>", "about")]
    assert shown[0][2].startswith("<svg")
    assert 'aria-label="Loss &amp; &lt;co&gt;"' in shown[0][2]
