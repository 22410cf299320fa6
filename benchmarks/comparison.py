# SPDX-License-Identifier: Apache-2.0
"""All methods with one budget on real text: what each is worth, and what it costs.

    export DEEPFUSION_DATA=/path/to/data
    python benchmarks/comparison.py                                 every method, seeds 0 1 2, as long as configs/benchmark.toml
    python benchmarks/comparison.py --share 0.1 --methods deepfusion fedavg
    python benchmarks/comparison.py --share 0.1 --table             the table of the results so far, and its page
    python benchmarks/comparison.py --share 0.1 --name best --beside share-0.1 --methods deepfusion ofa \
        --set distillation.optimisation.learning_rate=0.004 compare.ofa.distillation.optimisation.learning_rate=0.004

--share shortens every training of the benchmark, the devices' and the server's alike. It is `deepfusion compare` otherwise.
Results of different shares lie apart, and those of other settings (--set) under a --name of their own; --beside takes the
methods that were not measured with these settings from other results. A result that is there is not measured again, so this
can be stopped and taken up at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from running import add_series, deepfusion, parse_settings

from deepfusion.comparing import MAIN, document_scores
from deepfusion.methods import methods
from deepfusion.record import Record
from deepfusion.report.comparison import INTERVAL, Comparison, MethodResult, Run, compare_runs
from deepfusion.report.comparison_page import write_comparison
from deepfusion.report.rows import size

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "benchmark.toml"
RESULTS = HERE / "results" / "comparison"
STEPS = (("devices", "max_steps"), ("warm_start", "steps"), ("distillation", "steps"), ("tune", "steps"))
MORE = ("federation.workers=1", "evaluate.devices=false", "evaluate.proxies=false", "evaluate.students=false")
"""One core a run; what devices' models and proxies are worth is the study's question."""
HEAD = """| method | seeds | perplexity | nats above DeepFusion (95%) | traffic | device memory | FLOPs: devices | server |
|---|---|---|---|---|---|---|---|"""
"""Traffic and FLOPs are the whole fleet's, memory is the largest device's."""


def shortened(share: float) -> dict[str, int]:
    """The benchmark's steps, so much shorter."""
    tree = tomllib.loads(CONFIG.read_text())
    return {f"{section}.{key}": max(1, round(share * tree[section][key])) for section, key in STEPS}


def measure(method: str, seed: int, steps: dict[str, int], out: Path, results: Path, more: Sequence[str]) -> None:
    """Run a method at a seed unless its result is there, and write the result."""
    target = results / f"{method}-seed-{seed}.json"
    if target.exists():
        return
    values = [f"{key}={value}" for key, value in steps.items()] + [*MORE, *more]
    arguments = ("compare", str(CONFIG), "--methods", method, "--seeds", str(seed), "--out", str(out))
    if not deepfusion(f"{method}, seed {seed}", arguments, values, out / f"{method}-seed-{seed}.log"):
        return
    folder = out / method / f"seed-{seed}"
    nll_D, tokens_D = document_scores(folder)
    results.mkdir(parents=True, exist_ok=True)
    record = json.loads((folder / "record.json").read_text()) | {"curves": {}}  # nine tenths of it, and in no table
    said = {"record": record, "documents": [nll_D.round(3).tolist(), tokens_D.tolist()]}
    target.write_text(json.dumps(said) + "\n")


def measured(results: Path, beside: Path | None = None) -> Comparison | None:
    """What the results so far come to, with those `beside` of the methods that have none."""
    runs: list[Run] = []
    paths = {path.name: path for path in results.glob("*-seed-*.json")}
    own = {name.split("-seed-")[0] for name in paths}
    others = beside.glob("*-seed-*.json") if beside else ()
    paths |= {path.name: path for path in others if path.name.split("-seed-")[0] not in own}
    for path in (paths[name] for name in sorted(paths)):
        found: dict[str, Any] = json.loads(path.read_text())
        nll_D, tokens_D = (np.asarray(part) for part in found["documents"])
        runs.append(Run(Record.model_validate(found["record"]), Path(path.stem), (nll_D, tokens_D)))
    return compare_runs(runs, {}, main=MAIN) if runs else None


def table(found: Comparison) -> str:
    """Markdown: the methods, best first, and the perplexity in each domain."""
    lines = [HEAD, *(_line(method) for method in found.methods)]
    domains = list(found.methods[0].domains)
    lines += ["", f"| perplexity in each domain | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    lines += [f"| {m.name} | {' | '.join(m.domains[d].text(1) for d in domains)} |" for m in found.methods]
    return "\n".join([*lines, "", *filter(None, (INTERVAL, found.caution))])


def _line(method: MethodResult) -> str:
    line = (
        f"| {method.name} | {len(method.seeds)} | {method.perplexity.text(1)} | {method.gap or ''} | {size(method.total_bytes)} "
        f"| {size(method.device_memory_bytes)} | {method.device_flops:.1e} | {method.server_flops:.1e} |"
    )
    if method.name != MAIN or method.public_only is None:
        return line
    return f"{line}\n| *public text only* | {len(method.seeds)} | {method.public_only.text(1)} | | | | | |"


def main() -> None:
    """Measure what is missing, then print and write the table, and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the benchmark's steps")
    parser.add_argument("--methods", nargs="+", default=sorted(methods), choices=sorted(methods))
    add_series(parser, Path("runs/comparison"), RESULTS)
    parser.add_argument("--beside", help="of these results, methods that have none of their own: e.g. share-0.1")
    asked = parse_settings(parser)
    name = "-".join(filter(None, (f"share-{asked.share:g}", asked.name)))
    results: Path = asked.results / name
    if not asked.table:
        steps = shortened(asked.share)
        for wave in (True, False):  # the others start from what the seed's DeepFusion has made
            mine = [(method, seed) for seed in asked.seeds for method in asked.methods if (method == MAIN) == wave]
            with ThreadPoolExecutor(asked.jobs) as pool:
                list(pool.map(lambda one: measure(*one, steps, asked.out / name, results, asked.more), mine))
    found = measured(results, asked.results / asked.beside if asked.beside else None)
    if found is None:
        sys.exit(f"{results}: no results yet; leave --table out to measure")
    (results / "results.md").write_text(table(found) + "\n")
    print(table(found))
    write_comparison(found, results / "comparison.html")


if __name__ == "__main__":
    main()
