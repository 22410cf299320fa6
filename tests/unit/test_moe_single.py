# SPDX-License-Identifier: Apache-2.0
"""The short way through a MoE layer of one expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_world import Rows, config, write_tokenizer

from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config, save
from deepfusion.moe import families
from deepfusion.moe.single import NAME, compute_as_mlp


@pytest.mark.parametrize("model_type", [name for name, family in families.items() if family.student == "single"])
def test_the_short_way_gives_the_logits_and_gradients_of_the_long_way(model_type: str) -> None:
    family = families[model_type]
    target = family.ready_target(config(f"{model_type.replace('_', '-')}-pico"))
    long_way = from_config(family.student_config(target), seed=0)
    long_way.set_experts_implementation("eager")
    short_way = from_config(family.student_config(target), seed=0)
    compute_as_mlp(short_way)
    batch = Rows(0).batch(0, 3)
    for model in (long_way, short_way):
        forward(model, batch).logits_BTV.square().mean().backward()
    with torch.no_grad():
        torch.testing.assert_close(forward(long_way, batch).logits_BTV, forward(short_way, batch).logits_BTV)
    for name, parameter in long_way.named_parameters():
        other = short_way.get_parameter(name)
        if ".mlp.gate." not in name:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-8)
        else:
            assert parameter.grad is None or float(parameter.grad.abs().max()) == 0


def test_nothing_of_it_is_saved(tmp_path: Path) -> None:
    family = families["qwen2_moe"]
    student = from_config(family.student_config(family.ready_target(config("qwen2-moe-pico"))), seed=0)
    compute_as_mlp(student)
    save(student, tmp_path / "student", write_tokenizer(tmp_path / "tokenizer"))
    assert NAME not in (tmp_path / "student" / "config.json").read_text()
