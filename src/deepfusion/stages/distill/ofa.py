# SPDX-License-Identifier: Apache-2.0
"""One-for-All distillation (OFA-KD, arXiv 2310.19444): unlike architectures meet in the space of predictions.

Not hidden states are compared, but what early exits of the student would predict (baselines, section 6). The loss and its
exponent are those of `losses.TeacherScores`; weights are [distillation] beta for the final prediction, alpha for the exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from deepfusion.errors import ConfigError
from deepfusion.stages.distill.base import Exits, rules
from deepfusion.stages.distill.vaa import stage_ends


@dataclass(frozen=True, kw_only=True)
class Ofa:
    """Early exits of the student learn each teacher's next-token distributions; no hidden states are compared.

    Attributes:
        num_stages: exits J; as many as the student has blocks, but at most 4, when left out.
    """

    num_stages: int | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.num_stages is not None and self.num_stages < 1:
            yield f"num_stages = {self.num_stages}: must be at least 1; remove it for 4"

    def attach(
        self, student: PreTrainedConfig, teacher: PreTrainedConfig, *, sequence_length: int, seed: int
    ) -> OfaExits:
        """Fresh exits for one teacher.

        Raises:
            ConfigError: more exits than the student has blocks.
        """
        depth = int(student.num_hidden_layers)
        stages = self.num_stages or min(4, depth)
        if stages > depth:
            where = f"the student ({student.model_type}) has {depth} blocks"
            raise ConfigError([f"[distill] num_stages = {stages}: {where}; choose at most {depth}"])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return OfaExits(int(student.hidden_size), stage_ends(stages, depth))


rules.register("ofa")(Ofa)


class OfaExits(Exits):
    """For each exit a norm, a linear map and a GELU in front of the student's own output head."""

    def __init__(self, size: int, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.student_taps = taps
        self.norm = nn.ModuleList(nn.LayerNorm(size) for _ in taps)
        self.map = nn.ModuleList(nn.Linear(size, size) for _ in taps)

    def forward(self, student_hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One hidden_BTS for each exit."""
        layers = zip(self.norm, self.map, student_hidden, strict=True)
        return [functional.gelu(linear(norm(hidden_BTS))) for norm, linear, hidden_BTS in layers]
