# SPDX-License-Identifier: Apache-2.0
"""Small dense models grown into students: the same predictions, and new parts that can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.config import parse_config
from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config
from deepfusion.devices.presets import PRESETS
from deepfusion.moe import families
from deepfusion.moe.growth import cannot_grow, grow
from deepfusion.plan import make_plan
from small_world import WARM, rounds_tree, small_tree, write_text

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 56,
    "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
LARGE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "num_experts_per_tok": 2,
}  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "intermediate_size": 60, "num_local_experts": 4, "rope_theta": 10_000.0,
                "rms_norm_eps": 1e-6},
    "qwen2_moe": {"model_type": "qwen2_moe", "moe_intermediate_size": 40, "shared_expert_intermediate_size": 24,
                  "intermediate_size": 64, "num_experts": 4, "norm_topk_prob": True},
}  # fmt: skip
LENGTH = 24
IDS_BT = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def small(kind: str, **changes: Any) -> Any:
    model = from_config(make_config({"model_type": kind, **SMALL, **changes}, vocab_size=None, positions=1), seed=3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def student(target: str, **changes: Any) -> tuple[Any, Any]:
    family = families[target]
    config = family.ready_target(make_config({**LARGE, **TARGETS[target], **changes}, vocab_size=None, positions=1))
    return from_config(family.student_config(config), seed=0), family


def grown(source: Any, target: str, **changes: Any) -> Any:
    model, family = student(target, **changes)
    assert cannot_grow(source.config, model.config, family, LENGTH) is None
    model.load_state_dict(grow(source.state_dict(), source.config, model.state_dict(), model.config, family))
    return model


@pytest.mark.parametrize(("kind", "target"), [("llama", "mixtral"), ("llama", "qwen2_moe"), ("qwen2", "qwen2_moe")])
def test_what_has_grown_predicts_the_same_where_heads_are_as_wide(kind: str, target: str) -> None:
    """More layers, channels, heads and neurons; in Qwen's case some of these in the shared and some in the routed expert."""
    source = small(kind)
    with torch.no_grad():
        gap = grown(source, target)(IDS_BT).logits - source(IDS_BT).logits
    assert float(gap.abs().max()) < 2e-3, "the epsilon of the norm is all that differs"


def test_grouped_heads_and_dense_layers_grow_as_well() -> None:
    source = small("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    model = grown(source, "qwen2_moe", **wide, mlp_only_layers=[1], intermediate_size=70)
    with torch.no_grad():
        assert float((model(IDS_BT).logits - source(IDS_BT).logits).abs().max()) < 2e-3


def test_wider_heads_change_little() -> None:
    source = small("llama")
    with torch.no_grad():
        theirs = source(IDS_BT).logits.log_softmax(-1)
        ours = grown(source, "mixtral", num_attention_heads=2, num_key_value_heads=2)(IDS_BT).logits.log_softmax(-1)
    assert float((ours - theirs).abs().mean()) < 0.05


def test_every_new_part_learns() -> None:
    model = grown(small("llama"), "qwen2_moe")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # what is read at random is reached once something has been written
        optimiser.zero_grad()
        model(IDS_BT, labels=IDS_BT).loss.backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            continue  # of one expert: its weight is 1 whatever the router says
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0, name
    assert float(model.model.embed_tokens.weight.grad[:, 32:].abs().sum()) > 0, "new channels of the embedding"


def test_heads_that_are_new_learn_where_there_are_no_new_channels() -> None:
    model = grown(small("llama", head_dim=16), "mixtral", hidden_size=32, head_dim=16)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(IDS_BT, labels=IDS_BT).loss.backward()
        optimiser.step()
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        assert float(getattr(attention, name).weight.grad[32:].abs().sum()) > 0, name
    assert float(attention.o_proj.weight[:, 32:].detach().abs().sum()) > 0


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}, {}, "a gpt2 is not built like a mixtral"),
        ({"intermediate_size": 61}, {}, "it has 61 FFN neurons, the student 60"),
        ({"hidden_size": 96, "head_dim": 16}, {}, "it has 96 channels, the student 64"),
        ({"num_hidden_layers": 4}, {}, "it has 4 layers, the student 3"),
        ({"num_attention_heads": 4}, {}, "another number of query heads"),
        ({"head_dim": 32}, {}, "it has 32 numbers a head, the student 16"),
        ({"vocab_size": 97}, {}, "it has 97 tokens of vocabulary"),
        ({"attention_bias": True}, {}, "it has biases"),
        ({"hidden_act": "gelu"}, {}, "its activation function is gelu, the student's silu"),
        (
            {"model_type": "mistral", "sliding_window": 8},
            {},
            "its attention reaches over 8 tokens, the student's over 24",
        ),
        ({}, {"sliding_window": 8}, "its attention reaches over 24 tokens, the student's over 8"),
        ({"tie_word_embeddings": False}, {}, "an output head of its own"),
    ],
)
def test_what_cannot_grow_is_told_with_the_reason(source: dict[str, Any], target: dict[str, Any], said: str) -> None:
    model, family = student("mixtral", **target)
    values = source if "n_embd" in source else {"model_type": "llama", **SMALL, **source}
    config = make_config({"vocab_size": 96, **values}, vocab_size=None, positions=1)
    assert said in str(cannot_grow(config, model.config, family, LENGTH))


def test_biases_of_qwen2_need_a_place() -> None:
    model, family = student("qwen2_moe", qkv_bias=False)
    source = make_config({"model_type": "qwen2", **SMALL}, vocab_size=None, positions=1)
    assert cannot_grow(source, model.config, family, LENGTH) == "it has biases that the student has not"


def test_sliding_windows_of_some_layers_are_compared_layer_by_layer() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 8}
    model, family = student("qwen2_moe", **sliding, max_window_layers=3)
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]

    def why(**layers: Any) -> str | None:
        source = make_config({"model_type": "qwen2", **SMALL, **sliding, **layers}, vocab_size=None, positions=1)
        return cannot_grow(source, model.config, family, LENGTH)

    assert why(layer_types=model.config.layer_types[:2]) is None
    assert why(max_window_layers=1) == "its attention reaches over 24 tokens, the student's over 8"
    assert why(max_window_layers=0) == "its attention reaches over 8 tokens, the student's over 24"


def test_a_sliding_window_as_long_as_the_text_changes_nothing() -> None:
    source = small("mistral", sliding_window=LENGTH)
    with torch.no_grad():
        gap = grown(source, "mixtral")(IDS_BT).logits - source(IDS_BT).logits
    assert float(gap.abs().max()) < 2e-3, "the epsilon of the norm is all that differs"


def test_the_shipped_llamas_grow_into_the_shipped_qwen() -> None:
    for size in ("pico", "tiny", "small"):
        family = families["qwen2_moe"]
        target = family.ready_target(make_config(PRESETS[f"qwen2-moe-{size}"].config, vocab_size=512, positions=64))
        llama = make_config(PRESETS[f"llama-{size}"].config, vocab_size=512, positions=64)
        assert cannot_grow(llama, family.student_config(target), family, LENGTH) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "the best proxy of llama, grown"),
        ({"distillation": {"start": "warm_start"}, "warm_start": WARM}, "the best warm start of llama, grown"),
        ({"distillation": {"start": "base"}}, "random weights"),
        (
            {"target": {"preset": "olmoe-pico"}},
            "random weights: gpt2 cannot grow, a gpt2 is not built like a olmoe; llama ",
        ),
    ],
)
def test_a_plan_says_what_students_start_as(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_text(tmp_path)
    start = make_plan(parse_config(small_tree(tmp_path, **changes))).start
    assert start is not None
    assert start.startswith(said)


def test_a_plan_of_a_method_without_students_has_no_start(tmp_path: Path) -> None:
    write_text(tmp_path)
    assert make_plan(parse_config(rounds_tree(tmp_path, "fedavg"))).start is None
