# SPDX-License-Identifier: Apache-2.0
"""The script of tuning trials: every method has as many, and each reaches the method that it is of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trials
from comparison import CONFIG

from deepfusion.comparing import beside
from deepfusion.config import load_config, tree_of
from deepfusion.methods import methods


def rate_of(method: str, overrides: list[str]) -> float:
    found = tree_of(beside(load_config(CONFIG, overrides), method, 0))
    for key in trials.RATES[method].split("."):
        found = found[key]
    assert isinstance(found, float)
    return found


def test_every_method_has_the_same_number_of_trials_around_the_benchmarks_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFUSION_DATA", "/data")
    assert trials.RATES.keys() == set(methods)
    assert trials.USUAL in trials.TRIALS
    for method in methods:
        assert rate_of(method, []) == trials.USUAL
        assert [rate_of(method, [trials.option(method, rate)]) for rate in trials.TRIALS] == list(trials.TRIALS)


def test_the_best_rate_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    losses = {"deepfusion": (5.2, 5.0, 5.1), "fedavg": (5.4, 5.3, 5.2), "ofa": (5.5, 5.6)}
    for method, row in losses.items():
        for rate, loss in zip(trials.TRIALS, row, strict=False):
            found = {"method": method, "rate": rate, "seed": 0, "validation": loss}
            (tmp_path / f"{method}-{rate:g}.json").write_text(json.dumps(found))
    lines = trials.table(tmp_path).splitlines()
    assert lines[2:5] == [
        "| deepfusion | `distillation.optimisation.learning_rate` | 5.200 | **5.000** | 5.100 |",
        "| fedavg | `devices.training.learning_rate` | 5.400 | 5.300 | **5.200** |",
        "| ofa | `distillation.optimisation.learning_rate` | **5.500** | 5.600 |  |",
    ]
    assert lines[-1] == "At their best: --set compare.fedavg.devices.training.learning_rate=0.004"
