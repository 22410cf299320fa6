# SPDX-License-Identifier: Apache-2.0
"""Distillation from the teachers' next-token distributions alone (DeepFusion, eq. 10; its ablation without VAA)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from deepfusion.stages.distill.base import rules


@rules.register("logits")
@dataclass(frozen=True, kw_only=True)
class Logits:
    """KL to the teachers' next-token distributions, no feature matching."""

    def attach(self, student: PreTrainedConfig, teacher: PreTrainedConfig, *, sequence_length: int, seed: int) -> None:
        """No adapter: hidden states are not compared."""
        return
