# SPDX-License-Identifier: Apache-2.0
"""One slot from bids to verdicts: a pure function, so that anybody can compute it again (aeria, section 10)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepfusion.errors import MarketError
from deepfusion.market.auction import Candidates, Market, Outcome, candidates, make_market
from deepfusion.market.bids import Bid, Provider
from deepfusion.market.coco import Coco
from deepfusion.market.demand import CutTable, Users, minimum_demand
from deepfusion.market.mechanisms import draw
from deepfusion.market.profiles import Mode, Profile

SAME_DEMAND = 1e-6
"""Relative: a stated demand that differs by more from what the tables say is refused."""
MICRO = 1e15
"""From $ for a FLOP/s to millionths of $ for a GFLOP/s, as charts have it."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Phase I of a slot.

    Attributes:
        market: the bids that take part.
        cuts: the cut of each of them, in the market's order.
        local: users whose device meets the deadline alone.
        refused: why the others have no part, by user.
    """

    market: Market
    cuts: np.ndarray
    local: list[str] = field(default_factory=list[str])
    refused: dict[str, str] = field(default_factory=dict[str, str])


def prepare(
    bids: Sequence[Bid], profiles: Mapping[str, Profile], provider: Provider, price_kwh: float, mode: Mode
) -> Prepared:
    """Check the bids, compute what each asks of the edge, and sort out who takes part.

    Raises:
        MarketError: the provider's values make no market.
    """
    faults = list(provider.faults())
    if faults:
        raise MarketError("; ".join(faults))
    refused: dict[str, str] = {}
    valid: dict[str, Bid] = {}
    for bid in bids:
        wrong = "; ".join(bid.faults(profiles))
        if bid.user in valid or bid.user in refused:
            valid.pop(bid.user, None)  # neither: which of them came first must not count
            refused[bid.user] = "bids more than once; one bid a user and slot"
        elif wrong:
            refused[bid.user] = wrong
        else:
            valid[bid.user] = bid
    ordered = [valid[user] for user in sorted(valid)]
    speed_N, cut_N = _demand(ordered, profiles, provider, mode)
    kept, local = list[int](), list[str]()
    for index, (bid, speed) in enumerate(zip(ordered, speed_N.tolist(), strict=True)):
        reason = _refusal(bid, speed, provider.capacity)
        if reason:
            refused[bid.user] = reason
        elif speed == 0:
            local.append(bid.user)
        else:
            kept.append(index)
    users, budgets = [ordered[k].user for k in kept], np.array([ordered[k].budget for k in kept], dtype=np.float64)
    reserve = provider.reserve_price(price_kwh)
    market = make_market(np.array(users, dtype=str), speed_N[kept], budgets, provider.capacity, reserve)
    return Prepared(market, cut_N[kept], local, dict(sorted(refused.items())))


def _demand(
    bids: Sequence[Bid], profiles: Mapping[str, Profile], provider: Provider, mode: Mode
) -> tuple[np.ndarray, np.ndarray]:
    pairs = sorted({(bid.model, bid.row(profiles[bid.model])) for bid in bids})
    if not pairs:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    place = {pair: index for index, pair in enumerate(pairs)}

    def column(name: str) -> np.ndarray:
        return np.array([getattr(bid, name) for bid in bids], dtype=np.float64)

    users = Users(
        np.array([place[bid.model, bid.row(profiles[bid.model])] for bid in bids]),
        column("latency"), column("device_flops"), column("rate"), column("rtt"),
        np.array([bid.device_bandwidth or math.inf for bid in bids]),
    )  # fmt: skip
    table = CutTable([(profiles[model], row) for model, row in pairs], mode)
    found = minimum_demand(users, table, provider.edge)
    return found.speed_N, found.cut_N


def _refusal(bid: Bid, speed: float, capacity: float) -> str:
    if speed == math.inf:
        return f"latency = {bid.latency}: no cut leaves the edge any time, however fast; allow more"
    if speed > capacity:
        return f"needs {speed:.4g} FLOP/s, more than the whole edge has ({capacity:.4g}); allow more latency"
    if bid.demand is not None and not abs(bid.demand - speed) <= SAME_DEMAND * speed:
        return f"demand = {bid.demand:.6g}: by the public tables it is {speed:.6g} FLOP/s; leave it out"
    return ""


def verdicts(market: Market, found: Candidates, outcome: Outcome) -> dict[str, str]:
    """Why each loser lost, by user."""
    reasons: dict[str, str] = {}
    member = np.zeros(len(market), dtype=bool)
    member[found.member_W] = True
    prices = outcome.price_N[outcome.won_N]
    lowest = float(prices.min()) if len(prices) else None
    for index in np.flatnonzero(~outcome.won_N).tolist():
        density = float(market.density_N[index])
        said = f"bids {per_gigaflop(density)}"
        if market.budget_N[index] == 0 or density < market.reserve * (1 - 1e-12):
            why = f"below the reserve price, {per_gigaflop(market.reserve)}"
        elif not member[index]:
            why = f"the capacity is sold to denser bids; it took more than {per_gigaflop(found.floor)}"
        elif lowest is None or density < lowest:
            why = f"below the price, {per_gigaflop(lowest if lowest is not None else found.floor)}"
        else:
            why = "no consensus in this slot: the price made without this bid came to more than it"
        reasons[str(market.ids_N[index])] = f"{said}: {why}"
    return reasons


def per_gigaflop(price: float) -> str:
    """A price for people."""
    return f"${price * 1e9:.4g} a GFLOP/s"


def clear_slot(
    bids: Sequence[Bid],
    profiles: Mapping[str, Profile],
    provider: Provider,
    *,
    price_kwh: float,
    seed: str,
    coco: Coco,
    mode: Mode = "expected",
) -> dict[str, Any]:
    """All that a slot comes to, as JSON values: who won at which price, who lost and why, and the slot's totals.

    Args:
        seed: hex digits, secret until the bids are closed.

    Raises:
        MarketError: the provider's values, the mechanism's or the seed make no market.
    """
    faults = list(coco.faults())
    if faults:
        raise MarketError("; ".join(faults))
    prepared = prepare(bids, profiles, provider, price_kwh, mode)
    market = prepared.market
    outcome = coco.clear(market, draw(int(seed, 16), len(market)))
    won = np.flatnonzero(outcome.won_N).tolist()
    sold, rent = float(market.demand_N[outcome.won_N].sum()), provider.rent(price_kwh)
    return {
        "price": outcome.price,
        "winners": {
            str(market.ids_N[i]): {
                "speed": float(market.demand_N[i]), "cut": int(prepared.cuts[i]),
                "price": float(outcome.price_N[i]), "payment": float(outcome.payment_N[i]),
            }
            for i in won
        },
        "losers": verdicts(market, candidates(market, coco.fit), outcome),
        "local": prepared.local,
        "refused": prepared.refused,
        "reserve": market.reserve, "rent": rent, "revenue": outcome.revenue, "profit": outcome.revenue - rent,
        "utilisation": sold / market.capacity,
        **{name: None if value == math.inf else value for name, value in outcome.told.items()},
    }  # fmt: skip
