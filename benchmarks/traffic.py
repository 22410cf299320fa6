# SPDX-License-Identifier: Apache-2.0
"""The whole traffic of a fleet, both ways: as plain as it comes, and with all that makes it small; and what the MoE pays for it.

    export DEEPFUSION_DATA=/path/to/data
    python benchmarks/traffic.py                           64 devices, a fleet that trains and a server that reads for minutes
    python benchmarks/traffic.py --set devices.count=32 --name 32-devices
    python benchmarks/traffic.py --table

Every row is `deepfusion run configs/benchmark.toml` with a few options; bytes are its ledger's. They are told against the
paper's upload, the models of all devices in fp16. A result that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from comparison import CONFIG
from running import add_series, deepfusion, parse_settings, slug

from deepfusion.comparing import document_scores
from deepfusion.statistics import mean_and_deviation, paired_difference

RESULTS = Path(__file__).parent / "results" / "traffic"
SIZE = (
    "devices.count=64", "devices.max_steps=150", "warm_start.steps=200", "distillation.steps=150", "tune.steps=50",
    "federation.workers=1", "evaluate.public_only=false", "evaluate.devices=false", "evaluate.proxies=false",
    "evaluate.students=false",
)  # fmt: skip
ONE = ("upload.select=medoids", "upload.medoids=1")
PLAIN = "every device, fp32"
WAYS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "one medoid of each domain and architecture, fp32": ONE,
    "one medoid, nf4 both ways": (
        *ONE,
        "upload.format=nf4",
        "warm_start.format=nf4",
        "embed.type=tfidf",
        "embed.hash_bits=11",
    ),
}
HEAD = """| who sends a model, and how | seeds | models | up | up and down | perplexity | log-perplexity against the first (95%) |
|---|---|---|---|---|---|---|"""


def measure(way: str, seed: int, more: list[str], out: Path, results: Path) -> None:
    """Run one way at a seed unless its result is there, and write the result."""
    target, folder = results / f"{slug(way)}-seed-{seed}.json", out / slug(way) / f"seed-{seed}"
    if target.exists():
        return
    values = [f"seed={seed}", *SIZE, *more, *WAYS[way]]
    arguments = ("run", str(CONFIG), "--out", str(folder), "--resume")
    if not deepfusion(f"{way}, seed {seed}", arguments, values, folder.with_suffix(".log")):
        return
    record = json.loads((folder / "record.json").read_text())
    nll_D, tokens_D = document_scores(folder)
    found = {
        "way": way, "seed": seed, "options": values, "versions": record["versions"], "ledger": record["ledger"],
        "models": len(list((folder / "uploads").glob("*.safetensors"))),
        "half": sum(2 * device["parameters"] for device in record["devices"]),
        "documents": [nll_D.round(3).tolist(), tokens_D.tolist()],
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found) + "\n")


def table(results: Path) -> str:
    """Markdown: a line for each way."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(results.glob("*-seed-*.json")):
        row = json.loads(path.read_text())
        found.setdefault(row["way"], {})[row["seed"]] = row
    lines = [HEAD]
    for way in WAYS:
        rows = found.get(way, {})
        if not rows:
            continue
        nats = [sum(row["documents"][0]) / sum(row["documents"][1]) for row in rows.values()]
        up = mean(row["ledger"]["upload_bytes"] / row["half"] for row in rows.values())
        both = mean(row["ledger"]["total_bytes"] / row["half"] for row in rows.values())
        models, perplexity = mean(row["models"] for row in rows.values()), [math.exp(n) for n in nats]
        lines.append(
            f"| {way} | {len(rows)} | {models:.3g} | {up:.1%} | {both:.1%} | {mean_and_deviation(perplexity, 1)} | "
            f"{_change(found, way)} |"
        )
    return "\n".join([*lines, "", "Bytes are shares of all devices' models in fp16."])


def _change(found: dict[str, dict[int, dict[str, Any]]], way: str) -> str:
    seeds = sorted(found[way].keys() & found.get(PLAIN, {}).keys())
    if way == PLAIN or not seeds:
        return ""
    ours, theirs = ([np.asarray(found[name][seed]["documents"][0]) for seed in seeds] for name in (way, PLAIN))
    tokens_D = np.asarray(found[way][seeds[0]]["documents"][1])
    gap = paired_difference(ours, theirs, tokens_D)
    base = mean(nll_D.sum() for nll_D in theirs) / tokens_D.sum()
    return f"{gap.mean / base:+.2%} ({gap.low / base:+.2%} to {gap.high / base:+.2%})"


def main() -> None:
    """Measure what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add_series(parser, Path("runs/traffic"), RESULTS)
    asked = parse_settings(parser)
    results: Path = asked.results / asked.name
    if not asked.table:
        with ThreadPoolExecutor(asked.jobs) as pool:
            mine = [(way, seed) for seed in asked.seeds for way in asked.ways]
            list(pool.map(lambda one: measure(*one, asked.more, asked.out / asked.name, results), mine))
    said = table(results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "results.md").write_text(said + "\n")
    print(said)


if __name__ == "__main__":
    main()
