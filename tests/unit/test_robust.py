# SPDX-License-Identifier: Apache-2.0
"""Averages that bear hostile models: their definitions by brute force, and what they cannot be made to do."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from deepfusion.robust import Reader, krum, robust_average
from deepfusion.types import State


def models(seed: int, count: int) -> list[State]:
    torch.manual_seed(seed)
    return [{"a": torch.randn(3, 4), "b": torch.randn(5), "n": torch.tensor(index)} for index in range(count)]


def readers(states: list[State]) -> list[Reader]:
    return [state.__getitem__ for state in states]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_the_median_and_the_trimmed_mean_are_taken_number_by_number(count: int) -> None:
    states = models(0, count)
    median = robust_average(readers(states), ["a", "b", "n"], "median", 0.2)
    trimmed = robust_average(readers(states), ["a", "b", "n"], "trimmed", 0.2)
    cut = int(0.2 * count)
    for name in ("a", "b"):
        ordered = torch.stack([s[name] for s in states]).double().sort(0).values
        middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
        assert torch.allclose(median[name].double(), middle, atol=1e-7)
        assert torch.allclose(trimmed[name].double(), ordered[cut : count - cut].mean(0), atol=1e-7)
        assert median[name].dtype == torch.float32
    assert int(median["n"]) == 0, "a whole number is the first model's"


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
