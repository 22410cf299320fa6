# SPDX-License-Identifier: Apache-2.0
"""Noise out of a key: the same again for the same key and stream, normal, and of no use to who lacks the key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from deepfusion.devices import noise
from deepfusion.devices.noise import Noise

KEY, OTHER = bytes(32), bytes([1] * 32)


@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 9))
def test_a_stream_is_one_sequence_however_it_is_taken(number: int, first: int, second: int) -> None:
    parts = Noise(KEY).stream(number)
    taken = np.concatenate([parts.words(first), parts.words(second)])
    assert np.array_equal(taken, Noise(KEY).stream(number).words(first + second))


def test_other_streams_and_other_keys_have_nothing_in_common() -> None:
    found = [Noise(key).stream(number).words(4096) for key in (KEY, OTHER) for number in (0, 1, 2**40)]
    assert len({word for words in found for word in words.tolist()}) > 0.999 * sum(map(len, found))


def test_the_words_of_a_key_never_change() -> None:
    """AES-256 of a counter that begins at 0, with a key of zeros: NIST's known answer."""
    assert Noise(KEY).stream(0).words(4).tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_numbers_are_normal_and_uncorrelated() -> None:
    drawn = Noise(KEY).stream(3).normal(200_001)
    assert drawn.dtype == torch.float32
    assert len(drawn) == 200_001
    assert kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1])) < 0.01
    halves = drawn[:200_000].view(2, -1).abs()
    assert abs(float(torch.corrcoef(halves)[0, 1])) < 0.01, "the two numbers of a pair"
    assert kstest(Noise(KEY).stream(4).uniform(100_000), "uniform").pvalue > 0.01


def test_large_draws_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "PIECE", 100)
    drawn = Noise(KEY).stream(0).normal(1001)
    assert kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert len(set(drawn.tolist())) == 1001
