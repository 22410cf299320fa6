# SPDX-License-Identifier: Apache-2.0
"""What of a MoE learns in the federation and so travels: all of it, or adapters of low rank and the routers (HFedMoE)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.devices import models
from deepfusion.devices.memory import num_parameters, skeleton_state
from deepfusion.errors import UploadError
from deepfusion.moe.base import EXPERT, ROUTER
from deepfusion.stages.selective import (
    DOWN,
    UP,
    Pieces,
    adapted_matrices,
    fresh_adapters,
    is_adapted,
    separate_experts,
    with_adapters,
)
from deepfusion.state_dicts import distinct_state, load_distinct
from deepfusion.types import State

FROZEN = "frozen."
"""Prefix of what does not learn, in a request."""
ADAPTERS = "adapters.safetensors"
"""The averaged adapters, in a round's folder beside the model that they make."""


class Learning(Protocol):
    """What learns. Names are those of the model's tensors, or of their adapters."""

    def state(self, model: PreTrainedModel, moe: Path, first: Path) -> State:
        """What learns of the model in the folder `moe`, whose rounds began from that in `first`."""
        ...

    def frozen(self, first: Path) -> State:
        """What a device needs besides, once."""
        ...

    def settle(self, model: PreTrainedModel, state: State, first: Path, folder: Path) -> None:
        """Make `model` the one that `state` says, and write into its folder what the next `state` reads."""
        ...

    def num_parameters(self, config: PreTrainedConfig) -> int:
        """How many numbers learn in a model of this configuration."""
        ...

    def num_remade(self, config: PreTrainedConfig) -> int:
        """How many weights are made of pieces in each forward pass."""
        ...


class Everything(Learning):
    """All tensors of the model."""

    def state(self, model: PreTrainedModel, moe: Path, first: Path) -> State:
        """The model's."""
        return distinct_state(model)

    def frozen(self, first: Path) -> State:
        """Nothing."""
        return {}

    def settle(self, model: PreTrainedModel, state: State, first: Path, folder: Path) -> None:
        """Put it in."""
        load_distinct(model, state)

    def num_parameters(self, config: PreTrainedConfig) -> int:
        """All."""
        return num_parameters(config)

    def num_remade(self, config: PreTrainedConfig) -> int:
        """The experts'."""
        return sum(tensor.numel() for name, tensor in skeleton_state(config).items() if EXPERT.search(name))


@dataclass(frozen=True)
class Adapters(Learning):
    """Adapters W + B A of rank `rank` on the experts' and all other projections, and the routers; the rest is as it began.

    The server averages the As and the Bs by themselves, as is usual (FedIT, arXiv 2305.05644).
    """

    rank: int
    seed: int
    _first: dict[Path, State] = field(default_factory=dict[Path, State], repr=False, compare=False)

    def state(self, model: PreTrainedModel, moe: Path, first: Path) -> State:
        """The routers, and the adapters that are beside the model; at first fresh ones, which change nothing."""
        weights = distinct_state(model)
        adapters = fresh_adapters(weights, self.rank, self.seed) if moe == first else load_file(moe / ADAPTERS)
        return {**adapters, **_routers(weights)}

    def frozen(self, first: Path) -> State:
        """All of the first model but its routers, read once."""
        if first not in self._first:
            weights = distinct_state(models.load(first))
            self._first[first] = {name: tensor for name, tensor in weights.items() if not ROUTER.search(name)}
        return self._first[first]

    def settle(self, model: PreTrainedModel, state: State, first: Path, folder: Path) -> None:
        """The first model with these adapters and routers; the adapters are written beside it."""
        routers = _routers(state)
        adapters = {name: tensor.contiguous() for name, tensor in state.items() if name not in routers}
        load_distinct(model, {**with_adapters(self.frozen(first), adapters), **routers})
        save_file(adapters, folder / ADAPTERS)

    def num_parameters(self, config: PreTrainedConfig) -> int:
        """Of the adapters and the routers."""
        weights = skeleton_state(config)
        learning = {**fresh_adapters(weights, self.rank, self.seed), **_routers(weights)}
        return sum(tensor.numel() for tensor in learning.values())

    def num_remade(self, config: PreTrainedConfig) -> int:
        """Of all that has an adapter."""
        return sum(t.numel() for name, t in skeleton_state(config).items() if is_adapted(name, t.ndim))


def check_products(pieces: State, device_id: str) -> None:
    """Raise UploadError where the product of an adapter's matrices, each of finite numbers, is not finite."""
    for name, down in pieces.items():
        if name.startswith(DOWN) and not bool(torch.isfinite(pieces[UP + name.removeprefix(DOWN)] @ down).all()):
            raise UploadError(
                f"device {device_id}: the adapter of {name.removeprefix(DOWN)} makes numbers that are not finite; "
                "lower its learning rate and send again"
            )


@contextmanager
def learning_on(model: PreTrainedModel, state: State, frozen: State) -> Generator[Pieces]:
    """On the device: put the weights into the model and let its experts learn piece by piece; yields the pieces.

    On the way out `state` is what was learnt.

    Args:
        frozen: what does not learn; empty where everything does.
    """
    if not frozen:
        load_distinct(model, state)
        with separate_experts(model) as pieces:
            yield pieces
        state.update(distinct_state(model))
        return
    load_distinct(model, {**frozen, **_routers(state)})
    adapters = {name: tensor for name, tensor in state.items() if not ROUTER.search(name)}
    with adapted_matrices(model, adapters) as pieces:
        yield pieces
    state.update({**adapters, **_routers(distinct_state(model))})


def _routers(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if ROUTER.search(name)}
