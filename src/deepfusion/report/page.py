# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page out of one or several records: opens without network, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepfusion.artifacts import write_atomic
from deepfusion.devices.memory import gib
from deepfusion.record import Record
from deepfusion.report import charts
from deepfusion.report.render import render
from deepfusion.report.rows import compared, headline, server_seconds, size, terms

MANY = 40
"""With more devices than this, charts with a bar for each are left out; the table has them all."""


def write_report(records: Sequence[Record], path: Path) -> None:
    """Write the page; replaces `path` only when it is whole."""
    page = render(
        "page.html",
        title=records[0].name if len(records) == 1 else "Comparison of runs",
        comparison=_comparison(records) if len(records) > 1 else None,
        runs=[_run(record) for record in records],
    )
    write_atomic(path, page)


def _comparison(records: Sequence[Record]) -> dict[str, Any]:
    names = [f"{r.run_id} ({r.recipe or r.method}, seed {r.seed})" for r in records]
    domains = sorted({d for r in records for d in r.metrics.domains})
    bars = {
        name: [r.metrics.domains[d].perplexity if d in r.metrics.domains else 0.0 for d in domains]
        for name, r in zip(names, records, strict=True)
    }
    return {
        "rows": [
            (
                name,
                r.metrics.perplexity,
                r.metrics.log_perplexity,
                r.metrics.token_accuracy,
                r.ledger.total_bytes,
                size(r.ledger.total_bytes),
            )
            for name, r in zip(names, records, strict=True)
        ],
        "chart": charts.named(charts.grouped_bars(domains, bars, "perplexity"), "Perplexity in each domain"),
    }


def _run(record: Record) -> dict[str, Any]:
    rows = compared(record)
    domains = sorted(record.metrics.domains)
    return {
        "record": record,
        "headline": headline(record),
        "facts": _facts(record),
        "domains": domains,
        "rows": rows,
        "terms": terms(record),
        "charts": charts.titled(_charts(record, domains)),
        "rounds": _rounds(record),
        "devices": [_device(device) for device in record.devices],
        "config": json.dumps(record.config, indent=2),
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    own = record.metrics
    facts = [
        ("perplexity", f"{own.perplexity:.2f}"),
        ("token accuracy", f"{own.token_accuracy:.1%}"),
        ("devices", str(len(record.devices))),
        ("uploaded", size(record.ledger.upload_bytes)),
        ("all traffic", size(record.ledger.total_bytes)),
        ("server stages", f"{sum(server_seconds(record).values()):.0f} s"),
    ]
    if record.clusters:
        facts.insert(3, ("domains found", str(record.clusters.num_clusters)))
    return facts


def _charts(record: Record, domains: list[str]) -> list[tuple[str, str, str]]:
    rows = compared(record)
    bars = {name: [m.domains[d].perplexity for d in domains] for name, m in rows.items() if name != "devices (mean)"}
    names = [*record.expert_load]
    experts = [f"expert {e}" for e in range(len(next(iter(record.expert_load.values()), [])))]
    load = [record.expert_load[name] for name in names]
    top = max((v for row in load for v in row), default=1.0)
    return [
        ("Perplexity by domain", "Test text, every document scored by itself; lower is better.",
         charts.grouped_bars(domains, bars, "perplexity")),
        ("Which experts a domain uses", "Share of a domain's routed tokens that each expert gets, mean over the layers; "
         f"mutual information of domain and expert {record.expert_mutual_information:.3f} nats.",
         charts.heat_map(names, experts, load, 0.0, top) if names else ""),
        *_cluster_charts(record), *_curve_charts(record), *_cost_charts(record),
    ]  # fmt: skip


def _cluster_charts(record: Record) -> list[tuple[str, str, str]]:
    clusters = record.clusters
    if clusters is None:
        return []
    architectures = {device.id: device.architecture for device in record.devices}
    found = [
        ("Map of the devices", "Two main axes of the embeddings of the devices' texts.",
         charts.cluster_map(clusters, architectures)),
    ]  # fmt: skip
    if clusters.similarity is None:
        return found
    ids = list(clusters.labels)
    order = sorted(range(len(ids)), key=lambda i: (clusters.labels[ids[i]], i))
    ordered = [ids[i] for i in order]
    cosine = [[clusters.similarity[i][j] for j in order] for i in order]
    return [
        *found,
        ("Cosine of the devices' texts", "Devices ordered by domain; domains should show as blocks.",
         charts.heat_map(ordered, ordered, cosine, -1.0, 1.0)),
    ]  # fmt: skip


def _curve_charts(record: Record) -> list[tuple[str, str, str]]:
    titles = {"experts": "Distillation", "moe": "Tuning", "reference/trained": "Reference: base on public text",
              "reference/moe": "Reference: tuning"}  # fmt: skip
    found: list[tuple[str, str, str]] = []
    for training, metrics in record.curves.items():
        title = titles.get(training, titles.get(training.rsplit("/", 1)[0], training))
        parts = ("loss", "ce", "kl", "features", "balance")
        shown = {name: metrics[name] for name in parts if any(value for _, value in metrics.get(name, []))}
        found.append(
            (f"{title} ({training})", "Training loss and its parts by step.", charts.lines(shown, "step", "nats"))
        )
    return found


def _cost_charts(record: Record) -> list[tuple[str, str, str]]:
    seconds = {name: s for name, s in server_seconds(record).items() if s >= 0.5}
    times = charts.horizontal_bars(seconds, {name: f"{s:.1f} s" for name, s in seconds.items()})
    found = [("Time by stage", "On the server, of the stages that took half a second or more.", times)]
    if len(record.devices) <= MANY:
        sent = {d.id: float(d.upload_bytes) for d in record.devices}
        found.append(("Bytes uploaded", "Counted where they cross from a device to the server.",
                      charts.horizontal_bars(sent, {d.id: size(d.upload_bytes) for d in record.devices})))  # fmt: skip
    return found


def _rounds(record: Record) -> list[dict[str, Any]]:
    """A row for each round: quality, who failed and, with HFedMoE, what was used of the MoE.

    A device that cannot hold what it would train is never asked, and has failed in every round.
    """
    rows: list[dict[str, Any]] = []
    unfit = len(record.failures.keys() - {device.id for device in record.devices})
    for number, told in enumerate(record.round_records):
        score = record.rounds[number] if number < len(record.rounds) else None
        failed = [
            f"{b} experts: {asked - came} of {asked}" for b, (asked, came) in told.by_budget.items() if came < asked
        ] + [f"too little memory to be asked: {unfit}"] * (unfit > 0)
        rows.append({
            "number": number + 1, "perplexity": score and score.perplexity, "accuracy": score and score.token_accuracy,
            "asked": told.asked, "failed": told.asked - told.answered + unfit, "failed_text": "; ".join(failed),
            "scale": told.gate_scale, "routed": told.routed, "trained": told.trained, "uploaded": told.uploaded,
        })  # fmt: skip
    return rows


def _device(device: Any) -> dict[str, Any]:
    main = sorted(device.domains.items(), key=lambda item: -item[1])
    return {
        "id": device.id, "architecture": device.architecture, "domain": device.cluster,
        "parameters": device.parameters, "documents": device.documents, "tokens": device.tokens,
        "text": ", ".join(f"{name} {count / max(device.tokens, 1):.0%}" for name, count in main[:3]),
        "estimate": device.estimated_memory_bytes, "estimate_text": gib(device.estimated_memory_bytes),
        "peak": device.peak_memory_bytes or 0, "peak_text": gib(device.peak_memory_bytes) if device.peak_memory_bytes else "",
        "upload": device.upload_bytes, "upload_text": size(device.upload_bytes),
        "seconds": device.seconds or 0, "seconds_text": f"{device.seconds:.1f}" if device.seconds else "",
    }  # fmt: skip
