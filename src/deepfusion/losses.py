# SPDX-License-Identifier: Apache-2.0
"""Token losses: cross-entropy and KL to teachers in one fused pass (DeepFusion, eq. 2, 10, 11), and the MoE balance loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional

from deepfusion.fused import Choice, FusedTokenLoss, WeighedTeacher
from deepfusion.scores import Scores
from deepfusion.types import Batch


class TeacherScores(NamedTuple):
    """One teacher's prediction of the student's next tokens.

    Attributes:
        scores: over the student's vocabulary, at the student's positions; no gradient flows into them.
        weight: omega in eq. (11), the share of its KL among those of a domain's teachers.
        matched_BT: bool, positions at which it speaks (all that hold a token, when the tokenizer is shared).
        trusted_B: bool, rows on which it is listened to; all when left out.
        exponent: g of OFA-KD (arXiv 2310.19444, eq. 8): not the KL but -sum_v ((q_v + 1{v=c})^g - 1{v=c}) log p_v is
            minimised, where c is the next token; at g = 1 that is the KL plus the teacher's entropy.
    """

    scores: Scores
    weight: float
    matched_BT: torch.Tensor
    trusted_B: torch.Tensor | None = None
    exponent: float = 1.0


class TokenLosses(NamedTuple):
    """The parts of `next_token_losses`, for logs: scalars without gradient; and whom it listened to.

    Attributes:
        cross_entropy: mean over counted positions, in nats; 0 without one.
        divergence: tau^2 * KL(teacher || student), mean over the positions that are listened to, by their weight.
        heard: the teachers, with the rows of text and the weight with which they were listened to.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor
    heard: list[TeacherScores]


Trust = Literal["all", "better", "best", "always"]
"""Whom a student listens to: all teachers; those ahead of it; the best of those; each row's best, ahead of it or not."""


def next_token_losses(
    student: Scores, teachers: Sequence[TeacherScores], batch: Batch, temperature: float, *, beta: float = 1.0,
    trust: Trust = "all",
) -> tuple[torch.Tensor, TokenLosses]:  # fmt: skip
    """Cross-entropy plus the weighted KL to every teacher, in one pass; and both parts for the log.

    Position t predicts token t+1. Cross-entropy is the mean over the positions whose next token is counted and valid
    (eq. 2); the KL of a teacher is tau^2 * mean KL(softmax(z_T / tau) || softmax(z_S / tau)) over the positions that it
    matches (eq. 10). A mean over no position is 0 with zero gradient. Rows that a teacher is not trusted on count in its
    mean as zeros.

    A teacher knows its own domain; elsewhere its distributions lead away from the text. `trust` = "better" keeps the rows of
    text that a teacher predicts at least as well as the student does, "best" of those teachers the one that predicts the row
    best, with the weight of all. "always" asks that one also where the student is ahead of it. A teacher whose prediction of
    a row is not finite is not listened to there. With any of the three, `trusted_B` of the teachers must be left out.

    Args:
        student: of any floating type; the arithmetic on logits is done in float32 at least.
        teachers: may be empty: then the loss is the cross-entropy.
        temperature: tau > 0.
        beta: weight of the KLs.

    Returns:
        loss = cross-entropy + beta * sum of weight * KL, differentiable once; and its parts.
    """
    counted_BT = torch.zeros_like(batch.counted_BT)
    counted_BT[:, :-1] = batch.counted_BT[:, 1:] & batch.valid_BT[:, 1:]
    follows_BT = functional.pad(batch.valid_BT[:, 1:], (0, 1))  # there is a next token
    target_BT = batch.input_ids_BT.roll(-1, dims=1)
    mean_R = _mean_weights(counted_BT)
    choice: Choice | None = None
    if teachers and trust != "all":
        assert all(teacher.trusted_B is None for teacher in teachers), "decided here"
        choice = Choice(target_BT.shape[1], follows_BT.flatten(), partial(_listened_to, trust))
        if trust != "better":
            whole = sum(teacher.weight for teacher in teachers)
            teachers = [teacher._replace(weight=whole) for teacher in teachers]
    soft: list[WeighedTeacher] = []
    used_BT = counted_BT if choice is None else counted_BT | follows_BT
    for teacher in teachers:
        matched_BT = teacher.matched_BT if teacher.exponent == 1 else teacher.matched_BT & follows_BT
        weight_R = beta * teacher.weight * _mean_weights(matched_BT)
        if teacher.trusted_B is not None:
            matched_BT, weight_R = matched_BT & teacher.trusted_B[:, None], _on_rows(weight_R, teacher.trusted_B)
        soft.append(WeighedTeacher(teacher.scores.detached().flat(), weight_R, teacher.exponent))
        used_BT = used_BT | matched_BT
    row_Q = used_BT.flatten().nonzero().squeeze(-1)
    found: Any = FusedTokenLoss.apply(*student.flat(), row_Q, target_BT.flatten(), mean_R, temperature, soft, choice)
    loss, cross_entropy, divergence, heard_AB = found
    weights = [weight_R for _, weight_R, _ in soft]
    if heard_AB is not None:
        weights = [_on_rows(weight_R, heard_B) for weight_R, heard_B in zip(weights, heard_AB, strict=True)]
        teachers = [teacher._replace(trusted_B=heard_B) for teacher, heard_B in zip(teachers, heard_AB, strict=True)]
    heard = sum(float(weight_R.sum()) for weight_R in weights)
    return loss, TokenLosses(cross_entropy, divergence / heard if heard else divergence, list(teachers))


def _listened_to(trust: Trust, nll_B: torch.Tensor, nll_AB: torch.Tensor) -> torch.Tensor:
    """Which teachers are listened to on which rows of text, by how well student and teachers predict them, in nats."""
    heard_AB = nll_AB.isfinite()
    nll_AB = nll_AB.where(heard_AB, torch.inf)
    if trust != "always":
        heard_AB = heard_AB & (nll_AB <= nll_B)
    if trust == "better":
        return heard_AB
    best_B, number_A1 = nll_AB.argmin(0), torch.arange(len(nll_AB), device=nll_AB.device)[:, None]
    return heard_AB & (best_B == number_A1)


def _on_rows(weight_R: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
    """Weights of positions, 0 on all rows of text but these."""
    return (weight_R.view(len(rows_B), -1) * rows_B[:, None]).flatten()


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
