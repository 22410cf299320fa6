# SPDX-License-Identifier: Apache-2.0
"""Which experts of a MoE suit a text, before any of them has read it (FedJETS; baselines, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from deepfusion.devices.features import forward
from deepfusion.moe import families
from deepfusion.moe.routing import router_inputs
from deepfusion.types import Text

SAMPLE, AT_ONCE = 64, 8
"""Sequences of the text that are looked at, and how many of them are read together."""


@torch.no_grad()
def gate_preference(common: PreTrainedModel, gates: Sequence[torch.Tensor], text: Text) -> torch.Tensor:
    """q, (E,): the mean over layers and tokens of the gate's probability of each expert; sums to 1.

    Args:
        common: a model of one expert of the same shape, whose router inputs stand for the MoE's.
        gates: each MoE layer's router weight, (E, H).
    """
    family = families[common.config.model_type]
    sums: list[torch.Tensor] = []
    for step in range(SAMPLE // AT_ONCE):
        with router_inputs(common) as inputs:
            forward(common, text.batch(step, AT_ONCE))
        sums += [
            family.probabilities(inputs_RH @ gate_EH.T).mean(0)
            for inputs_RH, gate_EH in zip(inputs, gates, strict=True)
        ]
    return torch.stack(sums).mean(0)
