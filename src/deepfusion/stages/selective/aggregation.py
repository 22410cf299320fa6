# SPDX-License-Identifier: Apache-2.0
"""Whose gate counts how much: devices that use important experts well (HFedMoE, eq. 18-21)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class GateShares(NamedTuple):
    """Weights of the devices' gates.

    Attributes:
        weight_C: a of eq. (20), one a device; they do not sum to 1, so they are normalised before they are used.
        coverage_C: r of eq. (18), the share of all dominant experts that are dominant on the device; for the report.
    """

    weight_C: torch.Tensor
    coverage_C: torch.Tensor


def gate_shares(usage_CLE: torch.Tensor, score_CLE: torch.Tensor, threshold: float) -> GateShares:
    """a(c) = sum over c's dominant experts of usage times importance, over the number of all dominant experts.

    Args:
        usage_CLE: u of each device; an expert is dominant where it is at least `threshold`.
        score_CLE: mean importance.

    Returns:
        All zero where no expert is dominant anywhere; the caller then weighs by tokens.
    """
    dominant_CLE = usage_CLE >= threshold
    everywhere = int(dominant_CLE.any(0).sum())
    worth_CLE = torch.where(dominant_CLE, usage_CLE.double() * score_CLE.double(), 0.0)
    return GateShares(
        worth_CLE.sum((1, 2)) / max(1, everywhere), dominant_CLE.sum((1, 2)).double() / max(1, everywhere)
    )
