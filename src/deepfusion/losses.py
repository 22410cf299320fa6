# SPDX-License-Identifier: Apache-2.0
"""Token losses: cross-entropy and KL to teachers in one fused pass (DeepFusion, eq. 2, 10, 11), and the MoE balance loss.

The gradient with respect to the student's logits is made in the forward pass, chunk by chunk over the token positions:
each chunk's softmax is used while it is in the cache, and nothing of size B*T*V is kept but that gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.nn import functional

from deepfusion.types import Batch

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits that one chunk holds: about a core's cache on a CPU; on a GPU enough to hide the launch of its kernels."""


class TeacherLogits(NamedTuple):
    """One teacher's prediction of the student's next tokens.

    Attributes:
        logits_BTV: over the student's vocabulary, at the student's positions; no gradient flows into it.
        weight: factor of its KL in the loss: beta * omega in eq. (11).
        matched_BT: bool, positions at which it speaks (all that hold a token, when the tokenizer is shared).
        trusted_B: bool, rows on which it is listened to (`listen`); all when left out.
    """

    logits_BTV: torch.Tensor
    weight: float
    matched_BT: torch.Tensor
    trusted_B: torch.Tensor | None = None


class TokenLosses(NamedTuple):
    """The parts of `next_token_losses`, for logs: scalars without gradient.

    Attributes:
        cross_entropy: mean over counted positions, in nats; 0 without one.
        divergence: tau^2 * KL(teacher || student), mean over the positions that are listened to, by their weight.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def next_token_losses(
    student_logits_BTV: torch.Tensor, teachers: Sequence[TeacherLogits], batch: Batch, temperature: float
) -> tuple[torch.Tensor, TokenLosses]:
    """Cross-entropy plus the weighted KL to every teacher, in one pass; and both parts for the log.

    Position t predicts token t+1. Cross-entropy is the mean over the positions whose next token is counted and valid
    (eq. 2); the KL of a teacher is tau^2 * mean KL(softmax(z_T / tau) || softmax(z_S / tau)) over the positions that it
    matches (eq. 10). A mean over no position is 0 with zero gradient. Rows that a teacher is not trusted on count in its
    mean as zeros.

    Args:
        student_logits_BTV: any floating type; the arithmetic is done in float32 at least.
        teachers: may be empty: then the loss is the cross-entropy.
        temperature: tau > 0.

    Returns:
        loss = cross-entropy + sum of weight * KL, differentiable once; and its parts.
    """
    counted_BT = torch.zeros_like(batch.counted_BT)
    counted_BT[:, :-1] = batch.counted_BT[:, 1:] & batch.valid_BT[:, 1:]
    target_BT = batch.input_ids_BT.roll(-1, dims=1)
    mean_R = _mean_weights(counted_BT)
    kl_weights: list[torch.Tensor] = []
    used_R = counted_BT.flatten()
    for teacher in teachers:
        matched_BT, weight_R = teacher.matched_BT, teacher.weight * _mean_weights(teacher.matched_BT)
        if teacher.trusted_B is not None:
            trusted_BT = teacher.trusted_B[:, None].expand_as(matched_BT)
            matched_BT, weight_R = matched_BT & trusted_BT, weight_R * trusted_BT.flatten()
        kl_weights.append(weight_R)
        used_R = used_R | matched_BT.flatten()
    row_Q = used_R.nonzero().squeeze(-1)
    vocabulary = student_logits_BTV.shape[-1]
    arguments: list[Any] = [student_logits_BTV.reshape(-1, vocabulary), row_Q, target_BT.flatten(), mean_R, temperature]
    for teacher, weight_R in zip(teachers, kl_weights, strict=True):
        arguments += [teacher.logits_BTV.detach().reshape(-1, vocabulary), weight_R]
    loss, cross_entropy, divergence = cast(tuple[torch.Tensor, ...], _FusedTokenLoss.apply(*arguments))
    heard = sum(float(weight_R.sum()) for weight_R in kl_weights)
    return loss, TokenLosses(cross_entropy, divergence / heard if heard else divergence)


Trust = Literal["all", "better", "best", "always"]
"""Whom a student listens to: all teachers; those ahead of it; the best of those; each row's best, ahead of it or not."""


@torch.no_grad()
def listen(
    teachers: Sequence[TeacherLogits], student_logits_BTV: torch.Tensor, batch: Batch, trust: Trust
) -> list[TeacherLogits]:
    """The teachers, each with the rows of text on which it is listened to; one for all where each row has its best.

    A teacher knows its own domain; elsewhere its distributions lead away from the text. "better" keeps the rows that a
    teacher predicts at least as well as the student does, "best" of those teachers the one that predicts the row best,
    with the weight of all. "always" asks that one also where the student is ahead of it.
    """
    if trust == "all" or not teachers:
        return list(teachers)
    nll_AB = torch.stack([_row_cross_entropy(teacher.logits_BTV, batch) for teacher in teachers])
    ahead_AB = None if trust == "always" else nll_AB <= _row_cross_entropy(student_logits_BTV, batch)
    if trust == "better" and ahead_AB is not None:
        return [teacher._replace(trusted_B=rows_B) for teacher, rows_B in zip(teachers, ahead_AB, strict=True)]
    picked = list(enumerate(nll_AB.argmin(0).tolist()))
    logits_BTV = torch.stack([teachers[best].logits_BTV[row] for row, best in picked])
    matched_BT = torch.stack([teachers[best].matched_BT[row] for row, best in picked])
    trusted_B = None if ahead_AB is None else ahead_AB.any(0)
    return [TeacherLogits(logits_BTV, sum(teacher.weight for teacher in teachers), matched_BT, trusted_B)]


def _row_cross_entropy(logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the cross-entropy over each row's next tokens, (B,)."""
    target_BT, valid_BT = batch.input_ids_BT[:, 1:], batch.valid_BT[:, 1:]
    rows = zip(logits_BTV[:, :-1].detach(), target_BT, valid_BT, strict=True)  # one at a time: memory flat in B
    nll = [
        functional.cross_entropy(row_TV.float(), target_T, reduction="none") * valid_T
        for row_TV, target_T, valid_T in rows
    ]
    return torch.stack(nll).sum(1)


def balance_loss(probabilities: Sequence[torch.Tensor], top_k: int, valid_BT: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i * Pbar_i, averaged over the MoE layers: 1 under uniform routing, at most E (method, section 9).

    Args:
        probabilities: each MoE layer's routing probabilities, [B*T, E], rows summing to 1; gradients flow through them.
        top_k: experts that a token is sent to.
        valid_BT: bool, False on padding, which is left out.

    Returns:
        Scalar. f_i is the share of the assignments that went to expert i, Pbar_i its mean probability.
    """
    valid_R = valid_BT.flatten()
    losses: list[torch.Tensor] = []
    for probability_RE in probabilities:
        kept_RE = probability_RE[valid_R]
        chosen = kept_RE.topk(top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=kept_RE.shape[-1]).to(kept_RE.dtype) / max(1, chosen.numel())
        losses.append(kept_RE.shape[-1] * (share_E * kept_RE.sum(0) / max(1, len(kept_RE))).sum())
    return torch.stack(losses).mean()


def _mean_weights(mask_BT: torch.Tensor) -> torch.Tensor:
    """Weights that turn a sum over positions into the mean over `mask_BT`: all 0 for an empty mask."""
    return mask_BT.flatten().double() / mask_BT.sum().clamp(min=1)


def _chunks(row_Q: torch.Tensor, logits_RV: torch.Tensor) -> Iterator[slice | torch.Tensor]:
    """Rows a chunk at a time: as slices, which copy nothing, where all rows are used."""
    positions, vocabulary = logits_RV.shape
    rows = max(1, CHUNK_ELEMENTS.get(logits_RV.device.type, 1 << 22) // vocabulary)
    if len(row_Q) == positions:
        return (slice(begin, begin + rows) for begin in range(0, positions, rows))
    return iter(row_Q.split(rows))


def _exponentials(
    logits_RV: torch.Tensor, rows: slice | torch.Tensor, dtype: torch.dtype, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of some rows: z/tau less its largest value, its exponential, and that one's sum: a softmax with one exp each."""
    logits_CV = logits_RV[rows].to(dtype)
    if tau != 1:
        logits_CV = logits_CV / tau
    shifted_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    exp_CV = shifted_CV.exp()
    return shifted_CV, exp_CV, exp_CV.sum(-1, keepdim=True)


class _FusedTokenLoss(torch.autograd.Function):
    """(student_RV, row_Q, target_R, mean_R, tau, teacher_RV, weight_R, ...) -> loss, cross-entropy, weighted KL.

    Only `row_Q` of the R positions are looked at. The last two outputs carry no gradient.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        student_RV, row_Q, target_R, mean_R, tau, *soft = arguments
        teachers = list(zip(soft[::2], soft[1::2], strict=True))
        dtype = torch.promote_types(student_RV.dtype, torch.float32)
        sums = torch.zeros(2, dtype=torch.float64, device=student_RV.device)
        gradient_RV = torch.empty_like(student_RV) if ctx.needs_input_grad[0] else None
        if gradient_RV is not None and len(row_Q) < len(student_RV):
            gradient_RV.zero_()
        for row_C in _chunks(row_Q, student_RV):
            target_C1, mean_C1 = target_R[row_C, None], mean_R[row_C, None].to(dtype)
            shifted_CV, exp_CV, total_C1 = _exponentials(student_RV, row_C, dtype, 1.0)
            logp_C1 = shifted_CV.gather(1, target_C1) - total_C1.log()
            sums[0] -= (logp_C1 * mean_C1).sum()
            step_CV = exp_CV * (mean_C1 / total_C1) if tau != 1 else exp_CV
            if tau != 1 and teachers:
                shifted_CV, exp_CV, total_C1 = _exponentials(student_RV, row_C, dtype, tau)
            weights_C1 = torch.zeros_like(mean_C1)
            pull_CV: torch.Tensor | None = None
            for teacher_RV, weight_R in teachers:
                weight_C1 = weight_R[row_C, None].to(dtype)
                teacher_CV, q_CV, q_total_C1 = _exponentials(teacher_RV, row_C, dtype, tau)
                # KL = sum q (log q - log p), with log q and log p up to what their own sums add
                kl_C1 = teacher_CV.sub_(shifted_CV).mul_(q_CV).sum(-1, keepdim=True) / q_total_C1
                kl_C1 += total_C1.log() - q_total_C1.log()
                sums[1] += tau**2 * (kl_C1 * weight_C1).sum()
                weights_C1 += weight_C1
                pull_C1 = weight_C1 / q_total_C1
                pull_CV = q_CV.mul_(pull_C1) if pull_CV is None else pull_CV.addcmul_(q_CV, pull_C1)
            if gradient_RV is None:
                continue
            # d/dz of tau^2 KL is tau (softmax(z/tau) - q); d/dz of the cross-entropy is softmax(z) - onehot(target)
            if tau == 1:
                step_CV.mul_((mean_C1 + weights_C1) / total_C1)
            elif teachers:
                step_CV.addcmul_(exp_CV, tau * weights_C1 / total_C1)
            if pull_CV is not None:
                step_CV.sub_(pull_CV, alpha=tau)
            step_CV.scatter_add_(1, target_C1, -mean_C1)
            gradient_RV[row_C] = step_CV.to(student_RV.dtype)
        ctx.gradient_RV = gradient_RV
        cross_entropy, divergence = sums.to(dtype).unbind()
        loss = cross_entropy + divergence
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient_RV, ctx.gradient_RV = ctx.gradient_RV, None
        if gradient_RV is None:
            raise RuntimeError("next_token_losses: its gradient was used up by an earlier backward pass; call it again")
        return gradient_RV.mul_(gradients[0]), *[None] * (len(ctx.needs_input_grad) - 1)
