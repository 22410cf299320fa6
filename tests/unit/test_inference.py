# SPDX-License-Identifier: Apache-2.0
"""Properties of scoring and writing with any folder: within the model's reach, and out of its own distribution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from devices_world import byte_tokenizer
from transformers import PreTrainedModel

from deepfusion.data.tokenizer import open_tokenizer
from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config, load, save
from deepfusion.devices.presets import PRESETS
from deepfusion.devices.writing import write
from deepfusion.errors import ConfigError, DataError, ModelError
from deepfusion.inference import evaluate_model, generate_text

REACH = 16
"""Positions of the small model."""
V = 300


def small() -> PreTrainedModel:
    values = {**PRESETS["gpt2-pico"].config, "n_positions": REACH}
    return from_config(make_config(values, vocab_size=V, positions=1, eos_id=0), seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference")
    save(small(), folder / "model", byte_tokenizer(folder / "tokenizer"))
    (folder / "text.jsonl").write_text(json.dumps({"text": "1234"}) + "\n")
    return folder / "model"


@pytest.fixture
def opinionated(model: Path, tmp_path: Path) -> Path:
    """The same model as a publisher may recommend to use it."""
    published = load(model)
    save(published, tmp_path / "model", model)
    advice = {"do_sample": True, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.5,
              "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(V // 2))}  # fmt: skip
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | advice))
    return tmp_path / "model"


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_window_without_anything_to_predict_is_refused(model: Path, length: int) -> None:
    with pytest.raises(ConfigError, match=rf"--sequence-length {length}: a token needs one before it; choose 2"):
        evaluate_model(str(model), str(model.parent / "text.jsonl"), sequence_length=length)
    assert evaluate_model(str(model), str(model.parent / "text.jsonl"), sequence_length=2)["tokens"] == 4


def test_several_files_are_scored_together(model: Path) -> None:
    text = str(model.parent / "text.jsonl")
    once, twice = (evaluate_model(str(model), data, sequence_length=2)["tokens"] for data in (text, [text, text]))
    assert twice == 2 * once


def test_it_writes_as_far_as_the_model_reads_and_says_how_far_that_is(model: Path) -> None:
    assert generate_text(str(model), "123")
    assert generate_text(str(model), "123", tokens=REACH - 3)
    with pytest.raises(ConfigError, match=r"--tokens 14: the model reads 16, and the prompt has 3; choose 13 or less"):
        generate_text(str(model), "123", tokens=REACH - 2)
    with pytest.raises(ConfigError, match=r"PROMPT: has 17 tokens, the model reads 16; shorten it"):
        generate_text(str(model), "1" * 17)


def test_what_a_publisher_recommends_bends_no_distribution(model: Path, opinionated: Path) -> None:
    for temperature in (0.0, 1.0, 5.0):
        texts = {generate_text(str(folder), "123", temperature=temperature) for folder in (model, opinionated)}
        assert len(texts) == 1


def test_every_token_may_be_drawn() -> None:
    """transformers' default would leave all but the first fifty out."""
    prompt_BT = torch.ones(2000, 1, dtype=torch.long)
    torch.manual_seed(0)
    drawn_B = write(small(), prompt_BT, tokens=1, temperature=5.0, pad_id=0)[:, 1]
    assert len(drawn_B.unique()) > 150


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), 1e-300])
def test_a_temperature_at_which_nothing_can_be_drawn_is_refused(model: Path, temperature: float) -> None:
    with pytest.raises(ConfigError, match=rf"--temperature {temperature:g}: not between 0.001 and 1000"):
        generate_text(str(model), "123", temperature=temperature)
    assert generate_text(str(model), "123", temperature=0.0)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    small().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"bare: the model has no tokenizer; save one beside it"):
        evaluate_model(str(tmp_path / "bare"), str(model.parent / "text.jsonl"))
    with pytest.raises(ModelError, match=r"bare: the model has no tokenizer; save one beside it"):
        generate_text(str(tmp_path / "bare"), "123")
    with pytest.raises(DataError, match=r"bare: has no vocabulary"):
        open_tokenizer(tmp_path / "bare")
