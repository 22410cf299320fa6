# SPDX-License-Identifier: Apache-2.0
"""DP-SGD over documents: each one's gradient by itself, clipped; the noise that was promised; the epsilon that is accounted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices_world import DENSE
from opacus.accountants import RDPAccountant
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from scipy.optimize import brentq
from scipy.stats import norm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deepfusion.devices.configurations import config_of, make_config
from deepfusion.devices.documents import PrivateDocuments
from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.devices.noise import Noise
from deepfusion.devices.privacy import PrivacyOptions, draws_for, epsilon_of
from deepfusion.devices.releases import Draws
from deepfusion.errors import DataError, PrivacyError
from deepfusion.stages.local import train_causal_lm
from deepfusion.training import Optimisation
from deepfusion.types import Batch, Corpus, ModelSpec, State

KEY, T, VOCABULARY = Noise(bytes(32)), 16, 64
CLEAR = Draws(0.0, 1.0, 1)
"""All documents, no noise."""


def corpus_of(lengths: list[int], counted: list[bool] | None = None) -> Corpus:
    """Documents of random tokens."""
    count, total = len(lengths), sum(lengths)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, total).astype(np.uint16)
    flags, none = np.repeat(counted or [True] * count, lengths), np.zeros(count + 1, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(ids, flags, starts, np.zeros(0, np.uint8), none, none[:count], ("own",), np.arange(count))


def model_of(name: str) -> PreTrainedModel:
    """A pico model of a preset, or of a model type that has none."""
    if name in DENSE:
        return from_config(config_of(ModelSpec(name="m", preset=name), vocab_size=VOCABULARY, positions=T), 0)
    keys = {
        "model_type": name,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return from_config(make_config({**keys, "num_key_value_heads": 1}, vocab_size=VOCABULARY, positions=T), 0)


def loss_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The sum over rows of each one's mean cross-entropy."""
    logits_BTV = forward(model, batch).logits_BTV[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch.input_ids_BT[:, 1:], reduction="none")
    return losses.mean(1).sum()


def gradients(model: PreTrainedModel, corpus: Corpus, draws: Draws = CLEAR, clip: float = 0.05, step: int = 0) -> State:
    """What `PrivateDocuments` leaves in `grad`."""
    parameters = dict(model.named_parameters())
    PrivateDocuments(corpus, T, draws, clip, KEY).backward(step, parameters, lambda b: loss_of(model, b).backward())
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


@register_grad_sampler(Conv1D)
def _conv1d(layer: Any, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[Any, torch.Tensor]:
    """GPT-2's transposed linear layer, which Opacus does not know."""
    weight = torch.einsum("nti,nto->nio", activations[0], backprops)
    return {layer.weight: weight, layer.bias: backprops.sum(1)}


def by_opacus(model: PreTrainedModel, corpus: Corpus, clip: float) -> State:
    """The mean of clipped gradients, out of Opacus' per-sample gradients of one batch."""
    ids_BT = torch.from_numpy(corpus.token_ids.astype(np.int64)).view(len(corpus), T)
    inputs: dict[str, torch.Tensor] = {"input_ids": ids_BT}
    if model.config.model_type == "gpt2":  # whose positions have one row for all documents otherwise
        inputs["position_ids"] = torch.arange(T).expand(len(corpus), T)
    hooks = GradSampleHooks(model.train(), loss_reduction="sum", strict=False)
    logits_BTV = model(**inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    losses.mean(1).sum().backward()
    samples: State = {name: p.grad_sample for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    hooks.cleanup()
    norm_B = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
    assert float(norm_B.std()) > 0
    scale_B = (clip / norm_B).clamp(max=1)
    return {name: torch.einsum("b...,b->...", sample, scale_B) / len(corpus) for name, sample in samples.items()}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("clip", [0.05, 2.0, 100.0])
@pytest.mark.parametrize("name", [*DENSE, "qwen2", "qwen3", "mistral"])
def test_clipped_gradients_are_those_that_opacus_makes_for_each_document_of_a_batch(name: str, clip: float) -> None:
    corpus = corpus_of([T] * 5)
    found, expected = gradients(model_of(name), corpus, clip=clip), by_opacus(model_of(name), corpus, clip)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float((found[key] - gradient).abs().max()) <= 2e-5 * float(gradient.abs().max()) + 1e-9, key


@pytest.mark.parametrize("name", DENSE)
def test_one_document_more_moves_the_sum_by_the_clipping_norm_at_most(name: str) -> None:
    model, corpus = model_of(name), corpus_of([9, T, 5, 40])
    whole, without = (gradients(model, part) for part in (corpus, corpus.select(np.arange(3))))
    moved = torch.cat([(4 * whole[n] - 3 * without[n]).flatten() for n in whole])
    assert float(moved.norm()) == pytest.approx(0.05, rel=1e-3), "it is longer than the norm and so scaled to it"


def test_a_document_without_a_finite_gradient_counts_as_none() -> None:
    model, corpus = model_of("llama-pico"), corpus_of([8, 8])
    seen: list[int] = []

    def backward(batch: Batch) -> None:
        seen.append(len(seen))
        (loss_of(model, batch) * (math.nan if len(seen) == 1 else 1.0)).backward()

    parameters = dict(model.named_parameters())
    PrivateDocuments(corpus, T, CLEAR, 0.05, KEY).backward(0, parameters, backward)
    total = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
    assert len(seen) == 2
    assert float(total.norm()) == pytest.approx(0.05 / 2, rel=1e-4)


def test_documents_are_drawn_by_themselves_and_all_with_the_same_chance() -> None:
    documents = PrivateDocuments(corpus_of([4] * 200), T, Draws(1.0, 0.1, 1), 1.0, KEY)
    drawn = [np.flatnonzero(KEY.stream(2 * step).uniform(200) < 0.1) for step in range(400)]
    assert [sum(1 for _ in documents.rows(step)) for step in range(400)] == [len(rows) for rows in drawn]
    sizes = np.asarray([len(rows) for rows in drawn])
    assert sizes.mean() == pytest.approx(20, abs=4 * math.sqrt(18 / 400))
    assert sizes.var() == pytest.approx(18, rel=0.3), "binomial: a fixed size would have none"
    often = np.bincount(np.concatenate(drawn), minlength=200)
    assert np.abs(often - 40).max() < 5 * 6


def test_a_row_is_of_one_document_and_a_long_ones_windows_are_all_read() -> None:
    corpus = corpus_of([3, 40, 1, 7], [True, True, True, False])
    documents = PrivateDocuments(corpus, T, Draws(1.0, 1.0, 1), 1.0, KEY)
    seen = {tuple(batch.input_ids_BT[0].tolist()) for step in range(40) for batch in documents.rows(step)}
    texts = [corpus.document(index)[0].tolist() for index in range(4)]
    windows = {tuple(texts[1][begin : begin + T]) for begin in (0, 15, 30)}
    assert seen == {tuple(texts[0]), *windows}, "the last two have nothing to predict"
    assert all(not batch.counted_BT[0, 0] for batch in documents.rows(0))


def test_the_noise_has_the_promised_deviation_and_is_other_noise_in_each_step() -> None:
    model, corpus, draws = model_of("gpt2-pico"), corpus_of([8] * 50), Draws(3.0, 1e-9, 10)
    first, second = (
        torch.cat([g.flatten() for g in gradients(model, corpus, draws, clip=0.5, step=step).values()])
        for step in (0, 1)
    )
    scale = 3.0 * 0.5 / (1e-9 * 50)
    assert float(first.std()) == pytest.approx(scale, rel=0.01)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02


def test_a_private_training_lowers_the_loss_tells_none_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    corpus, options = corpus_of([12] * 24), Optimisation(batch_size=12, learning_rate=3e-3)
    batch = Batch(*(torch.from_numpy(a.reshape(24, 12)) for a in (corpus.token_ids.astype(np.int64), corpus.counted)),
                  valid_BT=torch.ones(24, 12, dtype=torch.bool))  # fmt: skip

    def trained(scratch: Path | None, dies_at: int = -1) -> tuple[PreTrainedModel, list[dict[str, float]]]:
        model = model_of("llama-pico")

        def watch(label: str, done: int, total: int, note: str) -> None:
            if done == dies_at:
                raise KeyboardInterrupt

        text = PrivateDocuments(corpus, T, Draws(0.05, 0.5, 30), 1.0, KEY)
        history = train_causal_lm(
            model, text, steps=30, optimisation=options, seed=1, label="d", scratch=scratch, progress=watch
        )
        return model, history

    straight, history = trained(None)
    after, before = (loss_of(model, batch).detach() for model in (straight, model_of("llama-pico")))
    assert float(after) < 0.95 * float(before)
    assert all("loss" not in row for row in history)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepfusion.training.Checkpoint.__init__", _eager)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, dies_at=11)
        again, _ = trained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), again.parameters(), strict=True))


def _eager(checkpoint: Any, path: Path) -> None:
    object.__setattr__(checkpoint, "path", path)
    object.__setattr__(checkpoint, "every_seconds", 0.0)


def test_no_document_is_an_error_with_a_cure() -> None:
    with pytest.raises(DataError, match="no document to train on; add text"):
        PrivateDocuments(corpus_of([]), T, CLEAR, 1.0, KEY)


@pytest.mark.parametrize("draws", [Draws(1.1, 256 / 60_000, 14_062), Draws(0.7, 0.05, 300), Draws(4.0, 1.0, 20)])
def test_an_epsilon_is_about_that_of_opacus_own_accountant(draws: Draws) -> None:
    """Which asks at other orders; both are bounds."""
    accountant = RDPAccountant()
    accountant.history = [(draws.multiplier, draws.rate, draws.steps)]
    theirs = accountant.get_epsilon(delta=1e-5)
    assert epsilon_of([draws], 1e-5) == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(("multiplier", "steps"), [(1.0, 1), (4.0, 20), (30.0, 100)])
def test_where_every_step_reads_everything_the_bound_is_near_the_exact_curve(multiplier: float, steps: int) -> None:
    """Then all steps are one Gaussian, whose epsilon is known exactly (Balle and Wang 2018, theorem 8)."""
    width = math.sqrt(steps) / multiplier

    def over(epsilon: float) -> float:
        upper, lower = width / 2 - epsilon / width, -width / 2 - epsilon / width
        return float(norm.cdf(upper) - math.exp(epsilon) * norm.cdf(lower)) - 1e-5

    exact = brentq(over, 1e-6, 60.0)
    assert exact <= epsilon_of([Draws(multiplier, 1.0, steps)], 1e-5) <= 1.25 * exact


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.02, 500), (1.0, 5)])
def test_the_noise_is_the_least_that_keeps_to_epsilon(epsilon: float, rate: float, steps: int) -> None:
    draws = draws_for(PrivacyOptions(epsilon=epsilon), rate, steps)
    assert 0.97 * epsilon <= epsilon_of([draws], 1e-5) <= epsilon
    assert (draws.rate, draws.steps) == (rate, steps)


def test_trainings_add_up_to_less_than_the_sum_of_their_epsilons() -> None:
    draws = draws_for(PrivacyOptions(epsilon=2.0), 0.05, 200)
    once, twice = epsilon_of([draws], 1e-5), epsilon_of([draws, draws], 1e-5)
    assert epsilon_of([], 1e-5) == 0
    assert once < twice < 2 * once
    assert twice == pytest.approx(epsilon_of([draws._replace(steps=400)], 1e-5))


def test_what_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"epsilon = 0.01 cannot be kept over .* steps; choose a larger one"):
        draws_for(PrivacyOptions(epsilon=0.01, delta=1e-300), 1.0, 10**9)


@pytest.mark.parametrize(
    "bad", [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"max_grad_norm": 0.0}, {"max_grad_norm": 1e-40}]
)
def test_impossible_options_are_named_with_their_value(bad: dict[str, float]) -> None:
    (fault,) = PrivacyOptions(**{"epsilon": 1.0, **bad}).faults()
    assert fault.startswith(next(iter(bad)))
