# SPDX-License-Identifier: Apache-2.0
"""Properties of reading ahead: the same as reading each row when it is asked for, whatever is asked for before."""

from __future__ import annotations

import pytest
import torch
from distill_world import Rows, config

from deepfusion.devices import features
from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.devices.read_ahead import ReadAhead


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("held", [1, 1 << 22])
def test_outputs_are_those_of_the_rows(rows: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LOGITS_HELD", held)
    models = [
        (from_config(config(name), seed=1).eval(), taps) for name, taps in (("gpt2-pico", (1,)), ("llama-pico", ()))
    ]
    reader = ReadAhead(models, Rows(0), rows, "fp32")
    for begin, end in ((0, rows), (rows, 2 * rows), (5, 9), (30, 37), (2, 3)):
        text = Rows(0)
        expected = [text.batch(row, 1) for row in range(begin, end)]
        for reading, (model, taps) in zip(reader(begin, end), models, strict=True):
            logits_BTV = reading.scores.logits(slice(None))
            assert len(logits_BTV) == end - begin
            assert not reading.scores.hidden_BTH.requires_grad
            for row, batch in enumerate(expected):
                alone = forward(model, batch, taps=taps)
                torch.testing.assert_close(logits_BTV[row : row + 1], alone.logits_BTV)
                for read, direct in zip(reading.taps, alone.taps, strict=True):
                    torch.testing.assert_close(read[row : row + 1], direct)


def test_what_was_asked_before_changes_no_bit() -> None:
    models = [(from_config(config("gpt2-pico"), seed=1).eval(), ())]
    first, second = (ReadAhead(models, Rows(0), 2, "fp32") for _ in range(2))
    for begin in (0, 2, 4):
        first(begin, begin + 2)
    assert torch.equal(first(6, 8)[0].scores.hidden_BTH, second(6, 8)[0].scores.hidden_BTH)


def test_nobody_reads_nothing() -> None:
    assert ReadAhead([], Rows(0), 4, "fp32")(0, 4) == []
