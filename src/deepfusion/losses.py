# SPDX-License-Identifier: Apache-2.0
"""Token losses: cross-entropy and KL to teachers in one fused pass (DeepFusion, eq. 2, 10, 11), and the MoE balance loss.

The gradient is made in the forward pass, chunk by chunk over the token positions, while each chunk's softmax is in the
cache. Scores that come as a hidden state and an output matrix are made within the chunk, too, and their gradient goes
straight on to those two: then nothing of size B*T*V is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.nn import functional

from deepfusion.types import Batch

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits that one chunk holds: about a core's cache on a CPU; on a GPU enough to hide the launch of its kernels."""


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


class TeacherScores(NamedTuple):
    """One teacher's prediction of the student's next tokens.

    Attributes:
        scores: over the student's vocabulary, at the student's positions; no gradient flows into them.
        weight: factor of its KL in the loss: beta * omega in eq. (11).
        matched_BT: bool, positions at which it speaks (all that hold a token, when the tokenizer is shared).
        trusted_B: bool, rows on which it is listened to (`listen`); all when left out.
    """

    scores: Scores
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
    soft = [
        (teacher.scores.detached().flat(), weight_R) for teacher, weight_R in zip(teachers, kl_weights, strict=True)
    ]
    parts = _FusedTokenLoss.apply(*student.flat(), row_Q, target_BT.flatten(), mean_R, temperature, soft)
    loss, cross_entropy, divergence = cast(tuple[torch.Tensor, ...], parts)
    heard = sum(float(weight_R.sum()) for weight_R in kl_weights)
    return loss, TokenLosses(cross_entropy, divergence / heard if heard else divergence)


Trust = Literal["all", "better", "best", "always"]
"""Whom a student listens to: all teachers; those ahead of it; the best of those; each row's best, ahead of it or not."""


@torch.no_grad()
def listen(teachers: Sequence[TeacherScores], student: Scores, batch: Batch, trust: Trust) -> list[TeacherScores]:
    """The teachers, each with the rows of text on which it is listened to.

    A teacher knows its own domain; elsewhere its distributions lead away from the text. "better" keeps the rows that a
    teacher predicts at least as well as the student does, "best" of those teachers the one that predicts the row best,
    with the weight of all. "always" asks that one also where the student is ahead of it.
    """
    if trust == "all" or not teachers:
        return list(teachers)
    nll_AB = torch.stack([_row_cross_entropy(teacher.scores, batch) for teacher in teachers])
    heard_AB = torch.ones_like(nll_AB, dtype=torch.bool)
    if trust != "always":
        heard_AB = nll_AB <= _row_cross_entropy(student, batch)
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


def _chunks(row_Q: torch.Tensor, scores: Scores) -> Iterator[slice | torch.Tensor]:
    """Rows a chunk at a time: as slices, which copy nothing, where all rows are used."""
    positions = len(scores.hidden_BTH)
    rows = max(1, CHUNK_ELEMENTS.get(scores.hidden_BTH.device.type, 1 << 22) // scores.vocab_size)
    if len(row_Q) == positions:
        return (slice(begin, begin + rows) for begin in range(0, positions, rows))
    return iter(row_Q.split(rows))


def _exponentials(
    logits_CV: torch.Tensor, dtype: torch.dtype, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z/tau less its largest value, its exponential, and that one's sum: a softmax with one exp each."""
    logits_CV = logits_CV.to(dtype)
    if tau != 1:
        logits_CV = logits_CV / tau
    shifted_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
    exp_CV = shifted_CV.exp()
    return shifted_CV, exp_CV, exp_CV.sum(-1, keepdim=True)


class _Gradients:
    """Gradients of the student's scores, gathered a chunk at a time; None where none is asked for."""

    def __init__(self, scores: Scores, wanted: Sequence[bool], *, sparse: bool) -> None:
        hidden_RH, weight_VH, bias_V = scores
        make = torch.zeros_like if sparse else torch.empty_like
        self._scores = scores
        self.hidden_RH = make(hidden_RH) if wanted[0] else None
        self.weight_VH = torch.zeros_like(weight_VH) if wanted[1] and weight_VH is not None else None
        self.bias_V = torch.zeros_like(bias_V) if wanted[2] and bias_V is not None else None

    def add(self, rows: slice | torch.Tensor, step_CV: torch.Tensor) -> None:
        """Pass the gradient of some rows' logits on."""
        hidden_RH, weight_VH, _ = self._scores
        if self.hidden_RH is not None:
            gradient_CH = step_CV if weight_VH is None else step_CV.to(weight_VH.dtype) @ weight_VH
            self.hidden_RH[rows] = gradient_CH.to(hidden_RH.dtype)
        if self.weight_VH is not None:
            self.weight_VH += step_CV.mT @ hidden_RH[rows].to(step_CV.dtype)
        if self.bias_V is not None:
            self.bias_V += step_CV.sum(0)


class _FusedTokenLoss(torch.autograd.Function):
    """(hidden_RH, weight_VH, bias_V, row_Q, target_R, mean_R, tau, [(teacher, weight_R)]) -> loss, cross-entropy, weighted KL.

    Only `row_Q` of the R positions are looked at. The last two outputs carry no gradient.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row_Q, target_R, mean_R, tau, teachers = arguments[3:]
        student = Scores(*arguments[:3])
        dtype = torch.promote_types(student.hidden_BTH.dtype, torch.float32)
        sums = torch.zeros(2, dtype=torch.float64, device=mean_R.device)
        wanted = ctx.needs_input_grad[:3]
        gradients = _Gradients(student, wanted, sparse=len(row_Q) < len(mean_R))
        for row_C in _chunks(row_Q, student):
            target_C1, mean_C1 = target_R[row_C, None], mean_R[row_C, None].to(dtype)
            logits_CV = student.logits(row_C)
            shifted_CV, exp_CV, total_C1 = _exponentials(logits_CV, dtype, 1.0)
            logp_C1 = shifted_CV.gather(1, target_C1) - total_C1.log()
            sums[0] -= (logp_C1 * mean_C1).sum()
            step_CV = exp_CV * (mean_C1 / total_C1) if tau != 1 else exp_CV
            if tau != 1 and teachers:
                shifted_CV, exp_CV, total_C1 = _exponentials(logits_CV, dtype, tau)
            weights_C1 = torch.zeros_like(mean_C1)
            pull_CV: torch.Tensor | None = None
            for teacher, weight_R in teachers:
                weight_C1 = weight_R[row_C, None].to(dtype)
                if not bool(weight_C1.any()):
                    continue
                teacher_CV, q_CV, q_total_C1 = _exponentials(teacher.logits(row_C), dtype, tau)
                # KL = sum q (log q - log p), with log q and log p up to what their own sums add
                kl_C1 = teacher_CV.sub_(shifted_CV).mul_(q_CV).sum(-1, keepdim=True) / q_total_C1
                kl_C1 += total_C1.log() - q_total_C1.log()
                sums[1] += tau**2 * (kl_C1 * weight_C1).sum()
                weights_C1 += weight_C1
                pull_C1 = weight_C1 / q_total_C1
                pull_CV = q_CV.mul_(pull_C1) if pull_CV is None else pull_CV.addcmul_(q_CV, pull_C1)
            if not any(wanted):
                continue
            # d/dz of tau^2 KL is tau (softmax(z/tau) - q); d/dz of the cross-entropy is softmax(z) - onehot(target)
            if tau == 1:
                step_CV.mul_((mean_C1 + weights_C1) / total_C1)
            elif teachers:
                step_CV.addcmul_(exp_CV, tau * weights_C1 / total_C1)
            if pull_CV is not None:
                step_CV.sub_(pull_CV, alpha=tau)
            step_CV.scatter_add_(1, target_C1, -mean_C1)
            gradients.add(row_C, step_CV)
        ctx.gradients = gradients
        cross_entropy, divergence = sums.to(dtype).unbind()
        loss = cross_entropy + divergence
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("next_token_losses: its gradient was used up by an earlier backward pass; call it again")
        found = (gradients.hidden_RH, gradients.weight_VH, gradients.bias_V)
        scaled = [None if gradient is None else gradient.mul_(upstream[0]) for gradient in found]
        return *scaled, *[None] * (len(ctx.needs_input_grad) - 3)
