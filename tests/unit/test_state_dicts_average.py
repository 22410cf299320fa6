# SPDX-License-Identifier: Apache-2.0
"""Properties of averaged models: exact where they must be, and refused where an average means nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepfusion.errors import ModelError
from deepfusion.state_dicts import average, check_finite, distinct_state, load_distinct
from deepfusion.types import State

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def random_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 5, generator=generator).to(dtype),
        "tiny": (torch.randn(3, generator=generator) * 1e-30).to(dtype),
        "steps": torch.tensor([3, 4]),
    }


@given(copies=st.integers(1, 40), seed=st.integers(0, 9), dtype=st.sampled_from(FLOATS))
def test_identical_models_average_to_that_model_bit_for_bit(copies: int, seed: int, dtype: torch.dtype) -> None:
    state = random_state(seed, dtype)
    mean = average((f"copy {index}", state, 1.0) for index in range(copies))
    for name, tensor in state.items():
        assert mean[name].dtype == tensor.dtype
        assert torch.equal(mean[name].view(torch.uint8), tensor.view(torch.uint8))


@given(weights=st.lists(st.floats(0.001, 1e6), min_size=1, max_size=12))
def test_identical_models_average_to_that_model_whatever_their_weights(weights: list[float]) -> None:
    state = random_state(1)
    mean = average((str(index), state, weight) for index, weight in enumerate(weights))
    assert all(torch.equal(mean[name], state[name]) for name in state)


def test_signs_of_zero_survive() -> None:
    mean = average([("a", {"w": torch.tensor([-0.0])}, 1.0), ("b", {"w": torch.tensor([-0.0])}, 1.0)])
    assert torch.signbit(mean["w"]).item()


def test_weighted_mean_equals_numpys() -> None:
    states = [random_state(seed) for seed in range(5)]
    weights = [1.0, 2.0, 0.0, 4.0, 0.5]
    mean = average((str(i), s, w) for i, (s, w) in enumerate(zip(states, weights, strict=True)))
    expected = sum(s["weight"].double() * w for s, w in zip(states, weights, strict=True)) / sum(weights)
    assert torch.equal(mean["weight"], expected.float())


def test_order_of_models_does_not_matter_beyond_the_last_digit() -> None:
    states = [(str(seed), random_state(seed), 1.0) for seed in range(30)]
    forth, back = average(states), average(reversed(states))
    torch.testing.assert_close(forth["weight"], back["weight"], rtol=2e-7, atol=0)


def test_a_thousand_small_updates_are_not_lost() -> None:
    """Plain float32 sums would drift: 4096 models of 0.1 sum to 409.6 only in float64."""
    mean = average((str(i), {"w": torch.full((2,), 0.1)}, 1.0) for i in range(4096))
    assert torch.equal(mean["w"], torch.full((2,), 0.1))


def test_inputs_are_left_alone_and_results_share_nothing_with_them() -> None:
    state = {"w": torch.ones(3, dtype=torch.float64), "n": torch.tensor([5])}
    mean = average([("a", state, 3.0)])
    mean["w"] += 1
    mean["n"] += 1
    assert state["w"].tolist() == [1, 1, 1]
    assert state["n"].tolist() == [5]


def test_integer_buffers_are_those_of_the_first_model() -> None:
    first, second = random_state(0), random_state(1) | {"steps": torch.tensor([30, 40])}
    assert average([("a", first, 1.0), ("b", second, 1.0)])["steps"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.zeros(5, 7)}, "weight"),
        ({"weight": torch.zeros(7, 5, dtype=torch.float16)}, "weight"),
        ({"extra": torch.zeros(1)}, "extra"),
        ({"tiny": torch.tensor([1.0, float("nan"), 0.0])}, "tiny"),
        ({"tiny": torch.tensor([1.0, float("inf"), 0.0])}, "tiny"),
    ],
)
def test_a_model_that_does_not_fit_is_named_with_its_tensor(change: State, says: str) -> None:
    states = [("good", random_state(0), 1.0), ("device-7", random_state(1) | change, 1.0)]
    with pytest.raises(ModelError, match=f"device-7.*{says}"):
        average(states)


def test_a_missing_tensor_is_named() -> None:
    short = random_state(1)
    del short["weight"]
    with pytest.raises(ModelError, match=r"device-7.*weight.*missing"):
        average([("good", random_state(0), 1.0), ("device-7", short, 1.0)])


def test_an_average_of_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="at least one"):
        average([])


def test_a_model_is_let_go_before_the_next_one_is_read() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def states() -> Iterator[tuple[str, State, float]]:
        for index in range(4):
            assert all(ref() is None for ref in seen[:-1]), "an earlier model is still held"
            big, small = torch.ones(1000), torch.ones(1)
            seen[:] = [weakref.ref(big)]
            yield str(index), {"big": big, "small": small}, 1.0
            del big, small
            assert seen[0]() is None, "the model that was just added is still held"

    assert average(states())["big"][0] == 1


def test_infinite_numbers_are_found_in_any_float_type() -> None:
    for dtype in FLOATS:
        with pytest.raises(ModelError, match="student 3: tensor w"):
            check_finite({"w": torch.tensor([1.0, float("inf")], dtype=dtype)}, "student 3")
    check_finite({"w": torch.ones(2), "n": torch.tensor([1])}, "student 3")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("also_nothing", torch.zeros(0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_are_listed_once_and_unlike_ones_always(device: str) -> None:
    with torch.device(device):
        model = _Tied()
    assert list(distinct_state(model)) == ["nothing", "also_nothing", "embed.weight"]


def test_what_is_tied_follows_when_a_distinct_state_is_loaded() -> None:
    source, target = _Tied(), _Tied()
    load_distinct(target, distinct_state(source))
    assert target.head.weight is target.embed.weight
    assert torch.equal(target.head.weight, source.embed.weight)
