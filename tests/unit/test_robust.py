# SPDX-License-Identifier: Apache-2.0
"""Averages that bear hostile models: their definitions by brute force, and what they cannot be made to do."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from scipy import stats

from deepfusion.robust import Reader, Robust, credible, krum, robust_average
from deepfusion.types import State


def models(seed: int, count: int) -> list[State]:
    torch.manual_seed(seed)
    return [{"a": torch.randn(3, 4), "b": torch.randn(5), "n": torch.tensor(index)} for index in range(count)]


def readers(states: list[State]) -> list[Reader]:
    return [state.__getitem__ for state in states]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 10, 15])
def test_the_median_and_the_trimmed_mean_are_taken_number_by_number(count: int) -> None:
    states = models(0, count)
    median = robust_average(readers(states), ["a", "b", "n"], "median", 0.2)
    trimmed = robust_average(readers(states), ["a", "b", "n"], "trimmed", 0.2)
    cut = {1: 0, 2: 0, 10: 2, 15: 3}.get(count, 1)
    for name in ("a", "b"):
        ordered = torch.stack([s[name] for s in states]).double().sort(0).values
        middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
        assert torch.allclose(median[name].double(), middle, atol=1e-7)
        assert torch.allclose(trimmed[name].double(), ordered[cut : count - cut].mean(0), atol=1e-7)
        assert median[name].dtype == torch.float32
    assert int(median["n"]) == 0, "a whole number is the first model's"


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("how", ["trimmed", "median"])
def test_one_hostile_model_of_three_or_four_moves_no_number_beyond_the_others(how: Robust, count: int) -> None:
    states = models(1, count - 1)
    found = robust_average(readers([{"a": torch.full((3, 4), 1e6)}, *states]), ["a"], how, 0.2)["a"]
    stack = torch.stack([s["a"] for s in states])
    assert bool((found >= stack.amin(0)).all() and (found <= stack.amax(0)).all())


def test_where_no_model_is_bad_none_is_trimmed() -> None:
    states = models(2, 4)
    mean = torch.stack([s["a"] for s in states]).double().mean(0)
    assert torch.allclose(robust_average(readers(states), ["a"], "trimmed", 0.0)["a"].double(), mean, atol=1e-7)


def test_large_groups_are_trimmed_to_the_same_bytes_as_by_scipy() -> None:
    states = models(4, 23)
    stack_N = torch.stack([s["a"] for s in states]).double().numpy()
    expected = torch.as_tensor(stats.trim_mean(stack_N, 0.2, axis=0)).float()
    assert torch.equal(robust_average(readers(states), ["a"], "trimmed", 0.2)["a"], expected)


@pytest.mark.parametrize("seed", range(5))
def test_krum_is_the_model_of_least_distance_to_its_nearest(seed: int) -> None:
    states, bad = models(seed, 7), 2
    flat = [torch.cat([s["a"].flatten(), s["b"]]).double() for s in states]

    def score(index: int) -> float:
        others = [float((flat[index] - flat[other]).square().sum()) for other in range(7) if other != index]
        return min(sum(group) for group in combinations(others, 7 - bad - 2))

    assert krum(readers(states), ["a", "b"], bad) == min(range(7), key=score)
    chosen = robust_average(readers(states), ["a", "b"], "krum", bad / 7)
    assert any(torch.equal(chosen["a"], s["a"]) for s in states), "one of them, whole"


def test_krum_of_one_or_two_models_is_the_first() -> None:
    assert krum(readers(models(0, 1)), ["a"], 0) == krum(readers(models(0, 2)), ["a"], 0) == 0


@pytest.mark.parametrize("how", ["trimmed", "median", "krum"])
def test_equal_models_give_that_model(how: str) -> None:
    state = models(3, 1)[0]
    found = robust_average(readers([state] * 5), ["a", "b"], how, 0.2)  # type: ignore[arg-type]
    assert torch.equal(found["a"], state["a"])
    assert torch.equal(found["b"], state["b"])


@pytest.mark.parametrize(
    ("claims", "count"),
    [
        ([100, 300, 1000], [100, 300, 1000]),
        ([100, 300, 2**62], [100, 300, 3000]),
        ([100, 2**62], [100, 1000]),
        ([2**62], [2**62]),
        ([0, 0, 0, 50, 400], [0, 0, 0, 50, 400]),
        ([0, 0, 50, 60, 2**62], [0, 0, 50, 60, 600]),
        ([0, 0], [0, 0]),
        ([], []),
    ],
)
def test_a_claim_counts_at_most_ten_times_the_median_of_those_that_are_not_zero(
    claims: list[int], count: list[int]
) -> None:
    assert credible(claims) == count
