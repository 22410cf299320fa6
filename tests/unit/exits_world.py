# SPDX-License-Identifier: Apache-2.0
"""Small models of every family with four blocks, lively enough that exits disagree, and heads for them."""

from __future__ import annotations

import torch

from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config
from deepfusion.devices.presets import PRESETS
from deepfusion.market.exits.backbone import Backbone
from deepfusion.market.exits.heads import ExitHeads

FAMILIES = (
    "gpt2-pico", "llama-pico", "olmo2-pico", "bloom-pico", "qwen2-moe-pico", "qwen3-moe-pico", "mixtral-pico", "olmoe-pico",
    "deepseek-v2-pico", "deepseek-v3-pico",
)  # fmt: skip
VOCABULARY = 64


def backbone_of(name: str, *, blocks: int = 4, vocab_size: int = VOCABULARY, **changes: object) -> Backbone:
    """A model of a preset with more blocks and larger weights than a fresh one has."""
    values = dict(PRESETS[name].config)
    values |= {"n_layer" if "n_layer" in values else "num_hidden_layers": blocks, **changes}
    model = from_config(make_config(values, vocab_size=vocab_size, positions=64), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter *= 4
    return Backbone(model)


def heads_of(backbone: Backbone, exits: tuple[int, ...] = (1, 3, 4), width: int = 8) -> ExitHeads:
    """Heads whose adapters do something."""
    heads = ExitHeads(backbone, exits, width).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3, generator=generator)
    return heads
