# SPDX-License-Identifier: Apache-2.0
"""What differential privacy costs and buys: perplexity of devices and of the fused MoE, and what attacks find in them.

For each seed the same small run without privacy and at each epsilon. Devices read their text equally often; with privacy a step
has `--lot` documents on average, as DP-SGD needs many, and the learning rate that goes with them. Prints a table as Markdown.

DEEPFUSION_DATA=/path/to/data python benchmarks/privacy.py --out FOLDER [--seeds 0 1] [--epsilons none 8 2] [--documents 250]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from deepfusion.app import launch
from deepfusion.audit import Audit, audit_run
from deepfusion.config import parse_config
from deepfusion.record import Record

QUESTIONS = {"prompt": "Question: {question}\nAnswer:", "answer": " {answer}"}
TEXTS: dict[str, dict[str, Any]] = {
    "medical_openqa": QUESTIONS,
    "finance_openqa": {**QUESTIONS, "prompt": "Context: {context}\nQuestion: {question}\nAnswer:"},
    "math_openqa": QUESTIONS,
    "code_text": {"text": "{text}"},
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def tree_of(epsilon: float | None, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration."""
    splits = {"private": "train", "public": "validation", "test": "test"}
    plain = {"batch_size": 8, "learning_rate": 3e-3}
    lot = {"batch_size": 8, "accumulate": args.lot // 8, "learning_rate": 6e-3}
    devices: dict[str, Any] = {
        "count": args.domains, "alpha": 0.1, "sigma": 0.0, "epochs": args.epochs,
        "training": plain if epsilon is None else lot,
        "models": [
            {"name": "gpt2", "preset": "gpt2-pico", "config": {"n_embd": 64}},
            {"name": "llama", "preset": "llama-pico", "config": WIDE},
        ],
    }  # fmt: skip
    if epsilon is not None:
        devices["privacy"] = {"epsilon": epsilon, "delta": 1e-4}
    return {
        "name": f"privacy-{epsilon or 'none'}",
        "seed": seed,
        "data": {
            "root": "${DEEPFUSION_DATA}", "sequence_length": 128, "counted": "all", "test_documents": args.documents // 2,
            "tokenizer": {"vocab_size": 1024},
            "corpora": [
                {"domain": name, **{split: f"{name}/{file}.jsonl" for split, file in splits.items()}, **template,
                 "limit": args.documents}
                for name, template in list(TEXTS.items())[: args.domains]
            ],
        },
        "devices": devices,
        "warm_start": {"steps": args.steps, "training": plain},
        "federation": {"engine": "inline"},
        "cluster": {"type": "kmeans", "num_clusters": 2},
        "target": {"preset": "qwen2-moe-pico", "config": {"hidden_size": 64}},
        "distillation": {"steps": args.steps, "optimisation": plain},
        "tune": {"steps": args.steps // 2, "optimisation": plain},
        "evaluate": {"students": False},
    }  # fmt: skip


def row_of(epsilon: float | None, seed: int, record: Record, audit: Audit, seconds: float) -> dict[str, Any]:
    """What is kept of a run."""
    baselines = record.baselines
    return {
        "epsilon": epsilon,
        "seed": seed,
        "spent": max((device.epsilon or 0.0) for device in record.devices),
        "devices": baselines.devices.mean.perplexity if baselines.devices else None,
        "moe": record.metrics.perplexity,
        "public_only": baselines.public_only.perplexity if baselines.public_only else None,
        "seconds": round(seconds),
        "device_seconds": round(sum(device.seconds or 0.0 for device in record.devices)),
        "audit": {kind.kind: {n: a.model_dump() for n, a in kind.attacks.items()} for kind in audit.kinds},
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def auc(row: dict[str, Any], kind: str, attack: str) -> str:
        found = row["audit"].get(kind, {}).get(attack)
        return f"{found['auc']:.3f} ({found['low']:.3f} to {found['high']:.3f}), {found['caught']:.1%}" if found else ""

    head = ("epsilon", "seed", "devices", "fused MoE", "public only", "loss: devices", "reference: devices",
            "reference: proxies", "loss: MoE", "reference: MoE", "loss: control", "training s")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            f"{row['epsilon'] or 'none'}",
            str(row["seed"]),
            *(f"{row[k]:.1f}" for k in ("devices", "moe", "public_only")),
        ]
        asked = (("devices", "loss"), ("devices", "reference"), ("proxies", "reference"), ("fused MoE", "loss"),
                 ("fused MoE", "reference"), ("public text only", "loss"))  # fmt: skip
        cells += [auc(row, *one) for one in asked] + [str(row["device_seconds"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, attack, print; what is there is read again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", nargs="+", default=["none", "8", "2"])
    parser.add_argument("--documents", type=int, default=250, help="private documents of a domain")
    parser.add_argument("--domains", type=int, default=4, help="the first so many; as many devices")
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--lot", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="of the server's trainings")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.epsilons:
            epsilon, folder = None if name == "none" else float(name), args.out / f"epsilon-{name}-seed-{seed}"
            began = time.monotonic()
            record = launch(parse_config(tree_of(epsilon, seed, args)), folder, resume=True)
            assert record is not None
            audit = audit_run(folder, most=args.documents)
            rows.append(row_of(epsilon, seed, record, audit, time.monotonic() - began))
            (args.out / "rows.json").write_text(json.dumps(rows, indent=1))
            print(table_of(rows), flush=True)


if __name__ == "__main__":
    main()
