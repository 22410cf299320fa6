# SPDX-License-Identifier: Apache-2.0
"""A simulated market as a table for the terminal and as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from deepfusion.artifacts import write_atomic
from deepfusion.market.simulation import MechanismResult, Simulated, SlotRow
from deepfusion.market.slot import MICRO
from deepfusion.report import charts
from deepfusion.report.fitting import FittingTable
from deepfusion.report.render import render

COLUMNS = (
    "mechanism", "truthful", "one price", "revenue", "over omniscient", "profit", "served", "sold", "users' surplus",
    "envious", "early", "late", "ms a slot",
)  # fmt: skip
LEFT = ("mechanism", "truthful", "one price")


def cells(m: MechanismResult) -> list[tuple[str, float | None]]:
    """Text and value of each column; None where the text itself is the value."""
    served = max(m.served, 1)
    early, late = (sum(getattr(row, what) * row.served for row in m.slots) / served for what in ("early", "late"))
    return [
        (m.name, None), (m.truthful, None), (m.uniform, None), (f"${m.revenue:.3f}", m.revenue),
        (f"{m.mean_ratio:.3f}", m.mean_ratio), (f"${m.profit:+.3f}", m.profit), (f"{m.served:,}", m.served),
        (f"{m.utilisation:.0%}", m.utilisation), (f"${m.surplus:.3f}", m.surplus), (str(m.envious), m.envious),
        (f"{early:.0%}", early), (f"{late:.0%}", late), (f"{m.median_milliseconds:.2f}", m.median_milliseconds),
    ]  # fmt: skip


def simulation_table(found: Simulated) -> Table:
    """One row for each mechanism."""
    table = FittingTable(headline(found))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for m in found.mechanisms:
        table.add_row(*(text for text, _ in cells(m)), style="bold" if m.name.startswith("coco") else "")
    return table


def headline(found: Simulated) -> str:
    """What the simulation found, in a sentence."""
    own = found.mechanisms[0]
    sellers = [m for m in found.mechanisms[1:] if not m.name.startswith("coco") and m.truthful != "no"]
    said = (
        f"{own.name} earns ${own.revenue:.2f} in {len(found.bids)} slots, {own.mean_ratio:.0%} of the omniscient price"
    )
    if not sellers:
        return f"{said}."
    best = max(sellers, key=lambda m: m.revenue)
    change = own.revenue / best.revenue - 1 if best.revenue else 0.0
    word = "more" if change >= 0 else "less"
    return f"{said}, {abs(change):.1%} {word} than the best rival that is truthful, {best.name} (${best.revenue:.2f})."


def write_page(found: Simulated, path: Path) -> None:
    """Write the page; replaces `path` only when it is whole."""
    page = render(
        "market.html",
        title=found.name,
        lead=headline(found),
        slots=len(found.bids),
        bids=f"{min(found.bids)} to {max(found.bids)}",
        columns=COLUMNS,
        left=LEFT,
        rows=[{"own": m.name.startswith("coco"), "cells": cells(m)} for m in found.mechanisms],
        charts=charts.titled(_charts(found)),
        config=found.config,
    )
    write_atomic(path, page)


def _charts(found: Simulated) -> list[tuple[str, str, str]]:
    def series(value: Callable[[SlotRow], float | None]) -> dict[str, list[tuple[float, float]]]:
        return {
            m.name: [(float(slot), y) for slot, row in enumerate(m.slots) if (y := value(row)) is not None]
            for m in found.mechanisms[: charts.COLOURS - 1]  # the last colour is the reserve price's
        }

    prices = series(lambda row: row.price * MICRO if row.price is not None else None)
    prices["reserve price"] = [(float(slot), price * MICRO) for slot, price in enumerate(found.reserve)]
    bids = [(float(slot), float(count)) for slot, count in enumerate(found.bids)]

    def bars(value: Callable[[MechanismResult], float], text: str) -> str:
        return charts.horizontal_bars(
            {m.name: value(m) for m in found.mechanisms}, {m.name: text.format(value(m)) for m in found.mechanisms}
        )

    return [
        ("Revenue", "Over all slots.", bars(lambda m: m.revenue, "${:.3f}")),
        ("Users' surplus", "Budgets of the served above what they pay.", bars(lambda m: m.surplus, "${:.3f}")),
        ("Revenue by slot", "First mechanisms of the table.", charts.lines(series(lambda row: row.revenue), "slot", "$")),
        ("Revenue over the omniscient price's", "1: as if all budgets were known and one price had to be asked.",
         charts.lines(series(lambda row: row.ratio), "slot", "ratio")),
        ("Price", "Where all winners pay the same.", charts.lines(prices, "slot", "millionths of $ a GFLOP/s")),
        ("Sold", "Share of the edge that is rented out.",
         charts.lines(series(lambda row: row.utilisation), "slot", "share")),
        ("Envious bidders", "Who would rather have another's deal, over all slots.",
         bars(lambda m: float(m.envious), "{:.0f}")),
        ("Time of the mechanism", "Median of a slot.", bars(lambda m: m.median_milliseconds, "{:.2f} ms")),
        ("Bids", "That take part.", charts.lines({"bids": bids}, "slot", "bids")),
    ]  # fmt: skip
