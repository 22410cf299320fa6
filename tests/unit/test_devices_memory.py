# SPDX-License-Identifier: Apache-2.0
"""What models cost: exact counts of any size without a download, and estimates that grow as they must."""

from __future__ import annotations

import pytest
import torch
from devices_world import DENSE, SPARSE

from deepfusion.devices import memory
from deepfusion.devices.configurations import config_of
from deepfusion.devices.models import from_config
from deepfusion.errors import MemoryLimitError
from deepfusion.training import Optimisation
from deepfusion.types import ModelSpec

PUBLISHED = {  # parameters of the models on the hub
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "tinyllama-1.1b": 1_100_048_384,
    "olmo-1.2b": 1_176_764_416,
    "bloom-1.1b": 1_065_314_304,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
}


def config(preset: str, vocab_size: int | None = 64, positions: int = 32, **keys: object):
    return config_of(ModelSpec(name="m", preset=preset, config=keys), vocab_size=vocab_size, positions=positions)


def optimisation(**keys: object) -> Optimisation:
    return Optimisation(**{"batch_size": 4, "precision": "fp32", **keys})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_of_published_models_have_the_published_number_of_parameters(preset: str) -> None:
    assert memory.num_parameters(config(preset, None)) == PUBLISHED[preset]


def test_deepseek_moe_is_within_a_thousandth_of_the_published_size() -> None:
    assert memory.num_parameters(config("deepseek-moe-16b", None)) == pytest.approx(16_375_728_128, rel=1e-3)


@pytest.mark.parametrize("preset", DENSE + SPARSE)
def test_counts_are_those_of_the_built_model_with_tied_tensors_once(preset: str) -> None:
    model = from_config(config(preset), 0)
    distinct = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert memory.num_parameters(config(preset)) == sum(distinct.values())
    assert memory.upload_bytes(config(preset)) == 4 * sum(distinct.values())
    assert memory.upload_bytes(config(preset), torch.bfloat16) == 2 * sum(distinct.values())


@pytest.mark.parametrize("preset", SPARSE)
def test_of_a_sparse_model_only_the_chosen_experts_are_active(preset: str) -> None:
    expert = 3 * 32 * 48  # gate, up, down: hidden 32, expert width 48
    layers = 2 if preset.startswith("qwen") else 1
    total, active = (count(config(preset)) for count in (memory.num_parameters, memory.num_active_parameters))
    assert total - active == 2 * layers * expert  # 2 of 4 experts rest


def test_flops_leave_out_look_ups_but_not_the_head() -> None:
    tied, untied = config("llama-pico"), config("llama-pico", tie_word_embeddings=False)
    assert memory.forward_flops_per_token(tied) == memory.forward_flops_per_token(untied)
    assert memory.forward_flops_per_token(tied) == 2 * memory.num_parameters(tied)
    gpt2 = config("gpt2-pico")
    assert memory.forward_flops_per_token(gpt2) == 2 * (memory.num_parameters(gpt2) - 32 * 32)  # 32 positions


@pytest.mark.parametrize("preset", DENSE + SPARSE)
def test_fake_activations_agree_with_what_autograd_really_keeps(preset: str) -> None:
    model = from_config(config(preset), 0).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(4, 32, dtype=torch.long), use_cache=False)
    estimate = memory.training_memory(config(preset), optimisation(), 32).activations
    assert 0.97 * sum(kept.values()) <= estimate <= 1.2 * sum(kept.values())


def test_an_estimate_grows_with_what_must_make_it_grow() -> None:
    def total(**keys: object) -> int:
        return memory.training_memory(config("llama-small", 8192, 256), optimisation(**keys), 256).total

    assert total(batch_size=8) > total() > total(batch_size=1)
    assert total(gradient_checkpointing=True) < 0.8 * total()
    assert total(precision="bf16") < total() < total(accumulate=2)
    parts = memory.training_memory(config("llama-small", 8192, 256), optimisation(), 256)
    assert parts.weights == parts.gradients == parts.optimiser // 2 == 4 * 10_326_816
    assert parts.logits == 3 * 4 * 256 * 8192 * 4


def test_a_private_training_holds_one_document_and_one_more_gradient_whatever_its_batch() -> None:
    def estimate(private: bool, **keys: object) -> memory.MemoryEstimate:
        return memory.training_memory(config("llama-small", 8192, 256), optimisation(**keys), 256, private=private)

    one = estimate(True)
    assert one == estimate(True, batch_size=64, accumulate=4)
    assert one.gradients == 2 * estimate(False).gradients
    assert one.activations == estimate(False, batch_size=1).activations
    assert estimate(False, batch_size=1).total < one.total < estimate(False, batch_size=4).total


def test_a_device_over_its_limit_is_refused_with_what_would_fit() -> None:
    big, tiny = config("llama-small", 8192, 256), config("gpt2-pico", 64, 256)
    need = memory.training_memory(big, optimisation(), 256).total
    memory.check_fits("device-003", big, optimisation(), 256, need)
    memory.check_fits("device-003", big, optimisation(), 256, None)
    with pytest.raises(
        MemoryLimitError, match=r"device-003: .* needs .* limit is .*; batch_size = 4 with gradient_checkpointing"
    ):
        memory.check_fits("device-003", big, optimisation(), 256, need - 1)
    one = memory.training_memory(big, optimisation(batch_size=1), 256).total
    with pytest.raises(MemoryLimitError, match=r"batch_size = 1 \(.*iB\) or small would fit"):
        memory.check_fits(
            "d",
            big,
            optimisation(gradient_checkpointing=False, batch_size=2),
            256,
            one,
            [("big", big), ("small", tiny)],
        )
    with pytest.raises(MemoryLimitError, match="; small would fit"):
        memory.check_fits("d", big, optimisation(), 256, 2**27, [("big", big), ("small", tiny)])
    with pytest.raises(MemoryLimitError, match="none of the fleet's architectures fits; raise"):
        memory.check_fits("d", big, optimisation(), 256, 2**20, [("big", big), ("small", tiny)])


def test_peak_memory_is_that_of_a_process_with_torch() -> None:
    assert 100 * 2**20 < memory.peak_memory_bytes() < 100 * 2**30


def test_sizes_read_well() -> None:
    assert (memory.gib(3 * 2**29), memory.gib(2**20)) == ("1.50 GiB", "1.0 MiB")
