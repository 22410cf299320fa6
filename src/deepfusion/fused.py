# SPDX-License-Identifier: Apache-2.0
"""The fused token loss: cross-entropy and KL to teachers with their gradients, made in one pass, a chunk at a time.

The gradient is made in the forward pass, while a chunk's logits are at hand. Scores that come as a hidden state and an
output matrix are made within the chunk, too, and their gradient goes straight on to those two: then nothing of size
B*T*V is ever in memory. Chunks are large, for the matrix products' sake; their softmax is made a tile at a time, which
stays in a core's cache. Whom a row of text listens to is decided in the same pass, from the logits that are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from deepfusion.scores import Scores

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that one chunk holds: enough for its matrix products to run at full speed."""
ROOM_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Logits of all models together that are kept until it is decided whom a row of text listens to."""
TILE_ELEMENTS = {"cpu": 1 << 17}
"""Logits that one softmax looks at: about a core's cache on a CPU; elsewhere the whole chunk."""


class WeighedTeacher(NamedTuple):
    """A teacher's scores, its weight at every position, and the exponent of its soft targets (see `TeacherScores`)."""

    scores: Scores
    weight_R: torch.Tensor
    exponent: float


class Choice(NamedTuple):
    """How it is decided, for each row of text, which teachers are listened to there.

    Attributes:
        length: T, positions of a row.
        told_R: bool, positions by whose next token the models are compared.
        decide: (nll_B, nll_AB) -> heard_AB, bool; the student's and the teachers' sums over a row's told positions, in nats.
    """

    length: int
    told_R: torch.Tensor
    decide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _budget(elements: dict[str, int], scores: Scores, models: int = 1) -> int:
    """Positions for which so many models' logits are within `elements`."""
    return elements.get(scores.hidden_BTH.device.type, 1 << 22) // (scores.vocab_size * models)


def _chunks(
    row_Q: torch.Tensor, student: Scores, teachers: Sequence[WeighedTeacher], size: int
) -> Iterator[tuple[slice | torch.Tensor, list[int]]]:
    """Positions that hear the same teachers, and their numbers: slices, which copy nothing, where it is all positions."""
    positions = len(student.hidden_BTH)
    heard_Q = torch.zeros_like(row_Q)
    for number, teacher in enumerate(teachers):
        heard_Q += (teacher.weight_R[row_Q] != 0).long() << number
    for heard in heard_Q.unique().tolist():
        mine = [number for number in range(len(teachers)) if heard >> number & 1]
        row_P = row_Q[heard_Q == heard]
        if len(row_P) == positions:
            yield from ((slice(begin, begin + size), mine) for begin in range(0, positions, size))
        else:
            yield from ((row_C, mine) for row_C in row_P.split(size))


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
    """Positions whose softmax is made at once; `differentiate` overwrites all that is as wide as the vocabulary.

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

    def split(self, counts: Sequence[int]) -> Iterator[_Tile]:
        """Itself in parts of so many positions."""
        for end, count in zip(itertools.accumulate(counts), counts, strict=True):
            rows = slice(end - count, end)
            teachers = [(teacher_CV[rows], weight_C1[rows], power) for teacher_CV, weight_C1, power in self.teachers]
            yield _Tile(self.logits_CV[rows], teachers, self.target_C1[rows], self.mean_C1[rows])

    def tiles(self, size: int) -> Iterator[_Tile]:
        """Itself in parts of at most `size` positions."""
        count = len(self.target_C1)
        return self.split([min(size, count - begin) for begin in range(0, max(1, count), size)])

    def hearing(self, numbers: Sequence[int]) -> _Tile:
        """Itself with these of its teachers."""
        return self._replace(teachers=[self.teachers[number] for number in numbers])

    def nll(self) -> torch.Tensor:
        """Cross-entropy of the next token under the student and each teacher, (1 + A, C)."""
        models = [self.logits_CV, *(teacher_CV for teacher_CV, _, _ in self.teachers)]
        return torch.stack(
            [(each.logsumexp(-1, keepdim=True) - each.gather(1, self.target_C1))[:, 0] for each in models]
        )

    def differentiate(self, tau: float) -> torch.Tensor:
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
        return torch.stack([-(logp_C1 * mean_C1).sum(), tau**2 * divergence_C1.sum()])


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


class _Sweep:
    """One pass over positions: the models' logits, and the sums and gradients so far."""

    def __init__(
        self, student: Scores, teachers: Sequence[WeighedTeacher], target_R: torch.Tensor, mean_R: torch.Tensor,
        tau: float, gradients: _Gradients,
    ) -> None:  # fmt: skip
        self._student, self._teachers = student, teachers
        self._target_R, self._mean_R, self._tau = target_R, mean_R, tau
        self._dtype = torch.promote_types(student.hidden_BTH.dtype, torch.float32)
        self._gradients = gradients
        everything = student.vocab_size * len(mean_R)
        self._tile = max(1, TILE_ELEMENTS.get(mean_R.device.type, everything) // student.vocab_size)
        self.sums = torch.zeros(2, dtype=torch.float64, device=mean_R.device)

    def known(self, row_Q: torch.Tensor) -> None:
        """Loss and gradients of positions, where the teachers' weights say who is listened to."""
        size = max(1, _budget(CHUNK_ELEMENTS, self._student))
        rooms = _Rooms(min(len(row_Q), size), self._dtype)
        for rows, numbers in _chunks(row_Q, self._student, self._teachers, size):
            made = self._logits(rooms, rows, numbers)
            self._add(rows, made, [made])

    def chosen(self, row_Q: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Loss and gradients of positions, where `choice` says who is listened to; returns its heard_AB.

        As many rows of text are taken at a time as leave room for all models' logits until that is decided. Where there is
        room for none, the logits of one are made twice, a chunk at a time.
        """
        everyone, size = range(len(self._teachers)), max(1, _budget(CHUNK_ELEMENTS, self._student))
        at_once = _budget(ROOM_ELEMENTS, self._student, 1 + len(everyone)) // choice.length
        rooms = _Rooms(min(len(row_Q), max(size, at_once * choice.length)), self._dtype)
        count_B = torch.bincount(row_Q // choice.length, minlength=len(self._mean_R) // choice.length)
        groups = [part.tolist() for part in count_B.split(max(1, at_once))]
        heard: list[torch.Tensor] = []
        for counts, row_G in zip(groups, row_Q.split([sum(counts) for counts in groups]), strict=True):
            whole = self._logits(rooms, row_G, everyone) if at_once else None
            nll_MG = self._nll(whole) if whole is not None else self._nll_apart(rooms, row_G, size)
            told_MG = torch.where(choice.told_R[row_G], nll_MG, 0)
            nll_MB = torch.stack([told_MT.sum(1) for told_MT in told_MG.split(counts, 1)], 1)
            heard.append(choice.decide(nll_MB[0], nll_MB[1:]))
            numbers = [list(itertools.compress(everyone, heard_A)) for heard_A in heard[-1].mT.tolist()]
            if whole is not None:
                rows = whole.split(counts)
                self._add(row_G, whole, [row.hearing(mine) for row, mine in zip(rows, numbers, strict=True)])
                continue
            for row_C in row_G.split(size):
                made = self._logits(rooms, row_C, numbers[0])
                self._add(row_C, made, [made])
        return torch.cat(heard, 1)

    def _logits(self, rooms: _Rooms, rows: slice | torch.Tensor, numbers: Sequence[int]) -> _Tile:
        """Those of the student and of the teachers of these numbers."""
        teachers: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        for room, (scores, weight_R, exponent) in enumerate((self._teachers[number] for number in numbers), start=1):
            weight_C1 = weight_R[rows, None].to(self._dtype)
            teachers.append((rooms.logits(room, scores, rows), weight_C1, exponent))
        mean_C1 = self._mean_R[rows, None].to(self._dtype)
        return _Tile(rooms.logits(0, self._student, rows), teachers, self._target_R[rows, None], mean_C1)

    def _nll(self, whole: _Tile) -> torch.Tensor:
        """`_Tile.nll`, a tile at a time."""
        return torch.cat([tile.nll() for tile in whole.tiles(self._tile)], 1)

    def _nll_apart(self, rooms: _Rooms, row_G: torch.Tensor, size: int) -> torch.Tensor:
        """The same of positions whose logits have no room together: one model after the other."""
        models = [self._student, *(teacher.scores for teacher in self._teachers)]
        target_G1 = self._target_R[row_G, None]
        return torch.cat([
            torch.cat([self._nll(_Tile(rooms.logits(0, each, row_C), [], target_C1, target_C1)) for each in models])
            for row_C, target_C1 in zip(row_G.split(size), target_G1.split(size), strict=True)
        ], 1)  # fmt: skip

    def _add(self, rows: slice | torch.Tensor, whole: _Tile, parts: Sequence[_Tile]) -> None:
        """Differentiate the parts that `whole` consists of, and pass its gradient on."""
        for part in parts:
            for tile in part.tiles(self._tile):
                self.sums += tile.differentiate(self._tau)
        self._gradients.add(rows, whole.logits_CV)


class FusedTokenLoss(torch.autograd.Function):
    """Loss, cross-entropy, weighted KL, heard_AB, from the student's (hidden_RH, weight_VH, bias_V) and, without gradient:

    row_Q (the only positions of the R that are looked at, in order), target_R, mean_R, tau, [WeighedTeacher], and `Choice` or
    None. Only the first output carries a gradient; heard_AB is what was chosen.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        row_Q, target_R, mean_R, tau, teachers, choice = arguments[3:]
        student = Scores(*arguments[:3])
        gradients = _Gradients(student, ctx.needs_input_grad[:3], sparse=len(row_Q) < len(mean_R))
        sweep = _Sweep(student, teachers, target_R, mean_R, tau, gradients)
        heard_AB = sweep.chosen(row_Q, choice) if choice else sweep.known(row_Q)
        ctx.gradients = gradients
        cross_entropy, divergence = sweep.sums.to(torch.promote_types(student.hidden_BTH.dtype, torch.float32)).unbind()
        loss = cross_entropy + divergence
        ctx.mark_non_differentiable(*(each for each in (cross_entropy, divergence, heard_AB) if each is not None))
        return loss, cross_entropy, divergence, heard_AB

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
