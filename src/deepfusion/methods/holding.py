# SPDX-License-Identifier: Apache-2.0
"""How much of a MoE a device may hold and train, and which experts those are (HFedMoE, arXiv 2601.00583)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedConfig

from deepfusion.devices.fleet import DeviceCard
from deepfusion.devices.memory import training_memory
from deepfusion.methods.base import Site
from deepfusion.moe.hosting import with_experts
from deepfusion.training import derive_seed


class Means(NamedTuple):
    """What a device may use of the MoE: the experts that it holds in each layer, and how many it trains on a batch."""

    held: int
    budget: int


def held_of(share: float, experts: int, top: int) -> int:
    """Experts of a layer that a device of this budget holds."""
    return min(experts, max(top, int(share * experts)))


def fitting(site: Site, card: DeviceCard, target: PreTrainedConfig, experts: int, top: int) -> int:
    """Most experts of a layer whose training fits the device's memory."""
    if card.memory_limit_bytes is None:
        return experts
    for count in range(experts, top, -1):
        need = training_memory(with_experts(target, count), site.fleet.training, site.sequence_length).total
        if need <= card.memory_limit_bytes:
            return count
    return top


def choose_hosted(
    site: Site, card: DeviceCard, held: int, usage: Sequence[Sequence[float]] | None, layers: int, experts: int
) -> list[list[int]]:
    """The experts that a device holds in each layer: the most used ones of its last round, at first drawn ones."""
    if held == experts:
        return [list(range(experts))] * layers
    if usage is not None:
        return [sorted(np.argsort(-np.asarray(row), kind="stable")[:held].tolist()) for row in usage]
    drawn = np.random.default_rng(derive_seed(site.seed, "hosted", card.id))
    return [sorted(drawn.permutation(experts)[:held].tolist()) for _ in range(layers)]
