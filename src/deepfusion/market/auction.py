# SPDX-License-Identifier: Apache-2.0
"""What all mechanisms share: a slot's market, its candidates and price floor, ROSO and REAL (aeria, sections 6.1, 6.2, 6.4).

Shapes: N bids, in the order of their ids; W candidates, densest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from deepfusion.errors import MarketError
from deepfusion.market.consensus import TOLERANCE

Fit = Literal["prefix", "skip"]
"""Whether the first bid that does not fit ends the candidates, or is left out and the next one tried."""


@dataclass(frozen=True, eq=False)
class Market:
    """One slot. Make it with `make_market`, which puts the bids in the order of their ids.

    Attributes:
        ids_N: the bidders.
        demand_N: a_i > 0, FLOP/s.
        budget_N: beta_i, $.
        capacity: f_e, FLOP/s.
        reserve: p_res, $ for a FLOP/s.
    """

    ids_N: np.ndarray
    demand_N: np.ndarray
    budget_N: np.ndarray
    capacity: float
    reserve: float

    def __len__(self) -> int:
        return len(self.ids_N)

    @cached_property
    def density_N(self) -> np.ndarray:
        """d_i = beta_i / a_i."""
        return self.budget_N / self.demand_N

    def with_budget(self, index: int, budget: float) -> Market:
        """The same market, had one bidder said another budget."""
        budgets = self.budget_N.copy()
        budgets[index] = budget
        return Market(self.ids_N, self.demand_N, budgets, self.capacity, self.reserve)


def make_market(
    ids: Sequence[str] | np.ndarray, demands: np.ndarray, budgets: np.ndarray, capacity: float, reserve: float
) -> Market:
    """Check a slot's bids and put them in the order of their ids, so that no result depends on who came first.

    Raises:
        MarketError: an id stands twice, a number is not finite, a demand is not positive or above the capacity.
    """
    ids_N = np.asarray(ids)
    demand_N, budget_N = np.asarray(demands, dtype=np.float64), np.asarray(budgets, dtype=np.float64)
    faults: list[str] = []
    if not 0 < capacity < np.inf:
        faults.append(f"capacity = {capacity}: must be finite and above 0; give the cluster's FLOP/s")
    if not 0 <= reserve < np.inf:
        faults.append(f"reserve = {reserve}: must be finite and not negative; see `reserve_price`")
    if not len(ids_N) == len(demand_N) == len(budget_N):
        faults.append(f"{len(ids_N)} ids, {len(demand_N)} demands, {len(budget_N)} budgets: give one of each for a bid")
    elif not (np.isfinite(demand_N) & (demand_N > 0) & (demand_N <= capacity)).all():
        faults.append(f"demands: each must lie in (0, {capacity:g}], or no price can serve it; leave such bids out")
    elif not (np.isfinite(budget_N) & (budget_N >= 0)).all():
        faults.append("budgets: each must be finite and not negative; leave such bids out")
    if faults:
        raise MarketError("; ".join(faults))
    order = np.argsort(ids_N, kind="stable")
    ids_N = ids_N[order]
    if (ids_N[1:] == ids_N[:-1]).any():
        twice = ids_N[1:][ids_N[1:] == ids_N[:-1]][0]
        raise MarketError(f'"{twice}" bids twice; one bid a user and slot')
    return Market(ids_N, demand_N[order], budget_N[order], capacity, reserve)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Who may win, W, and the lowest price.

    Attributes:
        member_W: index of each candidate in the market, densest first.
        density_W: their densities, falling.
        demand_W: their demands.
        sold_W: running sums of the demands.
        floor: r, $ for a FLOP/s.
        blocker: index of the bid whose density is the floor, j*; None where all fit.
    """

    member_W: np.ndarray
    density_W: np.ndarray
    demand_W: np.ndarray
    sold_W: np.ndarray
    floor: float
    blocker: int | None

    def __len__(self) -> int:
        return len(self.member_W)

    @cached_property
    def revenue_W(self) -> np.ndarray:
        """What each candidate's density earns as the one price, d_[k] * (a_[1] + .. + a_[k])."""
        return self.density_W * self.sold_W


def candidates(market: Market, fit: Fit = "prefix") -> Candidates:
    """The densest bids at or above the reserve price that fit the capacity together, and the price floor.

    With `prefix` the first bid that does not fit, j*, ends the list and its density is the floor: a member that
    drops below j* falls out, so its entry price does not depend on its bid.
    """
    density_N = market.density_N
    order = np.argsort(-density_N, kind="stable")
    served = np.searchsorted(-density_N[order], -max(market.reserve * (1 - TOLERANCE), 5e-324), side="right")
    order = order[:served]
    limit = market.capacity * (1 + TOLERANCE)
    blocker: int | None = None
    floor = market.reserve
    if fit == "prefix":
        sold = np.cumsum(market.demand_N[order])
        fitting = int(np.searchsorted(sold, limit, side="right"))
        if fitting < len(order):
            blocker = int(order[fitting])
            floor = max(floor, float(density_N[blocker]))
        order = order[:fitting]
    else:
        left, kept = limit, list[int]()
        for index, demand in enumerate(market.demand_N[order].tolist()):
            if demand <= left:
                kept.append(index)
                left -= demand
        order = order[kept]
    demand_W = market.demand_N[order]
    return Candidates(order, density_N[order], demand_W, np.cumsum(demand_W), floor, blocker)


@dataclass(frozen=True)
class BestPrice:
    """ROSO: the best single price for known budgets.

    Attributes:
        revenue: Pi.
        price: the density at which it is reached; the floor where nobody bids.
        winners: so many candidates, from the densest on.
        sold: Phi, FLOP/s.
        largest: zeta, the largest demand among them.
    """

    revenue: float
    price: float
    winners: int
    sold: float
    largest: float

    @property
    def slack(self) -> float:
        """delta = Phi / (Phi - zeta): without any one bidder at least Pi / delta remains."""
        return self.sold / (self.sold - self.largest) if self.sold > self.largest else float("inf")


def best_price(found: Candidates) -> BestPrice:
    """Pi(W) and where it is reached."""
    if not len(found):
        return BestPrice(0.0, found.floor, 0, 0.0, 0.0)
    at = int(found.revenue_W.argmax())
    winners = int(np.searchsorted(-found.density_W, -found.density_W[at], side="right"))
    sold, largest = float(found.sold_W[winners - 1]), float(found.demand_W[:winners].max())
    price = max(float(found.density_W[at]), found.floor)
    return BestPrice(float(found.revenue_W[winners - 1]), price, winners, sold, largest)


def share(found: Candidates, target: float) -> tuple[int, float]:
    """REAL: the largest group of candidates that pays `target` in equal prices a unit, each at most its density.

    The group is a prefix of the candidates: all up to the last whose density, asked of everyone before it too, earns
    the target. That is where dropping those who cannot pay, and dividing again, comes to rest.

    Returns:
        How many win, from the densest on, and the price, max(r, target / their demand); 0 and the floor where none do.
    """
    enough = np.flatnonzero(found.revenue_W >= target * (1 - TOLERANCE))
    if not len(enough):
        return 0, found.floor
    winners = int(enough[-1]) + 1
    return winners, max(found.floor, target / float(found.sold_W[winners - 1]))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Who won, and what they pay.

    Attributes:
        price_N: $ for a FLOP/s that each winner pays; NaN for those who lose.
        payment_N: $ that each bidder pays; 0 for those who lose. Never above the budget.
        told: what the mechanism drew and computed, for the ledger.
    """

    price_N: np.ndarray
    payment_N: np.ndarray
    told: Mapping[str, float | bool | str | None] = field(default_factory=dict[str, float | bool | str | None])

    @cached_property
    def won_N(self) -> np.ndarray:
        """Whether each bidder has won."""
        return ~np.isnan(self.price_N)

    @property
    def revenue(self) -> float:
        """$ that the provider takes."""
        return float(self.payment_N.sum())

    @property
    def price(self) -> float | None:
        """The price for a unit, where all winners pay the same; None where nobody wins or prices differ."""
        prices = self.price_N[self.won_N]
        if not len(prices) or prices.max() > prices.min() * (1 + TOLERANCE):
            return None
        return float(prices[0])


def settle(
    market: Market, members: np.ndarray, prices: np.ndarray | float, **told: float | bool | str | None
) -> Outcome:
    """The outcome where `members` win at `prices`; rounding never makes anyone pay more than the budget."""
    price_N, payment_N = np.full(len(market), np.nan), np.zeros(len(market))
    price_N[members] = prices
    payment_N[members] = np.minimum(price_N[members] * market.demand_N[members], market.budget_N[members])
    return Outcome(price_N, payment_N, told)


def envy_count(market: Market, outcome: Outcome) -> int:
    """Bidders who would rather have another's deal: the lowest price of the slot, for what they themselves need."""
    won = outcome.won_N
    if not won.any():
        return 0
    lowest = float(outcome.price_N[won].min())
    pays = np.where(won, outcome.price_N, np.inf)
    gains = (pays > lowest * (1 + 1e-9)) & (market.density_N > lowest * (1 + 1e-9))
    return int(gains.sum())


def surplus(market: Market, outcome: Outcome) -> float:
    """$ by which the winners' budgets exceed their payments, as if budgets were values."""
    return float((market.budget_N - outcome.payment_N)[outcome.won_N].sum())
