# SPDX-License-Identifier: Apache-2.0
"""How sure a difference between two models is: the paired bootstrap over test documents and seeds (Koehn, 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

DRAWS_AT_ONCE = 1000
"""Resamples whose weights are in memory together."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds within which it lies with the asked probability."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation where there are several: "42.7 ± 1.8"."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def paired_difference(
    ours_SU: Sequence[np.ndarray],
    theirs_SU: Sequence[np.ndarray],
    tokens_U: np.ndarray,
    *,
    probability: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Log-perplexity of ours minus that of theirs, in nats a token: the mean over S seeds, and its interval.

    Each resample draws seeds and, for all of them alike, documents, both with replacement. With few seeds the interval is
    too narrow for what other seeds would give; with one seed it speaks of the documents alone.

    Args:
        ours_SU: for each seed, the negative log-likelihood of each document in nats.
        theirs_SU: the same of the other model, from the same seeds in the same order.
        tokens_U: counted tokens of each document.
    """
    gap_SU = np.asarray(ours_SU, float) - np.asarray(theirs_SU, float)
    tokens_U = np.asarray(tokens_U, float)
    assert gap_SU.ndim == 2
    assert gap_SU.shape[1] == len(tokens_U), f"{gap_SU.shape[1]} documents of the models, {len(tokens_U)} of the text"
    seeds, documents = gap_SU.shape
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for begin in range(0, draws, DRAWS_AT_ONCE):
        count = min(DRAWS_AT_ONCE, draws - begin)
        times_RU = generator.multinomial(documents, np.full(documents, 1 / documents), size=count)
        times_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        nats_RS = times_RU @ gap_SU.T / (times_RU @ tokens_U)[:, None]
        found.append((nats_RS * times_RS).sum(1) / seeds)
    tail = (1 - probability) / 2
    low, high = np.quantile(np.concatenate(found), (tail, 1 - tail))
    return Interval(float(gap_SU.sum() / tokens_U.sum() / seeds), float(low), float(high))
