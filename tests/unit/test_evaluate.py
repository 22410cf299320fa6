# SPDX-License-Identifier: Apache-2.0
"""Properties of the scores: the plain formula document by document, sums that add up, loads that are shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distill_world import V, config
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from deepfusion.devices.models import from_config
from deepfusion.moe import families
from deepfusion.moe.routing import routers
from deepfusion.stages.evaluate import Score, by_domain, expert_load, mutual_information, score_documents, total
from deepfusion.types import Corpus

LENGTHS = [3, 40, 1, 16, 17, 2, 31, 9]


def corpus_of(lengths: list[int] = LENGTHS, seed: int = 0) -> Corpus:
    """Random tokens of two domains in turn; some tokens do not count."""
    rng, count = np.random.default_rng(seed), len(lengths)
    tokens = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(
        rng.integers(0, V, tokens).astype(np.uint16), rng.random(tokens) < 0.7, starts, np.zeros(0, np.uint8),
        np.zeros(count + 1, np.int64), np.arange(count) % 2, ("even", "odd"), np.arange(count),
    )  # fmt: skip


def model_of(preset: str = "llama-pico") -> PreTrainedModel:
    return from_config(config(preset), seed=3).eval()


def test_scores_are_the_plain_formula_document_by_document() -> None:
    model, corpus = model_of(), corpus_of()
    scores = score_documents(model, corpus, sequence_length=64)
    for index, score in enumerate(scores):
        ids, counted = corpus.document(index)
        if len(ids) == 1:
            assert score == Score()
            continue
        ids_1T = torch.as_tensor(ids.astype(np.int64))[None]
        with torch.no_grad():
            log_TV = model(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
        mask = torch.as_tensor(counted[1:])
        target = ids_1T[0, 1:]
        assert score.nll == pytest.approx(float(-log_TV[range(len(target)), target][mask].sum()), rel=1e-5, abs=1e-6)
        assert score.hits == int((log_TV.argmax(-1) == target)[mask].sum())
        assert score.tokens == int(mask.sum())


def test_windows_count_every_token_but_the_first_exactly_once() -> None:
    model, corpus = model_of(), corpus_of()
    whole = score_documents(model, corpus, sequence_length=64)
    cut = score_documents(model, corpus, sequence_length=16)
    assert [s.tokens for s in cut] == [s.tokens for s in whole]
    for length, a, b in zip(LENGTHS, cut, whole, strict=True):
        if length <= 16:
            assert a.nll == pytest.approx(b.nll, rel=1e-5)
    assert cut[1].nll != pytest.approx(whole[1].nll, rel=1e-5), "a window begins without what went before"


def test_a_documents_neighbours_do_not_change_its_score() -> None:
    model, corpus = model_of(), corpus_of()
    together = score_documents(model, corpus, sequence_length=16)
    for index in range(len(corpus)):
        (alone,) = score_documents(model, corpus.select(np.asarray([index])), sequence_length=16)
        assert alone.nll == pytest.approx(together[index].nll, rel=1e-5, abs=1e-6)


def test_an_uncertain_model_has_the_vocabulary_as_its_perplexity() -> None:
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    score = total(by_domain(score_documents(model, corpus_of(), sequence_length=16), corpus_of()))
    assert score.perplexity == pytest.approx(V, rel=1e-5)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 50), st.integers(0, 100)), max_size=8))
def test_scores_add_up(parts: list[tuple[float, int, int]]) -> None:
    scores = [Score(nll, hits, tokens) for nll, hits, tokens in parts]
    whole = sum(scores, Score())
    assert whole.tokens == sum(tokens for _, _, tokens in parts)
    assert whole.nll == pytest.approx(sum(nll for nll, _, _ in parts))
    if whole.tokens:
        assert whole.log_perplexity == pytest.approx(whole.nll / whole.tokens)
    else:
        assert math.isnan(whole.log_perplexity)
        assert math.isnan(whole.token_accuracy)


def test_domains_are_summed_by_name_and_cover_everything() -> None:
    corpus = corpus_of()
    scores = score_documents(model_of(), corpus, sequence_length=16)
    domains = by_domain(scores, corpus)
    assert list(domains) == ["even", "odd"]
    assert domains["odd"].nll == pytest.approx(sum(s.nll for s in scores[1::2]))
    assert total(domains).tokens == sum(s.tokens for s in scores)
    assert list(by_domain(scores[:1], corpus.select(np.asarray([0])))) == ["even"]


def test_a_perplexity_beyond_every_number_is_infinite() -> None:
    assert Score(1e6, 0, 1).perplexity == math.inf


@pytest.mark.parametrize("model_type", sorted(families))
def test_loads_are_shares_of_the_chosen_experts(model_type: str) -> None:
    family = families[model_type]
    target = family.ready_target(config(f"{model_type.replace('_', '-')}-pico", num_hidden_layers=2))
    model, top, experts = from_config(target, seed=1), int(target.num_experts_per_tok), family.num_experts(target)
    load = expert_load(model, corpus_of(), 16, family=family)
    assert set(load) == {"even", "odd"}
    for shares in load.values():
        assert len(shares) == experts
        assert sum(shares) == pytest.approx(1)
        assert max(shares) <= 1 / top + 1e-9, "an expert is chosen once a token at most"
    with torch.no_grad():  # the first experts win always
        for router in routers(model):
            router.weight.zero_()  # type: ignore[operator]
    even = expert_load(model, corpus_of(), 16, family=family)
    assert even["even"] == pytest.approx(even["odd"])
    assert mutual_information(even) == pytest.approx(0, abs=1e-12)


def test_mutual_information_lies_between_zero_and_the_entropy_of_the_domains() -> None:
    assert mutual_information({"a": [0.25] * 4, "b": [0.25] * 4}) == pytest.approx(0)
    assert mutual_information({"a": [1.0, 0.0], "b": [0.0, 1.0]}) == pytest.approx(math.log(2))
    assert mutual_information(dict(zip("abcd", np.eye(4).tolist(), strict=True))) == (pytest.approx(math.log(4)))


def test_progress_ends_at_the_number_of_tokens() -> None:
    seen: list[tuple[int, int]] = []
    corpus = corpus_of()
    score_documents(model_of(), corpus, 16, progress=lambda _label, done, total, _note: seen.append((done, total)))
    assert seen[-1][1] == corpus.num_tokens
    assert seen[-1][0] <= corpus.num_tokens
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
