# SPDX-License-Identifier: Apache-2.0
"""What a distillation rule is, and the options that all rules share (DeepFusion, phase II, eq. 9 to 11).

A rule says how a teacher's hidden states teach the student beside its next-token distribution: for each teacher it
makes an adapter, a small network that is trained along with the student and thrown away afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from deepfusion.losses import Trust
from deepfusion.registry import Registry
from deepfusion.training import Optimisation


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """[distillation]: how long phase II lasts, what its loss weighs, and how it is optimised.

    The loss of a domain is CE + sum over its teachers of omega (alpha L_features + beta L_KL), eq. (11).

    Attributes:
        steps: optimiser steps; the joint recipe reads one batch of every domain in each.
        alpha: weight of the rule's feature loss; 0 switches it off.
        beta: weight of the KL to the teachers' next-token distributions; 0 switches it off.
        temperature: tau of that KL.
        exponent: g of OFA-KD in place of that KL's distribution, see `losses.TeacherScores`; 1 is the KL.
        trust: "all" takes the KL to every teacher everywhere (paper); "better" to each only on rows of text that it
            predicts at least as well as the student does; "best" only to the one of those that predicts the row best;
            "always" to that one also where the student is ahead of it.
        align: "same" asks for teachers with the student's vocabulary (the padding of their output matrices may differ); "none"
            compares no vocabularies and leaves the KL out, the teachers must still be able to read the student's token ids.
        text: public text for domain i is drawn by its closeness to the domain ("domain") or evenly ("uniform").
        text_temperature: of that draw: exp(cosine / text_temperature); the lower, the more is read of the nearest documents.
        branch: share of the steps in which the experts of all domains learn alike, from the text and teachers of all; then each
            goes its own way, from its own domain alone (after Branch-Train-MiX, arXiv 2403.07816). With the paper's recipe
            students are apart from the start.
        start: what all students start as: with "proxy" the proxy that predicts the domains' public text best, grown to the
            student's size (`moe/growth.py`), where an architecture and the target allow it; with "warm_start" in the same way the
            best warm start, which no device has touched; else, or with "base", the target's base. A target with pretrained
            weights is always its base.
        together: the student reads the batches of all domains in one forward pass, each through its own expert: much
            faster for small models, and as much activation memory as domains; false reads one after the other.
            Families whose students are dense (DeepSeek) always do the latter.
        optimisation: [distillation.optimisation]
    """

    steps: int = 400
    alpha: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    exponent: float = 1.0
    trust: Trust = "best"
    align: Literal["same", "none"] = "same"
    text: Literal["domain", "uniform"] = "domain"
    text_temperature: float = 0.1
    branch: float = 0.8
    start: Literal["proxy", "warm_start", "base"] = "proxy"
    together: bool = True
    optimisation: Optimisation = field(default_factory=Optimisation)

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.steps < 1:
            yield f"steps = {self.steps}: must be at least 1; give the number of optimiser steps"
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < float("inf"):
                yield f"{name} = {value}: must be finite and not negative; use 0 to switch this loss off"
        if not 0 <= self.branch <= 1:
            yield f"branch = {self.branch}: not a share of the steps; choose a number from 0 to 1"
        if not 0 < self.temperature < float("inf"):
            yield f"temperature = {self.temperature}: must be finite and above 0; 1 leaves the logits as they are"
        if not 1 <= self.exponent <= 10:
            yield f"exponent = {self.exponent}: not between 1 and 10; 1 is the KL, 1.5 trusts a confident teacher more"
        if not 0.01 <= self.text_temperature < float("inf"):
            yield f"text_temperature = {self.text_temperature}: must be finite and at least 0.01; 0.1 is the default"


class Adapter(nn.Module, ABC):
    """Compares one teacher's hidden states with the student's. Trained with the student, never part of it.

    Attributes:
        student_taps: 1-based numbers of the student's blocks whose output it reads.
        teacher_taps: those of the teacher.
    """

    student_taps: tuple[int, ...]
    teacher_taps: tuple[int, ...]

    @abstractmethod
    def forward(
        self,
        student_hidden: Sequence[torch.Tensor],
        teacher_hidden: Sequence[torch.Tensor],
        student_valid_BT: torch.Tensor,
        teacher_valid_BT: torch.Tensor,
    ) -> torch.Tensor:
        """The feature loss, a scalar.

        Args:
            student_hidden: hidden_BTH after each of `student_taps`.
            teacher_hidden: hidden_BTH after each of `teacher_taps`, without gradient.
        """


class Exits(nn.Module, ABC):
    """Early exits of the student for one teacher: each learns the teacher's next-token distributions through the student's head.

    Attributes:
        student_taps: 1-based numbers of the student's blocks that it reads.
        teacher_taps: none.
    """

    student_taps: tuple[int, ...]
    teacher_taps: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, student_hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states, of the student's size, that the student's output head turns into scores; one for each exit."""


class Rule(Protocol):
    """A distillation rule: a frozen, registered dataclass whose fields are its TOML options."""

    def attach(
        self, student: PreTrainedConfig, teacher: PreTrainedConfig, *, sequence_length: int, seed: int
    ) -> Adapter | Exits | None:
        """A fresh adapter (or exits) for one teacher, or None when the rule looks at no hidden states.

        Its weights depend on `seed` alone, and no other random stream is disturbed.

        Raises:
            ConfigError: the options do not fit these two models.
        """
        ...


rules: Registry[Rule] = Registry("distill")
