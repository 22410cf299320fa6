# SPDX-License-Identifier: Apache-2.0
"""The fleet: who carries which architecture, and which options make no fleet."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.devices.fleet import FleetOptions, NamedDevice, cards, shared_ids
from deepfusion.types import ModelSpec

GPT, LLAMA = ModelSpec(name="gpt", preset="gpt2-pico"), ModelSpec(name="llama", preset="llama-pico")
MINE = NamedDevice(id="mine", model="llama", files=("own.jsonl",))


def fleet(**keys: Any) -> FleetOptions:
    return FleetOptions(**{"count": 4, "models": (GPT, LLAMA), **keys})


@given(
    count=st.integers(1, 300),
    shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
)
def test_architectures_are_given_out_by_largest_remainder_of_their_shares(
    count: int, shares: list[float], seed: int
) -> None:
    models = tuple(ModelSpec(name=f"m{i}", preset="gpt2-pico", share=share) for i, share in enumerate(shares))
    given_out = cards(fleet(count=count, models=models), seed)
    assert [card.id for card in given_out] == list(shared_ids(fleet(count=count)))
    assert len({card.id for card in given_out}) == count
    carried = Counter(card.model.name for card in given_out)
    for spec in models:
        exact = spec.share / sum(shares) * count
        assert math.floor(exact - 1e-9) <= carried[spec.name] <= math.ceil(exact + 1e-9)


def test_the_seed_alone_decides_who_gets_what() -> None:
    one, again, other = (cards(fleet(count=40), seed) for seed in (1, 1, 2))
    assert one == again
    assert [c.model.name for c in one] != [c.model.name for c in other]


def test_named_devices_come_after_the_others_with_their_own_model_and_limit() -> None:
    lean = NamedDevice(id="lean", model="gpt", files=("a.txt",), memory_limit_gib=0.5)
    fleet_cards = cards(fleet(named=(MINE, lean), memory_limit_gib=2.0), 0)
    assert [c.id for c in fleet_cards[4:]] == ["mine", "lean"]
    assert [c.model.name for c in fleet_cards[4:]] == ["llama", "gpt"]
    assert [c.memory_limit_bytes for c in fleet_cards] == [2**31] * 5 + [2**29]
    assert not list(fleet(count=0, named=(MINE,)).faults())


def test_good_options_have_no_faults() -> None:
    assert not list(fleet(alpha=math.inf, sigma=0.0, named=(MINE,), max_steps=1, memory_limit_gib=0.1).faults())


BAD: dict[str, FleetOptions] = {
    "count = 0: .*at least one": fleet(count=0),
    "count = -3": fleet(count=-3),
    "alpha = 0": fleet(alpha=0.0),
    "alpha = nan": fleet(alpha=math.nan),
    "sigma = -1": fleet(sigma=-1.0),
    "epochs = 0": fleet(epochs=0.0),
    "epochs = inf": fleet(epochs=math.inf),
    "max_steps = 0": fleet(max_steps=0),
    "threads = 0": fleet(threads=0),
    "memory_limit_gib = 0": fleet(memory_limit_gib=0.0),
    "models = .*add a": fleet(models=()),
    '"gpt" is given 2 times': fleet(models=(GPT, GPT)),
    'name = "../up"': fleet(models=(ModelSpec(name="../up", preset="gpt2-pico"),)),
    "none of preset, folder, hub": fleet(models=(ModelSpec(name="m"),)),
    "preset and hub exclude": fleet(models=(ModelSpec(name="m", preset="gpt2", hub="gpt2"),)),
    'did you mean "gpt2-pico"': fleet(models=(ModelSpec(name="m", preset="gpt2-pcio"),)),
    "share = 0": fleet(models=(ModelSpec(name="m", preset="gpt2-pico", share=0.0),)),
    "share = nan": fleet(models=(ModelSpec(name="m", preset="gpt2-pico", share=math.nan),)),
    'id "mine" is given 2 times': fleet(named=(MINE, MINE)),
    'id = "device-000"': fleet(named=(NamedDevice(id="device-000", model="gpt", files=("a",)),)),
    'id = "a/b"': fleet(named=(NamedDevice(id="a/b", model="gpt", files=("a",)),)),
    'did you mean "llama"': fleet(named=(NamedDevice(id="a", model="lama", files=("a",)),)),
    '"a": memory_limit_gib = -1': fleet(named=(NamedDevice(id="a", model="gpt", files=("a",), memory_limit_gib=-1.0),)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_option_is_answered_by_one_fault_with_a_cure(message: str) -> None:
    faults = list(BAD[message].faults())
    assert len(faults) == 1
    assert re.search(message, faults[0]), faults
    assert ";" in faults[0]
