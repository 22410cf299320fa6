# SPDX-License-Identifier: Apache-2.0
"""Who leaves where: the exit rule, and one pass over known text in which every position leaves by itself (aeria, section 3).

A position that has left keeps its state through the later blocks, whose keys and values are made of it: that is state
propagation, for all positions at once, and gives what token by token with a cache gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from deepfusion.market.exits.backbone import Run
from deepfusion.market.exits.heads import ExitHeads
from deepfusion.scores import Scores
from deepfusion.types import Batch

Confidence = Literal["probability", "entropy"]
"""How sure an exit is: its largest probability, or 1 - entropy / log V."""

LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True, eq=False)
class Verdict:
    """What an exit says of R positions.

    Attributes:
        confidence_R: between 0 and 1.
        token_R: its most likely next token.
        nll_R: negative log-likelihood of the token that does come next, nats; 0 where it was not given.
    """

    confidence_R: torch.Tensor
    token_R: torch.Tensor
    nll_R: torch.Tensor


@torch.no_grad()
def judge(scores: Scores, kind: Confidence, target_R: torch.Tensor | None = None) -> Verdict:
    """The verdict on scores of shape (R, H); logits are made a piece at a time, so memory does not grow with R V."""
    parts: list[tuple[torch.Tensor, ...]] = []
    rows, size = len(scores.hidden_BTH), max(1, LOGITS_AT_ONCE // scores.vocab_size)
    for begin in range(0, max(rows, 1), size):
        piece = slice(begin, begin + size)
        logits_CV = scores.logits(piece).float()
        best_C, token_C = logits_CV.max(-1)
        total_C = logits_CV.logsumexp(-1)
        nll_C = torch.zeros_like(best_C)
        if target_R is not None:
            nll_C = total_C - logits_CV.gather(-1, target_R[piece, None]).squeeze(-1)
        if kind == "entropy":
            expected_C = torch.linalg.vecdot((logits_CV - total_C[:, None]).exp_(), logits_CV)
            sure_C = 1 - (total_C - expected_C) / math.log(scores.vocab_size)
        else:
            sure_C = (best_C - total_C).exp()
        parts.append((sure_C, token_C, nll_C))
    return Verdict(*(torch.cat(part) for part in zip(*parts, strict=True)))


def leaves(verdict: Verdict, sigma: float) -> torch.Tensor:
    """Who leaves at an early exit, (R,). At sigma = 1 nobody does, however sure: that is the whole model."""
    return verdict.confidence_R >= sigma if sigma < 1 else torch.zeros_like(verdict.confidence_R, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Leaving:
    """Which exit each position took, and what it said there.

    Attributes:
        exit_BT: index 0..M-1 of the exit; M - 1 wherever `made_BT` is False.
        token_BT: its most likely next token.
        nll_BT: negative log-likelihood of the text's next token, nats.
    """

    exit_BT: torch.Tensor
    token_BT: torch.Tensor
    nll_BT: torch.Tensor


@torch.no_grad()
def leave_early(
    heads: ExitHeads, batch: Batch, made_BT: torch.Tensor, sigma: float, kind: Confidence = "probability"
) -> Leaving:
    """Read a batch of known text; each position of `made_BT` leaves at the first exit that is sure enough.

    Args:
        made_BT: positions that stand for generated tokens. The others, the prompts, run through all blocks. Each needs
            a next token in its row.
    """
    backbone, blocks = heads.backbone, heads.early
    target_BT = batch.input_ids_BT.roll(-1, dims=1)
    exit_BT = torch.full_like(target_BT, len(blocks))
    token_BT = torch.zeros_like(target_BT)
    nll_BT = torch.zeros_like(target_BT, dtype=torch.float32)
    left_BT = torch.zeros_like(made_BT)

    def keep(verdict: Verdict, here_BT: torch.Tensor, gone_R: torch.Tensor) -> None:
        gone_BT = here_BT.clone()
        gone_BT[here_BT] = gone_R
        token_BT[gone_BT], nll_BT[gone_BT] = verdict.token_R[gone_R], verdict.nll_R[gone_R]
        left_BT.logical_or_(gone_BT)

    def step(number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
        out_BTH = torch.where(left_BT[..., None], hidden_BTH, run(hidden_BTH))
        if number in blocks and sigma < 1:
            here_BT = made_BT & ~left_BT
            verdict = judge(heads.scores(number, out_BTH[here_BT]), kind, target_BT[here_BT])
            keep(verdict, here_BT, leaves(verdict, sigma))
            exit_BT[here_BT & left_BT] = blocks.index(number)
        return out_BTH

    last_BTH = backbone.run(step, input_ids_BT=batch.input_ids_BT, valid_BT=batch.valid_BT)
    here_BT = made_BT & ~left_BT
    verdict = judge(backbone.scores(last_BTH[here_BT]), kind, target_BT[here_BT])
    keep(verdict, here_BT, torch.ones_like(verdict.token_R, dtype=torch.bool))
    return Leaving(exit_BT, token_BT, nll_BT)
