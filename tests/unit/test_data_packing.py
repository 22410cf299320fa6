# SPDX-License-Identifier: Apache-2.0
"""Packing: a pure, exact stream of tokens for training; every document by itself for evaluation."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.data.packing import PackedText, document_batches
from deepfusion.errors import DataError
from deepfusion.types import Corpus

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def _corpus(lengths: list[int]) -> Corpus:
    """A store with a foreign document between any two; token ids are unique, even ones count."""
    stored = [length for own in lengths for length in (own, 3)]
    starts = np.concatenate([[0], np.cumsum(stored)])
    ids = np.arange(starts[-1])
    return Corpus(
        ids.astype(np.uint16), ids % 2 == 0, starts, np.zeros(0, np.uint8), np.zeros(len(stored) + 1, np.int64),
        np.zeros(len(stored), np.int32), ("d",), np.arange(0, len(stored), 2),
    )  # fmt: skip


def _tokens(corpus: Corpus) -> list[int]:
    return [int(t) for u in range(len(corpus)) for t in corpus.document(u)[0]]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, length=st.integers(2, 40), batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_epoch_of_the_stream_holds_each_token_once(lengths: list[int], length: int, batch_size: int, seed: int):
    corpus = _corpus(lengths)
    text = PackedText(corpus, length, seed)
    steps = -(-3 * corpus.num_tokens // (length * batch_size))
    batches = [text.batch(step, batch_size) for step in range(steps)]
    stream = torch.cat([batch.input_ids_BT.flatten() for batch in batches]).tolist()
    for epoch in range(3):
        part = stream[epoch * corpus.num_tokens : (epoch + 1) * corpus.num_tokens]
        assert sorted(part) == sorted(_tokens(corpus))
    assert all(batch.input_ids_BT.shape == (batch_size, length) and batch.valid_BT.all() for batch in batches)
    counted = torch.cat([batch.counted_BT.flatten() for batch in batches]).tolist()
    assert counted == [token % 2 == 0 for token in stream]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, length=st.integers(2, 40), weighted=st.booleans(), data=st.data())
def test_a_batch_depends_on_its_arguments_alone(lengths: list[int], length: int, weighted: bool, data: st.DataObject):
    corpus = _corpus(lengths)
    weights_U = np.arange(1.0, len(corpus) + 1) if weighted else None
    rows = [PackedText(corpus, length, 5, weights_U).batch(step, 1).input_ids_BT[0] for step in range(12)]
    used = PackedText(corpus, length, 5, weights_U)
    for step in data.draw(st.permutations(range(6))):
        assert torch.equal(used.batch(step, 2).input_ids_BT, torch.stack(rows[2 * step : 2 * step + 2]))


def test_documents_stay_whole_and_in_a_new_order_each_epoch():
    corpus = _corpus([4] * 20)
    ids = PackedText(corpus, 80, 0).batch(0, 2).input_ids_BT.view(2, 20, 4)
    assert torch.equal(ids[:, :, 1:] - ids[:, :, :1], torch.tensor([1, 2, 3]).expand(2, 20, 3))
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(PackedText(corpus, 80, 1).batch(0, 1).input_ids_BT[0], ids[0].flatten())


def test_weighted_documents_appear_in_proportion_and_weightless_ones_never():
    corpus = _corpus([5] * 40)
    weights_U = np.r_[np.zeros(10), np.full(10, 1.0), np.full(20, 3.0)]
    batch = PackedText(corpus, 50, 2, weights_U).batch(0, 400)
    owner = np.searchsorted(corpus.token_starts, batch.input_ids_BT.numpy(), side="right") // 2
    assert not np.isin(owner, np.arange(10)).any()
    assert (owner >= 20).mean() == pytest.approx(60 / 70, abs=0.03)
    assert PackedText(corpus, 50, 2, weights_U).num_rows == 4


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.floats(0, 10), min_size=1, max_size=30).filter(any), seed=st.integers(0, 9))
def test_a_weighted_document_comes_as_often_as_it_should_to_within_one(weights: list[float], seed: int):
    corpus = _corpus([3] * len(weights))
    due_U = np.asarray(weights) / np.sum(weights) * len(weights)
    rows = PackedText(corpus, 3, seed, np.asarray(weights)).batch(0, len(weights)).input_ids_BT[:, 0].numpy()
    owner = (np.searchsorted(corpus.token_starts, rows, side="right") - 1) // 2
    times_U = np.bincount(owner, minlength=len(weights))
    assert (np.abs(times_U - due_U) < 1 + 1e-9).all()
    assert times_U.sum() == len(weights)


def test_num_rows_is_what_an_epoch_begins():
    assert PackedText(_corpus([10, 11]), 7, 0).num_rows == 3
    assert PackedText(_corpus([10, 12]), 7, 0).num_rows == 4


def test_an_empty_corpus_cannot_be_trained_on():
    corpus = _corpus([3]).select(np.arange(0))
    with pytest.raises(DataError, match="no document to train on"):
        PackedText(corpus, 8, 0)
    assert list(document_batches(corpus, 8)) == []


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, length=st.integers(2, 40), budget=st.integers(1, 200))
def test_evaluation_predicts_every_token_but_a_documents_first_exactly_once(
    lengths: list[int], length: int, budget: int
):
    corpus = _corpus(lengths)
    seen: list[int] = []
    counted: list[int] = []
    for documents_B, batch in document_batches(corpus, length, budget):
        assert batch.valid_BT.shape[1] <= length
        assert batch.valid_BT.numel() <= budget or len(documents_B) == 1
        for document, ids, flags, valid in zip(
            documents_B, batch.input_ids_BT, batch.counted_BT, batch.valid_BT, strict=True
        ):
            own = set(corpus.document(int(document))[0].tolist())
            assert set(ids[valid].tolist()) <= own
            assert not ids[~valid].any()
            assert torch.equal(valid, torch.arange(len(valid)) < valid.sum())
            assert valid.sum() >= 2
            seen += ids[1:][valid[1:]].tolist()
            counted += ids[flags].tolist()
    expected = [int(t) for u in range(len(corpus)) for t in corpus.document(u)[0][1:]]
    assert sorted(seen) == sorted(expected)
    assert sorted(counted) == sorted(token for token in expected if token % 2 == 0)


def test_rows_come_longest_first_so_that_little_is_padding():
    corpus = _corpus(np.random.default_rng(0).integers(2, 100, 400).tolist())
    valids = [batch.valid_BT for _, batch in document_batches(corpus, 64, 640)]
    widths = [valid_BT.shape[1] for valid_BT in valids]
    assert widths == sorted(widths, reverse=True)
    assert sum(int(v.sum()) for v in valids) / sum(v.numel() for v in valids) > 0.95


def test_packing_is_much_faster_than_any_training():
    corpus = _corpus([100] * 600)
    text = PackedText(corpus, 128, 0)
    text.batch(0, 32)
    began = time.perf_counter()
    for step in range(100):
        text.batch(step, 32)
    assert 100 * 32 * 128 / (time.perf_counter() - began) > 1e6
