# SPDX-License-Identifier: Apache-2.0
"""The exact best subset that fits: bounds fix most items, and lists of undominated sums decide the few between.

Pisinger's core idea with the lists of Nemhauser and Ullmann (1969); the bound on a flipped item is Dell'Amico's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepfusion.errors import MarketError

LONGEST = 2_000_000
"""Undominated sums at most; beyond that an exact answer would take too long."""


@dataclass(frozen=True, eq=False)
class Knapsack:
    """Items in the order of falling value a weight.

    Attributes:
        weight_J: > 0.
        value_J: not negative.
        capacity: of the knapsack.
    """

    weight_J: np.ndarray
    value_J: np.ndarray
    capacity: float

    def without(self, j: int) -> Knapsack:
        """The same without one item."""
        return Knapsack(np.delete(self.weight_J, j), np.delete(self.value_J, j), self.capacity)

    def best(self) -> tuple[float, np.ndarray]:
        """The highest value that fits, and which items make it up, bool of shape (J,).

        Raises:
            MarketError: so many items are alike in value a weight that an exact answer would take too long.
        """
        total_J = np.cumsum(self.weight_J)
        split = int(np.searchsorted(total_J, self.capacity, side="right"))
        chosen = np.zeros(len(self.weight_J), dtype=bool)
        chosen[:split] = True
        if split == len(self.weight_J):
            return float(self.value_J.sum()), chosen
        left = self.capacity - (float(total_J[split - 1]) if split else 0.0)
        rate = float(self.value_J[split] / self.weight_J[split])
        bound = float(self.value_J[:split].sum()) + left * rate
        for j in range(split, len(chosen)):
            if self.weight_J[j] <= left:
                chosen[j] = True
                left -= float(self.weight_J[j])
        value = float(self.value_J[chosen].sum())
        flipped_J = bound - abs(self.value_J - rate * self.weight_J)
        core = np.flatnonzero(flipped_J > value * (1 + 1e-12))
        if not len(core):
            return value, chosen
        fixed = np.arange(len(chosen)) < split
        fixed[core] = False
        room = self.capacity - float(self.weight_J[fixed].sum())
        more, picked = _undominated(self.weight_J[core], self.value_J[core], room)
        better = float(self.value_J[fixed].sum()) + more
        if better <= value:
            return value, chosen
        fixed[core[picked]] = True
        return better, fixed


def _undominated(weight_J: np.ndarray, value_J: np.ndarray, room: float) -> tuple[float, np.ndarray]:
    """The best subset by lists of sums of which no other is both lighter and worth more; the subset as indices."""
    weights, values = np.zeros(1), np.zeros(1)
    parents: list[tuple[np.ndarray, np.ndarray]] = []
    for weight, value in zip(weight_J.tolist(), value_J.tolist(), strict=True):
        fits = int(np.searchsorted(weights, room - weight, side="right"))
        both_w = np.concatenate([weights, weights[:fits] + weight])
        both_v = np.concatenate([values, values[:fits] + value])
        order = np.lexsort((-both_v, both_w))
        both_v = both_v[order]
        rising = np.concatenate([[True], both_v[1:] > np.maximum.accumulate(both_v)[:-1]])
        kept = order[rising]
        parents.append((np.where(kept < len(weights), kept, kept - len(weights)), kept >= len(weights)))
        weights, values = both_w[kept], both_v[rising]
        if len(weights) > LONGEST:
            raise MarketError(
                f"the best subset of {len(weight_J)} bids of like density cannot be found exactly; use fewer"
            )
    at, picked = len(values) - 1, list[int]()
    for j in reversed(range(len(parents))):
        origin, taken = parents[j]
        if taken[at]:
            picked.append(j)
        at = int(origin[at])
    return float(values[-1]), np.array(picked[::-1], dtype=np.int64)
