# SPDX-License-Identifier: Apache-2.0
"""Whole runs of ever larger fleets on one machine: the server's peak memory and the time for each device, against their number.

Every fleet runs in a process of its own, with devices that train small models on made-up text, each in a process of its own; the
memory is the server process's own (what it has written; the pages of files that it reads are the system's, who takes them back),
looked at twenty times a second. Embeddings are clustered in larger numbers besides. Ratios are to the first size. What is not
measured (`--devices` or `--embeddings` with nothing behind it) stays as it was.

python benchmarks/fleet_size.py [--devices 16 64 256 1000] [--embeddings 1000 10000 100000] [--out benchmarks/results/scaling]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from scaling import embeddings, texts

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.federation.beside import beside
from deepfusion.stages.cluster import KMeans

OUT = Path(__file__).parent / "results" / "scaling"
DOMAINS = 16


def tree(folder: Path, devices: int) -> dict[str, Any]:
    """A run of so many devices, each with one document to read in two steps."""
    domains = ("north", "south")
    for seed, name in enumerate(domains):
        for split, count in (("private", devices), ("public", 60), ("test", 10)):
            lines = [json.dumps({"text": text}) for text in texts(count, 10 * seed + len(split))]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
    corpora = [
        {"domain": name, **{split: f"{name}-{split}.jsonl" for split in ("private", "public", "test")}} for name in domains
    ]  # fmt: skip
    return {
        "method": "deepfusion",
        "data": {"root": str(folder), "sequence_length": 64, "tokenizer": {"vocab_size": 512}, "corpora": corpora},
        "devices": {
            "count": devices, "max_steps": 2, "memory_limit_gib": 1.0, "training": {"batch_size": 2},
            "models": [{"name": "llama", "preset": "llama-pico"}, {"name": "gpt2", "preset": "gpt2-pico"}],
        },
        "cluster": {"type": "kmeans", "num_clusters": 2},
        "proxy": {"average": "mean"},
        "target": {"preset": "qwen2-moe-pico"},
        "distillation": {"steps": 2},
        "tune": {"steps": 2},
        "evaluate": {"public_only": False, "devices": False, "proxies": False, "students": False},
    }  # fmt: skip


class Peak:
    """The most memory that this process has had of its own, MiB; watches beside other work."""

    def __init__(self) -> None:
        self.mib = 0.0

    def __call__(self, over: threading.Event) -> None:
        while not over.wait(0.05):
            told = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            assert told is not None
            self.mib = max(self.mib, int(told[1]) / 2**10)


def run(devices: int) -> dict[str, float]:
    """One run in this process."""
    with tempfile.TemporaryDirectory() as place:
        config = parse_config(tree(Path(place), devices))
        peak, began = Peak(), time.perf_counter()
        with beside(peak, "memory"):
            record = launch(config, Path(place) / "run")
        seconds = time.perf_counter() - began
        assert record is not None
        assert len(record.devices) == devices
        assert not record.failures, record.failures
        return {
            "devices": devices,
            "seconds": seconds,
            "seconds_per_device": seconds / devices,
            "peak_mib": peak.mib,
            "up": record.ledger.upload_bytes,
        }


def cluster(count: int) -> dict[str, float]:
    """Seconds to group so many embeddings, with K given and with K to be found."""
    embedding_ND = embeddings(count, DOMAINS)
    ids = tuple(f"device-{number:06}" for number in range(count))
    found: dict[str, float] = {"embeddings": count}
    for name, rule in (("given", KMeans(num_clusters=DOMAINS)), ("auto", KMeans(num_clusters="auto"))):
        began = time.perf_counter()
        clusters = rule.assign(embedding_ND, ids, ("model",) * count, seed=0, note=lambda _: None)
        found[f"{name}_seconds"] = time.perf_counter() - began
        found[f"{name}_clusters"] = clusters.num_clusters
    return found


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Peak memory and seconds a device against the number of devices."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "deepfusion"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, key, label in (
        (left, "peak_mib", "peak memory of the server, MiB"),
        (right, "seconds_per_device", "seconds a device"),
    ):
        axes.plot([row["devices"] for row in rows], [row[key] for row in rows], "o-")
        axes.set(xscale="log", xlabel="devices", ylabel=label, ylim=(0, 1.2 * max(row[key] for row in rows)))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="*", default=[16, 64, 256, 1000])
    parser.add_argument("--embeddings", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(run(asked.devices[0])))
        return
    rows: list[dict[str, float]] = []
    for count in asked.devices:
        command = [sys.executable, __file__, "--inside", "--devices", str(count)]
        rows.append(
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        )
        ratios = {f"{key}_ratio": round(rows[-1][key] / rows[0][key], 2) for key in ("devices", "peak_mib", "seconds")}
        print(json.dumps({**{key: round(value, 3) for key, value in rows[-1].items()}, **ratios}), flush=True)
    groups = [cluster(count) for count in asked.embeddings]
    for group in groups:
        print(json.dumps({key: round(value, 3) for key, value in group.items()}), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    kept, now = asked.out / "fleet_size.json", date.today().isoformat()
    found = json.loads(kept.read_text()) if kept.exists() else {}
    found |= {name: {"date": now, "rows": part} for name, part in (("fleets", rows), ("embeddings", groups)) if part}
    kept.write_text(json.dumps(found, indent=1))
    if rows:
        plot(rows, asked.out / "fleet_size.svg")


if __name__ == "__main__":
    main()
