# SPDX-License-Identifier: Apache-2.0
"""The run of `deepfusion fleet init` without a configuration: three small devices on text that every installation has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from deepfusion.config import RunConfig, parse_config
from deepfusion.schema import override

TRIAL: dict[str, Any] = {
    "name": "trial",
    "data": {
        "sequence_length": 64,
        "test_documents": 64,
        "tokenizer": {"vocab_size": 1024},
        "corpora": [
            {"domain": "mathematics", "embedded": "mathematics", "limit": 240},
            {"domain": "programming", "embedded": "programming", "limit": 240},
        ],
    },
    "devices": {
        "count": 3,
        "alpha": 0.1,
        "max_steps": 20,
        "training": {"learning_rate": 3e-3},
        "models": [{"name": "gpt2", "preset": "gpt2-pico"}, {"name": "llama", "preset": "llama-pico"}],
    },
    "cluster": {"type": "kmeans", "num_clusters": 2},
    "target": {"preset": "qwen2-moe-pico"},
    "distillation": {"steps": 20, "optimisation": {"learning_rate": 3e-3}},
    "tune": {"steps": 10, "optimisation": {"learning_rate": 1e-3}},
    "evaluate": {"devices": False, "proxies": False, "students": False},
}
"""Minutes on two cores; it shows that the parts work together, not what they are worth."""


def trial_config(overrides: Sequence[str] = (), *, seed: int | None = None) -> RunConfig:
    """The trial's configuration, with `section.key=value` overrides.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    tree = {**copy.deepcopy(TRIAL), **({} if seed is None else {"seed": seed})}
    for text in overrides:
        override(tree, text)
    return parse_config(tree, "the trial's configuration")
