# SPDX-License-Identifier: Apache-2.0
"""What a mechanism is: a market, a draw of chance and the past in, an outcome out; a registry of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deepfusion.market.auction import BestPrice, Candidates, Market, Outcome, best_price, candidates
from deepfusion.registry import Registry


@dataclass(frozen=True, eq=False)
class Draw:
    """A slot's chance, the same for all mechanisms, and not known before the bids are closed.

    Attributes:
        eps: where the grid lies, uniform on [0, 1).
        arrival_N: a random order of the bidders.
        half_N: a fair coin for each bidder.
    """

    eps: float
    arrival_N: np.ndarray
    half_N: np.ndarray


def draw(seed: int, bids: int) -> Draw:
    """The chance of a slot with so many bids. It depends on no budget: coins belong to bidders, in order of their ids."""
    generator = np.random.default_rng(seed)
    return Draw(float(generator.random()), generator.permutation(bids), generator.random(bids) < 0.5)


@dataclass(frozen=True, eq=False)
class Past:
    """A slot that is over, as mechanisms that learn from history see it: reported bids."""

    market: Market
    found: Candidates
    best: BestPrice


def remember(market: Market) -> Past:
    """A slot for the history."""
    found = candidates(market)
    return Past(market, found, best_price(found))


class Mechanism(Protocol):
    """A rule that sells one slot."""

    @property
    def truthful(self) -> str:
        """Whether bidding the true budget is always best: "yes", "no", or when."""
        ...

    @property
    def uniform(self) -> str:
        """Whether all winners pay one price a unit: "yes", "no", or when."""
        ...

    def clear(self, market: Market, chance: Draw, history: Sequence[Past]) -> Outcome:
        """Who wins and what each pays.

        Args:
            chance: of `draw`; a mechanism takes from it what it needs.
            history: slots that are over, the latest last; may be empty.
        """
        ...


mechanisms: Registry[Mechanism] = Registry("mechanism")
