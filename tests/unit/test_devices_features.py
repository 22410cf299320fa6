# SPDX-License-Identifier: Apache-2.0
"""Features: taps are the residual stream before the final norm, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
from devices_world import DENSE, SPARSE, batch_of

from deepfusion.devices import features
from deepfusion.devices.configurations import config_of, make_config
from deepfusion.devices.features import blocks, forward, read
from deepfusion.devices.models import from_config
from deepfusion.errors import ModelError
from deepfusion.types import Batch, ModelSpec


def pico(preset: str, seed: int = 0, **config: object):
    spec = ModelSpec(name="m", preset=preset, config=config)
    return from_config(config_of(spec, vocab_size=64, positions=32, eos_id=0), seed)


@pytest.mark.parametrize("preset", DENSE + SPARSE)
def test_taps_are_what_transformers_calls_hidden_states_but_before_the_final_norm(preset: str) -> None:
    model, batch = pico(preset), batch_of(2, 12, 64, padded=4)
    mask = batch.valid_BT.long()
    expected = model(batch.input_ids_BT, attention_mask=mask, output_hidden_states=True, use_cache=False)
    outputs = forward(model, batch, taps=(2, 1))
    assert torch.equal(outputs.logits_BTV, expected.logits)
    assert torch.equal(outputs.taps[1], expected.hidden_states[1])
    assert outputs.taps[0].shape == expected.hidden_states[2].shape
    assert not torch.allclose(outputs.taps[0], expected.hidden_states[2])  # that one is after the norm


@pytest.mark.parametrize("preset", DENSE + SPARSE)
def test_scores_that_are_not_made_yet_are_the_logits(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = pico(preset), batch_of(2, 12, 64, padded=4)
    whole = forward(model, batch, taps=(1,))
    held = read(model, batch, taps=(1,))
    assert torch.equal(held.scores.hidden_BTH, whole.logits_BTV)
    monkeypatch.setattr(features, "LOGITS_HELD", 1)
    reading = read(model, batch, taps=(1,))
    assert reading.scores.weight_VH is model.get_output_embeddings().weight
    torch.testing.assert_close(reading.scores.logits(slice(None)), whole.logits_BTV)
    assert torch.equal(reading.taps[0], whole.taps[0])


def test_a_model_that_scales_its_logits_gives_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LOGITS_HELD", 1)
    values = {
        "model_type": "granite", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 48, "logits_scaling": 4.0,
    }  # fmt: skip
    model, batch = from_config(make_config(values, vocab_size=64, positions=32), 0), batch_of(2, 12, 64)
    for _ in range(2):
        reading = read(model, batch)
        assert reading.scores.weight_VH is None
        assert torch.equal(reading.scores.hidden_BTH, forward(model, batch).logits_BTV)


@pytest.mark.parametrize("preset", DENSE + SPARSE)
def test_padding_at_the_end_changes_nothing_before_it(preset: str) -> None:
    model, batch = pico(preset), batch_of(1, 12, 64, padded=4)
    short = Batch(batch.input_ids_BT[:, :8], batch.counted_BT[:, :8], batch.valid_BT[:, :8])
    torch.testing.assert_close(
        forward(model, batch).logits_BTV[:, :8], forward(model, short).logits_BTV, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("preset", ["gpt2-pico", "llama-pico", "qwen2-moe-pico"])
def test_given_parameters_take_the_place_of_the_models_own(preset: str) -> None:
    model, other, batch = pico(preset, 0), pico(preset, 1), batch_of(2, 8, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = dict(other.named_parameters())
    outputs = forward(model, batch, parameters=own, taps=(1,))
    assert torch.equal(outputs.logits_BTV, forward(other, batch).logits_BTV)
    outputs.taps[0].sum().backward()
    assert any(p.grad is not None for p in own.values())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_hooks_are_gone_after_a_forward_pass_also_after_one_that_failed() -> None:
    model = pico("llama-pico")
    forward(model, batch_of(1, 4, 64), taps=(1, 2))
    with pytest.raises(IndexError):
        forward(model, batch_of(1, 4, 10_000), taps=(1,))
    assert all(not block._forward_hooks for block in blocks(model))


def test_a_model_without_its_list_of_blocks_is_named() -> None:
    model = pico("llama-pico")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 decoder blocks"):
        blocks(model)
