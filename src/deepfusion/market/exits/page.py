# SPDX-License-Identifier: Apache-2.0
"""A measured profile for people: two tables for the terminal, and a page with curves over sigma."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from deepfusion.artifacts import write_atomic
from deepfusion.market.exits.making import Made
from deepfusion.report import charts
from deepfusion.report.page import render

PAGE = "profile.html"


def headline(made: Made) -> str:
    """The lowest threshold that costs no more than a point of accuracy, in a sentence."""
    whole = made.measured.rows[-1]
    row = next(row for row in made.measured.rows if row.accuracy >= whole.accuracy - 0.01)
    if row.sigma == 1:
        return f"{made.profile.name}: every threshold below 1 costs more than one point of accuracy."
    word = "fewer" if row.flops < 1 else "more"
    return (
        f"{made.profile.name}: at sigma {row.sigma} {1 - row.exit_share[-1]:.0%} of the tokens leave early and a token costs "
        f"{abs(1 - row.flops):.0%} {word} FLOPs; accuracy changes by {100 * (row.accuracy - whole.accuracy):+.2f} points."
    )


def threshold_rows(made: Made) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a row for each sigma."""
    whole = made.measured.rows[-1]
    columns = [
        "sigma",
        *(f"leaves at {x}" for x in made.costs.exit_blocks),
        "accuracy",
        "change",
        "loss",
        "FLOPs a token",
    ]
    rows = [
        [
            f"{row.sigma:g}", *(f"{share:.1%}" for share in row.exit_share), f"{row.accuracy:.2%}",
            f"{100 * (row.accuracy - whole.accuracy):+.2f}", f"{row.loss:.4f}", f"{row.flops:.3f}",
        ]
        for row in made.measured.rows
    ]  # fmt: skip
    return columns, rows


def block_rows(made: Made) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a row for each block, of one token."""
    costs = made.costs
    columns = ["block", "MFLOPs", "after leaving", "sent behind it", "exit's MFLOPs", "exit alone: accuracy", "loss"]
    rows: list[list[str]] = []
    for block, flops in enumerate(costs.block_flops, start=1):
        cells = ["", "", ""]
        if block in costs.exit_blocks:
            m = costs.exit_blocks.index(block)
            accuracy, loss = made.measured.alone[m]
            cells = [f"{costs.head_flops[m] / 1e6:.3f}", f"{accuracy:.2%}", f"{loss:.4f}"]
        sent = f"{costs.state_bytes[block]:,.0f} B" if costs.state_bytes[block] else ""
        rows.append([str(block), f"{flops / 1e6:.3f}", f"{costs.state_flops[block - 1] / 1e6:.3f}", sent, *cells])
    return columns, rows


def profile_tables(made: Made) -> tuple[Table, Table]:
    """Thresholds and blocks, for the terminal."""
    tables: list[Table] = []
    for title, (columns, rows) in ((headline(made), threshold_rows(made)), ("A token", block_rows(made))):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables[0], tables[1]


def write_page(made: Made) -> Path:
    """Write the page beside the exits; returns its path."""
    rows = made.measured.rows
    left = {
        f"by block {x}": [(row.sigma, sum(row.exit_share[: m + 1])) for row in rows]
        for m, x in enumerate(made.costs.exit_blocks[:-1])
    }
    curves = [
        ("Share that has left", "Of the generated tokens of held-out text.", charts.lines(left, "sigma", "share")),
        ("Accuracy", "Next tokens that stand first at the exit taken.",
         charts.lines({"accuracy": [(row.sigma, row.accuracy) for row in rows]}, "sigma", "share")),
        ("Loss", "Mean negative log-likelihood at the exit taken.",
         charts.lines({"loss": [(row.sigma, row.loss) for row in rows]}, "sigma", "nats")),
        ("FLOPs of a token", "Over those of the model without exits; heads and state propagation included.",
         charts.lines({"FLOPs": [(row.sigma, row.flops) for row in rows]}, "sigma", "ratio")),
    ]  # fmt: skip
    page = render(
        PAGE,
        title=made.profile.name,
        lead=headline(made),
        source=made.profile.source,
        tables=[("Thresholds", *threshold_rows(made)), ("Blocks and exits, for one token", *block_rows(made))],
        charts=charts.titled(curves),
    )
    path = made.folder / PAGE
    write_atomic(path, page)
    return path
