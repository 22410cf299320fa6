# SPDX-License-Identifier: Apache-2.0
"""A model in two halves: blocks 1..s on the device, s+1..L on the edge, and what crosses between (aeria, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepfusion.errors import MarketError
from deepfusion.market.exits.backbone import Backbone, Run, plain
from deepfusion.scores import Scores
from deepfusion.types import Batch


@dataclass(frozen=True, eq=False)
class Crossing:
    """All that the device sends.

    Attributes:
        cut: s, the number of blocks that have run.
        content: the token ids (B, T) as int32 at cut 0, else the hidden state (B, T, H).
        valid_BT: False on padding; None where there is none, and nothing is sent for it.
    """

    cut: int
    content: torch.Tensor
    valid_BT: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.content.nbytes + (0 if self.valid_BT is None else self.valid_BT.nbytes)


@torch.no_grad()
def device_half(backbone: Backbone, batch: Batch, cut: int) -> Crossing:
    """Run blocks 1..`cut` and nothing after them.

    Raises:
        MarketError: nothing crosses there: the cut is not one of 0..L-1.
    """
    if not 0 <= cut < backbone.num_blocks:
        raise MarketError(f"cut = {cut}: nothing crosses there; choose 0 to {backbone.num_blocks - 1}")
    valid_BT = None if bool(batch.valid_BT.all()) else batch.valid_BT
    if cut == 0:
        return Crossing(0, batch.input_ids_BT.int(), valid_BT)
    return Crossing(cut, backbone.stop_before(cut + 1, batch), valid_BT)


@torch.no_grad()
def edge_half(backbone: Backbone, crossing: Crossing) -> Scores:
    """Run the blocks after the cut, the final norm and leave the output matrix to whoever looks at the scores.

    Neither the embeddings nor the blocks before the cut are used.
    """
    if crossing.cut == 0:
        return backbone.scores(backbone.run(plain, input_ids_BT=crossing.content.long(), valid_BT=crossing.valid_BT))

    def go_on(number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
        if number <= crossing.cut:
            return hidden_BTH
        # what the model's forward has done to the state before its first block (GPT-2 adds positions) is dropped here
        return run(crossing.content if number == crossing.cut + 1 else hidden_BTH)

    return backbone.scores(backbone.run(go_on, state_BTH=crossing.content, valid_BT=crossing.valid_BT))


@torch.no_grad()
def run_split(backbone: Backbone, batch: Batch, cut: int) -> tuple[Scores, int]:
    """The model's scores with its blocks in two halves at cut 0..L, and the bytes that crossed."""
    if cut == backbone.num_blocks:
        return backbone.scores(backbone.run(plain, input_ids_BT=batch.input_ids_BT, valid_BT=batch.valid_BT)), 0
    crossing = device_half(backbone, batch, cut)
    return edge_half(backbone, crossing), crossing.nbytes
