# SPDX-License-Identifier: Apache-2.0
"""A whole run whose devices train with differential privacy: what it says of it, and that it can be made again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.devices.memory import training_memory
from deepfusion.errors import ConfigError, MemoryLimitError
from deepfusion.federation.payload import read_metadata
from deepfusion.report.table import summary_table
from deepfusion.run import own_configs
from fleet_world import QUICK, result_bytes
from small_world import small_tree

PRIVATE = {"epsilon": 4.0, "delta": 1e-4}


def private_tree(root: Path) -> dict[str, object]:
    tree = small_tree(root, evaluate=QUICK, embed={"type": "tfidf", "epsilon": 1.0})
    return {**tree, "devices": {**tree["devices"], "count": 3, "privacy": PRIVATE}}


def test_a_private_run_tells_its_epsilon_and_comes_out_the_same_again(root: Path, tmp_path: Path) -> None:
    config = parse_config(private_tree(root))
    record = launch(config, tmp_path / "a")
    assert record is not None
    assert all(3.9 < (device.epsilon or 0) <= 4.0 for device in record.devices)
    told = read_metadata(tmp_path / "a/uploads/device-000.safetensors")
    assert told["delta"] == 1e-4
    assert told["noise_multiplier"] > 0.3
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table([record]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    shown = " ".join(shown.split())
    assert "Differential privacy for each document: 3 models, each (epsilon 3.99, delta 0.0001)" in shown
    assert "embeddings, each (epsilon 1.00, delta 1e-05)" in shown
    launch(config, tmp_path / "b", until="uploads")
    uploads = [
        {name: data for name, data in result_bytes(tmp_path / run).items() if name.startswith("uploads/")}
        for run in "ab"
    ]
    assert uploads[0] == uploads[1]


def test_methods_that_give_more_away_and_memory_that_does_not_do_are_refused_before_anything_is_trained(
    root: Path,
) -> None:
    tree = private_tree(root)
    with pytest.raises(
        ConfigError, match=r"\[devices.privacy\]: of this method devices give away more than private models"
    ):
        parse_config({**tree, "continue": {"type": "hfedmoe", "rounds": 1}})
    config = parse_config(tree)
    need = training_memory(own_configs(config)["gpt2"], config.devices.training, 32, private=True).total
    little = {**tree, "devices": {**tree["devices"], "memory_limit_gib": (need - 1) / 2**30}}  # type: ignore[dict-item]
    with pytest.raises(MemoryLimitError, match=r"\(gpt2\) needs"):
        launch(parse_config(little), Path("never"))
