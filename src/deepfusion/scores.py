# SPDX-License-Identifier: Apache-2.0
"""A model's next-token scores, as they are or as what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch.nn import functional


class Scores(NamedTuple):
    """A model's next-token scores: as logits, or as what they are made of, logits = hidden weight^T + bias.

    Attributes:
        hidden_BTH: the last hidden state; the logits themselves where there is no weight.
        weight_VH: the output matrix.
        bias_V: its bias.
    """

    hidden_BTH: torch.Tensor
    weight_VH: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.hidden_BTH.shape[-1] if self.weight_VH is None else len(self.weight_VH)

    def flat(self) -> Scores:
        """The same with batch and time as one axis."""
        return self._replace(hidden_BTH=self.hidden_BTH.reshape(-1, self.hidden_BTH.shape[-1]))

    def rows(self, rows: slice) -> Scores:
        """Those of some rows of the batch."""
        return self._replace(hidden_BTH=self.hidden_BTH[rows])

    def first(self, count: int) -> Scores:
        """Those of the first `count` tokens of the vocabulary."""
        hidden_BTH, weight_VH, bias_V = self
        if count == self.vocab_size:
            return self
        if weight_VH is None:
            return Scores(hidden_BTH[..., :count])
        return Scores(hidden_BTH, weight_VH[:count], None if bias_V is None else bias_V[:count])

    def split(self, counts: Sequence[int]) -> list[Scores]:
        """Parts of `counts` rows each."""
        return [self._replace(hidden_BTH=part_BTH) for part_BTH in self.hidden_BTH.split(list(counts))]

    def detached(self) -> Scores:
        """The same without gradient."""
        parts = (None if part is None else part.detach() for part in self)
        return Scores(*cast(tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], tuple(parts)))

    def logits(self, rows: slice | torch.Tensor | int) -> torch.Tensor:
        """Logits of some entries of the first axis."""
        hidden = self.hidden_BTH[rows]
        return hidden if self.weight_VH is None else functional.linear(hidden, self.weight_VH, self.bias_V)
