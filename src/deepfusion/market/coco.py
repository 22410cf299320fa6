# SPDX-License-Identifier: Apache-2.0
"""COCO, the consensus and cost-sharing auction: ROSO, CENTRE, REAL in O(n log n) (aeria, section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepfusion.market import consensus
from deepfusion.market.auction import Candidates, Fit, Market, Outcome, best_price, candidates, settle, share
from deepfusion.market.consensus import Grid
from deepfusion.market.mechanisms import Draw, Past, mechanisms

Agreement = Literal["per_bidder", "global"]
Base = Literal["demands", "paper"] | float


def targets(found: Candidates, grid: Grid) -> np.ndarray:
    """R_i = f(Pi(W without i)) of each candidate; shape (W,).

    Pi(W without i) is max(d_[k] A_[k] over k before i, d_[k] (A_[k] - a_i) over k after i). Only the point of the grid
    below it counts, and that is one of two for all but a few bidders: whether a point g is reached needs two running
    maxima, as d_[k] (A_[k] - a_i) >= g where A_[k] - g / d_[k] >= a_i. Who misses both points takes with it more than
    1 - 1/y of what the best price sells, so there are less than y / (y - 1) of them, and they are computed one by one.
    """
    revenue_W = found.revenue_W
    target_W = np.empty(len(found))
    before_W = np.concatenate([[0.0], np.maximum.accumulate(revenue_W)[:-1]])
    highest = grid.exponent(float(revenue_W.max()))
    left = np.arange(len(found))
    for m in (highest, highest - 1):
        least = grid.reached(m)
        room_W = np.maximum.accumulate((found.sold_W - least / found.density_W)[::-1])[::-1]
        after_W = np.concatenate([room_W[1:], [-np.inf]])
        reaches = (before_W[left] >= least) | (after_W[left] >= found.demand_W[left])
        target_W[left[reaches]] = grid.point(m)
        left = left[~reaches]
        if not len(left):
            return target_W
    for i in left.tolist():
        after = found.density_W[i + 1 :] * (found.sold_W[i + 1 :] - found.demand_W[i])
        target_W[i] = grid.below(max(float(before_W[i]), float(after.max(initial=0.0))))
    return target_W


@mechanisms.register("coco")
@dataclass(frozen=True, kw_only=True)
class Coco:
    """Consensus on the best revenue, then an even price by cost sharing (COCO, arXiv 2503.04521).

    Attributes:
        agreement: "per_bidder": each bidder's target is made without it, truthful always; "global": one target for
            all, one price always.
        y: base of the grid: "demands" (out of the slot's verified demands), "paper" (out of the winners' own, which
            depend on bids), or a number.
        objective: "revenue", or "welfare": sell to all candidates at the floor.
        fit: "prefix", or "skip" for comparison: more is sold, but neither truthful nor free of envy.
    """

    agreement: Agreement = "per_bidder"
    y: Base = "demands"
    objective: Literal["revenue", "welfare"] = "revenue"
    fit: Fit = "prefix"

    @property
    def truthful(self) -> str:
        """See `Mechanism`."""
        if self.fit == "skip" or self.y == "paper":
            return "no"
        return "yes" if self.agreement == "per_bidder" or self.objective == "welfare" else "mostly"

    @property
    def uniform(self) -> str:
        """See `Mechanism`."""
        return "yes" if self.agreement == "global" or self.objective == "welfare" else "mostly"

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not isinstance(self.y, str) and not 1.01 <= self.y < float("inf"):
            yield f'y = {self.y}: must be a finite number of at least 1.01; leave it out for "demands"'

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`; the past has no part in it."""
        found = candidates(market, self.fit)
        best = best_price(found)
        y = self._base(market, best.slack)
        delta = best.slack
        told = {
            "eps": chance.eps, "y": y, "delta": delta, "floor": found.floor, "best_revenue": best.revenue,
            "consensus_probability": consensus.consensus_probability(y, delta) if best.winners else None,
        }  # fmt: skip
        if self.objective == "welfare" or not len(found):
            return settle(market, found.member_W, found.floor, **told, target=None, consensus=True)
        grid = Grid(y, chance.eps)
        common = grid.below(best.revenue)
        if self.agreement == "global":
            winners, price = share(found, common)
            return settle(market, found.member_W[:winners], price, **told, target=common, consensus=True)
        return self._per_bidder(market, found, targets(found, grid), common, told)

    def _base(self, market: Market, delta: float) -> float:
        if self.y == "demands":
            return consensus.best_base(consensus.reference_slack(market.demand_N, market.capacity))
        return consensus.best_base(delta) if self.y == "paper" else float(self.y)

    def _per_bidder(
        self, market: Market, found: Candidates, target_W: np.ndarray, common: float, told: dict[str, float | None]
    ) -> Outcome:
        price_W = np.full(len(found), np.nan)
        agreed = bool((target_W == common).all())
        for target in {common} if agreed else set(target_W.tolist()):
            winners, price = share(found, target)
            head = price_W[:winners]
            head[target_W[:winners] == target] = price
        won_W = ~np.isnan(price_W)
        return settle(
            market, found.member_W[won_W], price_W[won_W], **told, target=common if agreed else None, consensus=agreed
        )
