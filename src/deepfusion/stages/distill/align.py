# SPDX-License-Identifier: Apache-2.0
"""How a teacher's tokens lie against the student's: positions, vocabulary and mask as one value.

Distillation reads a teacher only through an `Alignment`, so it never assumes equal lengths or vocabularies. The
identity, `same_tokens`, is the shared-tokenizer case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from deepfusion.errors import ModelError
from deepfusion.scores import Scores
from deepfusion.types import Batch


@dataclass(frozen=True, eq=False)
class Alignment:
    """One batch of text as a teacher reads it, and where its predictions meet the student's.

    Attributes:
        batch: the text in the teacher's tokens.
        matched_BT: bool, student positions whose next token the teacher predicts too.
        position_BT: the teacher's position for each student position (any where unmatched); None when they coincide.
        token_V: the teacher's token id for each of the student's; None when the vocabularies coincide.
    """

    batch: Batch
    matched_BT: torch.Tensor
    position_BT: torch.Tensor | None = None
    token_V: torch.Tensor | None = None

    def on_student(self, scores: Scores) -> Scores:
        """The teacher's scores at the student's positions, over the student's vocabulary."""
        hidden_BTH, weight_VH, bias_V = scores
        if self.position_BT is not None:
            hidden_BTH = hidden_BTH.take_along_dim(self.position_BT[..., None], dim=1)
        if self.token_V is None:
            return Scores(hidden_BTH, weight_VH, bias_V)
        if weight_VH is None:
            return Scores(hidden_BTH.index_select(-1, self.token_V))
        return Scores(hidden_BTH, weight_VH[self.token_V], None if bias_V is None else bias_V[self.token_V])


def same_tokens(batch: Batch) -> Alignment:
    """The identity: teacher and student share the tokenizer, every position that holds a token matches itself."""
    return Alignment(batch, batch.valid_BT)


def check_same_vocabulary(student_tokenizer: Path, teacher_folder: Path, teacher: str) -> None:
    """Assert that a teacher gives every token the id that the student gives it.

    Raises:
        ModelError: names the teacher and a token that differs.
    """
    ours = AutoTokenizer.from_pretrained(student_tokenizer).get_vocab()
    theirs = AutoTokenizer.from_pretrained(teacher_folder).get_vocab()
    if ours == theirs:
        return
    token = min((ours.items() ^ theirs.items()), key=lambda item: (item[1], item[0]))[0]
    raise ModelError(
        f"teacher {teacher} has another vocabulary than the student ({len(theirs)} tokens against {len(ours)}; {token!r} "
        'differs); give all models one tokenizer, or leave the KL out: [distillation] align = "none", or --beta 0'
    )
