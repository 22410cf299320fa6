# SPDX-License-Identifier: Apache-2.0
"""What COCO is compared with (aeria, section 9); all see the same market, chance and past."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deepfusion.market.auction import Candidates, Market, Outcome, best_price, candidates, settle, share
from deepfusion.market.consensus import TOLERANCE
from deepfusion.market.knapsack import Knapsack
from deepfusion.market.mechanisms import Draw, Past, mechanisms


@mechanisms.register("omniscient")
@dataclass(frozen=True, kw_only=True)
class Omniscient:
    """The best single price for budgets that are known: an upper bound, not a rule to sell by."""

    truthful: ClassVar[str] = "no"
    uniform: ClassVar[str] = "yes"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        found = candidates(market)
        best = best_price(found)
        return settle(market, found.member_W[: best.winners], best.price)


@mechanisms.register("first-price")
@dataclass(frozen=True, kw_only=True)
class FirstPrice:
    """All candidates pay what they bid: an upper bound as long as bids are honest."""

    truthful: ClassVar[str] = "no"
    uniform: ClassVar[str] = "no"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        found = candidates(market)
        return settle(market, found.member_W, found.density_W)


@mechanisms.register("market-clearing")
@dataclass(frozen=True, kw_only=True)
class MarketClearing:
    """All candidates pay the floor, the density of the first bid that does not fit."""

    truthful: ClassVar[str] = "yes"
    uniform: ClassVar[str] = "yes"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        found = candidates(market)
        return settle(market, found.member_W, found.floor)


@mechanisms.register("vcg")
@dataclass(frozen=True, kw_only=True)
class Vcg:
    """The welfare maximum by an exact knapsack; a winner pays what its presence costs the others.

    Capacity that stays unsold counts as sold at the reserve price, which is what makes that price the lowest.
    """

    truthful: ClassVar[str] = "yes"
    uniform: ClassVar[str] = "no"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        gain_N = market.budget_N - market.reserve * market.demand_N
        order = np.argsort(-gain_N / market.demand_N, kind="stable")
        order = order[gain_N[order] > 0]
        items = Knapsack(market.demand_N[order], gain_N[order], market.capacity)
        value, chosen = items.best()
        winners = np.flatnonzero(chosen)
        demand_W, cost_W = items.weight_J[winners], np.zeros(len(winners))
        if not chosen.all():
            for index, j in enumerate(winners.tolist()):
                others = value - float(items.value_J[j])
                cost_W[index] = max(0.0, items.without(j).best()[0] - others)
        return settle(market, order[winners], market.reserve + cost_W / demand_W)


@mechanisms.register("posted")
@dataclass(frozen=True, kw_only=True)
class Posted:
    """First come, first served at a posted price: the multiple of the reserve price that the past would have paid best for."""

    truthful: ClassVar[str] = "yes"
    uniform: ClassVar[str] = "yes"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        price = market.reserve * self._multiple(history)
        left, winners = market.capacity, list[int]()
        willing_N = (market.density_N >= price * (1 - TOLERANCE)) & (market.budget_N > 0)
        for index in chance.arrival_N[willing_N[chance.arrival_N]].tolist():
            if market.demand_N[index] <= left:
                winners.append(index)
                left -= float(market.demand_N[index])
        return settle(market, np.array(winners, dtype=np.int64), price)

    def _multiple(self, history: Sequence[Past]) -> float:
        multiples = np.geomspace(1.0, 16.0, 65)
        earned = np.zeros(len(multiples))
        for past in history:
            density_N = past.market.density_N
            order = np.argsort(-density_N, kind="stable")
            asked = np.concatenate([[0.0], np.cumsum(past.market.demand_N[order])])
            prices = multiples * past.market.reserve
            willing = np.searchsorted(-density_N[order], -prices * (1 - TOLERANCE), side="right")
            earned += prices * np.minimum(asked[willing], past.market.capacity)
        return float(multiples[int(earned.argmax())])


@mechanisms.register("yesterday")
@dataclass(frozen=True, kw_only=True)
class Yesterday:
    """Candidates at the price that would have been best in the slot before; the first slot sells at the floor."""

    truthful: ClassVar[str] = "within the slot"
    uniform: ClassVar[str] = "yes"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        found = candidates(market)
        price = max(found.floor, history[-1].best.price if history else 0.0)
        winners = int(np.searchsorted(-found.density_W, -price * (1 - TOLERANCE), side="right"))
        return settle(market, found.member_W[:winners], price)


@mechanisms.register("rsop")
@dataclass(frozen=True, kw_only=True)
class Rsop:
    """Random sampling: each half of the candidates is offered the price that is best for the other half."""

    truthful: ClassVar[str] = "yes"
    uniform: ClassVar[str] = "two prices"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`. An empty half has no best price; the other half is offered the floor."""
        found = candidates(market)
        first_W = chance.half_N[found.member_W]
        prices_W = np.where(first_W, _half_price(found, ~first_W), _half_price(found, first_W))
        won_W = found.density_W >= prices_W * (1 - TOLERANCE)
        return settle(market, found.member_W[won_W], prices_W[won_W])


def _half_price(found: Candidates, half_W: np.ndarray) -> float:
    demand = found.demand_W[half_W]
    part = Candidates(
        found.member_W[half_W], found.density_W[half_W], demand, np.cumsum(demand), found.floor, found.blocker
    )
    return best_price(part).price


@mechanisms.register("fixed-target")
@dataclass(frozen=True, kw_only=True)
class FixedTarget:
    """Cost sharing of a target out of the past: the share of its mean best revenue that it would have paid best for."""

    truthful: ClassVar[str] = "yes"
    uniform: ClassVar[str] = "yes"

    def clear(self, market: Market, chance: Draw, history: Sequence[Past] = ()) -> Outcome:
        """See `Mechanism.clear`."""
        found = candidates(market)
        winners, price = share(found, self._target(history))
        return settle(market, found.member_W[:winners], price)

    def _target(self, history: Sequence[Past]) -> float:
        """0, which sells at the floor, as long as there is no past."""
        if not history:
            return 0.0
        mean = sum(past.best.revenue for past in history) / len(history)
        shares = np.linspace(0.3, 1.0, 15).tolist()
        return max((mean * part for part in shares), key=lambda target: _earned(history, target))


def _earned(history: Sequence[Past], target: float) -> float:
    earned = 0.0
    for past in history:
        winners, price = share(past.found, target)
        earned += price * float(past.found.sold_W[winners - 1]) if winners else 0.0
    return earned
