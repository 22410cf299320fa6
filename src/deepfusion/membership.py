# SPDX-License-Identifier: Apache-2.0
"""How well one can tell what a model was trained on: area under the curve, its interval, true positives (Carlini et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepfusion.statistics import Interval

DRAWS = 1000
"""Resamples of an interval."""


def area(members_U: np.ndarray, others_V: np.ndarray) -> float:
    """Chance that a member's score is above another's, ties counted half: 0.5 tells nothing, 1 everything."""
    return float(_above(members_U, others_V).mean())


def mean_area(pairs: Sequence[tuple[np.ndarray, np.ndarray]], *, probability: float = 0.95, seed: int = 0) -> Interval:
    """The mean area over several models, and its interval: members and others of each are drawn anew, with replacement.

    The interval speaks of the documents, not of what other trainings would give.

    Args:
        pairs: for each model the scores of members and of others.
    """
    generator = np.random.default_rng(seed)
    drawn_R, mean = np.zeros(DRAWS), 0.0
    for members_U, others_V in pairs:
        above_UV = _above(members_U, others_V)
        times_RU, times_RV = (
            generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) for n in (len(members_U), len(others_V))
        )
        drawn_R += ((times_RU @ above_UV) * times_RV).sum(1) / above_UV.size / len(pairs)
        mean += float(above_UV.mean()) / len(pairs)
    tail = (1 - probability) / 2
    low, high = np.quantile(drawn_R, (tail, 1 - tail))
    return Interval(mean, float(low), float(high))


def caught(members_U: np.ndarray, others_V: np.ndarray, false_rate: float = 0.01) -> float:
    """Share of the members whose score is above all but `false_rate` of the others' (rounded down: of 99, above all)."""
    threshold = np.sort(others_V)[::-1][int(false_rate * len(others_V))]
    return float((members_U > threshold).mean())


def matched(
    members_strata_U: Sequence[object], others_strata_V: Sequence[object], seed: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of members and of others, of each stratum equally many of both, at most `most` of each in all.

    Within a stratum they are drawn. What has no counterpart is left out.
    """
    generator = np.random.default_rng(seed)
    rows: dict[object, tuple[list[int], list[int]]] = {}
    for side, strata in enumerate((members_strata_U, others_strata_V)):
        for index in generator.permutation(len(strata)).tolist():
            rows.setdefault(strata[index], ([], []))[side].append(index)
    pairs = [pair for both in rows.values() for pair in zip(*both, strict=False)]
    kept = [pairs[index] for index in generator.permutation(len(pairs))[:most]]
    chosen = np.asarray(kept, np.int64).reshape(-1, 2)
    return np.sort(chosen[:, 0]), np.sort(chosen[:, 1])


def _above(members_U: np.ndarray, others_V: np.ndarray) -> np.ndarray:
    gap_UV = members_U[:, None] - others_V[None, :]
    return np.where(gap_UV == 0, 0.5, gap_UV > 0)
