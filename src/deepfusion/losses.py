# SPDX-License-Identifier: Apache-2.0
"""Token losses: cross-entropy and KL to teachers in one fused pass (DeepFusion, eq. 2, 10, 11), and the MoE balance loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch.nn import functional

from deepfusion.fused import FusedTokenLoss, Scores, WeighedTeacher
from deepfusion.types import Batch


class TeacherScores(NamedTuple):
    """One teacher's prediction of the student's next tokens.

    Attributes:
        scores: over the student's vocabulary, at the student's positions; no gradient flows into them.
        weight: factor of its KL in the loss: beta * omega in eq. (11).
        matched_BT: bool, positions at which it speaks (all that hold a token, when the tokenizer is shared).
        trusted_B: bool, rows on which it is listened to (`listen`); all when left out.
        exponent: g of OFA-KD (arXiv 2310.19444, eq. 8): not the KL but -sum_v ((q_v + 1{v=c})^g - 1{v=c}) log p_v is
            minimised, where c is the next token; at g = 1 that is the KL plus the teacher's entropy.
    """

    scores: Scores
    weight: float
    matched_BT: torch.Tensor
    trusted_B: torch.Tensor | None = None
    exponent: float = 1.0


class TokenLosses(NamedTuple):
    """The parts of `next_token_losses`, for logs: scalars without gradient.

    Attributes:
        cross_entropy: mean over counted positions, in nats; 0 without one.
        divergence: tau^2 * KL(teacher || student), mean over the positions that are listened to, by their weight.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def next_token_losses(
    student: Scores, teachers: Sequence[TeacherScores], batch: Batch, temperature: float
) -> tuple[torch.Tensor, TokenLosses]:
    """Cross-entropy plus the weighted KL to every teacher, in one pass; and both parts for the log.

    Position t predicts token t+1. Cross-entropy is the mean over the positions whose next token is counted and valid
    (eq. 2); the KL of a teacher is tau^2 * mean KL(softmax(z_T / tau) || softmax(z_S / tau)) over the positions that it
    matches (eq. 10). A mean over no position is 0 with zero gradient. Rows that a teacher is not trusted on count in its
    mean as zeros.

    Args:
        student: of any floating type; the arithmetic on logits is done in float32 at least.
        teachers: may be empty: then the loss is the cross-entropy.
        temperature: tau > 0.

    Returns:
        loss = cross-entropy + sum of weight * KL, differentiable once; and its parts.
    """
    counted_BT = torch.zeros_like(batch.counted_BT)
    counted_BT[:, :-1] = batch.counted_BT[:, 1:] & batch.valid_BT[:, 1:]
    target_BT = batch.input_ids_BT.roll(-1, dims=1)
    mean_R = _mean_weights(counted_BT)
    soft: list[WeighedTeacher] = []
    used_R = counted_BT.flatten()
    for teacher in teachers:
        matched_BT = teacher.matched_BT
        if teacher.exponent != 1:
            matched_BT = matched_BT & functional.pad(batch.valid_BT[:, 1:], (0, 1))  # where there is a next token
        weight_R = teacher.weight * _mean_weights(matched_BT)
        if teacher.trusted_B is not None:
            trusted_BT = teacher.trusted_B[:, None].expand_as(matched_BT)
            matched_BT, weight_R = matched_BT & trusted_BT, weight_R * trusted_BT.flatten()
        soft.append(WeighedTeacher(teacher.scores.detached().flat(), weight_R, teacher.exponent))
        used_R = used_R | matched_BT.flatten()
    row_Q = used_R.nonzero().squeeze(-1)
    parts = FusedTokenLoss.apply(*student.flat(), row_Q, target_BT.flatten(), mean_R, temperature, soft)
    loss, cross_entropy, divergence = cast(tuple[torch.Tensor, ...], parts)
    heard = sum(float(weight_R.sum()) for _, weight_R, _ in soft)
    return loss, TokenLosses(cross_entropy, divergence / heard if heard else divergence)


Trust = Literal["all", "better", "best", "always"]
"""Whom a student listens to: all teachers; those ahead of it; the best of those; each row's best, ahead of it or not."""


@torch.no_grad()
def listen(teachers: Sequence[TeacherScores], student: Scores, batch: Batch, trust: Trust) -> list[TeacherScores]:
    """The teachers, each with the rows of text on which it is listened to.

    A teacher knows its own domain; elsewhere its distributions lead away from the text. "better" keeps the rows that a
    teacher predicts at least as well as the student does, "best" of those teachers the one that predicts the row best,
    with the weight of all. "always" asks that one also where the student is ahead of it. A teacher whose prediction of a
    row is not finite is not listened to there.
    """
    if trust == "all" or not teachers:
        return list(teachers)
    nll_AB = torch.stack([_row_cross_entropy(teacher.scores, batch) for teacher in teachers])
    heard_AB = nll_AB.isfinite()
    nll_AB = nll_AB.where(heard_AB, torch.inf)
    if trust != "always":
        heard_AB = heard_AB & (nll_AB <= _row_cross_entropy(student, batch))
    if trust == "better":
        return [teacher._replace(trusted_B=rows_B) for teacher, rows_B in zip(teachers, heard_AB, strict=True)]
    best_B, whole = nll_AB.argmin(0), sum(teacher.weight for teacher in teachers)
    return [
        teacher._replace(trusted_B=heard_B & (best_B == number), weight=whole)
        for number, (teacher, heard_B) in enumerate(zip(teachers, heard_AB, strict=True))
    ]


def _row_cross_entropy(scores: Scores, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropy over each row's next tokens, (B,)."""
    target_BT, valid_BT = batch.input_ids_BT[:, 1:], batch.valid_BT[:, 1:]
    nll = [
        functional.cross_entropy(scores.logits(row)[:-1].detach().float(), target_T, reduction="none") * valid_T
        for row, (target_T, valid_T) in enumerate(
            zip(target_BT, valid_BT, strict=True)
        )  # one at a time: memory flat in B
    ]
    return torch.stack(nll).sum(1)


def balance_loss(
    probabilities: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor], valid_BT: torch.Tensor
) -> torch.Tensor:
    """E * sum_i f_i * Pbar_i, averaged over the MoE layers: 1 under uniform routing, at most E (method, section 9).

    Args:
        probabilities: each MoE layer's routing probabilities, [B*T, E], rows summing to 1; gradients flow through them.
        chosen: the experts that each MoE layer's router sends the tokens to, [B*T, k]: not always the most probable ones.
        valid_BT: bool, False on padding, which is left out.

    Returns:
        Scalar. f_i is the share of the assignments that went to expert i, Pbar_i its mean probability.
    """
    valid_R = valid_BT.flatten()
    losses: list[torch.Tensor] = []
    for probability_RE, chosen_Rk in zip(probabilities, chosen, strict=True):
        kept_RE, sent = probability_RE[valid_R], chosen_Rk[valid_R].flatten()
        share_E = torch.bincount(sent, minlength=kept_RE.shape[-1]).to(kept_RE.dtype) / max(1, sent.numel())
        losses.append(kept_RE.shape[-1] * (share_E * kept_RE.sum(0) / max(1, len(kept_RE))).sum())
    return torch.stack(losses).mean()


def _mean_weights(mask_BT: torch.Tensor) -> torch.Tensor:
    """Weights that turn a sum over positions into the mean over `mask_BT`: all 0 for an empty mask."""
    return mask_BT.flatten().double() / mask_BT.sum().clamp(min=1)
