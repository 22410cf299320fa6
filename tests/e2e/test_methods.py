# SPDX-License-Identifier: Apache-2.0
"""Every method on one tiny fleet: they end with the same kind of model, score it on the same text, and book their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepfusion.app import launch
from deepfusion.artifacts import start_from
from deepfusion.config import CONFIG, load_config, parse_config
from deepfusion.devices.memory import num_parameters
from deepfusion.methods import methods
from deepfusion.plan import make_plan
from deepfusion.record import Record
from small_world import small_tree, write_text

WARM = {"steps": 2, "training": {"batch_size": 4, "learning_rate": 3e-3}}
TRAINING = {"steps": 3, "optimisation": {"batch_size": 4, "learning_rate": 3e-3}}
DISTILLED = ("deepfusion", "ofa", "fedmkt1")
SECTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{name: ({"warm_start": WARM}, ()) for name in DISTILLED},
    "centralised": ({"warm_start": WARM, "training": TRAINING}, ("cluster", "distillation")),
    "fedavg": ({"warm_start": WARM, "rounds": 2}, ("cluster", "distillation")),
    "fedmkt": ({"warm_start": WARM, "rounds": 2, "sequences": 12}, ("cluster", "distillation")),
    "hfedmoe": ({"warm_start": WARM, "rounds": 2}, ("cluster", "distillation")),
    "fedjets": ({"warm_start": WARM, "rounds": 2}, ("cluster", "distillation")),
}
"""What each method's configuration has beside the common one, and which of its sections it has not."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Record]]:
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    found: dict[str, tuple[Path, Record]] = {}
    for name, (given, dropped) in SECTIONS.items():
        tree = small_tree(root, method=name, evaluate={"devices": False, "proxies": False, "students": False}, **given)
        tree["devices"]["max_steps"] = 4
        record = launch(parse_config({k: v for k, v in tree.items() if k not in dropped}), root / name)
        assert record is not None
        found[name] = root / name, record
    return found


def test_every_method_is_here() -> None:
    assert set(SECTIONS) == set(methods)


def test_all_end_with_the_same_kind_of_model_and_are_scored_on_the_same_text(
    records: dict[str, tuple[Path, Record]],
) -> None:
    models = {name: AutoModelForCausalLM.from_pretrained(folder / "moe") for name, (folder, _) in records.items()}
    assert len({num_parameters(model.config) for model in models.values()}) == 1
    assert len({record.metrics.tokens for _, record in records.values()}) == 1
    assert {record.method for _, record in records.values()} == set(methods)
    assert all(record.baselines.public_only is not None for _, record in records.values())
    starts = {(folder / "reference" / "start" / "model.safetensors").read_bytes() for folder, _ in records.values()}
    assert len(starts) == 1, "M_0"


def test_the_plan_foretells_the_bytes(records: dict[str, tuple[Path, Record]]) -> None:
    """At this size names and shapes are a tenth of a message; HFedMoE sends fewer experts than it might."""
    for name, (folder, record) in records.items():
        plan = make_plan(load_config(folder / CONFIG))
        assert plan.method == name
        up, down = record.ledger.upload_bytes, record.ledger.total_bytes - record.ledger.upload_bytes
        if plan.upload_bytes is None or plan.download_bytes is None:
            assert name == "centralised"
            continue
        low = 0.3 if name == "hfedmoe" else 0.85
        assert low * plan.upload_bytes < up < 1.15 * plan.upload_bytes, name
        assert low * plan.download_bytes < down < 1.15 * plan.download_bytes, name
        assert plan.server_flops > 0
        assert plan.server_memory_bytes > 0


def test_methods_that_upload_models_once_cost_the_same_bytes(records: dict[str, tuple[Path, Record]]) -> None:
    assert len({records[name][1].ledger.total_bytes for name in DISTILLED}) == 1
    first, *others = ((records[name][0] / "uploads" / "device-000.safetensors").read_bytes() for name in DISTILLED)
    assert all(other == first for other in others), "devices do the same, whatever the server does with it"


def test_students_start_from_a_proxy_that_has_grown_and_the_reference_from_a_warm_start(
    records: dict[str, tuple[Path, Record]],
) -> None:
    folder = records["deepfusion"][0]
    for place, names in (("start", "llama"), ("reference/start", "llama")):
        told = json.loads((folder / place / "grown.json").read_text())
        assert names in told["from"], "of the fleet's architectures only this one grows into the target"
        assert abs(told["after"] - told["before"]) < 0.02


def test_students_may_start_from_a_warm_start_that_no_device_has_touched(
    records: dict[str, tuple[Path, Record]], tmp_path: Path
) -> None:
    other = records["deepfusion"][0]
    tree = small_tree(other.parent, warm_start=WARM)
    tree["distillation"]["start"] = "warm_start"
    start_from(other, tmp_path / "run")
    launch(parse_config(tree), tmp_path / "run", until="start", resume=True)
    ours, proxys, references = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run" / "start", other / "start", other / "reference" / "start")
    )
    assert all(torch.equal(ours[name], references[name]) for name in references)
    assert not all(torch.equal(ours[name], proxys[name]) for name in proxys)


def test_where_nothing_can_grow_the_base_is_the_start_and_the_record_says_so(
    records: dict[str, tuple[Path, Record]], tmp_path: Path
) -> None:
    tree = small_tree(records["deepfusion"][0].parent, warm_start=WARM)
    tree["devices"] |= {"count": 3, "max_steps": 2, "models": [{"name": "gpt2", "preset": "gpt2-pico"}]}
    tree["evaluate"] = {"devices": False, "proxies": False, "students": False, "public_only": False}
    record = launch(parse_config(tree), tmp_path / "run")
    assert record is not None
    assert any("a gpt2 is not built like a qwen2_moe" in note for note in record.notes)
    assert (tmp_path / "run" / "base" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "start").exists()


def test_rules_of_distillation_make_a_difference(records: dict[str, tuple[Path, Record]]) -> None:
    assert len({records[name][1].metrics.log_perplexity for name in DISTILLED}) == len(DISTILLED)
