# SPDX-License-Identifier: Apache-2.0
"""Weights that are made anew in each forward pass, of pieces that an optimiser can leave alone (HFedMoE, section 4).

The pieces of an expert are its matrices, or adapters of low rank: W + B A in place of W (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepfusion.moe.base import EXPERT, LAYER, MATRICES, ROUTER
from deepfusion.training import derive_seed
from deepfusion.types import State

DOWN, UP = "lora_A.", "lora_B."
"""Prefixes of the two matrices of a weight's adapter, (r, in) and (out, r); with an axis of experts before them for experts."""

Pieces = list[list[list[nn.Parameter]]]
"""The parameters of each MoE layer's experts."""


@contextmanager
def separate_experts(model: PreTrainedModel) -> Generator[Pieces]:
    """Within it every expert has parameters of its own, which an optimiser can leave alone; yields them.

    The stacked tensors that transformers works with are made anew in each forward pass. On the way out they are
    parameters again, with what was learnt.
    """
    modules = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    stacked = {
        (module, name): _Made(module, name, {"of_each": list(module.get_parameter(name).detach())}, torch.stack)
        for module in modules
        for name in MATRICES
    }
    try:
        yield [
            [list(expert) for expert in zip(*(stacked[module, name].parts[0] for name in MATRICES), strict=True)]
            for module in modules
        ]
    finally:
        for made in stacked.values():
            made.undo(made.weight().detach())


@contextmanager
def adapted_matrices(model: PreTrainedModel, adapters: State) -> Generator[Pieces]:
    """Within it only adapters and routers learn, each expert's adapters by themselves; yields the experts' adapters.

    On the way out the model's matrices are what they were, and `adapters` is what was learnt.

    Args:
        adapters: as `fresh_adapters` names them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(ROUTER.search(name)))
    made: dict[str, _Made] = {}
    for name in (name.removeprefix(DOWN) for name in adapters if name.startswith(DOWN)):
        owner, _, leaf = name.rpartition(".")
        is_expert = EXPERT.search(name)
        down, up = (list(tensor) if is_expert else [tensor] for tensor in (adapters[DOWN + name], adapters[UP + name]))
        make, base = _adapted_stack if is_expert else _adapted_one, model.get_parameter(name).detach()
        made[name] = _Made(model.get_submodule(owner), leaf, {"A": down, "B": up}, make, base)
    layers = sorted({int(found[1]) for name in made if EXPERT.search(name) and (found := LAYER.search(name))})
    of_layer = [[made[f"model.layers.{layer}.mlp.experts.{matrix}"] for matrix in MATRICES] for layer in layers]
    try:
        yield [
            [list(expert) for expert in zip(*(part for m in matrices for part in m.parts), strict=True)]
            for matrices in of_layer
        ]
    finally:
        for name, weight in made.items():
            for prefix, pieces in zip((DOWN, UP), weight.parts, strict=True):
                learnt = torch.stack([piece.detach() for piece in pieces])
                adapters[prefix + name] = learnt if EXPERT.search(name) else learnt[0]
            weight.undo(weight.base)


def is_adapted(name: str, ndim: int) -> bool:
    """Whether a weight gets an adapter: the experts' matrices and all other projections of a layer; not routers."""
    return bool(EXPERT.search(name)) or (ndim == 2 and "_proj" in name and bool(LAYER.search(name)))


def fresh_adapters(weights: Mapping[str, torch.Tensor], rank: int, seed: int) -> State:
    """Adapters that change nothing yet: A uniform as a linear layer begins, B zero.

    Args:
        weights: a model's state; of meta tensors the adapters are meta tensors too.
    """
    adapters: State = {}
    for name, weight in weights.items():
        if is_adapted(name, weight.ndim):
            *experts, wide, narrow = weight.shape
            down = torch.empty(*experts, rank, narrow, device=weight.device)
            if not weight.is_meta:
                down.uniform_(-(narrow**-0.5), narrow**-0.5, generator=_generator(seed, name))
            adapters[DOWN + name] = down
            adapters[UP + name] = torch.zeros(*experts, wide, rank, device=weight.device)
    return adapters


def with_adapters(weights: Mapping[str, torch.Tensor], adapters: Mapping[str, torch.Tensor]) -> State:
    """The weights with W + B A for each W that has an adapter."""
    return {
        name: weight + adapters[UP + name] @ adapters[DOWN + name] if DOWN + name in adapters else weight
        for name, weight in weights.items()
    }


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, "adapter", name))


def _adapted_stack(down: list[torch.Tensor], up: list[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    return base + torch.stack(up) @ torch.stack(down)


def _adapted_one(down: list[torch.Tensor], up: list[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    return base + up[0] @ down[0]


class _Made:
    """A weight of a module that is made of its parts in each forward pass."""

    def __init__(
        self, module: nn.Module, name: str, parts: Mapping[str, Sequence[torch.Tensor]],
        make: Callable[..., torch.Tensor], base: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take the parameter `name` of the module away.

        Args:
            parts: the pieces of each part; each becomes a parameter.
            make: the weight, of the pieces of each part, and of `base` if there is one, which does not learn.
        """
        self._module, self._name, self._make = module, name, make
        delattr(module, name)
        self._lists = [f"{name}_{part}" for part in parts]
        for list_name, pieces in zip(self._lists, parts.values(), strict=True):
            module.register_module(list_name, nn.ParameterList(piece.clone() for piece in pieces))
        if base is not None:
            module.register_buffer(f"{name}_base", base, persistent=False)
        self._has_base = base is not None
        self._hooks = module.register_forward_pre_hook(self._set), module.register_forward_hook(self._forget)

    @property
    def parts(self) -> list[list[nn.Parameter]]:
        """The pieces of each part."""
        return [list(self._module.get_submodule(name)) for name in self._lists]  # pyright: ignore[reportArgumentType]

    @property
    def base(self) -> torch.Tensor:
        """What does not learn."""
        return self._module.get_buffer(f"{self._name}_base")

    def weight(self) -> torch.Tensor:
        """The weight as the pieces make it now."""
        return self._make(*self.parts, *([self.base] if self._has_base else []))

    def undo(self, weight: torch.Tensor) -> None:
        """Make `weight` a parameter again, in the place of the pieces."""
        for handle in self._hooks:
            handle.remove()
        self._forget()
        for name in self._lists:
            delattr(self._module, name)
        if self._has_base:
            delattr(self._module, f"{self._name}_base")
        self._module.register_parameter(self._name, nn.Parameter(weight))

    def _set(self, _module: nn.Module, _inputs: Any) -> None:
        setattr(self._module, self._name, self.weight())

    def _forget(self, *_: Any) -> None:
        """Autograd keeps what it needs, until the backward pass is over."""
        self._module.__dict__.pop(self._name, None)
