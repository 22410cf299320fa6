# SPDX-License-Identifier: Apache-2.0
"""What a method spends, and what is the same for all methods that are compared (baselines, section 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from transformers import PreTrainedConfig

from deepfusion.devices.memory import forward_flops_per_token
from deepfusion.methods.assembly import TextTraining
from deepfusion.methods.base import Method
from deepfusion.methods.warm_start import WarmStart
from deepfusion.stages.embed import Embedding
from deepfusion.stages.tune import TuneOptions
from deepfusion.training import Optimisation

HEADER_BYTES = 1024
"""About what names and shapes of one message take."""


class Shapes(NamedTuple):
    """The models and sizes that costs depend on.

    Attributes:
        length: tokens of a sequence.
        domains: K.
        own: configuration of each architecture of the fleet that a device carries.
        student: the target's base of one expert.
        target: the MoE.
        private: tokens of private text that the devices' trainings read together; 0 where nobody has counted them yet.
    """

    length: int
    domains: int
    own: tuple[PreTrainedConfig, ...]
    student: PreTrainedConfig
    target: PreTrainedConfig
    private: int = 0


class Traffic(NamedTuple):
    """Bytes that one device receives and sends in the whole run, at most."""

    down: int
    up: int


def message(parameters: float, more: float = 0) -> int:
    """Bytes of a message with so many float32 numbers, and `more` bytes of other tensors."""
    return round(4 * parameters + more) + HEADER_BYTES


class Work(NamedTuple):
    """A training on the server: how many tokens it reads, and the FLOPs that each takes."""

    tokens: int
    flops_per_token: int


@dataclass(frozen=True)
class Budget:
    """What DeepFusion's rivals are given: the same warm start, and as many of the server's tokens at the same rates.

    Attributes:
        embed: how devices describe their text, for the methods that ask.
        warm_start: of the fleet's architectures on public text, outside the count.
        training: one training that reads what the distillation of all domains does.
        tune: how DeepFusion tunes its MoE.
    """

    embed: Embedding
    warm_start: WarmStart
    training: TextTraining
    tune: TuneOptions


class Rival(Protocol):
    """A method of another kind than DeepFusion's, which can be given DeepFusion's budget."""

    @classmethod
    def beside(cls, budget: Budget) -> Method:
        """The method with that budget, all else by default."""
        ...


def rows(optimisation: Optimisation) -> int:
    """Sequences of one optimiser step."""
    return optimisation.batch_size * optimisation.accumulate


def work(steps: int, optimisation: Optimisation, shapes: Shapes, model: PreTrainedConfig) -> Work:
    """What so many steps of training a model read and cost."""
    return Work(steps * rows(optimisation) * shapes.length, 3 * forward_flops_per_token(model))
