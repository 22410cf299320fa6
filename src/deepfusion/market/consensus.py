# SPDX-License-Identifier: Apache-2.0
"""CENTRE: rounding onto a random grid on which almost all bidders agree, and the grid's best base (aeria, section 6.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import lambertw

TOLERANCE = 1e-12
"""Relative: amounts that differ by less are equal, so that a point of the grid maps to itself."""
SLACK = (1.02, 4.0)
"""What a slack is clipped to before the base is made of it."""


def best_base(delta: float) -> float:
    """y with the highest guaranteed revenue: the larger root of y = delta (1 + ln y)."""
    delta = min(max(delta, SLACK[0]), SLACK[1])
    return float(-delta * lambertw(-1 / (math.e * delta), -1).real)


def reference_slack(demand_N: np.ndarray, capacity: float) -> float:
    """delta_ref of a slot: what the largest demand takes of all that can be sold. No budget has a part in it."""
    if not len(demand_N):
        return SLACK[1]
    sold, largest = min(capacity, float(demand_N.sum())), float(demand_N.max())
    return min(max(sold / (sold - largest), SLACK[0]), SLACK[1]) if sold > largest else SLACK[1]


def guaranteed_per_bidder(y: float, delta: float) -> float:
    """max(0, g(y)): expected revenue over Pi where each bidder has a target of its own."""
    return max(0.0, (1 / delta - 1 / y) / math.log(y))


def guaranteed_global(y: float) -> float:
    """Expected revenue over Pi where all have one target."""
    return (1 - 1 / y) / math.log(y)


def consensus_probability(y: float, delta: float) -> float:
    """Chance that no point of the grid lies in (Pi / delta, Pi], so that nobody can move the target."""
    return max(0.0, 1 - math.log(delta) / math.log(y)) if delta < math.inf else 0.0


@dataclass(frozen=True)
class Grid:
    """The points y^(m + eps) for all whole m."""

    y: float
    eps: float

    def point(self, m: int) -> float:
        """y^(m + eps)."""
        return self.y ** (m + self.eps)

    def reached(self, m: int) -> float:
        """The least amount that counts as having reached point m, which a power of the base must reach at eps = 0."""
        return self.point(m) * (1 - TOLERANCE)

    def exponent(self, x: float) -> int:
        """m of the largest point that x > 0 reaches."""
        m = math.floor(math.log(x) / math.log(self.y) - self.eps)
        while x >= self.reached(m + 1):
            m += 1
        while x < self.reached(m):
            m -= 1
        return m

    def below(self, x: float) -> float:
        """f(x): the largest point that is not above x; 0 for 0."""
        return self.point(self.exponent(x)) if x > 0 else 0.0
