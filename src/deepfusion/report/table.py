# SPDX-License-Identifier: Apache-2.0
"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from deepfusion.record import Record
from deepfusion.report.fitting import FittingTable
from deepfusion.report.rows import FUSED, compared, headline, server_seconds, size


def summary_table(records: Sequence[Record]) -> Table:
    """One row for each compared model of each run; columns for the whole test text and for each domain."""
    domains = sorted({name for record in records for name in record.metrics.domains})
    table = FittingTable("Quality on test text: perplexity (all, then by domain), nats a token, token accuracy")
    if len(records) > 1:
        table.add_column("run")
    table.add_column("model")
    for column in ("perplexity", "nats", "accuracy", *domains):
        table.add_column(escape(column), justify="right")
    for record in records:
        for name, metrics in compared(record).items():
            style = "bold" if name == FUSED else ""
            cells = [f"{metrics.perplexity:.1f}", f"{metrics.log_perplexity:.3f}", f"{metrics.token_accuracy:.1%}"]
            cells += [f"{metrics.domains[d].perplexity:.1f}" if d in metrics.domains else "" for d in domains]
            run = [escape(record.run_id)] if len(records) > 1 else []
            table.add_row(*run, name, *cells, style=style)
        table.add_section()
    table.caption = "\n".join(_caption(record) for record in records)
    table.caption_justify = "left"
    return table


def _caption(record: Record) -> str:
    ledger, seconds = record.ledger, sum(server_seconds(record).values())
    failed = f", {len(record.failures)} had no part" if record.failures else ""
    return (
        f"{escape(headline(record))}\n{len(record.devices)} devices{failed}; {size(ledger.total_bytes)} in all "
        f"(up {size(ledger.upload_bytes)}, first weights {size(ledger.init_bytes)}, other down {size(ledger.download_bytes)}); "
        f"server stages {seconds:.0f} s.{_privacy(record)}"
    )


def _privacy(record: Record) -> str:
    """What devices' uploads tell of a document at most, where they were made with differential privacy."""
    said: list[str] = []
    spent = [device.epsilon for device in record.devices if device.epsilon is not None]
    if spent:
        delta = record.config["devices"]["privacy"]["delta"]
        said.append(f"{len(spent)} models, each (epsilon {max(spent):.2f}, delta {delta:g})")
    embed = record.config.get("embed", {})
    if "epsilon" in embed:
        said.append(f"embeddings, each (epsilon {embed['epsilon']:.2f}, delta {embed['delta']:g})")
    return f"\nDifferential privacy for each document: {'; '.join(said)}." if said else ""
