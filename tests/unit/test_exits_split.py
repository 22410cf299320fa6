# SPDX-License-Identifier: Apache-2.0
"""A model in two halves is the model, at every cut and in every family; each half needs its own weights only."""

from __future__ import annotations

import math

import pytest
import torch
from devices_world import batch_of
from exits_world import FAMILIES, VOCABULARY, backbone_of

from deepfusion.devices.configurations import make_config
from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.errors import MarketError, ModelError
from deepfusion.market.exits.backbone import Backbone, Run
from deepfusion.market.exits.split import device_half, edge_half, run_split


@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_both_halves_together_are_the_model_at_every_cut(name: str, padded: int) -> None:
    backbone, batch = backbone_of(name), batch_of(3, 12, VOCABULARY, padded)
    with torch.no_grad():
        whole_BTV = forward(backbone.model, batch).logits_BTV
    mask = 36 if padded else 0
    width = backbone.hidden_size
    for cut in range(backbone.num_blocks + 1):
        scores, sent = run_split(backbone, batch, cut)
        gap_BTV = (scores.logits(slice(None)) - whole_BTV).abs()
        assert float(gap_BTV[batch.valid_BT].max()) <= 1e-5
        assert sent == (0 if cut == 4 else mask + 36 * (4 if cut == 0 else 4 * width))


@pytest.mark.parametrize("name", FAMILIES)
def test_neither_half_looks_at_the_weights_of_the_other(name: str) -> None:
    whole, batch = backbone_of(name, tie_word_embeddings=False), batch_of(2, 9, VOCABULARY, 2)
    device, edge = (backbone_of(name, tie_word_embeddings=False) for _ in range(2))
    foreign = [*device.blocks[2:], device.norm, device.head, *edge.blocks[:2], edge.model.get_input_embeddings()]
    with torch.no_grad():
        for part in foreign:
            for parameter in part.parameters():
                parameter.fill_(math.nan)
        wanted_BTV = forward(whole.model, batch).logits_BTV
        found_BTV = edge_half(edge, device_half(device, batch, 2)).logits(slice(None))
    assert float((found_BTV - wanted_BTV).abs()[batch.valid_BT].max()) <= 1e-5


def test_the_device_runs_its_blocks_and_no_other() -> None:
    backbone, batch = backbone_of("llama-pico"), batch_of(1, 5, VOCABULARY)
    ran: list[int] = []
    for number, block in enumerate(backbone.blocks, start=1):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    crossing = device_half(backbone, batch, 3)
    assert ran == [1, 2, 3]
    edge_half(backbone, crossing)
    assert ran == [1, 2, 3, 4]


def test_a_model_is_itself_again_after_a_pass_also_after_one_that_fails() -> None:
    backbone, batch = backbone_of("qwen2-moe-pico"), batch_of(1, 5, VOCABULARY)

    def fail(number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
        raise RuntimeError(f"block {number}")

    device_half(backbone, batch, 2)
    with pytest.raises(RuntimeError, match="block 1"):
        backbone.run(fail, input_ids_BT=batch.input_ids_BT)
    assert not any("forward" in vars(block) for block in backbone.blocks)


@pytest.mark.parametrize("cut", [-1, 4, 9])
def test_nothing_crosses_outside_the_model(cut: int) -> None:
    with pytest.raises(MarketError, match="choose 0 to 3"):
        device_half(backbone_of("gpt2-pico"), batch_of(1, 5, VOCABULARY), cut)


def test_a_model_whose_logits_are_more_than_a_product_is_refused() -> None:
    values = {"model_type": "granite", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 48, "logits_scaling": 3.0}  # fmt: skip
    model = from_config(make_config(values, vocab_size=64, positions=32), seed=0)
    with pytest.raises(ModelError, match="output matrix times its normed last state"):
        Backbone(model)
