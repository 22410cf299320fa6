# SPDX-License-Identifier: Apache-2.0
"""FedMKT's exchange of predictions: what is kept of logits, whom a row learns from, and what the loss is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from deepfusion.devices.configurations import make_config
from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.devices.presets import PRESETS
from deepfusion.losses import next_token_losses
from deepfusion.scores import Scores
from deepfusion.stages.mutual import Predictions, best_of, index_type, knowledge_loss, learn, least_loss, predict
from deepfusion.training import Optimisation
from deepfusion.types import Batch

V, S, T = 64, 10, 12
OPTIMISATION = Optimisation(batch_size=4, learning_rate=3e-3)


def model(seed: int) -> PreTrainedModel:
    found = from_config(make_config(PRESETS["llama-pico"].config, vocab_size=V, positions=T), seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return found


def rows() -> Batch:
    ids = torch.randint(0, V, (S, T), generator=torch.Generator().manual_seed(1))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[3, 8:] = False
    return Batch(ids, valid, valid)


def test_predictions_are_the_largest_logits_and_the_rows_own_losses() -> None:
    learner, text = model(0), rows()
    found = predict(learner, text, 5)
    with torch.no_grad():
        logits = forward(learner, text).logits_BTV
    top = logits.topk(5, dim=-1)
    assert torch.equal(found.tokens(torch.arange(S)), top.indices)
    assert torch.allclose(found.value_STK.float(), top.values - top.values[..., :1], atol=2e-3)
    assert found.value_STK.dtype is torch.float16
    assert found.index_STK.dtype is torch.int16
    for row in range(S):
        alone = Batch(*(part[row : row + 1] for part in (text.input_ids_BT, text.counted_BT, text.valid_BT)))
        loss, _ = next_token_losses(Scores(logits[row : row + 1]), [], alone, 1.0)
        assert float(found.loss_S[row]) == pytest.approx(float(loss), rel=1e-5)


def test_a_loss_is_at_least_what_the_predictions_allow() -> None:
    text = rows()
    for kept in (1, 4, V):
        found = predict(model(0), text, kept)
        least_S = least_loss(found, text)
        assert bool((least_S <= found.loss_S + 0.01).all())
        assert bool((least_S > 0).all()) or kept == 1
    assert torch.allclose(least_S, found.loss_S, atol=0.01), "with all logits kept it is the loss"


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, torch.int16), ((1 << 16) + 1, torch.int32)])
def test_indices_are_as_short_as_the_vocabulary_allows(size: int, dtype: torch.dtype) -> None:
    assert index_type(size) is dtype
    tokens = torch.tensor([0, size // 2, size - 1])
    found = Predictions(torch.zeros(1, 1, 3), tokens.to(dtype).view(1, 1, 3), torch.zeros(1))
    assert found.tokens(torch.tensor([0])).flatten().tolist() == tokens.tolist()


def test_every_row_learns_from_the_source_with_the_lowest_loss_and_of_equal_ones_from_the_learner() -> None:
    text = rows()
    sources = [predict(model(seed), text, 4) for seed in range(4)]
    equal = sources[0]._replace(value_STK=sources[0].value_STK - 1)
    found = best_of([*sources, equal])
    loss_NS = torch.stack([source.loss_S for source in sources])
    assert torch.equal(found.loss_S, loss_NS.amin(0))
    for row, number in enumerate(loss_NS.argmin(0).tolist()):
        assert torch.equal(found.value_STK[row], sources[number].value_STK[row])
        assert torch.equal(found.index_STK[row], sources[number].index_STK[row])
    assert bool((found.loss_S <= sources[0].loss_S).all()), "a source that is worse than the learner is never chosen"
    assert len(set(loss_NS.argmin(0).tolist())) > 1, "or the choice would not have been tried"


def test_with_all_logits_kept_the_loss_is_exact_distillation() -> None:
    """... but for the float16 of the wire; and q sums to 1 however few are kept."""
    learner, teacher, text = model(0), model(1), rows()
    with torch.no_grad():
        ours, theirs = (forward(m, text).logits_BTV for m in (learner, teacher))
    for temperature in (1.0, 2.0):
        found = knowledge_loss(ours, predict(teacher, text, V), torch.arange(S), text.valid_BT, temperature)
        q = (theirs / temperature).softmax(-1)
        exact = -(q * (ours / temperature).log_softmax(-1)).sum(-1)[text.valid_BT].mean()
        assert float(found) == pytest.approx(float(exact), abs=2e-3)
    flat = torch.zeros_like(ours)
    for kept in (1, 7):
        found = knowledge_loss(flat, predict(teacher, text, kept), torch.arange(S), text.valid_BT, 1.0)
        assert float(found) == pytest.approx(torch.tensor(float(V)).log().item(), rel=1e-5), "sum of q times log V"


def state_after(mixture: float, teacher_seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    learner, text = model(0), rows()
    teacher = best_of([predict(model(teacher_seed), text, 8)])
    learn(
        learner,
        text,
        teacher,
        mixture=mixture,
        temperature=1.0,
        optimisation=OPTIMISATION,
        seed=5,
        label="x",
        **changes,
    )
    return learner.state_dict()


def test_with_a_mixture_of_one_it_is_plain_training_whoever_teaches() -> None:
    ours, theirs = state_after(1.0, 1), state_after(1.0, 2)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    other = state_after(0.5, 2)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in ours.items())


def test_the_learner_comes_nearer_to_its_teacher_and_reads_every_row_once() -> None:
    learner, teacher, text = model(0), model(1), rows()
    target = predict(teacher, text, V)

    def gap() -> float:
        with torch.no_grad():
            return float(knowledge_loss(forward(learner, text).logits_BTV, target, torch.arange(S), text.valid_BT, 1.0))

    before = gap()
    for seed in range(8):
        history = learn(
            learner, text, target, mixture=0.0, temperature=1.0, optimisation=OPTIMISATION, seed=seed, label="x"
        )
        assert len(history) == 3, "ten rows, four at a time"
    assert gap() < before - 0.3
