# SPDX-License-Identifier: Apache-2.0
"""Areas under the curve: what they must be where that is known, intervals that hold, and sides that match."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from deepfusion.membership import area, caught, matched, mean_area

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=20)


@given(SCORES, SCORES)
def test_the_area_is_that_of_scikit_learn_and_turns_round_with_the_sides(members: list[int], others: list[int]) -> None:
    a, b = np.asarray(members), np.asarray(others)
    truth = roc_auc_score([1] * len(a) + [0] * len(b), np.concatenate([a, b]))
    assert area(a, b) == pytest.approx(truth)
    assert area(a, b) + area(b, a) == pytest.approx(1)


def test_apart_is_one_and_alike_is_a_half() -> None:
    rng = np.random.default_rng(0)
    apart = mean_area([(rng.normal(9, 1, 50), rng.normal(0, 1, 50))])
    assert (apart.mean, apart.low, apart.high) == (1, 1, 1)
    alike = mean_area([(rng.normal(size=400), rng.normal(size=300))])
    assert alike.low < 0.5 < alike.high
    assert 0.06 < alike.high - alike.low < 0.11, "as wide as 2 x 1.96 x sqrt((n + m + 1) / 12 n m)"


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        found = mean_area([(rng.normal(0.5, 1, 60), rng.normal(size=60)) for _ in range(2)])
        held += found.low <= 0.6382 <= found.high  # Phi(0.5 / sqrt(2))
    assert 86 <= held <= 100


def test_of_many_models_the_mean_is_taken_and_is_surer() -> None:
    rng = np.random.default_rng(2)
    pairs = [(rng.normal(size=80), rng.normal(size=80)) for _ in range(9)]
    one, all_of_them = mean_area(pairs[:1]), mean_area(pairs)
    assert all_of_them.mean == pytest.approx(np.mean([area(*pair) for pair in pairs]))
    assert all_of_them.high - all_of_them.low < 0.5 * (one.high - one.low)


def test_members_are_caught_above_all_but_one_in_a_hundred_others() -> None:
    others = np.arange(200.0)
    assert caught(np.asarray([198.5, 197.0, 196.0, 300.0]), others) == 0.5, "two of 200 may be above"
    assert caught(np.asarray([98.5, 99.5]), np.arange(100.0)[:99]) == 1
    assert caught(np.asarray([97.5, 98.0]), np.arange(100.0)[:99]) == 0, "of 99 none may be above"


@given(st.lists(st.integers(0, 4), max_size=40), st.lists(st.integers(0, 4), max_size=40), st.integers(1, 50))
def test_matched_sides_have_the_same_strata_and_no_document_twice(a: list[int], b: list[int], most: int) -> None:
    left, right = matched(a, b, seed=0, most=most)
    assert Counter(a[i] for i in left) == Counter(b[i] for i in right)
    assert len(set(left.tolist())) == len(left) == len(set(right.tolist()))
    pairs = sum(min(a.count(stratum), b.count(stratum)) for stratum in range(5))
    assert len(left) == min(most, pairs)
