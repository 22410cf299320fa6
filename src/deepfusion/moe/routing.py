# SPDX-License-Identifier: Apache-2.0
"""Watching and steering how a MoE routes its tokens, and what that adds to a loss."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from deepfusion.losses import balance_loss
from deepfusion.moe import families
from deepfusion.moe.base import Family
from deepfusion.types import Batch


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router of each MoE layer, first to last."""
    return [m for name, m in model.named_modules() if name.endswith(".mlp.gate")]


def router_logits(model: PreTrainedModel) -> AbstractContextManager[list[torch.Tensor]]:
    """Within it, a forward pass appends each MoE layer's router logits (B*T, E), in order, to the list; with gradient."""
    return _collected(model, lambda _inputs, output: output[0])


def router_inputs(model: PreTrainedModel) -> AbstractContextManager[list[torch.Tensor]]:
    """Within it, a forward pass appends each MoE layer's router input (B*T, H), in order, to the list."""
    return _collected(model, lambda inputs, _output: inputs[0].reshape(-1, inputs[0].shape[-1]))


def router_weights(model: PreTrainedModel) -> AbstractContextManager[list[torch.Tensor]]:
    """Within it, a forward pass appends the weights (B*T, k) of each MoE layer's chosen experts, in order, to the list."""
    return _collected(model, lambda _inputs, output: output[1])


def router_choices(model: PreTrainedModel) -> AbstractContextManager[list[torch.Tensor]]:
    """Within it, a forward pass appends the indices (B*T, k) of each MoE layer's chosen experts, in order, to the list."""
    return _collected(model, lambda _inputs, output: output[2])


class Routing(NamedTuple):
    """How a MoE has routed a batch.

    Attributes:
        inputs: each MoE layer's router input, (B*T, H), with gradient.
        logits: each MoE layer's router logits, (B*T, E), with gradient.
        chosen: each MoE layer's experts of every token, (B*T, k).
        valid_BT: False on padding.
    """

    inputs: Sequence[torch.Tensor]
    logits: Sequence[torch.Tensor]
    chosen: Sequence[torch.Tensor]
    valid_BT: torch.Tensor


Penalty = Callable[[Routing], torch.Tensor]
"""A scalar with gradient."""


@contextmanager
def watch_routing(model: PreTrainedModel, valid_BT: torch.Tensor) -> Generator[Routing]:
    """Within it, one forward pass of a batch fills the lists of the routing."""
    with router_logits(model) as logits, router_inputs(model) as inputs, router_choices(model) as chosen:
        yield Routing(inputs, logits, chosen, valid_BT)


def watching(model: PreTrainedModel, batch: Batch, penalty: Penalty | None) -> AbstractContextManager[Routing | None]:
    """`watch_routing` where there is a penalty that asks for it."""
    return watch_routing(model, batch.valid_BT) if penalty else nullcontext()


def balance_penalty(model: PreTrainedModel, weight: float) -> Penalty:
    """The balance loss over the experts, weighted."""
    family = families[model.config.model_type]

    def penalty(routing: Routing) -> torch.Tensor:
        shares = [family.probabilities(logits_RE.float()) for logits_RE in routing.logits]
        return weight * balance_loss(shares, routing.chosen, routing.valid_BT)

    return penalty


@contextmanager
def force_experts(model: PreTrainedModel, family: Family, indices: Sequence[int]) -> Generator[None]:
    """Within it, every token goes to the experts `indices` and no other, in equal shares that sum to a sure router's.

    One index makes the model that expert's student; the slices of one student together make that student.
    """
    share = family.sure_weight(model.config) / len(indices)

    def replace(_module: nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE, weights_Tk, chosen_Tk = output
        forced_Tk = chosen_Tk.new_tensor(indices).expand(len(chosen_Tk), -1)
        return logits_TE, weights_Tk.new_full(forced_Tk.shape, share), forced_Tk

    with _router_hooks(model, replace):
        yield


@contextmanager
def _collected(model: PreTrainedModel, pick: Callable[[Any, Any], torch.Tensor]) -> Generator[list[torch.Tensor]]:
    """Within it, a forward pass appends what `pick(inputs, output)` takes of each router, in order, to the list."""
    seen: list[torch.Tensor] = []
    with _router_hooks(model, lambda _module, inputs, output: seen.append(pick(inputs, output))):
        yield seen


@contextmanager
def _router_hooks(model: PreTrainedModel, hook: Any) -> Generator[None]:
    handles = [router.register_forward_hook(hook) for router in routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
