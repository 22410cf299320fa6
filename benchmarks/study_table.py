# SPDX-License-Identifier: Apache-2.0
"""The study's table, from its result files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from deepfusion.report.comparison import INTERVAL
from deepfusion.statistics import mean_and_deviation, paired_difference

HEAD = """| row | seeds | test perplexity | nats | against public only | nats above main | validation, nats | |
|---|---|---|---|---|---|---|---|"""
"""Perplexity over all test tokens; validation is the mean of the domains' log-perplexities."""
FOOT = f"Differences in nats a token, with their interval; bold where several seeds' excludes zero. {INTERVAL}"


def table(results: Path, names: list[str]) -> str:
    """Markdown: every row that has a result, in the order of `names`."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["row"], {})[result["seed"]] = result
    lines = [_line(name, found[name], found.get("main", {})) for name in names if name in found]
    return "\n".join([HEAD, *_references(found.get("main", {})), *lines, "", FOOT])


def _references(mains: dict[int, dict[str, Any]]) -> list[str]:
    """What the main runs are compared with."""
    if not mains:
        return []
    wanted = {
        "public_only": ("*public text only*", "the same MoE, the same server tokens, no device"),
        "oracle": ("*best proxy of each domain*", "told which domain a document is of"),
        "proxies": ("*proxies*", "mean log-perplexity"),
        "devices": ("*devices*", "mean log-perplexity"),
        "merged": ("*merged*", "main before its tuning"),
    }
    lines: list[str] = []
    for name, (title, about) in wanted.items():
        values = [main["baselines"][name] for main in mains.values() if main["baselines"].get(name)]
        if values:
            nats = [value.get("mean", value)["log_perplexity"] for value in values]
            cells = (_perplexity(nats), mean_and_deviation(nats, 3), "", _gap(mains, mains, name.replace("_", "-")))
            lines.append(f"| {title} | {len(nats)} | {' | '.join(cells)} | | {about} |")
    return lines


def _line(name: str, row: dict[int, dict[str, Any]], mains: dict[int, dict[str, Any]]) -> str:
    nats = [result["metrics"]["log_perplexity"] for result in row.values()]
    validation = [result["validation"] for result in row.values()]
    about = next(iter(row.values()))["about"]
    public = [
        1 - math.exp(result["metrics"]["log_perplexity"] - result["baselines"]["public_only"]["log_perplexity"])
        for result in row.values() if result["baselines"].get("public_only")
    ]  # fmt: skip
    gap = "" if name == "main" else _gap(row, mains)
    shares = f"{mean_and_deviation([100 * share for share in public], 1)}% better" if public else ""
    against = ", ".join(filter(None, (shares, _gap(row, row, than="public-only"))))
    cells = (
        name,
        len(nats),
        _perplexity(nats),
        mean_and_deviation(nats, 3),
        against,
        gap,
        mean_and_deviation(validation, 3),
        about,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _gap(
    ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], name: str = "moe", than: str = "moe"
) -> str:
    """One model of ours against one of theirs, on the seeds that have both; empty where there are none."""
    pairs = [
        (ours[seed]["documents"][name], theirs[seed]["documents"][than])
        for seed in sorted(ours.keys() & theirs.keys())
        if name in ours[seed]["documents"] and than in theirs[seed]["documents"]
    ]
    if not pairs:
        return ""
    tokens_U = np.asarray([tokens for _, tokens in pairs[0][0]])
    assert all(np.array_equal(tokens_U, [tokens for _, tokens in rows]) for pair in pairs for rows in pair)
    nll_PSU = [[np.asarray([nll for nll, _ in rows]) for rows in side] for side in zip(*pairs, strict=True)]
    found = paired_difference(*nll_PSU, tokens_U)
    sure = "**" if found.excludes_zero and len(pairs) > 1 else ""
    return f"{sure}{found.mean:+.3f}{sure} ({found.low:+.3f} to {found.high:+.3f})"


def _perplexity(nats: list[float]) -> str:
    return mean_and_deviation([math.exp(value) for value in nats], 1)
