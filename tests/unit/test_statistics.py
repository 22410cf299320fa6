# SPDX-License-Identifier: Apache-2.0
"""The interval of a difference: it covers other seeds and other documents, it pairs, and it narrows with the documents."""

from __future__ import annotations

import statistics

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


DOCUMENTS = 100


def shared_world(rng: np.random.Generator, seeds: int, seed_error: float, document_error: float) -> list[np.ndarray]:
    """Gaps around zero of equal documents: standard errors of their mean from seeds and from documents, which seeds share."""
    seed_S = rng.normal(0, seed_error * seeds**0.5, seeds)
    document_U = rng.normal(0, document_error * DOCUMENTS**0.5, DOCUMENTS)
    return list(seed_S[:, None] + document_U)


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


TRIALS = 300


@pytest.mark.parametrize(("seeds", "seed_error", "document_error"), [(3, 1, 0.05), (3, 1, 1), (3, 0, 1), (2, 1, 0.3)])
def test_the_interval_covers_the_truth_whatever_the_error_is_of(
    seeds: int, seed_error: float, document_error: float
) -> None:
    rng = np.random.default_rng(seeds)
    zeros, ones_U = [np.zeros(DOCUMENTS)] * seeds, np.ones(DOCUMENTS)
    inside = 0
    for _ in range(TRIALS):
        found = paired_difference(shared_world(rng, seeds, seed_error, document_error), zeros, ones_U, draws=300)
        inside += found.low <= 0 <= found.high
    slack = 3 * (0.95 * 0.05 / TRIALS) ** 0.5
    assert inside / TRIALS >= 0.94 - slack, "a bootstrap of a hundred documents is a point or so short itself"
    if 0 in (seed_error, document_error) or seed_error / document_error > 10:
        assert inside / TRIALS <= 0.95 + slack, "no wider than it must be where one error is all"


def test_one_seed_is_asked_about_documents_alone() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(TRIALS):
        ours_SU, theirs_SU, tokens_U = world(trial, 80, 1, -0.05)
        found = paired_difference(list(ours_SU), list(theirs_SU), tokens_U, draws=200)
        inside += found.low <= -0.05 <= found.high
    assert 0.92 <= inside / TRIALS <= 0.98
    moved, still = (
        paired_difference(shared_world(rng, 1, error, 1), [np.zeros(DOCUMENTS)], np.ones(DOCUMENTS)) for error in (9, 0)
    )
    assert moved.high - moved.low == pytest.approx(still.high - still.low, rel=0.3), "blind to what a seed is worth"


def test_three_seeds_are_as_unsure_as_students_t_says() -> None:
    gaps = [np.full(50, gap) for gap in (0.0238, 0.0557, 0.0154)]  # equal for all documents: only seeds differ
    found = paired_difference(gaps, [np.zeros(50)] * 3, np.ones(50), draws=100)
    margin = 4.302653 * statistics.stdev((0.0238, 0.0557, 0.0154)) / 3**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - margin, found.mean + margin))
    assert not found.excludes_zero


def test_pairing_finds_a_difference_that_is_small_beside_the_documents() -> None:
    ours_SU, theirs_SU, tokens_U = world(1, 200, 3, -0.05)
    assert paired_difference(list(ours_SU), list(theirs_SU), tokens_U).excludes_zero


def test_more_documents_narrow_the_interval() -> None:
    wide, narrow = (paired_difference(*world(2, count, 3, -0.05), draws=1000) for count in (40, 4000))
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_the_same_seed_gives_the_same_interval() -> None:
    assert paired_difference(*world(3, 60, 2, 0.1)) == paired_difference(*world(3, 60, 2, 0.1))
