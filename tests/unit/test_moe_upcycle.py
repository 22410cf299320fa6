# SPDX-License-Identifier: Apache-2.0
"""Bases out of pretrained weights: what grows out of a dense model computes what that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.devices.configurations import make_config
from deepfusion.devices.memory import num_parameters
from deepfusion.devices.models import from_config, load
from deepfusion.devices.presets import PRESETS
from deepfusion.errors import ConfigError, ModelError
from deepfusion.merging import merge_folders
from deepfusion.methods import TargetOptions
from deepfusion.moe import families
from deepfusion.moe.upcycle import GROWS_INTO, mean_expert, student_state, target_values
from deepfusion.plan import make_plan
from small_world import QUIET, small_tree, write_text

DENSE: dict[str, dict[str, Any]] = {
    kind: {
        "model_type": kind, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": kind != "qwen3",
        **({"head_dim": 8} if kind == "qwen3" else {}),
    }
    for kind in GROWS_INTO
}  # fmt: skip


def dense(kind: str, **changes: Any) -> Any:
    """A small dense model of the kind, with every weight away from its first value."""
    model = from_config(make_config({**DENSE[kind], **changes}, vocab_size=None, positions=1), seed=3)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def student_of(model: Any, **overrides: Any) -> Any:
    family = families[GROWS_INTO[model.config.model_type]]
    values = {**target_values(model.config, family), family.num_experts_key: 4, "num_experts_per_tok": 2, **overrides}
    target = family.ready_target(make_config(values, vocab_size=None, positions=1))
    student = from_config(family.student_config(target), seed=0)
    student.load_state_dict(student_state(model.state_dict(), student.state_dict(), family.width_key))
    return student


@pytest.mark.parametrize("kind", GROWS_INTO)
def test_what_grows_out_of_a_dense_model_computes_the_same(kind: str) -> None:
    model = dense(kind)
    student = student_of(model)
    ids_BT = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(student(ids_BT).logits, model(ids_BT).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_heads_of_another_width_stay_as_wide_from_the_dense_model_to_the_moe(kind: str, tmp_path: Path) -> None:
    """hidden_size / num_attention_heads is 8 here; real models of Qwen3 have heads twice as wide as that quotient, too."""
    model = dense(kind, head_dim=12)
    student = student_of(model)
    assert student.config.head_dim == 12
    student.save_pretrained(tmp_path / "student")
    merge_folders([tmp_path / "student"], GROWS_INTO[kind], tmp_path / "moe", experts=4)
    ids_BT = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted_BTV = model(ids_BT).logits
        for name in ("student", "moe"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            torch.testing.assert_close(loaded(ids_BT).logits, wanted_BTV, atol=1e-6, rtol=1e-5)


def test_a_moe_base_keeps_the_width_of_its_heads(tmp_path: Path) -> None:
    """And its size is counted with them."""
    family, values = families["qwen3_moe"], {**PRESETS["qwen3-moe-pico"].config, "head_dim": 24}
    moe = from_config(make_config(values, vocab_size=96, positions=64), seed=0)
    moe.save_pretrained(tmp_path)
    target = family.ready_target(TargetOptions(base=str(tmp_path)).make(96, 64, None))
    assert num_parameters(target) == sum(p.numel() for p in moe.parameters())
    student = from_config(family.student_config(target), seed=1)
    student.load_state_dict(mean_expert(moe.state_dict(), student.state_dict(), family, target, [1.0] * 2))
    assert student.get_parameter("model.layers.0.self_attn.k_norm.weight").shape == (24,)


def test_the_shared_expert_of_a_grown_model_says_nothing_yet_but_learns() -> None:
    student = student_of(dense("qwen2"))
    ids_BT = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    student(ids_BT, labels=ids_BT).loss.backward()
    down = student.get_parameter("model.layers.0.mlp.shared_expert.down_proj.weight")
    assert down.abs().sum() == 0
    assert down.grad is not None
    assert down.grad.abs().sum() > 0


def test_a_bias_that_the_family_lacks_is_refused_with_its_name() -> None:
    with pytest.raises(ModelError, match=r"self_attn\.k_proj\.bias is \[16\] in the base and missing in the student"):
        student_of(dense("llama", attention_bias=True))


def test_an_expert_of_another_width_is_refused() -> None:
    with pytest.raises(ModelError, match="leave intermediate_size out"):
        student_of(dense("llama"), intermediate_size=40)


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if name.endswith("-pico") and PRESETS[name].config["model_type"] in families]
)
def test_a_moe_of_equal_experts_is_its_own_mean(preset: str) -> None:
    family = families[PRESETS[preset].config["model_type"]]
    target = family.ready_target(make_config(PRESETS[preset].config, vocab_size=96, positions=32))
    moe = from_config(target, seed=0)
    state = moe.state_dict()
    for name in state:
        if ".mlp.experts." in name:
            state[name] = state[name][:1].expand_as(state[name]).clone()
    student = from_config(family.student_config(target), seed=1)
    sure = [family.sure_weight(target)] * len(family.moe_layers(target))
    student.load_state_dict(mean_expert(state, student.state_dict(), family, target, sure))
    shared, expert = family.split(student.state_dict(), target)
    for name, tensor in family.expert_of(state, 2, target).items():
        torch.testing.assert_close(expert[name], tensor)
    assert all(torch.equal(state[name], tensor) for name, tensor in shared.items() if name in state)


@pytest.mark.parametrize(
    ("preset", "changes"), [
        ("qwen2-moe-pico", {"norm_topk_prob": False}), ("olmoe-pico", {"norm_topk_prob": False}),
        ("qwen3-moe-pico", {"norm_topk_prob": True}),
        ("deepseek-v3-pico", {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    ],
)  # fmt: skip
def test_a_moe_of_equal_experts_whose_weights_do_not_sum_to_one_is_still_its_mean(
    preset: str, changes: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    """With an even router every token's weights have the same sum, so that the student computes what the MoE does."""
    moe = from_config(make_config({**PRESETS[preset].config, **changes}, vocab_size=400, positions=64), seed=0)
    for name, parameter in moe.named_parameters():
        if ".mlp.experts." in name:
            parameter.data = parameter.data[:1].expand_as(parameter).clone() * 4
        if name.endswith(".mlp.gate.weight"):
            parameter.data.zero_()
    moe.save_pretrained(tmp_path)
    for file in (world / "llama").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    launch(parse_config(small_tree(world, target={"base": str(tmp_path)})), tmp_path / "run", until="start")
    ids_BT = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV, theirs_BTV = load(tmp_path / "run" / "base")(ids_BT).logits, load(tmp_path)(ids_BT).logits
    torch.testing.assert_close(ours_BTV, theirs_BTV[..., : ours_BTV.shape[-1]], rtol=1e-3, atol=1e-4)


def test_a_moe_base_of_other_shapes_is_refused() -> None:
    family, values = families["mixtral"], PRESETS["mixtral-pico"].config
    target = family.ready_target(make_config(values, vocab_size=96, positions=32))
    wider = family.ready_target(make_config({**values, "intermediate_size": 80}, vocab_size=96, positions=32))
    fresh = from_config(family.student_config(wider), seed=1).state_dict()
    with pytest.raises(ModelError, match=r"leave intermediate_size out of \[target.config\]"):
        mean_expert(
            from_config(target, seed=0).state_dict(), fresh, family, target, [1.0] * len(family.moe_layers(target))
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and the uploads' tokenizer with a trained Llama of another vocabulary beside it."""
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    launch(parse_config(small_tree(root)), root / "first", until="data")
    model = dense("llama", vocab_size=400)
    model.save_pretrained(root / "llama")
    tokenizer = next((root / "first" / "data").rglob("tokenizer.json")).parent
    for file in tokenizer.glob("tokenizer*"):
        (root / "llama" / file.name).write_bytes(file.read_bytes())
    return root


def test_a_fleet_fuses_into_a_mixtral_grown_out_of_a_llama_folder(world: Path) -> None:
    target = {"base": str(world / "llama"), "config": {"num_local_experts": 4, "num_experts_per_tok": 2}}
    record = launch(parse_config(small_tree(world, target=target)), world / "run")
    assert record is not None
    moe = AutoModelForCausalLM.from_pretrained(world / "run" / "moe")
    assert (moe.config.model_type, moe.config.num_local_experts, moe.config.intermediate_size) == ("mixtral", 4, 48)
    base, dense_model = load(world / "run" / "base"), load(world / "llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(base.get_parameter(name), dense_model.get_parameter(name))


def test_a_fleet_fuses_into_a_qwen3_moe_with_the_wide_heads_of_its_base(world: Path) -> None:
    base = dense("qwen3", vocab_size=400, head_dim=12)
    base.save_pretrained(world / "qwen3")
    for file in (world / "llama").glob("tokenizer*"):
        (world / "qwen3" / file.name).write_bytes(file.read_bytes())
    target = {"base": str(world / "qwen3"), "config": {"num_experts": 3, "num_experts_per_tok": 1}}
    config = parse_config(small_tree(world, target=target, evaluate=QUIET))
    plan = make_plan(config)
    assert launch(config, world / "wide") is not None
    for name, planned in (("moe", plan.target_parameters), ("base", plan.student_parameters)):
        model = AutoModelForCausalLM.from_pretrained(world / "wide" / name)
        assert model.config.head_dim == 12
        assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (48, 32)
        spare = 400 - model.config.vocab_size  # of the tokens that the plan counts the text fills fewer
        assert planned == sum(p.numel() for p in model.parameters()) + spare * 2 * 32


def test_a_fleet_goes_on_from_a_moe_that_it_made(world: Path) -> None:
    made = launch(parse_config(small_tree(world)), world / "again")
    assert made is not None
    tree = small_tree(world, target={"base": str(world / "again" / "moe")})
    record = launch(parse_config(tree), world / "further")
    assert record is not None
    assert record.baselines.students is not None
    before, after = made.metrics.log_perplexity, record.metrics.log_perplexity
    assert after < before, "further training of what was learnt"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({}, "preset, base: nothing given"),
        ({"preset": "qwen2-moe-pico", "base": "x"}, "they exclude each other"),
        ({"base": "/no/such/folder"}, "no such folder"),
    ],
)
def test_a_wrong_target_is_refused_with_a_cure(tmp_path: Path, target: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(small_tree(tmp_path, target=target))


def test_a_dense_model_that_computes_otherwise_is_no_base(tmp_path: Path) -> None:
    config = make_config(PRESETS["olmo2-pico"].config, vocab_size=96, positions=32)
    from_config(config, 0).save_pretrained(tmp_path)
    faults = list(TargetOptions(base=str(tmp_path)).faults())
    assert "model type olmo2 cannot become an expert" in faults[0]
