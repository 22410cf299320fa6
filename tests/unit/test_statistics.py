# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap: it covers, it pairs, and it narrows with the documents."""

from __future__ import annotations

import numpy as np
import pytest

from deepfusion.statistics import paired_difference


def world(seed: int, documents: int, seeds: int, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models whose documents' difficulty varies far more than their difference."""
    rng = np.random.default_rng(seed)
    tokens_U = rng.integers(20, 200, documents)
    difficulty_U = rng.normal(4, 1, documents)
    theirs_SU = (difficulty_U + rng.normal(0, 0.1, (seeds, documents))) * tokens_U
    ours_SU = theirs_SU + (gap + rng.normal(0, 0.1, (seeds, documents))) * tokens_U
    return ours_SU, theirs_SU, tokens_U


def test_the_mean_is_the_difference_of_the_log_perplexities() -> None:
    ours_SU, theirs_SU, tokens_U = world(0, 50, 3, -0.1)
    found = paired_difference(list(ours_SU), list(theirs_SU), tokens_U, draws=100)
    assert found.mean == pytest.approx(np.mean(ours_SU.sum(1) - theirs_SU.sum(1)) / tokens_U.sum())
    assert found.low <= found.mean <= found.high


def test_equal_models_differ_by_exactly_nothing() -> None:
    ours_SU, _, tokens_U = world(0, 50, 3, 0.0)
    found = paired_difference(list(ours_SU), list(ours_SU), tokens_U, draws=100)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        ours_SU, theirs_SU, tokens_U = world(trial, 80, 1, -0.05)
        found = paired_difference(list(ours_SU), list(theirs_SU), tokens_U, draws=400)
        covered += found.low <= -0.05 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_pairing_finds_a_difference_that_is_small_beside_the_documents() -> None:
    ours_SU, theirs_SU, tokens_U = world(1, 200, 3, -0.05)
    assert paired_difference(list(ours_SU), list(theirs_SU), tokens_U).excludes_zero


def test_more_documents_narrow_the_interval() -> None:
    wide, narrow = (paired_difference(*world(2, count, 3, -0.05)) for count in (40, 4000))
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_the_same_seed_gives_the_same_interval() -> None:
    assert paired_difference(*world(3, 60, 2, 0.1)) == paired_difference(*world(3, 60, 2, 0.1))
