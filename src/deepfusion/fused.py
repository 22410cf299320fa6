# SPDX-License-Identifier: Apache-2.0
"""The fused token loss: cross-entropy and KL to teachers with their gradients, made in one pass, a chunk at a time.

The gradient is made in the forward pass, while a chunk's logits are at hand. Scores that come as a hidden state and an
output matrix are made within the chunk, too, and their gradient goes straight on to those two: then nothing of size
B*T*V is ever in memory. Chunks are large, for the matrix products' sake; their softmax is made a tile at a time, which
stays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that one chunk holds: enough for its matrix products to run at full speed."""
TILE_ELEMENTS = {"cpu": 1 << 17}
"""Logits that one softmax looks at: about a core's cache on a CPU; elsewhere the whole chunk."""


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


class WeighedTeacher(NamedTuple):
    """A teacher's scores, its weight at every position, and the exponent of its soft targets (see `TeacherScores`)."""

    scores: Scores
    weight_R: torch.Tensor
    exponent: float


class _Chunk(NamedTuple):
    """Positions with the same teachers, and those."""

    rows: slice | torch.Tensor
    teachers: list[WeighedTeacher]


def _chunk_size(scores: Scores) -> int:
    """Positions of a chunk."""
    return max(1, CHUNK_ELEMENTS.get(scores.hidden_BTH.device.type, 1 << 22) // scores.vocab_size)


def _chunks(row_Q: torch.Tensor, student: Scores, teachers: Sequence[WeighedTeacher]) -> Iterator[_Chunk]:
    """The positions, those that hear the same teachers together: as slices, which copy nothing, where it is all of them."""
    positions, size = len(student.hidden_BTH), _chunk_size(student)
    heard_Q = torch.zeros_like(row_Q)
    for number, teacher in enumerate(teachers):
        heard_Q += (teacher.weight_R[row_Q] != 0).long() << number
    for heard in heard_Q.unique().tolist():
        mine = [teacher for number, teacher in enumerate(teachers) if heard >> number & 1]
        row_P = row_Q[heard_Q == heard]
        if len(row_P) == positions:
            yield from (_Chunk(slice(begin, begin + size), mine) for begin in range(0, positions, size))
        else:
            yield from (_Chunk(row_C, mine) for row_C in row_P.split(size))


class _Rooms:
    """Memory for each model's logits of a chunk, used by one chunk after the other: fresh memory is slow."""

    def __init__(self, positions: int, dtype: torch.dtype) -> None:
        self._positions = positions
        self._dtype = dtype
        self._rooms: dict[int, torch.Tensor] = {}

    def logits(self, number: int, scores: Scores, rows: slice | torch.Tensor) -> torch.Tensor:
        """Logits of some positions, to be overwritten, in room `number`."""
        hidden_CH = scores.hidden_BTH[rows]
        if number not in self._rooms:
            self._rooms[number] = hidden_CH.new_empty(self._positions, scores.vocab_size, dtype=self._dtype)
        room_CV = self._rooms[number][: len(hidden_CH)]
        weight_VH = scores.weight_VH
        plain = scores.bias_V is None and not torch.is_autocast_enabled(hidden_CH.device.type)
        if plain and weight_VH is not None and weight_VH.dtype == hidden_CH.dtype == self._dtype:
            return torch.mm(hidden_CH, weight_VH.mT, out=room_CV)
        return room_CV.copy_(scores.logits(rows))


class _Tile(NamedTuple):
    """Positions whose softmax is made at once; all that is as wide as the vocabulary is overwritten.

    Attributes:
        logits_CV: the student's; their gradient afterwards.
        teachers: each one's logits, its weight at every position, [C, 1], and its exponent.
        target_C1: next tokens.
        mean_C1: weight of each position's cross-entropy.
    """

    logits_CV: torch.Tensor
    teachers: list[tuple[torch.Tensor, torch.Tensor, float]]
    target_C1: torch.Tensor
    mean_C1: torch.Tensor

    def split(self, size: int) -> Iterator[_Tile]:
        """Itself in parts of `size` positions."""
        for rows in (slice(begin, begin + size) for begin in range(0, len(self.target_C1), size)):
            teachers = [(teacher_CV[rows], weight_C1[rows], power) for teacher_CV, weight_C1, power in self.teachers]
            yield _Tile(self.logits_CV[rows], teachers, self.target_C1[rows], self.mean_C1[rows])

    def differentiate(self, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the weighted cross-entropy and of the weighted tau^2 KL."""
        logits_CV, target_C1, mean_C1 = self.logits_CV, self.target_C1, self.mean_C1
        logits_CV -= logits_CV.amax(-1, keepdim=True)
        soft_CV = logits_CV if tau == 1 or not self.teachers else logits_CV / tau
        divergence_C1, weights_C1 = torch.zeros_like(mean_C1), torch.zeros_like(mean_C1)
        pull_CV: torch.Tensor | None = None
        for teacher_CV, weight_C1, exponent in self.teachers:
            if tau != 1:
                teacher_CV /= tau
            teacher_CV -= teacher_CV.amax(-1, keepdim=True)
            q_CV = teacher_CV.exp()
            q_total_C1 = q_CV.sum(-1, keepdim=True)
            if exponent == 1:
                # KL = sum q (log q - log p), with log q and log p up to what their own sums add
                gap_CV = teacher_CV.clamp_(min=-1e4).sub_(soft_CV)  # or 0 * -inf is NaN; e^-1e4 is 0
                divergence_C1 += weight_C1 * (
                    torch.linalg.vecdot(q_CV, gap_CV)[:, None] / q_total_C1 - q_total_C1.log()
                )
                weights_C1 += weight_C1
                q_CV *= weight_C1 / q_total_C1
            else:
                q_CV /= q_total_C1
                confident_C1 = (1 + q_CV.gather(1, target_C1)).pow_(exponent) - 1
                q_CV.pow_(exponent).scatter_(1, target_C1, confident_C1).mul_(weight_C1)
                divergence_C1 -= torch.linalg.vecdot(q_CV, soft_CV)[:, None]
                weights_C1 += q_CV.sum(-1, keepdim=True)
            pull_CV = q_CV if pull_CV is None else pull_CV.add_(q_CV)
        logp_C1 = logits_CV.gather(1, target_C1)
        # d/dz of the cross-entropy is softmax(z) - onehot(target); of tau^2 KL tau (softmax(z/tau) - q)
        exp_CV = logits_CV.exp_()
        total_C1 = exp_CV.sum(-1, keepdim=True)
        logp_C1 -= total_C1.log()
        if pull_CV is None:
            exp_CV *= mean_C1 / total_C1
        elif tau == 1:
            divergence_C1 += weights_C1 * total_C1.log()
            exp_CV.mul_((mean_C1 + weights_C1) / total_C1).sub_(pull_CV)
        else:
            soft_CV.exp_()
            soft_total_C1 = soft_CV.sum(-1, keepdim=True)
            divergence_C1 += weights_C1 * soft_total_C1.log()
            pull_CV.addcmul_(soft_CV, -weights_C1 / soft_total_C1)
            exp_CV.mul_(mean_C1 / total_C1).sub_(pull_CV, alpha=tau)
        exp_CV.scatter_add_(1, target_C1, -mean_C1)
        return -(logp_C1 * mean_C1).sum(), tau**2 * divergence_C1.sum()


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
            if hidden_RH.dtype == step_CV.dtype == self.weight_VH.dtype:
                self.weight_VH.addmm_(step_CV.mT, hidden_RH[rows])
            else:
                self.weight_VH += step_CV.mT.to(hidden_RH.dtype) @ hidden_RH[rows]
        if self.bias_V is not None:
            self.bias_V += step_CV.sum(0)


class FusedTokenLoss(torch.autograd.Function):
    """(hidden_RH, weight_VH, bias_V, row_Q, target_R, mean_R, tau, [WeighedTeacher]) -> loss, cross-entropy, weighted KL.

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
        rooms = _Rooms(min(len(row_Q), _chunk_size(student)), dtype)
        size = TILE_ELEMENTS.get(mean_R.device.type, student.vocab_size * len(mean_R)) // student.vocab_size
        for row_C, heard in _chunks(row_Q, student, teachers):
            whole = _Tile(
                rooms.logits(0, student, row_C),
                [
                    (rooms.logits(number, scores, row_C), weight_R[row_C, None].to(dtype), exponent)
                    for number, (scores, weight_R, exponent) in enumerate(heard, start=1)
                ],
                target_R[row_C, None],
                mean_R[row_C, None].to(dtype),
            )
            for tile in whole.split(max(1, size)):
                sums += torch.stack(tile.differentiate(tau))
            if any(wanted):
                gradients.add(row_C, whole.logits_CV)
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
        if upstream[0].is_cuda or float(upstream[0]) != 1:  # on a GPU to look is slower than to multiply
            found = tuple(None if gradient is None else gradient.mul_(upstream[0]) for gradient in found)
        return *found, *[None] * (len(ctx.needs_input_grad) - 3)
