# SPDX-License-Identifier: Apache-2.0
"""Which public text each domain reads, which models and tokenizers a device does not let near its own, how answers weigh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from devices_world import byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from deepfusion.data.prepare import corpus_from_texts
from deepfusion.data.tokenizer import open_tokenizer, tokenizer_from_json
from deepfusion.devices.configurations import config_of
from deepfusion.devices.device import Device
from deepfusion.devices.models import from_config
from deepfusion.devices.privacy import PrivacyOptions
from deepfusion.devices.releases import Seeded
from deepfusion.errors import DataError, UploadError
from deepfusion.federation.payload import encode
from deepfusion.methods.exchange import train_here
from deepfusion.methods.reading import domain_weights
from deepfusion.methods.rounds import answers
from deepfusion.stages.proxy import MODEL
from deepfusion.training import Optimisation
from deepfusion.types import ModelSpec, Payload


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_public_text_is_drawn_by_its_closeness_to_the_domain(temperature: float) -> None:
    closeness_UK = np.asarray([[0.9, -0.3], [0.8, 0.1], [-1.0, 1.0]])
    weights = domain_weights(closeness_UK, "domain", temperature)
    for domain, weights_U in enumerate(weights):
        assert weights_U is not None
        assert weights_U.max() == 1, "no weight runs over, however low the temperature"
        gap = closeness_UK[0, domain] - closeness_UK[1, domain]
        assert np.log(weights_U[0] / weights_U[1]) == pytest.approx(gap / temperature)


def test_uniform_text_has_no_weights() -> None:
    assert domain_weights(np.zeros((5, 3)), "uniform", 0.1) == [None] * 3


@pytest.mark.parametrize("privacy", [None, PrivacyOptions(epsilon=8.0)])
def test_a_model_without_a_row_for_each_token_is_refused_whatever_the_text_holds(
    privacy: PrivacyOptions | None, tmp_path: Path
) -> None:
    """Else a server learns by the failure whether its one unknown word is in the text."""
    spec = ModelSpec(name="m", preset="llama-pico")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    corpus = corpus_from_texts(["a", "e i"], "own", tokenizer)
    assert int(corpus.token_ids.max()) < 250, "no document holds what the smaller models lack"
    device = Device("d", spec, corpus, tokenizer, 8, Optimisation(batch_size=2), privacy, 1.0, 1, None, 0, Seeded(0))

    def told(rows: int, end: int) -> dict[str, str | int | float | bool]:
        return train_here(device, from_config(config_of(spec, vocab_size=rows, positions=8, eos_id=end), 0))

    size = 1 + max(ids_of(tokenizer))
    assert told(size, 0)["steps"] == 1
    for rows, end in ((size - 1, 0), (250, 0), (size, size)):
        with pytest.raises(UploadError, match=rf"knows tokens 0 to {rows - 1}, .* go up to {max(size - 1, end)}; send"):
            told(rows, end)


def ids_of(tokenizer: Path) -> list[int]:
    """All ids of a tokenizer."""
    return list(AutoTokenizer.from_pretrained(tokenizer).get_vocab().values())


WORDS = {"<end>": 0, "dog": 1, "?": 2}
SCORES = [(word, -1.0) for word in WORDS]


@pytest.mark.parametrize(
    ("safe", "fails"),
    [
        (models.WordLevel(WORDS, unk_token="?"), models.WordLevel(WORDS, unk_token="!")),
        (models.WordPiece(WORDS, unk_token="?"), models.WordPiece(WORDS, unk_token="!")),
        (models.BPE(WORDS, [], unk_token="?"), models.BPE(WORDS, [], unk_token="!")),
        (models.BPE(WORDS, []), models.BPE(WORDS, [], unk_token="!")),
        (models.Unigram(SCORES, unk_id=2), models.Unigram(SCORES)),
    ],
)
def test_a_tokenizer_that_fails_on_an_unknown_word_is_refused_before_it_reads_any(
    safe: models.Model, fails: models.Model, tmp_path: Path
) -> None:
    """Else a server learns by the failure whether all of a text is among the words that it chose."""
    tokenizer_from_json(Tokenizer(safe).to_str(), "<end>", tmp_path)
    assert open_tokenizer(tmp_path).encode("cat") is not None
    with pytest.raises(Exception, match=r"(?i)unk"):
        Tokenizer(fails).encode("cat")
    with pytest.raises(DataError, match="fails on words that it does not know; give its model an unknown token"):
        tokenizer_from_json(Tokenizer(fails).to_str(), "<end>", tmp_path)


def test_a_rounds_answer_weighs_by_its_tokens_as_far_as_they_are_credible(tmp_path: Path) -> None:
    tokens = {"a": 0, "b": 100, "c": 300, "d": 2**62}
    files = {device: tmp_path / device for device in tokens}
    for device, count in tokens.items():
        sent = Payload("moe", {MODEL + "weight": torch.ones(1)}, {"device": device, "tokens": count})
        files[device].write_bytes(encode(sent))
    assert [(device, weight) for device, _, weight in answers(files)] == [("a", 1), ("b", 100), ("c", 300), ("d", 3000)]
