# SPDX-License-Identifier: Apache-2.0
"""A comparison of methods as one self-contained page: tables that sort, marks that can be hidden, no network."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepfusion.artifacts import write_atomic
from deepfusion.report import charts, scatter
from deepfusion.report.comparison import INTERVAL, Comparison, MethodResult
from deepfusion.report.render import render
from deepfusion.report.rows import size

COLUMNS = (
    "method", "seeds", "perplexity", "nats", "nats above the main", "accuracy", "public text only", "traffic", "up", "down",
    "first weights", "device memory", "peak", "device tokens", "server tokens", "device FLOPs", "server FLOPs", "left out",
)  # fmt: skip
LEFT = ("method", "nats above the main")


def write_comparison(found: Comparison, path: Path) -> None:
    """Write the page; replaces `path` only when it is whole."""
    page = render(
        "comparison.html",
        title="Comparison of methods",
        lead=lead(found),
        main=found.main,
        interval=INTERVAL,
        caution=found.caution,
        tokens=f"{found.test_tokens:,}",
        methods=found.methods,
        failures=found.failures,
        columns=[column.replace("the main", found.main) for column in COLUMNS],
        left=[column.replace("the main", found.main) for column in LEFT],
        rows=[{"own": m.name == found.main, "cells": _cells(m)} for m in found.methods],
        domains=sorted(found.methods[0].domains),
        charts=charts.titled(_charts(found)),
    )
    write_atomic(path, page)


def lead(found: Comparison) -> str:
    """What the comparison found, in a sentence or two."""
    best = found.methods[0]
    said = (
        f"{best.name} has the lowest perplexity, {best.perplexity.mean:.1f}, with {size(best.total_bytes)} of traffic"
    )
    main = next((method for method in found.methods if method.name == found.main), None)
    if main is None:
        return f"{said}."
    if main is not best:
        said += f"; {main.name} has {main.perplexity.mean:.1f} with {size(main.total_bytes)}"
    verdicts = {
        word: [m.name for m in found.methods if m.gap and m.gap.verdict == word] for word in ("worse", "better")
    }
    parts = [f"{word} than {main.name}: {', '.join(names)}" for word, names in verdicts.items() if names]
    return f"{said}. {'; '.join(parts).capitalize()}." if parts else f"{said}."


def _cells(m: MethodResult) -> list[tuple[str, float | None]]:
    """Text and value of each column; the value is what sorting goes by, None where the text itself is."""
    nats, accuracy, public = m.log_perplexity, m.token_accuracy, m.public_only
    return [
        (m.name, None),
        (str(len(m.seeds)), len(m.seeds)),
        (m.perplexity.text(1), m.perplexity.mean),
        (nats.text(3), nats.mean),
        (str(m.gap) if m.gap else "", None),
        (f"{accuracy.mean:.1%}", accuracy.mean),
        (public.text(1) if public else "", public.mean if public else 0.0),
        *((size(value), value) for value in (m.total_bytes, m.upload_bytes, m.download_bytes, m.init_bytes)),
        (size(m.device_memory_bytes), m.device_memory_bytes),
        (size(m.device_peak_bytes) if m.device_peak_bytes else "", m.device_peak_bytes or 0.0),
        *((f"{value:,.0f}", value) for value in (m.device_tokens, m.server_tokens)),
        *((f"{value:.1e}", value) for value in (m.device_flops, m.server_flops)),
        (f"{m.left_out:g}", m.left_out),
    ]


def _charts(found: Comparison) -> list[tuple[str, str, str]]:
    spread = "Bars: standard deviation over seeds. " if any(len(m.seeds) > 1 for m in found.methods) else ""
    return [
        ("Quality against traffic", f"All bytes that cross the door, both ways. {spread}Lower left is better.",
         _against(found, lambda method: method.total_bytes, "bytes, logarithmic", size)),
        ("Quality against device memory", "Estimate of the largest device's training; no mark where devices train nothing. "
         f"{spread}Lower left is better.",
         _against(found, lambda method: method.device_memory_bytes, "bytes, logarithmic", size)),
        ("Quality by round", "Before the last tuning; methods in one shot have no rounds.", _by_round(found)),
        ("Where the bytes went", "Of the whole fleet, by direction and kind.",
         charts.stacked_bars({method.name: method.bytes_by_kind for method in found.methods}, size)),
        ("Where the time went", "Server stages, and the sum of the devices' own times.",
         charts.stacked_bars({method.name: _stages(method) for method in found.methods}, lambda value: f"{value:,.0f} s")),
    ]  # fmt: skip


def _against(
    found: Comparison, cost: Callable[[MethodResult], float], x_name: str, text: Callable[[float], str]
) -> str:
    marks = [
        scatter.Point(group, m.name, cost(m), m.log_perplexity.mean, m.log_perplexity.deviation or 0.0)
        for group, m in enumerate(found.methods)
    ]
    return scatter.points(marks, x_name, "nats a token", text)


def _by_round(found: Comparison) -> str:
    marks = [
        scatter.Point(
            group, m.name, number, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        )
        for group, m in enumerate(found.methods)
        for number, values in enumerate(zip(*m.rounds, strict=False), start=1)
    ]
    return scatter.points(marks, "round, logarithmic", "nats a token", lambda x: f"{x:.3g}", joined=True)


def _stages(method: MethodResult) -> dict[str, float]:
    """Seconds by stage; all rounds are one stage."""
    sums: dict[str, Any] = {}
    for stage, seconds in method.seconds_by_stage.items():
        name = "rounds" if stage.startswith("rounds/") else stage
        sums[name] = sums.get(name, 0.0) + seconds
    return {name: seconds for name, seconds in sums.items() if seconds >= 0.5}
