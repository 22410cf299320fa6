# SPDX-License-Identifier: Apache-2.0
"""The same number of tuning trials for every method: at which learning rate is each best, on validation text?

    export DEEPFUSION_DATA=/path/to/data
    python benchmarks/trials.py --share 0.1                      every method at half, once and twice the benchmark's rate, seed 0
    python benchmarks/trials.py --share 0.1 --methods fedavg --table

The rate is that of the training a method stands on (`RATES`): of the devices' on private text where they train what becomes
the MoE, round after round; of the server's where they send a model of their own or their text. Everything else is
`benchmarks/comparison.py`, whose run folders and results are taken where the rate is the benchmark's. Test text is not looked
at. The last lines are the options with which `comparison.py --set` compares every method at its best.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from comparison import RESULTS, measure, shortened
from running import add_series, validation

from deepfusion.artifacts import start_from
from deepfusion.comparing import MAIN
from deepfusion.methods import DeepFusion, methods

SERVER, DEVICES = "distillation.optimisation.learning_rate", "devices.training.learning_rate"
RATES = {
    "deepfusion": SERVER, "ofa": SERVER, "fedmkt1": SERVER, "centralised": "training.optimisation.learning_rate",
    "fedavg": DEVICES, "fedjets": DEVICES, "fedmkt": DEVICES, "hfedmoe": DEVICES,
}  # fmt: skip
"""The option that is tried out, of each method's own configuration."""
TRIALS = (0.001, 0.002, 0.004)
USUAL = 0.002
"""All of these rates in configs/benchmark.toml, and so the one of the comparison itself."""


def option(method: str, rate: float) -> str:
    """The override of the comparison's configuration that gives a method this rate."""
    return f"{'' if method == MAIN else f'compare.{method}.'}{RATES[method]}={rate}"


def attempt(method: str, rate: float, asked: argparse.Namespace) -> None:
    """Run a method at a rate unless its result is there, and keep its validation loss."""
    name = f"share-{asked.share:g}"
    target: Path = asked.results / name / "trials" / f"{method}-{rate:g}.json"
    if target.exists():
        return
    usual = rate == USUAL
    out: Path = asked.out / name if usual else asked.out / name / "trials" / f"{rate:g}"
    kept: Path = asked.results / name if usual else out
    folder = out / method / f"seed-{asked.seed}"
    if not usual:
        # those of one exchange have the same uploads; the others learn the same before their rounds
        alike = issubclass(methods[method], DeepFusion)
        source = asked.out / name / (MAIN if alike else method) / folder.name
        start_from(source, folder, only=() if alike else ("data", "reference"))
    measure(method, asked.seed, shortened(asked.share), out, kept, [] if usual else [option(method, rate)])
    if not (folder / "moe").exists():
        print(f"{method} at {rate:g}: no model in {folder}; it has failed, or only its result is left", flush=True)
        return
    found = {"method": method, "rate": rate, "seed": asked.seed, "validation": validation(folder)}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found) + "\n")


def table(results: Path) -> str:
    """Markdown: each method's validation loss at each rate, the best in bold; then the options of the best ones."""
    found: dict[str, dict[float, float]] = {}
    for path in sorted(results.glob("*.json")):
        row = json.loads(path.read_text())
        found.setdefault(row["method"], {})[row["rate"]] = row["validation"]
    head = f"| validation, nats | option | {' | '.join(f'{rate:g}' for rate in TRIALS)} |"
    lines, chosen = [head, "|---" * (2 + len(TRIALS)) + "|"], list[str]()
    for method, tried in sorted(found.items(), key=lambda item: min(item[1].values())):
        best = min(tried, key=lambda rate: tried[rate])
        cells = [f"**{tried[r]:.3f}**" if r == best else f"{tried[r]:.3f}" if r in tried else "" for r in TRIALS]
        lines.append(f"| {method} | `{RATES[method]}` | {' | '.join(cells)} |")
        if len(tried) == len(TRIALS) and best != USUAL:
            chosen.append(option(method, best))
    said = f"--set {' '.join(chosen)}" if chosen else "the benchmark's own rate, wherever all were tried"
    return "\n".join([*lines, "", f"At their best: {said}"])


def main() -> None:
    """Try what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the benchmark's steps")
    parser.add_argument("--methods", nargs="+", default=sorted(methods), choices=sorted(methods))
    parser.add_argument("--seed", type=int, default=0)
    add_series(parser, Path("runs/comparison"), RESULTS)  # comparison.py's
    asked = parser.parse_args()
    if not asked.table:
        torch.set_num_threads(1)
        rates = sorted(TRIALS, key=lambda rate: rate != USUAL)  # its runs are what the others start from
        for wave in (True, False):  # the others start from what the seed's DeepFusion has made
            mine = [(method, rate) for rate in rates for method in asked.methods if (method == MAIN) == wave]
            with ThreadPoolExecutor(asked.jobs) as pool:
                list(pool.map(lambda one: attempt(*one, asked), mine))
    results: Path = asked.results / f"share-{asked.share:g}" / "trials"
    said = table(results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "results.md").write_text(said + "\n")
    print(said)


if __name__ == "__main__":
    main()
