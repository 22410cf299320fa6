# SPDX-License-Identifier: Apache-2.0
"""Two sources of training text in a fixed proportion, e.g. public text and text that teachers wrote."""

from __future__ import annotations

import torch

from deepfusion.data.packing import PackedText
from deepfusion.types import Batch


class MixedText:
    """Batches with `share` of their rows from `second`, the rest from `first`; pure in (step, batch_size) like both.

    Over many steps the proportion is exact: row r of the whole stream comes from `second` when
    floor((r + 1) share) > floor(r share).
    """

    def __init__(self, first: PackedText, second: PackedText, share: float) -> None:
        assert first.sequence_length == second.sequence_length
        assert 0 <= share <= 1
        self.first, self.second, self.share = first, second, share
        self.sequence_length = first.sequence_length

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of one step, (batch_size, sequence_length)."""
        from_second = [int((step * batch_size + r + 1) * self.share) > int((step * batch_size + r) * self.share)
                       for r in range(batch_size)]  # fmt: skip
        ours, theirs = self.first.batch(step, batch_size), self.second.batch(step, batch_size)
        pick_B1 = torch.tensor(from_second)[:, None]
        return Batch(
            torch.where(pick_B1, theirs.input_ids_BT, ours.input_ids_BT),
            torch.where(pick_B1, theirs.counted_BT, ours.counted_BT),
            torch.where(pick_B1, theirs.valid_BT, ours.valid_BT),
        )
