# SPDX-License-Identifier: Apache-2.0
"""Random markets, and every step of the auction once more the slow way, straight from its definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from deepfusion.market.auction import Candidates, Market, make_market
from deepfusion.market.consensus import Grid


def random_market(seed: int, bids: int | None = None, *, tight: bool | None = None, ties: bool = False) -> Market:
    """A slot of up to 11 bids; some below the reserve price, some with nothing."""
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 12)) if bids is None else bids
    demand = generator.integers(1, 4, n).astype(float) if ties else generator.lognormal(0, 0.8, n)
    density = 1.0 * (generator.integers(0, 6, n) if ties else 0.7 + generator.exponential(1.5, n))
    narrow = bool(generator.random() < 0.5) if tight is None else tight
    capacity = max(float(demand.sum()) * float(generator.uniform(0.3, 0.9) if narrow else 1.5), float(demand.max()))
    ids = [f"user-{number:05d}" for number in range(n)]
    return make_market(ids, demand, demand * density, capacity, 1.0)


markets = st.builds(random_market, st.integers(0, 2**32 - 1), tight=st.booleans() | st.none(), ties=st.booleans())


def slow_candidates(market: Market) -> tuple[list[int], float]:
    """W and r by the rule of aeria, section 6.1."""
    order = sorted(range(len(market)), key=lambda i: (-market.density_N[i], market.ids_N[i]))
    kept: list[int] = []
    for i in order:
        if market.density_N[i] < market.reserve * (1 - 1e-12) or market.budget_N[i] == 0:
            continue
        if sum(market.demand_N[j] for j in [*kept, i]) > market.capacity * (1 + 1e-12):
            return kept, max(market.reserve, market.density_N[i])
        kept.append(i)
    return kept, market.reserve


def slow_best(pairs: list[tuple[float, float]]) -> float:
    """Pi of (density, demand) pairs: every price that is somebody's density."""
    return max((price * sum(a for d, a in pairs if d >= price) for price, _ in pairs), default=0.0)


def slow_share(found: Candidates, target: float) -> tuple[list[int], float]:
    """REAL by repeated dropping (aeria, section 6.4)."""
    kept = list(range(len(found)))
    while kept:
        price = max(found.floor, target / sum(found.demand_W[k] for k in kept))
        staying = [k for k in kept if found.density_W[k] >= price * (1 - 1e-12)]
        if staying == kept:
            return kept, price
        kept = staying
    return [], found.floor


def slow_targets(found: Candidates, grid: Grid) -> list[float]:
    """f(Pi(W without i)) for each i."""
    pairs = list(zip(found.density_W.tolist(), found.demand_W.tolist(), strict=True))
    return [grid.below(slow_best(pairs[:i] + pairs[i + 1 :])) for i in range(len(pairs))]


def slow_knapsack(weights: list[float], values: list[float], capacity: float) -> float:
    """The best value over all subsets."""
    items = range(len(weights))
    subsets = (subset for size in range(len(weights) + 1) for subset in combinations(items, size))
    return max(sum(values[j] for j in s) for s in subsets if sum(weights[j] for j in s) <= capacity)


def lies(market: Market, index: int, generator: np.random.Generator) -> list[float]:
    """Budgets worth trying instead of the true one: multiples, just above and below every other density, random ones."""
    true, demand = float(market.budget_N[index]), float(market.demand_N[index])
    others = np.delete(market.density_N, index) * demand
    around = [*(others * (1 - 1e-7)), *(others * (1 + 1e-7))]
    multiples = [0.0, *(true * c for c in (0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1.01, 1.05, 1.2, 1.5, 2.0, 3.0, 5.0))]
    top = 2 * float(max(market.density_N.max(), market.reserve)) * demand
    return [*multiples, *around, *generator.uniform(0, top, 10)]
