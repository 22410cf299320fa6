# SPDX-License-Identifier: Apache-2.0
"""A tiny federation on made-up text: three domains with vocabularies of their own, six devices, models of 32 numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = {
    "harbour": ["ship", "quay", "crane", "cargo", "anchor", "tide", "pilot", "rope", "deck", "buoy", "sailor", "mast"],
    "kitchen": [
        "salt",
        "oven",
        "flour",
        "knife",
        "stew",
        "butter",
        "onion",
        "plate",
        "spoon",
        "garlic",
        "sauce",
        "bread",
    ],
    "garden": ["rose", "hedge", "soil", "spade", "seed", "lawn", "fern", "pond", "bee", "moss", "willow", "thorn"],
}
TRAINING = {"steps": 2, "optimisation": {"batch_size": 4, "learning_rate": 3e-3}}
WARM = {"steps": 3, "training": {"batch_size": 4, "learning_rate": 3e-3}}
QUIET = {"rounds": False, "public_only": False}
"""[evaluate] of a run of which only the last model matters."""
DOCUMENTS = {"private": 60, "public": 24, "test": 8}


def write_text(folder: Path) -> None:
    """One JSON-lines file for each domain and split."""
    rng = random.Random(7)
    for domain, words in WORDS.items():
        for split, count in DOCUMENTS.items():
            rows = [{"text": f"The {domain} note: " + " ".join(rng.choices(words, k=30)) + "."} for _ in range(count)]
            path = folder / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def small_tree(root: Path, **changes: Any) -> dict[str, Any]:
    """The configuration as nested dictionaries; `changes` take the place of whole sections."""
    tree: dict[str, Any] = {
        "name": "small",
        "data": {
            "root": str(root),
            "sequence_length": 32,
            "tokenizer": {"vocab_size": 400},
            "corpora": [
                {"domain": domain, **{split: f"{domain}/{split}.jsonl" for split in DOCUMENTS}} for domain in WORDS
            ],
        },
        "devices": {
            "count": 6,
            "alpha": 0.05,
            "sigma": 0.2,
            "max_steps": 6,
            "training": {"batch_size": 4, "learning_rate": 3e-3},
            "models": [{"name": "gpt2", "preset": "gpt2-pico"}, {"name": "llama", "preset": "llama-pico"}],
        },
        "federation": {"engine": "inline"},
        "cluster": {"type": "kmeans", "num_clusters": 3},
        "target": {"preset": "qwen2-moe-pico"},
        "distillation": {"steps": 6, "optimisation": {"batch_size": 4, "learning_rate": 3e-3}},
        "tune": {"steps": 4, "optimisation": {"batch_size": 4, "learning_rate": 1e-3}},
    }
    return {**tree, **changes}


def rounds_tree(root: Path, method: str, **changes: Any) -> dict[str, Any]:
    """The same for a method in two rounds of two steps; `changes` may take the place of these, too."""
    given = {"method": method, "warm_start": WARM, "training": TRAINING, "evaluate": QUIET, "rounds": 2}
    tree = small_tree(root, **{**given, **changes})
    tree["devices"]["max_steps"] = 4
    return {name: section for name, section in tree.items() if name not in ("cluster", "distillation")}
