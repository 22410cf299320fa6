# SPDX-License-Identifier: Apache-2.0
"""What a method spends, and what is the same for all methods that are compared (baselines, section 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from transformers import PreTrainedConfig

from deepfusion.methods.assembly import TextTraining
from deepfusion.methods.base import Method
from deepfusion.methods.exchange import WarmStart
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
    """

    length: int
    domains: int
    own: tuple[PreTrainedConfig, ...]
    student: PreTrainedConfig
    target: PreTrainedConfig


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
    """What DeepFusion's rivals are given: the same warm start, and as many of the server's tokens.

    Attributes:
        embed: how devices describe their text, for the methods that ask.
        warm_start: on public text, outside the count; the same number of steps for whatever model a method starts from.
        training: one training that reads what the distillation of all domains does.
        tune: how DeepFusion tunes its MoE; there the tokens of rivals that have no other training go, see `tune_steps`.
    """

    embed: Embedding
    warm_start: WarmStart
    training: TextTraining
    tune: TuneOptions

    def tune_steps(self) -> int:
        """Steps of tuning that read all of the server's tokens."""
        tokens = self.training.steps * rows(self.training.optimisation) + self.tune.steps * rows(self.tune.optimisation)
        return round(tokens / rows(self.tune.optimisation))


class Rival(Protocol):
    """A method of another kind than DeepFusion's, which can be given DeepFusion's budget."""

    @classmethod
    def beside(cls, budget: Budget) -> Method:
        """The method with that budget, all else by default."""
        ...


def rows(optimisation: Optimisation) -> int:
    """Sequences of one optimiser step."""
    return optimisation.batch_size * optimisation.accumulate
