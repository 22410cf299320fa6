# SPDX-License-Identifier: Apache-2.0
"""The models that a record compares, in the order in which every table and chart shows them."""

from __future__ import annotations

from deepfusion.record import Metrics, Record

FUSED = "fused MoE"
PUBLIC = "public text only"


def compared(record: Record) -> dict[str, Metrics]:
    """Metrics by row name; parts that were not measured are left out."""
    b = record.baselines
    rows = {
        FUSED: record.metrics,
        PUBLIC: b.public_only,
        "merged, not tuned": b.merged,
        "students (mean)": b.students.mean if b.students else None,
        "best proxy per domain": b.oracle,
        "proxies (mean)": b.proxies.mean if b.proxies else None,
        "devices (mean)": b.devices.mean if b.devices else None,
    }
    return {name: metrics for name, metrics in rows.items() if metrics is not None}


def terms(record: Record) -> str:
    """What the row names say, of those rows that are there."""
    said = {
        PUBLIC: "the same MoE without devices, trained on as many public tokens",
        "merged, not tuned": "the MoE before its last training",
        "students (mean)": "the single-expert models distilled from the proxies, which are merged",
        "best proxy per domain": "each domain scored by the proxy that is best at it",
        "proxies (mean)": "teachers, averages of uploads of one domain and architecture",
        "devices (mean)": "the devices' own models",
    }
    shown = [f"{name}: {what}" for name, what in said.items() if name in compared(record)]
    return f"{'; '.join(shown)}." if shown else ""


def size(count: float) -> str:
    """Bytes for people, in decimal units as networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def server_seconds(record: Record) -> dict[str, float]:
    """What each of the server's stages took. Scoring is none of them: it is measured, and no method needs it."""
    return {stage: seconds for stage, seconds in record.seconds.items() if not stage.startswith("scores/")}


def headline(record: Record) -> str:
    """What the run found, in one sentence."""
    fused, public = record.metrics.perplexity, record.baselines.public_only
    said = f"The fused MoE reaches perplexity {fused:.1f} on the devices' domains"
    if public is not None:
        change = 1 - fused / public.perplexity
        word = "below" if change >= 0 else "above"
        said += f", {abs(change):.0%} {word} the same MoE trained on public text alone ({public.perplexity:.1f})"
    sent = sum(1 for device in record.devices if device.upload_bytes)
    rounds = record.config.get("rounds", 1)
    how = "once" if rounds == 1 else f"in {rounds} rounds"
    return f"{said}; {sent} devices uploaded {size(record.ledger.upload_bytes)}, {how}."
