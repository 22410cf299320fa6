# SPDX-License-Identifier: Apache-2.0
"""Dividing private documents over devices: an exact partition, as unlike as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.data.split import divide
from deepfusion.errors import DataError
from deepfusion.types import Corpus


def _corpus(domain_U: np.ndarray) -> Corpus:
    count = len(domain_U)
    return Corpus(
        np.zeros(count, np.uint16), np.ones(count, bool), np.arange(count + 1), np.zeros(0, np.uint8),
        np.zeros(count + 1, np.int64), domain_U, ("a", "b", "c", "d"), np.arange(count),
    )  # fmt: skip


def _names(count: int) -> list[str]:
    return [f"device-{n}" for n in range(count)]


@settings(deadline=None, max_examples=80)
@given(
    domain_U=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    devices=st.integers(1, 20),
    alpha=st.sampled_from([1e-3, 0.5, 100.0, float("inf")]),
    sigma=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 99),
)
def test_every_document_goes_to_exactly_one_device_and_none_is_left_empty(
    domain_U: list[int], devices: int, alpha: float, sigma: float, seed: int
):
    corpus = _corpus(np.asarray(domain_U))
    if len(corpus) < devices:
        with pytest.raises(DataError, match=r"lower \[devices\] count"):
            divide(corpus, _names(devices), alpha=alpha, sigma=sigma, seed=seed)
        return
    parts = divide(corpus, _names(devices), alpha=alpha, sigma=sigma, seed=seed)
    assert list(parts) == _names(devices)
    assert min(map(len, parts.values())) >= 1
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(corpus)))


def test_an_infinite_alpha_and_no_spread_give_every_device_the_same_mixture():
    corpus = _corpus(np.repeat([0, 1, 2, 3], 250))
    for part in divide(corpus, _names(10), alpha=float("inf"), sigma=0.0, seed=1).values():
        assert np.bincount(corpus.domain_U[part]).tolist() == [25, 25, 25, 25]


def test_a_small_alpha_gives_devices_mostly_one_domain_and_a_large_one_all():
    corpus = _corpus(np.repeat([0, 1, 2, 3], 2500))

    def purity(alpha: float) -> float:
        parts = divide(corpus, _names(16), alpha=alpha, seed=3).values()
        return float(np.mean([np.bincount(corpus.domain_U[p], minlength=4).max() / len(p) for p in parts]))

    assert purity(0.05) > 0.85 > purity(0.5) > 0.4 > purity(100.0)


def test_the_seed_decides_the_division():
    corpus = _corpus(np.repeat([0, 1], 50))
    first, again, other = (divide(corpus, _names(4), seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
