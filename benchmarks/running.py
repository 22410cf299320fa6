# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share that run `deepfusion` many times: names as paths, one run into a log, its
validation loss, and the options of a series."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfusion.data.prepare import load_corpus
from deepfusion.devices.models import load
from deepfusion.stages.evaluate import by_domain, score_documents


def slug(name: str) -> str:
    """A name as part of a path."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def deepfusion(what: str, arguments: Sequence[str], values: Sequence[str], log: Path) -> bool:
    """`deepfusion <arguments>` on one core, with options (`--set`), into a log; whether it ended well, and said if it did not."""
    print(what, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deepfusion", *arguments, *(part for value in values for part in ("--set", value))]
    with open(log, "a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        print(f"{what}: failed, see {log}", flush=True)
    return not done.returncode


def validation(folder: Path) -> float:
    """Mean over the devices' domains of a run's log-perplexity on validation text, in nats a token."""
    corpus, record = load_corpus(folder / "data" / "validation"), json.loads((folder / "record.json").read_text())
    length = int(record["config"]["data"]["sequence_length"])
    found = by_domain(score_documents(load(folder / "moe"), corpus, length), corpus)
    return statistics.mean(found[name].log_perplexity for name in record["metrics"]["domains"])


def add_series(parser: argparse.ArgumentParser, out: Path, results: Path) -> None:
    """Options of a benchmark of many runs, each of which is kept."""
    parser.add_argument("--out", type=Path, default=out, help="run folders")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")


def parse_settings(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those of other settings of the runs (`more`, `name`) and their seeds."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="+", default=[], dest="more", help="other values of the configuration: section.key=value"
    )
    parser.add_argument("--name", default="", help="of the results with these other values")
    asked = parser.parse_args()
    if asked.more and not asked.name:
        parser.error("--set: results of other settings lie apart; say with --name what they are to be called")
    return asked
