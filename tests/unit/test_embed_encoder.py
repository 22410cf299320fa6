# SPDX-License-Identifier: Apache-2.0
"""Properties of the frozen-encoder embedding (method, section 4B), on a pico BERT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from devices_world import space_tokenizer
from domains_world import corpus_of
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from deepfusion.devices.noise import Noise
from deepfusion.errors import ModelError
from deepfusion.stages.embed import FrozenEncoder
from deepfusion.types import State

FOX, BOX = ["the quick brown fox", "the fox jumps over the dog"], ["pack my box", "five dozen jugs in my box"]
PUBLIC = corpus_of([*FOX, *BOX, "the dog naps"])


def no_noise() -> Noise:
    """An encoder's embedding has none on it."""
    return Noise(bytes(32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = space_tokenizer(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=120, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32,
        )
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> FrozenEncoder:
    return FrozenEncoder(model=str(folder), dimension=32, max_tokens=32, batch_size=2)


@pytest.fixture(scope="module")
def published(encoder: FrozenEncoder) -> State:
    return encoder.publish(PUBLIC, 0)


def test_an_embedding_is_a_unit_vector_of_float16_numbers(encoder: FrozenEncoder, published: State) -> None:
    vector_D = encoder.embed(corpus_of(FOX), published, 0, no_noise)
    assert vector_D.shape == (32,)
    assert np.array_equal(vector_D, vector_D.astype(np.float16).astype(np.float32))
    assert np.linalg.norm(vector_D) == pytest.approx(1, abs=1e-3)


def test_one_corpus_has_cosine_one_in_any_order_and_batching(encoder: FrozenEncoder, published: State) -> None:
    other = FrozenEncoder(model=encoder.model, dimension=32, max_tokens=32, batch_size=3)
    texts = [*FOX, *BOX]
    vector_D = encoder.embed(corpus_of(texts), published, 0, no_noise)
    again_D = other.embed(corpus_of(texts[::-1]), published, 0, no_noise)
    assert vector_D @ again_D == pytest.approx(1, abs=2e-3)


def test_unlike_text_is_told_apart(encoder: FrozenEncoder, published: State) -> None:
    vectors = [encoder.embed(corpus_of(texts), published, 0, no_noise) for texts in (FOX[:1], [FOX[0] + " naps"], BOX)]
    assert vectors[0] @ vectors[2] < vectors[0] @ vectors[1]


def test_blank_text_gives_the_zero_vector_and_changes_no_mean(encoder: FrozenEncoder, published: State) -> None:
    for texts in ([], [""], [" ", "\n"]):
        assert not encoder.embed(corpus_of(texts), published, 0, no_noise).any()
    rows_UD = encoder.embed_documents(corpus_of(["", *FOX]), published, 0)
    assert np.linalg.norm(rows_UD, axis=1) == pytest.approx([0, 1, 1])
    padded = encoder.embed(corpus_of(["", *FOX, " "]), published, 0, no_noise)
    assert padded @ encoder.embed(corpus_of(FOX), published, 0, no_noise) == pytest.approx(1, abs=2e-3)


def test_a_long_document_is_cut_to_what_is_read(encoder: FrozenEncoder, published: State) -> None:
    short = FrozenEncoder(model=encoder.model, dimension=32, max_tokens=4)
    ends = [["the fox", tail] for tail in ("the quick fox jumps over " * 40, "the quick fox jumps over " * 9)]
    first, second = (short.embed(corpus_of(texts), published, 0, no_noise) for texts in ends)
    assert np.array_equal(first, second)


def test_a_folder_that_is_no_encoder_is_refused_with_a_cure(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"\[embed\] model = .*cannot be opened.*tfidf"):
        FrozenEncoder(model=str(tmp_path)).publish(PUBLIC, 0)
    unpadded = tmp_path / "unpadded"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(unpadded)
    BertModel.from_pretrained(folder).save_pretrained(unpadded)
    with pytest.raises(ModelError, match="no padding token"):
        FrozenEncoder(model=str(unpadded)).publish(PUBLIC, 0)


def test_impossible_options_are_named() -> None:
    assert [fault.split(":")[0] for fault in FrozenEncoder(model="m", dimension=0, max_tokens=0).faults()] == [
        "dimension = 0",
        "max_tokens = 0",
    ]
