# SPDX-License-Identifier: Apache-2.0
"""A device's training of some experts: all are used, but on each batch only the chosen ones learn (HFedMoE, section 4)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepfusion.errors import ModelError
from deepfusion.moe import families
from deepfusion.moe.base import MATRICES
from deepfusion.moe.routing import Penalty, Routing
from deepfusion.stages.selective.importance import SelectOptions, choose, importance

Pieces = list[list[list[nn.Parameter]]]
"""The parameters of each layer's experts."""


@contextmanager
def separate_experts(model: PreTrainedModel) -> Generator[Pieces]:
    """Within it every expert has parameters of its own, which an optimiser can leave alone; yields them.

    The stacked tensors that transformers works with are made anew in each forward pass. On the way out they are
    parameters again, with what was learnt.
    """
    modules = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    hooks = [_take_apart(module) for module in modules]
    try:
        yield [[list(piece) for piece in zip(*_lists(module), strict=True)] for module in modules]
    finally:
        for module, hook in zip(modules, hooks, strict=True):
            hook.remove()
            for name, pieces in zip(MATRICES, _lists(module), strict=True):
                module.__dict__.pop(name, None)
                module.register_parameter(name, nn.Parameter(torch.stack([piece.detach() for piece in pieces])))
                delattr(module, _list_name(name))


def _take_apart(module: nn.Module) -> Any:
    for name in MATRICES:
        stacked = module.get_parameter(name).detach()
        delattr(module, name)
        module.register_module(_list_name(name), nn.ParameterList(piece.clone() for piece in stacked))

    def stack(module: nn.Module, _inputs: Any) -> None:
        for name, pieces in zip(MATRICES, _lists(module), strict=True):
            setattr(module, name, torch.stack(list(pieces)))

    return module.register_forward_pre_hook(stack)


def _list_name(matrix: str) -> str:
    return f"{matrix}_of_each"


def _lists(module: nn.Module) -> list[nn.ParameterList]:
    return [module.get_submodule(_list_name(name)) for name in MATRICES]  # pyright: ignore[reportReturnType]


class ExpertSelection:
    """Chooses the experts of each batch, drops the gradients of the others, and counts what was used.

    It is a `Penalty` for `train_causal_lm`: called with how the batch was routed, before the backward pass. A parameter whose
    gradient is dropped has none, so that AdamW leaves it, its moments and its count of steps as they are. Gradients of
    earlier layers still flow through experts that do not learn, so those of all others are exact.

    Attributes:
        usage_LE: sum over all tokens of each expert's probability; `usage` is its mean.
        count_LE: batches on which an expert was trained.
        routed_LE: whether any token was sent to it.
    """

    def __init__(
        self, model: PreTrainedModel, pieces: Pieces, options: SelectOptions, budget: int, balance: Penalty | None
    ) -> None:
        self._family = families[model.config.model_type]
        self._options, self._budget, self._balance = options, budget, balance
        shape = (len(pieces), len(pieces[0]))
        self._active_LE = torch.ones(shape, dtype=torch.bool)
        self._usage_LE, self._score_LE = (
            torch.zeros(shape, dtype=torch.float64),
            torch.zeros(shape, dtype=torch.float64),
        )
        self._tokens = self._batches = 0
        self.count_LE = torch.zeros(shape, dtype=torch.int32)
        self.routed_LE = torch.zeros(shape, dtype=torch.bool)
        for layer, experts in enumerate(pieces):
            for index, parameters in enumerate(experts):
                for parameter in parameters:
                    parameter.register_post_accumulate_grad_hook(self._dropper(layer, index))

    def _dropper(self, layer: int, index: int) -> Any:
        def drop(parameter: torch.Tensor) -> None:
            if not self._active_LE[layer, index]:
                parameter.grad = None

        return drop

    @property
    def usage_LE(self) -> torch.Tensor:
        """u, float32 (L, E): each expert's mean probability over all tokens; sums to 1 in a layer (eq. 16)."""
        return (self._usage_LE / max(1, self._tokens)).float()

    @property
    def score_LE(self) -> torch.Tensor:
        """Mean importance over the batches, float32 (L, E)."""
        return (self._score_LE / max(1, self._batches)).float()

    def __call__(self, routing: Routing) -> torch.Tensor:
        """Choose for this batch; the balance loss, if there is one.

        Raises:
            ModelError: a router gives NaN; names the layer.
        """
        self._choose(routing)
        return self._balance(routing) if self._balance is not None else torch.zeros(())

    @torch.no_grad()
    def _choose(self, routing: Routing) -> None:
        valid_R = routing.valid_BT.flatten()
        if not bool(valid_R.any()):
            return
        values: list[torch.Tensor] = []
        used_LE = torch.zeros_like(self._active_LE)
        for layer, (logits_RE, chosen_Rk) in enumerate(zip(routing.logits, routing.chosen, strict=True)):
            probability_RE = self._family.probabilities(logits_RE[valid_R].double())
            if bool(probability_RE.isnan().any()):
                raise ModelError(f"the router of MoE layer {layer} gives NaN; lower the learning rate")
            unit_XE = probability_RE
            if self._options.unit == "row":
                unit_XE = _row_means(self._family.probabilities(logits_RE.double()), routing.valid_BT)
            score_E = importance(unit_XE, self._options.mixture)
            values.append(self._options.value(unit_XE, score_E).cpu())
            used_LE[layer, chosen_Rk[valid_R].unique().cpu()] = True
            self._usage_LE[layer] += probability_RE.sum(0).cpu()
            self._score_LE[layer] += score_E.cpu()
        self._active_LE = choose(torch.stack(values), used_LE, self._budget, self._options.scope)
        self._tokens += int(valid_R.sum())
        self._batches += 1
        self.count_LE += self._active_LE
        self.routed_LE |= used_LE


def _row_means(probability_RE: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """Mean distribution of each row that has a token, (B', E)."""
    valid_BT1 = valid_BT[..., None].to(probability_RE)
    sum_BE = (probability_RE.view(*valid_BT.shape, -1) * valid_BT1).sum(1)
    tokens_B1 = valid_BT1.sum(1)
    return (sum_BE / tokens_B1.clamp(min=1))[tokens_B1[:, 0] > 0]
