# SPDX-License-Identifier: Apache-2.0
"""How the merged model's router starts: from the domains' prototypes, or at random (method, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.devices.features import forward
from deepfusion.moe import Family
from deepfusion.moe.routing import router_inputs, routers
from deepfusion.training import derive_seed
from deepfusion.types import Batch

RANDOM_STD = 0.02
"""Standard deviation of a random router's weights; zero would send every token to the same experts."""
COPY_STD = RANDOM_STD / 10
"""What experts of one domain differ by: enough to break ties, too little to outvote the prototype."""
LEAST_TOKENS = 256
"""With fewer public tokens in a domain its prototype means nothing, and the router starts at random."""
ALIKE = 1e-8
"""Domains whose means differ by less than this share of their squared length differ by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """[router]: how the router starts.

    Attributes:
        start: "prototype" points each expert's weight at the mean router input of its domain; "random" is N(0, 0.02^2).
        documents: public documents nearest to a domain's centroid whose beginnings give its prototype.
        strength: logit that the strongest prototype gives its own expert.
    """

    start: Literal["prototype", "random"] = "prototype"
    documents: int = 64
    strength: float = 2.0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.documents < 1:
            yield f"documents = {self.documents}: a prototype needs text; choose at least 1"
        if self.strength <= 0:
            yield f'strength = {self.strength}: must be positive; use start = "random" for no preference'


def random_router(target: PreTrainedConfig, *, family: Family, seed: int) -> list[torch.Tensor]:
    """For each MoE layer, weights (E, H) drawn from N(0, 0.02^2)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "router"))
    shape = (family.num_experts(target), int(target.hidden_size))
    return [torch.randn(shape, generator=generator) * RANDOM_STD for _ in family.moe_layers(target)]


@torch.no_grad()
def prototype_router(
    model: PreTrainedModel,
    domain_batches: Sequence[Sequence[Batch]],
    *,
    family: Family,
    slices: int,
    options: RouterOptions,
    seed: int,
    note: Callable[[str], None],
) -> list[torch.Tensor]:
    """For each MoE layer, weights (E, H) that point at the domains' mean router inputs.

    mu_i is the mean input of the layer's router over domain i's tokens in `model` (the merge with a random router, whose
    shared layers are final); d_i = mu_i - mean_i mu_i; expert of domain i gets g d_i with max_i g |d_i|^2 = strength.
    Experts of one domain (copies or slices) share a prototype and differ by a tiny random vector.

    Args:
        domain_batches: for each of the K domains, batches of its nearest public documents.
        slices: experts cut from one student: expert e belongs to domain e // slices, or e mod K when it is 1.
    """
    start = random_router(model.config, family=family, seed=seed)
    count = min(sum(int(b.valid_BT.sum()) for b in batches) for batches in domain_batches)
    if count < LEAST_TOKENS:
        note(f"router: a domain has only {count} public tokens (below {LEAST_TOKENS}); the router starts at random")
        return start
    means_KLH = torch.stack([_mean_inputs(model, batches) for batches in domain_batches])
    domains, experts = len(domain_batches), family.num_experts(model.config)
    owner_E = [e // slices if slices > 1 else e % domains for e in range(experts)]
    weights: list[torch.Tensor] = []
    for layer, random_EH in enumerate(start):
        mean_KH = means_KLH[:, layer]
        delta_KH = mean_KH - mean_KH.mean(0)
        strongest = float(delta_KH.square().sum(-1).max())
        if strongest <= ALIKE * float(mean_KH.square().sum(-1).max()):
            note(f"router: the domains' text looks alike to MoE layer {layer}; its router starts at random")
            weights.append(random_EH)
            continue
        prototype_EH = (options.strength / strongest * delta_KH)[owner_E].float()
        weights.append(prototype_EH + random_EH * (COPY_STD / RANDOM_STD) if experts > domains else prototype_EH)
    return weights


@torch.no_grad()
def set_routers(model: PreTrainedModel, weights: Sequence[torch.Tensor]) -> None:
    """Give the router of each MoE layer its weight (E, H)."""
    for router, weight_EH in zip(routers(model), weights, strict=True):
        cast(torch.Tensor, router.weight).copy_(weight_EH)


def _mean_inputs(model: PreTrainedModel, batches: Sequence[Batch]) -> torch.Tensor:
    """Mean router input of each MoE layer over all valid tokens: (layers, H), float64."""
    total: torch.Tensor | None = None
    tokens = 0
    for batch in batches:
        with router_inputs(model) as inputs:
            forward(model, batch)
        valid_T1 = batch.valid_BT.flatten()[:, None]
        sums_LH = torch.stack([(hidden_TH.float() * valid_T1).double().sum(0) for hidden_TH in inputs])
        total = sums_LH if total is None else total + sums_LH
        tokens += int(batch.valid_BT.sum())
    assert total is not None
    return total / tokens
