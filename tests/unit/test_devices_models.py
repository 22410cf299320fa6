# SPDX-License-Identifier: Apache-2.0
"""Models: built the same for the same seed, opened safely, saved so that anyone can open them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from devices_world import DENSE, SPARSE, batch_of, byte_tokenizer, space_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

from deepfusion.devices import configurations, models
from deepfusion.devices.features import forward
from deepfusion.devices.presets import PRESETS
from deepfusion.devices.vocabulary import spelling
from deepfusion.errors import ModelError
from deepfusion.types import ModelSpec


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def built(spec: ModelSpec, tokenizer: Path, seed: int = 0, positions: int = 16):
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    return models.build(
        spec, vocab_size=size, positions=positions, seed=seed, eos_id=0, tokenizer_folder=tokenizer
    )  # fmt: skip


def saved(folder: Path, tokenizer: Path, preset: str = "llama-pico", seed: int = 0) -> Path:
    models.save(built(ModelSpec(name="m", preset=preset), tokenizer, seed), folder, tokenizer)
    return folder


@pytest.mark.parametrize("preset", DENSE + SPARSE)
def test_a_saved_model_opens_with_transformers_alone_and_generates(preset: str, words: Path, tmp_path: Path) -> None:
    model = built(ModelSpec(name="m", preset=preset), words)
    models.save(model, tmp_path, words)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = batch_of(2, 8, 300)
    assert torch.equal(forward(again.eval(), batch).logits_BTV, forward(model, batch).logits_BTV)
    tokens = AutoTokenizer.from_pretrained(tmp_path)("the quick", return_tensors="pt")
    assert again.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] <= tokens["input_ids"].shape[1] + 3
    assert models.init_id(models.load(tmp_path)) == models.init_id(model)


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(words: Path) -> None:
    spec = ModelSpec(name="m", preset="gpt2-pico")
    torch.manual_seed(5)
    first = models.init_id(built(spec, words, seed=3))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert models.init_id(built(spec, words, seed=3)) == first
    assert models.init_id(built(spec, words, seed=4)) != first


def test_the_end_of_text_token_is_trained_although_it_also_pads(words: Path) -> None:
    model = built(ModelSpec(name="m", preset="llama-pico", config={"tie_word_embeddings": False}), words).train()
    batch = batch_of(1, 6, 300)
    batch.input_ids_BT[0, 0] = 0
    forward(model, batch).logits_BTV.logsumexp(-1).sum().backward()
    row_H = model.get_input_embeddings().weight
    assert row_H[0].abs().sum() > 0
    assert row_H.grad[0].abs().sum() > 0


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_a_configuration_without_dropout(preset: str) -> None:
    config = configurations.config_of(ModelSpec(name="m", preset=preset), positions=128)
    assert not any(
        value for key, value in config.to_dict().items() if key.endswith(("_pdrop", "dropout")) and "summary" not in key
    )


def test_a_hub_name_that_a_preset_describes_needs_no_network() -> None:
    config = configurations.config_of(ModelSpec(name="m", hub="allenai/OLMo-1B-hf"), positions=1024)
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("olmo", 16, 50304)


def test_a_folder_keeps_its_weights_and_its_configuration_can_be_overridden(words: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path, words)
    spec = ModelSpec(name="m", folder=str(folder), config={"attention_dropout": 0.25})
    model = built(spec, words)
    assert model.config.attention_dropout == 0.25
    assert models.init_id(model) == models.init_id(models.load(folder))


BAD_SPECS = {
    "hidden_sise.*did you mean": ModelSpec(name="m", preset="llama-pico", config={"hidden_sise": 8}),
    "refused": ModelSpec(name="m", preset="llama-pico", config={"hidden_size": "wide"}),
    "do not divide": ModelSpec(name="m", preset="gpt2-pico", config={"n_head": 5}),
    "did you mean \"llama-pico\"": ModelSpec(name="m", preset="lama-pico"),
    "reaches 1024 positions.*lower": ModelSpec(name="m", preset="gpt2"),
    "no config.json": ModelSpec(name="m", folder="."),
    "there is no such folder": ModelSpec(name="m", folder="/nowhere/at-all"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_SPECS)
def test_a_bad_architecture_is_named_with_its_cure(message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f'"m": .*{message}'):
        configurations.config_of(BAD_SPECS[message], vocab_size=300, positions=2048, eos_id=0)


@pytest.mark.parametrize("preset", ["qwen2-moe-pico", "qwen3-moe-pico"])
def test_a_width_of_heads_that_the_configuration_does_not_declare_is_taken(preset: str) -> None:
    """The attention reads it all the same."""
    values = {**PRESETS[preset].config, "head_dim": 24}
    config = configurations.make_config(values, vocab_size=300, positions=8)
    attention = models.from_config(config, seed=0).model.layers[0].self_attn
    assert len(attention.q_proj.weight) == 24 * config.num_attention_heads
    for wrong in (0, 7, "8"):
        with pytest.raises(ModelError, match=f"head_dim = {wrong}: must be an even number above 0"):
            configurations.make_config({**values, "head_dim": wrong}, vocab_size=300, positions=8)


@pytest.mark.parametrize("preset", ["gpt2-pico", "olmoe-pico"])
def test_a_width_of_heads_that_the_attention_cannot_take_is_refused(preset: str) -> None:
    """GPT-2 ignores it; OLMoE's norms of queries are as wide as the model."""
    with pytest.raises(ModelError, match="has no such key"):
        configurations.make_config({**PRESETS[preset].config, "head_dim": 24}, vocab_size=300, positions=8)


def test_a_model_type_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a causal LM"):
        configurations.make_config({"model_type": "t5"}, vocab_size=None, positions=8)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be opened as a causal LM"):
        models.load(tmp_path)


def test_weights_in_pickle_are_never_opened(words: Path, tmp_path: Path) -> None:
    saved(tmp_path, words)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        models.load(tmp_path)


def test_code_that_a_model_brings_is_never_run(words: Path, tmp_path: Path) -> None:
    saved(tmp_path, words)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="no model there"):
        models.load(tmp_path)


def test_missing_and_broken_weights_are_errors_not_random_numbers(words: Path, tmp_path: Path) -> None:
    saved(tmp_path, words)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing \(model.layers.1.mlp.up_proj.weight"):
        models.load(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"causal LM: model\.safetensors, 100 bytes: "):
        models.load(tmp_path)


def test_equal_vocabularies_carry_every_token_over_unchanged(words: Path, tmp_path: Path) -> None:
    first = models.load(saved(tmp_path, words))
    again = built(ModelSpec(name="m", folder=str(tmp_path)), words)
    assert models.init_id(first) == models.init_id(again)


@pytest.mark.parametrize("preset", ["gpt2-pico", "llama-pico"])
def test_a_new_token_starts_as_the_mean_of_the_old_pieces_of_its_text(preset: str, words: Path, tmp_path: Path) -> None:
    spaces = space_tokenizer(tmp_path / "spaces")
    old = models.load(saved(tmp_path / "model", spaces, preset))
    carried = built(ModelSpec(name="m", folder=str(tmp_path / "model")), words)
    one, other = AutoTokenizer.from_pretrained(spaces), AutoTokenizer.from_pretrained(words)
    assert carried.config.vocab_size == carried.get_output_embeddings().weight.shape[0] == len(other)
    before_VH, after_VH = (m.get_input_embeddings().weight for m in (old, carried))
    for text in (" the", "the", " dog", " quick"):
        tokens = other.encode(text)
        if len(tokens) == 1:
            pieces = spelling(one, other)[tokens[0]]
            assert one.decode(pieces).strip() == text.strip()
            torch.testing.assert_close(after_VH[tokens[0]], before_VH[pieces].mean(0))
    assert torch.equal(after_VH[0], before_VH[0])  # end of text
    assert carried.get_output_embeddings().weight.data_ptr() == after_VH.data_ptr()  # still tied


def test_a_space_before_a_word_is_carried_over_between_unlike_tokenizers(words: Path, tmp_path: Path) -> None:
    one, other = AutoTokenizer.from_pretrained(space_tokenizer(tmp_path)), AutoTokenizer.from_pretrained(words)
    spelled = spelling(one, other)
    (with_space,) = other.encode(" the")
    assert one.convert_ids_to_tokens(spelled[with_space]) == ["▁the"]
    half_a_character = other.convert_tokens_to_ids("Ã")
    assert spelled[half_a_character] == []


def test_a_model_with_another_vocabulary_and_no_tokenizer_is_named(words: Path, tmp_path: Path) -> None:
    saved(tmp_path, words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer there"):
        built(ModelSpec(name="m", folder=str(tmp_path)), words)
