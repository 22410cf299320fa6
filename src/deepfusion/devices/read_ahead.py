# SPDX-License-Identifier: Apache-2.0
"""Frozen models read the rows of a training text ahead of it: many rows at once cost less than the same rows in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from deepfusion.devices.features import Outputs, forward
from deepfusion.training import Precision, accelerator
from deepfusion.types import Text

LOGITS_HELD = 1 << 22
"""Logits of one model that are kept for the rows to come; at a large vocabulary that is the rows of one step."""


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
        vocabulary = max((int(model.config.vocab_size) for model, _ in models), default=1)
        self._rows = rows * max(1, min(16 // rows, LOGITS_HELD // (rows * text.sequence_length * vocabulary)))
        self._block, self._read = -1, list[Outputs]()

    def __call__(self, begin: int, end: int) -> list[Outputs]:
        """Each model's outputs on rows `begin` .. `end - 1` of the text, without gradient."""
        if not self._models:
            return []
        parts: list[list[Outputs]] = []
        while begin < end:
            block = begin // self._rows
            stop = min(end, (block + 1) * self._rows)
            rows = slice(begin - block * self._rows, stop - block * self._rows)
            parts.append([_rows_of(outputs, rows) for outputs in self._outputs(block)])
            begin = stop
        return [_joined(pieces) for pieces in zip(*parts, strict=True)]

    def _outputs(self, block: int) -> list[Outputs]:
        if block != self._block:
            batch = self._text.batch(block, self._rows).to(self._compute.device)
            with torch.no_grad(), self._compute.autocast():
                self._read = [forward(model, batch, taps=taps) for model, taps in self._models]
            self._block = block
        return self._read


def _rows_of(outputs: Outputs, rows: slice) -> Outputs:
    return Outputs(outputs.logits_BTV[rows], tuple(tap_BTH[rows] for tap_BTH in outputs.taps))


def _joined(pieces: Sequence[Outputs]) -> Outputs:
    if len(pieces) == 1:
        return pieces[0]
    taps = zip(*(piece.taps for piece in pieces), strict=True)
    return Outputs(torch.cat([piece.logits_BTV for piece in pieces]), tuple(torch.cat(tap) for tap in taps))
