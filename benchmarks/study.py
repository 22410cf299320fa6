# SPDX-License-Identifier: Apache-2.0
"""The study: what fusion is worth on real text, and which parts of the method earn it.

    export DEEPFUSION_DATA=/path/to/data
    python benchmarks/study.py                                         every row of study_rows.toml, seeds 0 1 2, then the table
    python benchmarks/study.py --rows main "no features" --seeds 0
    python benchmarks/study.py --table                                 the table of the results so far
    python benchmarks/study.py --name short --set distillation.steps=150 tune.steps=50           another size, under a name

Each row and seed is a run folder of its own under --out. It starts as a copy of the seed's main run, whose stages are not
done again where their options are the same. A result that is in --results already is not measured again, so the study
can be stopped and taken up at any time. Every result holds each test document's score, from which `--table` draws intervals.
"""

from __future__ import annotations

import argparse
import json
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
from comparison import CONFIG
from running import add_series, deepfusion, parse_settings, slug, validation
from study_table import table

from deepfusion.artifacts import start_from
from deepfusion.comparing import MAIN
from deepfusion.schema import read_toml

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "study"
KEPT = ("moe", "public-only", "merged")
"""Models whose score of each test document is part of a result."""


@dataclass(frozen=True)
class Row:
    """A row of study_rows.toml at one seed."""

    name: str
    about: str
    change: dict[str, Any]
    drop: tuple[str, ...]
    seed: int

    @property
    def slug(self) -> str:
        """Its name as part of a path."""
        return slug(self.name.lower())

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
    rows = tomllib.loads((HERE / "study_rows.toml").read_text())["row"]
    unknown = set(names) - {row["name"] for row in rows}
    if unknown:
        sys.exit(f"--rows {' '.join(sorted(unknown))}: no such row; choose from {', '.join(r['name'] for r in rows)}")
    found = [
        Row(row["name"], row["about"], row.get("set", {}), tuple(row.get("drop", ())), seed)
        for row in rows for seed in seeds
        if seed in row.get("only", seeds) and (not names or row["name"] in names)
    ]  # fmt: skip
    return sorted(found, key=lambda row: row.name != "main")


def run(row: Row, more: Sequence[str], out: Path, results: Path) -> None:
    """Make the row's run unless its result is there, and write the result."""
    target = results / f"{row.slug}-seed-{row.seed}.json"
    tree = row.config(CONFIG, more)
    if target.exists() and json.loads(target.read_text())["config"] == tree:
        return
    folder, main = out / f"seed-{row.seed}" / row.slug, out / f"seed-{row.seed}" / "main"
    start_from(main, folder, only=() if tree.get("method", MAIN) == MAIN else ("data",))
    config = out / f"seed-{row.seed}" / f"{row.slug}.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(tomli_w.dumps(tree))
    arguments = ("run", str(config), "--out", str(folder), "--resume")
    if not deepfusion(f"{row.name}, seed {row.seed}", arguments, (), folder.with_suffix(".log")):
        return
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result(row, tree, folder)) + "\n")


def result(row: Row, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept of a run: enough for every number of the table."""
    record = json.loads((folder / "record.json").read_text())
    scores = {path.parent.name: json.loads(path.read_text()) for path in (folder / "scores").glob("*/scores.json")}
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
        "validation": validation(folder),
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
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows; all when left out")
    add_series(parser, Path("runs/study"), RESULTS)
    asked = parse_settings(parser)
    rows, out, results = read_rows(asked.seeds, asked.rows), asked.out / asked.name, asked.results / asked.name
    if not asked.table:
        torch.set_num_threads(1)
        for wave in (True, False):  # the other rows start from their seed's main run
            with ThreadPoolExecutor(asked.jobs) as pool:
                mine = [row for row in rows if (row.name == "main") == wave]
                list(pool.map(lambda row: run(row, asked.more, out, results), mine))
    print(table(results, [row.name for row in read_rows([0], [])]))


if __name__ == "__main__":
    main()
