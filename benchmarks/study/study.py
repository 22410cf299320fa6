# SPDX-License-Identifier: Apache-2.0
"""The study: what fusion is worth on real text, and which parts of the method earn it.

    export DEEPFUSION_DATA=/path/to/data
    python benchmarks/study/study.py                                   every row of rows.toml, seeds 0 1 2, then the table
    python benchmarks/study/study.py --rows main "no features" --seeds 0
    python benchmarks/study/study.py --table                           the table of the results so far
    python benchmarks/study/study.py --name short --set distillation.steps=150 tune.steps=50     another size, under a name

Each row and seed is a run folder of its own under --out. It starts as a copy of the seed's main run, whose stages are not
done again where their options are the same. A result that is in --results already is not measured again, so the study
can be stopped and taken up at any time. Every result holds each test document's score, from which `--table` draws intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tomli_w
import torch
from table import table

from deepfusion.artifacts import start_from
from deepfusion.data.prepare import load_corpus
from deepfusion.devices.models import load
from deepfusion.schema import read_toml
from deepfusion.stages.evaluate import by_domain, score_documents

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "configs" / "benchmark.toml"
RESULTS = HERE.parent / "results" / "study"
KEPT = ("moe", "public-only", "merged")
"""Models whose score of each test document is part of a result."""


@dataclass(frozen=True)
class Row:
    """A row of rows.toml at one seed."""

    name: str
    about: str
    change: dict[str, Any]
    drop: tuple[str, ...]
    seed: int

    @property
    def slug(self) -> str:
        """Its name as part of a path."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())

    def config(self, base: Path, more: Sequence[str] = ()) -> dict[str, Any]:
        """The whole configuration as nested tables; `more` are overrides of the base, as of `deepfusion run --set`."""
        tree = {key: value for key, value in read_toml(base, more).items() if key not in self.drop}
        for path, value in {**self.change, "seed": self.seed}.items():
            *sections, key = path.split(".")
            table = tree
            for section in sections:
                table = table.setdefault(section, {})
            table[key] = value
        if self.name != "main":  # what main has measured already
            tree["evaluate"] = {"devices": False, "proxies": False, "students": False}
        return tree


def read_rows(seeds: list[int], names: list[str]) -> list[Row]:
    """The asked rows at the asked seeds, the mains first."""
    rows = tomllib.loads((HERE / "rows.toml").read_text())["row"]
    unknown = set(names) - {row["name"] for row in rows}
    if unknown:
        sys.exit(f"--rows {' '.join(sorted(unknown))}: no such row; choose from {', '.join(r['name'] for r in rows)}")
    found = [
        Row(row["name"], row["about"], row.get("set", {}), tuple(row.get("drop", ())), seed)
        for row in rows for seed in seeds
        if seed in row.get("only", seeds) and (not names or row["name"] in names)
    ]  # fmt: skip
    return sorted(found, key=lambda row: row.name != "main")


def run(row: Row, more: Sequence[str], out: Path, results: Path, threads: int) -> None:
    """Make the row's run unless its result is there, and write the result."""
    target = results / f"{row.slug}-seed-{row.seed}.json"
    tree = row.config(CONFIG, more)
    if target.exists() and json.loads(target.read_text())["config"] == tree:
        return
    folder, main = out / f"seed-{row.seed}" / row.slug, out / f"seed-{row.seed}" / "main"
    start_from(main, folder, only=() if tree["method"] == "deepfusion" else ("data",))
    config = out / f"seed-{row.seed}" / f"{row.slug}.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(tomli_w.dumps(tree))
    print(f"{row.name}, seed {row.seed}: {folder}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "deepfusion", "run", str(config), "--out", str(folder), "--resume"]
    with open(folder.with_suffix(".log"), "a") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        print(f"{row.name}, seed {row.seed}: failed, see {folder.with_suffix('.log')}", flush=True)
        return
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result(row, tree, folder)) + "\n")


def result(row: Row, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run: enough for every number of the table."""
    record = json.loads((folder / "record.json").read_text())
    scores = {path.parent.name: json.loads(path.read_text()) for path in (folder / "scores").glob("*/scores.json")}
    validation = load_corpus(folder / "data" / "validation")
    length = int(tree["data"]["sequence_length"])
    private = set(record["metrics"]["domains"])
    held_out = by_domain(score_documents(load(folder / "moe"), validation, length), validation)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "row": row.name,
        "about": row.about,
        "seed": row.seed,
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": record["versions"],
        "config": tree,
        "validation": statistics.mean(score.log_perplexity for name, score in held_out.items() if name in private),
        "metrics": record["metrics"],
        "baselines": {name: value and {**value, "items": None} for name, value in record["baselines"].items()},
        "seconds": record["seconds"],
        "ledger": record["ledger"],
        "mutual_information": record["expert_mutual_information"],
        "documents": {
            name: [[round(nll, 3), tokens] for nll, _, tokens in scores[name]["documents"]] for name in KEPT if name in scores
        },
    }  # fmt: skip


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows; all when left out")
    parser.add_argument(
        "--set", nargs="+", default=[], dest="more", help="another size for all rows: section.key=value"
    )
    parser.add_argument("--name", default="", help="of the study of that size")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    asked = parser.parse_args()
    if asked.more and not asked.name:
        parser.error("--set: results of another size lie apart; say with --name what they are to be called")
    rows, out, results = read_rows(asked.seeds, asked.rows), asked.out / asked.name, asked.results / asked.name
    if not asked.table:
        threads = max(1, (os.cpu_count() or 1) // asked.jobs)
        torch.set_num_threads(threads)
        for wave in (True, False):  # the other rows start from their seed's main run
            with ThreadPoolExecutor(asked.jobs) as pool:
                mine = [row for row in rows if (row.name == "main") == wave]
                list(pool.map(lambda row: run(row, asked.more, out, results, threads), mine))
    print(table(results, [row.name for row in read_rows([0], [])]))


if __name__ == "__main__":
    main()
