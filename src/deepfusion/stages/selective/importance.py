# SPDX-License-Identifier: Apache-2.0
"""Which experts a batch is worth training: importance, information bottleneck, selection (HFedMoE, eq. 3-5, 10-15)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """[selection]: how a device chooses the experts that it trains on a batch.

    Attributes:
        mixture: lambda of eq. (5): 1 is the mean probability of an expert over the batch, 0 the highest one.
        bottleneck: beta of eq. (14): weight of what the choice of an expert tells of the input.
        divergence: "literal" is eq. (11), which counts an expert's being on; "bernoulli" counts its being off as well.
        rank: what the experts are chosen by: eq. (14), importance alone (beta = 0), or chance.
        unit: what is routed: each token, or a row of text by its mean over the tokens.
        scope: whether the budget is one for the model, over which all layers compete, or the same share for each layer.
    """

    mixture: float = 0.5
    bottleneck: float = 0.5
    divergence: Literal["literal", "bernoulli"] = "literal"
    rank: Literal["bottleneck", "importance", "random"] = "bottleneck"
    unit: Literal["token", "row"] = "token"
    scope: Literal["model", "layer"] = "model"

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not 0 <= self.mixture <= 1:
            yield f"mixture = {self.mixture}: not between 0 (highest probability) and 1 (mean probability); 0.5 is usual"
        if not 0 <= self.bottleneck < float("inf"):
            yield f"bottleneck = {self.bottleneck}: must be finite and not negative; use 0 to choose by importance alone"

    def value(self, probability_XE: torch.Tensor, score_E: torch.Tensor) -> torch.Tensor:
        """What the experts of one layer are ranked by, (E,): I of eq. (14), the importance, or chance.

        Args:
            probability_XE: the router's distribution over all experts for each of X units.
            score_E: their importance.
        """
        if self.rank == "random":
            return torch.rand(score_E.shape).to(score_E) + torch.finfo(score_E.dtype).tiny
        if self.rank == "importance" or not self.bottleneck:
            return score_E
        return score_E - self.bottleneck * divergence(probability_XE, bernoulli=self.divergence == "bernoulli")


def importance(probability_XE: torch.Tensor, mixture: float) -> torch.Tensor:
    """s of each expert, (E,): mixture * mean + (1 - mixture) * maximum of its probability over the units (eq. 3-5)."""
    return mixture * probability_XE.mean(0) + (1 - mixture) * probability_XE.amax(0)


def divergence(probability_XE: torch.Tensor, *, bernoulli: bool = False) -> torch.Tensor:
    """KL of each expert, (E,): how far its probability departs from its mean over the batch (eq. 10, 11), in nats.

    0 where the probability is the same for every unit, at most 1/e; with `bernoulli`, at most log 2.
    """
    mean_E = probability_XE.mean(0)
    found_E = _expected_log_ratio(probability_XE, mean_E)
    return found_E + _expected_log_ratio(1 - probability_XE, 1 - mean_E) if bernoulli else found_E


def _expected_log_ratio(p_XE: torch.Tensor, mean_E: torch.Tensor) -> torch.Tensor:
    """Mean over the units of p log(p / mean), where 0 log 0 is 0."""
    return (torch.special.xlogy(p_XE, p_XE) - torch.special.xlogy(p_XE, mean_E)).mean(0).clamp(min=0)


def choose(
    value_LE: torch.Tensor, used_LE: torch.Tensor, budget: int, scope: Literal["model", "layer"] = "model"
) -> torch.Tensor:
    """A_b, bool (L, E): the experts in use whose values sum to the most within the budget (eq. 15).

    That is the `budget` largest positive values; where none is positive, the single largest. Of equal values the first comes
    first, so that a larger budget chooses the same and more.

    Args:
        used_LE: U_b, the experts that some unit was sent to; not empty.
        budget: most experts; with scope "layer" every layer has an equal part of it, at least 1.
    """
    if scope == "layer":
        each = max(1, budget // len(value_LE))
        found_LE = torch.cat([choose(v_E[None], u_E[None], each) for v_E, u_E in zip(value_LE, used_LE, strict=True)])
        return found_LE if int(found_LE.sum()) <= budget else choose(value_LE, found_LE, budget)
    value_P = value_LE.masked_fill(~used_LE, -torch.inf).flatten()
    count = max(1, min(budget, int((value_P > 0).sum())))
    chosen_P = torch.zeros_like(used_LE).flatten()
    chosen_P[value_P.argsort(descending=True, stable=True)[:count]] = True
    return chosen_P.view_as(used_LE) & used_LE
