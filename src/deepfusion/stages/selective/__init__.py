# SPDX-License-Identifier: Apache-2.0
"""Training some experts of a MoE on each batch, and averaging what was really used (HFedMoE, arXiv 2601.00583)."""

from deepfusion.stages.selective.aggregation import GateShares, gate_shares
from deepfusion.stages.selective.importance import SelectOptions, choose, divergence, importance
from deepfusion.stages.selective.training import ExpertSelection, separate_experts

__all__ = [
    "ExpertSelection",
    "GateShares",
    "SelectOptions",
    "choose",
    "divergence",
    "gate_shares",
    "importance",
    "separate_experts",
]
