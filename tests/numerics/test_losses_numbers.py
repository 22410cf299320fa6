# SPDX-License-Identifier: Apache-2.0
"""The fused token loss against its formula, and the balance loss against its bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.functional import cross_entropy, log_softmax

from deepfusion import fused
from deepfusion.losses import TeacherScores, TokenLosses, Trust, balance_loss, next_token_losses
from deepfusion.scores import Scores
from deepfusion.types import Batch

B, T, V = 3, 7, 11


def batch_of(seed: int = 0, *, padded: bool = True, counted: bool | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    valid_BT = torch.ones(B, T, dtype=torch.bool)
    if padded:
        valid_BT[1, 4:] = False
        valid_BT[2, 1:] = False
    flags_BT = torch.rand(B, T, generator=generator) < 0.6 if counted is None else torch.full((B, T), counted)
    return Batch(torch.randint(0, V, (B, T), generator=generator), flags_BT, valid_BT)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2


def teacher_of(
    logits_BTV: torch.Tensor, weight: float, matched_BT: torch.Tensor, trusted_B: torch.Tensor | None = None
) -> TeacherScores:
    return TeacherScores(Scores(logits_BTV), weight, matched_BT, trusted_B)


def loss_of(
    student_BTV: torch.Tensor, teachers: list[TeacherScores], batch: Batch, tau: float, trust: Trust = "all"
) -> tuple[torch.Tensor, TokenLosses]:
    return next_token_losses(Scores(student_BTV), teachers, batch, tau, trust=trust)


def plain_formula(
    student_BTV: torch.Tensor, teachers: list[TeacherScores], batch: Batch, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations (2) and (10) written out, position by position."""
    counted_BT = batch.counted_BT[:, 1:] & batch.valid_BT[:, 1:]
    student_RV, target_R = student_BTV[:, :-1][counted_BT], batch.input_ids_BT[:, 1:][counted_BT]
    ce = cross_entropy(student_RV, target_R) if len(target_R) else student_BTV.sum() * 0
    kl = student_BTV.sum() * 0
    for teacher in teachers:
        p_RV = (teacher.scores.hidden_BTH / tau).softmax(-1)[teacher.matched_BT]
        logq_RV = log_softmax(student_BTV / tau, -1)[teacher.matched_BT]
        if len(p_RV):
            kl = kl + teacher.weight * tau**2 * (p_RV * (p_RV.log() - logq_RV)).sum(-1).mean()
    return ce, kl


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(), (1.0,), (0.3, 0.7, 0.5)])
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient_agree_with_the_plain_formula(
    tau: float, weights: tuple[float, ...], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused.CHUNK_ELEMENTS, "cpu", 4 * V)  # four positions a chunk,
    monkeypatch.setitem(fused.TILE_ELEMENTS, "cpu", 3 * V)  # three a tile, and one
    batch = batch_of(padded=padded)
    teachers = [teacher_of(logits(10 + i), w, batch.valid_BT) for i, w in enumerate(weights)]
    student = logits(1).requires_grad_()
    loss, parts = loss_of(student, teachers, batch, tau)
    (gradient,) = torch.autograd.grad(loss, student)
    ce, kl = plain_formula(student, teachers, batch, tau)
    (expected,) = torch.autograd.grad(ce + kl, student)
    torch.testing.assert_close(loss, ce + kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.cross_entropy, ce)
    if weights:
        torch.testing.assert_close(parts.divergence, kl / sum(weights))


def test_gradient_agrees_with_finite_differences_in_double_precision() -> None:
    batch = batch_of()
    teachers = [teacher_of(logits(5), 0.4, batch.valid_BT), teacher_of(logits(6), 0.9, batch.valid_BT)]
    student, step = logits(2), 1e-6
    loss, _ = loss_of(student.requires_grad_(), teachers, batch, 1.7)
    (gradient,) = torch.autograd.grad(loss, student)
    for index in range(0, student.numel(), 7):
        nudge = torch.zeros_like(student).view(-1).index_fill_(0, torch.tensor([index]), step).view_as(student)
        with torch.no_grad():
            up, down = (loss_of(student + sign * nudge, teachers, batch, 1.7)[0] for sign in (1, -1))
        assert float(up - down) / (2 * step) == pytest.approx(float(gradient.view(-1)[index]), abs=1e-6)


def test_the_gradient_can_be_used_only_once() -> None:
    student = logits(2).requires_grad_()
    loss, _ = loss_of(student, [], batch_of(), 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by an earlier backward pass"):
        loss.backward()


def test_sizes_of_chunk_and_tile_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, student = batch_of(), logits(1, torch.float32).requires_grad_()
    gradients = []
    for rows, tile in ((1, 1), (3, 2), (1000, 4), (1000, 1000)):
        monkeypatch.setitem(fused.CHUNK_ELEMENTS, "cpu", rows * V)
        monkeypatch.setitem(fused.TILE_ELEMENTS, "cpu", tile * V)
        loss, _ = loss_of(student, [teacher_of(logits(9), 1.0, batch.valid_BT)], batch, 1.0)
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])
    assert torch.equal(gradients[0], gradients[2])


def test_no_counted_token_gives_zero_loss_and_zero_gradient() -> None:
    student = logits(3).requires_grad_()
    loss, parts = loss_of(student, [], batch_of(counted=False), 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == 0
    assert float(parts.cross_entropy) == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_teacher_that_matches_nowhere_changes_nothing() -> None:
    batch, student = batch_of(), logits(3).requires_grad_()
    silent = teacher_of(logits(4), 1.0, torch.zeros(B, T, dtype=torch.bool))
    with_teacher = torch.autograd.grad(loss_of(student, [silent], batch, 1.0)[0], student)[0]
    alone = torch.autograd.grad(loss_of(student, [], batch, 1.0)[0], student)[0]
    assert torch.equal(with_teacher, alone)


def test_rows_without_trust_count_as_zeros_in_the_mean() -> None:
    batch, student = batch_of(), logits(3).requires_grad_()
    trusted_B = torch.tensor([True, False, True])
    teacher = teacher_of(logits(4), 0.7, batch.valid_BT, trusted_B)
    loss, _ = loss_of(student, [teacher], batch, 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    heard_BT = batch.valid_BT & trusted_B[:, None]
    share = int(heard_BT.sum()) / int(batch.valid_BT.sum())
    ce, kl = plain_formula(student, [teacher_of(logits(4), 0.7 * share, heard_BT)], batch, 1.0)
    torch.testing.assert_close(loss, ce + kl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(ce + kl, student)[0], rtol=1e-8, atol=1e-12)


def rows_heard(teachers: list[torch.Tensor], student: torch.Tensor, batch: Batch, trust: Trust) -> list[list[bool]]:
    _, parts = loss_of(student, [teacher_of(t, 0.5, batch.valid_BT) for t in teachers], batch, 1.0, trust)
    return [teacher.trusted_B.tolist() for teacher in parts.heard if teacher.trusted_B is not None]


def test_better_listens_to_a_teacher_on_the_rows_that_it_predicts_no_worse() -> None:
    batch = Batch(torch.randint(0, V, (B, T)), torch.ones(B, T, dtype=torch.bool), batch_of().valid_BT)
    right_BTV = torch.nn.functional.one_hot(batch.input_ids_BT.roll(-1, 1), V).double() * 5
    student = torch.zeros(B, T, V, dtype=torch.float64)
    teacher = torch.stack([right_BTV[0], -right_BTV[1], student[2]])
    assert rows_heard([teacher], student, batch, "better") == [[True, False, True]], "better, worse, equal"
    assert rows_heard([student], student, batch, "better") == [[True] * B]
    assert rows_heard([teacher], student, batch, "all") == [], "everywhere"
    noisy = teacher.clone()
    noisy[~batch.valid_BT] += 100 * torch.randn(int((~batch.valid_BT).sum()), V, dtype=torch.float64)
    assert rows_heard([noisy], student, batch, "better") == [[True, False, True]], "padding says nothing"


@pytest.mark.parametrize("trust", ["better", "best", "always"])
def test_a_teacher_that_overflows_on_a_row_is_not_heard_there_and_silences_nobody(trust: Trust) -> None:
    every_BT = torch.ones(B, T, dtype=torch.bool)
    batch = Batch(torch.randint(0, V, (B, T)), every_BT, every_BT)
    good = torch.nn.functional.one_hot(batch.input_ids_BT.roll(-1, 1), V).double()
    student = torch.zeros(B, T, V, dtype=torch.float64).requires_grad_()
    bad = torch.stack([torch.full((T, V), torch.nan), torch.full((T, V), torch.inf), -good[2]]).double()
    rows = [[False, False, False], [True, True, True]]
    assert rows_heard([bad, good], student, batch, trust) == rows
    assert rows_heard([bad], student, batch, trust) == [[False, False, trust == "always"]]
    loss, _ = loss_of(student, [teacher_of(bad, 0.5, every_BT), teacher_of(good, 0.5, every_BT)], batch, 1.0, trust)
    (gradient,) = torch.autograd.grad(loss, student)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_best_listens_on_each_row_to_one_teacher_with_the_weight_of_all() -> None:
    every_BT = torch.ones(B, T, dtype=torch.bool)
    batch = Batch(torch.randint(0, V, (B, T)), every_BT, every_BT)
    right_BTV = torch.nn.functional.one_hot(batch.input_ids_BT.roll(-1, 1), V).double()
    student = right_BTV * torch.tensor([1.0, 1.0, 9.0])[:, None, None]
    first = right_BTV * torch.tensor([2.0, 3.0, 8.0])[:, None, None]
    second = right_BTV * torch.tensor([3.0, 2.0, 7.0])[:, None, None]
    teachers = [teacher_of(first, 0.2, every_BT), teacher_of(second, 0.5, every_BT)]
    best = {"best": [[False, True, False], [True, False, False]], "always": [[False, True, True], [True, False, False]]}
    for trust, rows in best.items():
        chosen = torch.stack([second[0], first[1], first[2]])
        counts_B = torch.tensor(rows).any(0)
        loss, parts = loss_of(student, teachers, batch, 1.0, trust)  # type: ignore[arg-type]
        assert [t.trusted_B.tolist() for t in parts.heard if t.trusted_B is not None] == rows, (
            "also where the student is ahead"
        )
        assert [t.weight for t in parts.heard] == [0.7, 0.7]
        expected, of_chosen = loss_of(student, [teacher_of(chosen, 0.7, every_BT, counts_B)], batch, 1.0)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(parts.divergence, of_chosen.divergence)
    one = [teacher_of(first, 0.2, every_BT)]
    torch.testing.assert_close(loss_of(student, one, batch, 1.0)[0], loss_of(student, one, batch, 1.0, "always")[0])


@pytest.mark.parametrize("trust", ["all", "better", "best", "always"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, B])
def test_scores_made_a_piece_at_a_time_give_the_loss_and_gradients_of_whole_logits(
    trust: Trust, tau: float, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, generator = batch_of(3), torch.Generator().manual_seed(5)

    def scores(width: int) -> Scores:
        numbers = torch.randn((B * T + V + 1) * width + V, generator=generator, dtype=torch.float64)
        hidden, weight = (
            numbers[: B * T * width].view(B, T, width),
            numbers[B * T * width :][: V * width].view(V, width),
        )
        return Scores(hidden, weight, numbers[-V:].clone() if bias else None)

    student, *teachers = (scores(width) for width in (5, 4, 6))
    leaves = [part.clone().requires_grad_() for part in student if part is not None]

    def whole(made: Scores) -> Scores:
        return Scores(made.logits(slice(None)))

    def run(ours: Scores, theirs: list[Scores]) -> list[torch.Tensor]:
        told = [TeacherScores(one, 0.4, batch.valid_BT) for one in theirs]
        loss, parts = next_token_losses(ours, told, batch, tau, trust=trust)
        return [loss, parts.divergence, *torch.autograd.grad(loss, leaves)]

    at_once = run(whole(Scores(*leaves)), [whole(t) for t in teachers])
    monkeypatch.setitem(fused.CHUNK_ELEMENTS, "cpu", 4 * V)
    monkeypatch.setitem(fused.ROOM_ELEMENTS, "cpu", rows * 3 * T * V)  # so many rows of three models' logits at a time
    pieces = run(Scores(*leaves), teachers)
    assert pieces[1] > 0
    for found, expected in zip(pieces, at_once, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_identical_teacher_and_student_give_zero_divergence_and_zero_gradient() -> None:
    batch, student = batch_of(counted=False), logits(3, torch.float32).requires_grad_()
    loss, parts = loss_of(student, [teacher_of(student.detach(), 1.0, batch.valid_BT)], batch, 2.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(parts.divergence) == 0
    assert float(gradient.abs().max()) < 1e-7


def test_a_constant_on_all_teacher_logits_changes_nothing() -> None:
    batch, student = batch_of(), logits(3, torch.float32).requires_grad_()

    def gradient(offset: float) -> torch.Tensor:
        teacher = teacher_of(logits(8, torch.float32) + offset, 1.0, batch.valid_BT)
        return torch.autograd.grad(loss_of(student, [teacher], batch, 1.0)[0], student)[0]

    torch.testing.assert_close(gradient(100.0), gradient(0.0), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 10_000), tau=st.floats(0.2, 8), scale=st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_divergence_is_never_negative(seed: int, tau: float, scale: float) -> None:
    batch = batch_of(seed)
    teacher = teacher_of(logits(seed, torch.float32) * scale, 1.0, batch.valid_BT)
    _, parts = loss_of(logits(seed + 1, torch.float32), [teacher], batch, tau)
    assert float(parts.divergence) >= 0


def test_what_padding_holds_never_changes_the_loss_or_the_gradient() -> None:
    clean = batch_of()
    student = logits(1).requires_grad_()
    noise = torch.where(clean.valid_BT[..., None], 0.0, logits(77))
    dirty = Batch(torch.where(clean.valid_BT, clean.input_ids_BT, 7), clean.counted_BT, clean.valid_BT)

    def run(batch: Batch, extra: torch.Tensor | float) -> torch.Tensor:
        teacher = teacher_of(logits(2) + extra, 1.0, batch.valid_BT)
        return torch.autograd.grad(loss_of(student + extra, [teacher], batch, 1.0)[0], student)[0]

    assert torch.equal(run(clean, 0.0), run(dirty, noise))


def test_half_precision_logits_get_their_gradient_in_their_own_type() -> None:
    batch, student = batch_of(), logits(1, torch.bfloat16).requires_grad_()
    loss, _ = loss_of(student, [teacher_of(logits(2, torch.bfloat16), 1.0, batch.valid_BT)], batch, 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert float(gradient.float().abs().max()) > 0


def best(score_RE: torch.Tensor, top_k: int) -> torch.Tensor:
    """What a router without groups chooses."""
    return score_RE.topk(top_k, dim=-1).indices


def test_balance_loss_is_one_under_uniform_routing() -> None:
    cyclic_RE = torch.eye(4).repeat(6, 1) * 1e-4 + 0.25  # all but uniform, the choices take turns
    valid_BT = torch.ones(4, 6, dtype=torch.bool)
    probability_RE = cyclic_RE / cyclic_RE.sum(-1, keepdim=True)
    assert float(balance_loss([probability_RE] * 3, [best(cyclic_RE, 1)] * 3, valid_BT)) == pytest.approx(1, abs=1e-4)


def test_balance_loss_is_the_number_of_experts_when_one_expert_takes_all() -> None:
    valid_BT = torch.ones(4, 6, dtype=torch.bool)
    collapsed_RE = torch.eye(5)[torch.zeros(24, dtype=torch.long)]
    assert float(balance_loss([collapsed_RE], [best(collapsed_RE, 1)], valid_BT)) == pytest.approx(5)


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 5), sharp=st.floats(0.1, 50))
@settings(max_examples=40, deadline=None)
def test_balance_loss_stays_between_zero_and_the_number_of_experts(seed: int, top_k: int, sharp: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability_RE = (torch.randn(B * T, 5, generator=generator) * sharp).softmax(-1)
    assert 0 < float(balance_loss([probability_RE], [best(probability_RE, top_k)], batch_of().valid_BT)) <= 5 + 1e-4


def test_balance_loss_counts_what_the_router_chose() -> None:
    """All tokens go to the least probable expert, as a router of groups may send them."""
    probability_RE = torch.tensor([0.4, 0.3, 0.1, 0.2]).expand(24, -1)
    chosen_Rk = torch.full((24, 1), 2)
    assert float(balance_loss([probability_RE], [chosen_Rk], torch.ones(4, 6, dtype=torch.bool))) == pytest.approx(
        4 * 0.1
    )


def test_balance_loss_ignores_padding_and_has_a_gradient() -> None:
    valid_BT = batch_of().valid_BT
    raw_RE = torch.randn(B * T, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = balance_loss([raw_RE.softmax(-1)], [best(raw_RE, 2)], valid_BT)
    (gradient,) = torch.autograd.grad(loss, raw_RE)
    moved_RE = torch.where(valid_BT.flatten()[:, None], raw_RE, raw_RE.flip(-1) * 3)
    assert torch.equal(balance_loss([moved_RE.softmax(-1)], [best(moved_RE, 2)], valid_BT), loss)
    assert float(gradient[valid_BT.flatten()].abs().max()) > 0
    assert float(gradient[~valid_BT.flatten()].abs().max()) == 0


@pytest.mark.parametrize("exponent", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_loss_of_ofa_agrees_with_its_formula(exponent: float, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """-sum_v ((q_v + 1{v=c})^g - 1{v=c}) log p_v, the mean over positions that have a next token (times tau^2)."""
    monkeypatch.setitem(fused.CHUNK_ELEMENTS, "cpu", 4 * V)
    monkeypatch.setitem(fused.TILE_ELEMENTS, "cpu", 3 * V)
    batch, student = batch_of(padded=True), logits(1).requires_grad_()
    teacher = logits(2).requires_grad_()
    matched_BT = batch.valid_BT & functional.pad(batch.valid_BT[:, 1:], (0, 1))
    told = TeacherScores(Scores(teacher), 0.7, matched_BT, exponent=exponent)
    unlabelled = replace(batch, counted_BT=torch.zeros_like(batch.counted_BT))
    loss, _ = next_token_losses(Scores(student), [told], unlabelled, tau)
    gradient, of_teacher = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert of_teacher is None, "the teacher is a constant"

    label_BT = batch.input_ids_BT.roll(-1, 1)[matched_BT]
    one_RV = functional.one_hot(label_BT, V).double()
    q_RV = (teacher.detach() / tau).softmax(-1)[matched_BT].clamp(1e-8, 1)
    soft_RV = (q_RV + one_RV) ** exponent - one_RV
    expected = -0.7 * tau**2 * (soft_RV * log_softmax(student / tau, -1)[matched_BT]).sum(-1).mean()
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9)
    entropy = -0.7 * tau**2 * (q_RV * q_RV.log()).sum(-1).mean() if exponent == 1 else 0.0  # the KL leaves it out
    torch.testing.assert_close(loss, expected - entropy, rtol=1e-7, atol=1e-9)
    assert float(expected.detach()) >= 0


def test_above_one_the_exponent_gives_the_next_token_more_weight_the_surer_the_teacher_is() -> None:
    shares = []
    for boost in (0.0, 2.0, 4.0):
        batch, student = batch_of(1), torch.zeros(B, T, V, dtype=torch.float64, requires_grad=True)
        label_BT1 = batch.input_ids_BT.roll(-1, 1)[..., None]
        teacher = torch.zeros(B, T, V, dtype=torch.float64).scatter(2, label_BT1, boost)
        told = TeacherScores(Scores(teacher), 1.0, batch.valid_BT, exponent=2.0)
        unlabelled = replace(batch, counted_BT=torch.zeros_like(batch.counted_BT))
        loss, _ = next_token_losses(Scores(student), [told], unlabelled, 1.0)
        (gradient,) = torch.autograd.grad(loss, student)
        shares.append(float(-gradient[0, 0].gather(0, label_BT1[0, 0])))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_token_that_a_teacher_rules_out_adds_nothing_to_the_kl(tau: float) -> None:
    torch.manual_seed(0)
    student_BTV, teacher_BTV = torch.randn(2, 4, 6, dtype=torch.double), torch.randn(2, 4, 6, dtype=torch.double)
    teacher_BTV[..., 5] = -torch.inf
    every_BT = torch.ones(2, 4, dtype=torch.bool)
    batch = Batch(torch.zeros(2, 4, dtype=torch.long), torch.zeros_like(every_BT), every_BT)
    loss, _ = next_token_losses(Scores(student_BTV), [TeacherScores(Scores(teacher_BTV), 1.0, every_BT)], batch, tau)
    q_BTV, log_p_BTV = (teacher_BTV / tau).softmax(-1), (student_BTV / tau).log_softmax(-1)
    kl_BT = (q_BTV * (q_BTV.log() - log_p_BTV))[..., :5].sum(-1)
    assert float(loss) == pytest.approx(tau**2 * float(kl_BT.mean()), rel=1e-12)
