# SPDX-License-Identifier: Apache-2.0
"""Frozen models read the rows of a training text ahead of it: many rows at once cost less than the same rows in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from deepfusion.devices.features import Reading, read
from deepfusion.training import Precision, accelerator
from deepfusion.types import Text

ROWS_AHEAD = 16
"""Rows that a model reads at once: enough for products of a good size."""


class ReadAhead:
    """What frozen models say of a text's rows, read a block at a time; a pure function of the rows asked for.

    Args:
        models: each with the blocks whose output is wanted (`features.forward`).
        text: what they read.
        rows: that one step asks for.
        precision: of the computation (`Optimisation.precision`).
    """

    def __init__(
        self, models: Sequence[tuple[PreTrainedModel, Sequence[int]]], text: Text, rows: int, precision: Precision
    ) -> None:
        self._models, self._text, self._compute = models, text, accelerator(precision)
        self._rows = rows * max(1, ROWS_AHEAD // rows)
        self._block, self._read = -1, list[Reading]()

    def __call__(self, begin: int, end: int) -> list[Reading]:
        """What each model makes of rows `begin` .. `end - 1` of the text, without gradient."""
        if not self._models:
            return []
        parts: list[list[Reading]] = []
        while begin < end:
            block = begin // self._rows
            stop = min(end, (block + 1) * self._rows)
            rows = slice(begin - block * self._rows, stop - block * self._rows)
            parts.append([_rows_of(reading, rows) for reading in self._readings(block)])
            begin = stop
        return [_joined(pieces) for pieces in zip(*parts, strict=True)]

    def _readings(self, block: int) -> list[Reading]:
        if block != self._block:
            batch = self._text.batch(block, self._rows).to(self._compute.device)
            with torch.no_grad(), self._compute.autocast():
                self._read = [read(model, batch, taps=taps) for model, taps in self._models]
            self._block = block
        return self._read


def _rows_of(reading: Reading, rows: slice) -> Reading:
    return Reading(reading.scores.rows(rows), tuple(tap_BTH[rows] for tap_BTH in reading.taps))


def _joined(pieces: Sequence[Reading]) -> Reading:
    if len(pieces) == 1:
        return pieces[0]
    hidden_BTH = torch.cat([piece.scores.hidden_BTH for piece in pieces])
    taps = zip(*(piece.taps for piece in pieces), strict=True)
    return Reading(pieces[0].scores._replace(hidden_BTH=hidden_BTH), tuple(torch.cat(tap) for tap in taps))
