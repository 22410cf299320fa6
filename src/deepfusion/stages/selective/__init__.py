# SPDX-License-Identifier: Apache-2.0
"""Training some experts of a MoE on each batch, and averaging what was really used (HFedMoE, arXiv 2601.00583)."""

from deepfusion.stages.selective.aggregation import GateShares, gate_shares
from deepfusion.stages.selective.importance import SelectOptions, choose, divergence, importance
from deepfusion.stages.selective.pieces import (
    DOWN,
    UP,
    Pieces,
    adapted_matrices,
    fresh_adapters,
    is_adapted,
    separate_experts,
    with_adapters,
)
from deepfusion.stages.selective.training import ExpertSelection

__all__ = [
    "DOWN",
    "UP",
    "ExpertSelection",
    "GateShares",
    "Pieces",
    "SelectOptions",
    "adapted_matrices",
    "choose",
    "divergence",
    "fresh_adapters",
    "gate_shares",
    "importance",
    "is_adapted",
    "separate_experts",
    "with_adapters",
]
