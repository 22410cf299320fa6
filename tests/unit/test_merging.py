# SPDX-License-Identifier: Apache-2.0
"""Properties of `deepfusion merge`: the merge of a run, made on disk; nothing is left behind where it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_world import config, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deepfusion.devices.configurations import read_config
from deepfusion.devices.models import from_config, load, save
from deepfusion.errors import DiskError, ModelError
from deepfusion.merging import merge_folders
from deepfusion.moe import Family, families, tensor_files
from deepfusion.moe.excerpt import open_excerpt
from deepfusion.moe.routing import router_weights
from deepfusion.moe.stream import merged_tensors
from deepfusion.stages import merge as in_memory
from deepfusion.stages.router import random_router

FAMILIES = tuple(families)


def target_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    target = config(f"{model_type.replace('_', '-')}-pico")
    for key, value in changes.items():
        setattr(target, key, value)
    return families[model_type].ready_target(target)


def make_students(
    folder: Path,
    family: Family,
    target: PreTrainedConfig,
    count: int,
    *,
    alike: bool = False,
    dtype: Any = torch.float32,
) -> list[Path]:
    tokenizer = write_tokenizer(folder / "tokenizer")
    made: list[Path] = []
    for k in range(count):
        student = from_config(family.student_config(target), seed=0 if alike else k)
        save(student.to(dtype), folder / str(k), tokenizer)
        made.append(folder / str(k))
    target.save_pretrained(folder / "target")
    return made


def merged(folder: Path, model_type: str, students: list[Path], **options: Any) -> Path:
    target = folder / "target" if families[model_type].student == "dense" else None
    return merge_folders(students, model_type, folder / "moe", target=target, **options).folder


@pytest.mark.parametrize("model_type", FAMILIES)
def test_on_disk_it_is_the_merge_of_a_run(model_type: str, tmp_path: Path) -> None:
    family = families[model_type]
    target = target_of(model_type)
    students = make_students(tmp_path, family, target, family.num_experts(target))
    found = load(merged(tmp_path, model_type, students)).state_dict()
    parts = in_memory.open_students(students, family=family, target=target, slices=1)
    start = random_router(target, family=family, seed=0)
    options = in_memory.MergeOptions()
    expected = in_memory.merge(parts, start, family=family, target=target, options=options, seed=0).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith("mlp.gate.weight"):  # the routers are random, of unlike generators
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
        else:
            std = 0.01 / target.hidden_size**0.5 if family.scaling == "calibrated" else 0.02
            assert float(found[name].std()) == pytest.approx(std, rel=0.3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equal_students_make_the_model_that_they_are(model_type: str, tmp_path: Path) -> None:
    family = families[model_type]
    target = target_of(model_type)
    students = make_students(tmp_path, family, target, 3, alike=True)
    moe, student = load(merged(tmp_path, model_type, students, experts=4)), load(students[0])
    ids_BT = torch.randint(0, int(target.vocab_size), (2, 9))
    atol = 5e-4 if family.scaling == "calibrated" else 1e-5  # of weights that sum to 1 on average only
    with torch.no_grad():
        torch.testing.assert_close(moe(ids_BT).logits, student(ids_BT).logits, rtol=0, atol=atol)


def test_where_weights_are_not_normalised_they_sum_to_one_on_average_in_a_wide_model_too(tmp_path: Path) -> None:
    target = target_of("deepseek_v2", hidden_size=256)
    students = make_students(tmp_path, families["deepseek_v2"], target, 2)
    moe = load(merged(tmp_path, "deepseek_v2", students, experts=16, top_k=3))
    ids_BT = torch.arange(40).view(2, 20)
    with torch.no_grad(), router_weights(moe) as layers:
        moe(ids_BT)
    for weights_Tk in layers:
        assert float(weights_Tk.sum(-1).mean()) == pytest.approx(1, abs=0.03)
        assert float(weights_Tk.std()) > 1e-4 / 3, "experts differ, or every token went to the same"


def test_it_opens_with_transformers_alone_and_has_a_tokenizer(tmp_path: Path) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 2)
    folder = merged(tmp_path, "qwen2_moe", students, experts=6, top_k=3)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.config.norm_topk_prob) == (6, 3, True)
    assert (folder / "tokenizer.json").exists()
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts[0], experts[2])
    assert torch.equal(experts[1], experts[5])
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "mixtral"])
def test_half_precision_stays_half_precision(model_type: str, tmp_path: Path) -> None:
    family = families[model_type]
    target = target_of(model_type)
    students = make_students(tmp_path, family, target, 2, dtype=torch.bfloat16)
    state = load_file(merged(tmp_path, model_type, students, experts=family.num_experts(target)) / "model.safetensors")
    assert {t.dtype for name, t in state.items() if name.endswith(".weight")} == {torch.bfloat16}
    sources = [load_file(student / "model.safetensors") for student in students]
    name = "model.embed_tokens.weight"
    mean = sum(source[name].double() for source in sources) / 2
    assert torch.equal(state[name], mean.to(torch.bfloat16))


def test_norms_may_be_kept_in_another_type_than_matrices(tmp_path: Path) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 3, dtype=torch.bfloat16)
    for student in students:
        state = load_file(student / "model.safetensors")
        state |= {name: tensor.float() for name, tensor in state.items() if "norm" in name}
        save_file(state, student / "model.safetensors", metadata={"format": "pt"})
    state = load_file(merged(tmp_path, "qwen2_moe", students) / "model.safetensors")
    assert {t.dtype for name, t in state.items() if "norm" in name} == {torch.float32}
    assert state["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_many_files_and_a_small_buffer_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("deepseek_v3")
    students = make_students(tmp_path, families["deepseek_v3"], target, families["deepseek_v3"].num_experts(target))
    whole = load(merged(tmp_path, "deepseek_v3", students)).state_dict()
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    monkeypatch.setattr("deepfusion.moe.stream.BUFFER", 100)
    again = merge_folders(students, "deepseek_v3", tmp_path / "again", target=tmp_path / "target").folder
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert not (again / "model.safetensors").exists()
    for name, tensor in load(again).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_sharded_students_are_read(tmp_path: Path) -> None:
    target = target_of("mixtral")
    students = make_students(tmp_path, families["mixtral"], target, 2)
    whole = load(merged(tmp_path, "mixtral", students)).state_dict()
    for student in students:
        AutoModelForCausalLM.from_pretrained(student).save_pretrained(student / "cut", max_shard_size="20KB")
    cut = merge_folders([s / "cut" for s in students], "mixtral", tmp_path / "from cut").folder
    assert len(list((students[0] / "cut").glob("*.safetensors"))) > 1
    assert not (cut / "tokenizer.json").exists(), "students without a tokenizer make a MoE without one"
    for name, tensor in load(cut).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def spoil(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "says"), [
    (lambda s: s["model.norm.weight"].fill_(float("nan")), r"model.norm.weight holds NaN or infinity; train"),
    (lambda s: s["model.layers.0.mlp.experts.0.up_proj.weight"].fill_(float("inf")), r"up_proj.weight holds NaN or infinity"),
    (lambda s: s.pop("model.norm.weight"), r"1: tensor model.norm.weight is missing but .* in .*0; merge students of one base"),
    (lambda s: s.update({"model.norm.weight": torch.ones(3)}), r"1: tensor model.norm.weight is .*\(3,\).* but"),
    (lambda s: s.update({"more": torch.ones(3)}), r"1: tensor more is .*\(3,\).* but missing"),
], ids=["nan", "infinite expert", "missing", "shape", "extra"])  # fmt: skip
def test_students_that_cannot_be_merged_leave_nothing_behind(change: Any, says: str, tmp_path: Path) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 2)
    spoil(students[1], change)
    with pytest.raises(ModelError, match=says):
        merged(tmp_path, "qwen2_moe", students)
    assert not list(tmp_path.glob("moe*"))


def test_wrong_requests_say_what_is_right(tmp_path: Path) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 3)
    with pytest.raises(ModelError, match=r"--family qwen: no such family; choose one of qwen2_moe, "):
        merge_folders(students, "qwen", tmp_path / "moe")
    with pytest.raises(ModelError, match=r"is a qwen2_moe, not a mixtral; give the --family of the students"):
        merge_folders(students, "mixtral", tmp_path / "moe")
    with pytest.raises(ModelError, match=r"3 students, but only 2 experts; raise --experts"):
        merge_folders(students, "qwen2_moe", tmp_path / "moe", experts=2)
    with pytest.raises(ModelError, match=r"0: exists already; choose another --out"):
        merge_folders(students, "qwen2_moe", students[0])
    with pytest.raises(ModelError, match=r"nowhere: no such folder"):
        merge_folders([tmp_path / "nowhere"], "qwen2_moe", tmp_path / "moe")
    (students[2] / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"not a sound safetensors file .*; copy or save it again"):
        merge_folders(students, "qwen2_moe", tmp_path / "moe")
    (students[2] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors: no such file; give a folder that save_pretrained wrote"):
        merge_folders(students, "qwen2_moe", tmp_path / "moe")


def test_a_dense_family_asks_for_its_configuration(tmp_path: Path) -> None:
    students = make_students(tmp_path, families["deepseek_v3"], target_of("deepseek_v3"), 2)
    with pytest.raises(
        ModelError, match=r"students are dense and do not say how wide an expert is; give --target CONFIG"
    ):
        merge_folders(students, "deepseek_v3", tmp_path / "moe")


@pytest.mark.parametrize(("model_type", "change"), [
    ("qwen2_moe", {"num_hidden_layers": 5, "layer_types": None}),
    ("qwen2_moe", {"num_hidden_layers": 1, "layer_types": None}),
    ("qwen2_moe", {"hidden_act": "gelu"}),
    ("qwen2_moe", {"rms_norm_eps": 0.1}),
    ("qwen2_moe", {"mlp_only_layers": [1]}),
    ("qwen2_moe", {"vocab_size": 400}),
    ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("deepseek_v3", {"num_hidden_layers": 5}),
], ids=str)  # fmt: skip
def test_a_target_that_is_no_moe_of_these_students_is_refused(
    model_type: str, change: dict[str, Any], tmp_path: Path
) -> None:
    target = target_of(model_type)
    students = make_students(tmp_path, families[model_type], target, 2)
    other = type(target).from_dict({**target.to_dict(), **change})
    other.save_pretrained(tmp_path / "other")
    key = next(iter(change))
    mine, its = (re.escape(repr(c.to_dict()[key])) for c in map(read_config, (students[0], tmp_path / "other")))
    with pytest.raises(ModelError, match=rf"0: {key} = {mine}, but .*other wants {its} of its students; mend {key}"):
        merge_folders(students, model_type, tmp_path / "moe", target=tmp_path / "other")
    assert not list(tmp_path.glob("moe*"))


@pytest.mark.parametrize("change", [
    {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, {"num_attention_heads": 1}
], ids=str)  # fmt: skip
def test_students_that_say_unlike_things_of_themselves_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 2)
    own = json.loads((students[1] / "config.json").read_text())
    (students[1] / "config.json").write_text(json.dumps({**own, **change}))
    with pytest.raises(
        ModelError, match=rf"1: {next(iter(change))} = .*, but a MoE made after .*0 wants .*; merge students"
    ):
        merged(tmp_path, "qwen2_moe", students)


def test_what_a_student_is_called_and_how_it_was_trained_does_not_matter(tmp_path: Path) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 2)
    own = json.loads((students[1] / "config.json").read_text())
    change = {
        "eos_token_id": 5,
        "dtype": "float16",
        "initializer_range": 0.1,
        "attention_dropout": 0.2,
        "nickname": "b",
    }
    (students[1] / "config.json").write_text(json.dumps({**own, **change}))
    assert merged(tmp_path, "qwen2_moe", students).is_dir()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_whole_moe_is_no_student(model_type: str, tmp_path: Path) -> None:
    target = target_of(model_type)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    save(from_config(target, 0), tmp_path / "whole", tokenizer)
    target.save_pretrained(tmp_path / "target")
    with pytest.raises(ModelError, match=r"whole: .*; merge folders of one expert each"):
        merged(tmp_path, model_type, [tmp_path / "whole"] * 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tensors_that_are_not_the_whole_moe_are_refused(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(model_type)
    students = make_students(tmp_path, families[model_type], target, families[model_type].num_experts(target))

    def shortened(*args: Any) -> Any:
        return [(spec, write) for spec, write in merged_tensors(*args) if "layers.1.input_layernorm" not in spec.name]

    monkeypatch.setattr("deepfusion.merging.merged_tensors", shortened)
    with pytest.raises(ModelError, match=r"layers.1.input_layernorm.weight is missing, but a .* has it \(\d+,\); save"):
        merged(tmp_path, model_type, students)


@pytest.mark.parametrize(("name", "says"), [
    ("model.embed_tokens.weight", "has another model.embed_tokens.weight than the mean of its students in layer [01]"),
    ("model.layers.0.self_attn.v_proj.weight", "has another .*v_proj.weight than the mean of its students in layer 0"),
    ("model.layers.0.post_attention_layernorm.weight", "has another .*post_attention_layernorm.weight than .* in layer 0"),
    ("model.layers.0.mlp.gate.weight", "has a router in layer 0"),
    ("model.layers.0.mlp.shared_expert.up_proj.weight", "has another .*shared_expert.up_proj.weight than .* in layer 0"),
    ("model.layers.0.mlp.experts.1.down_proj.weight", r"with expert 1 differs .* in a logit of layer 0"),
    ("model.layers.1.mlp.experts.3.gate_proj.weight", r"with expert 3 differs .* in a logit of layer 1"),
    ("model.layers.1.mlp.gate.weight", "has a router in layer 1"),
    ("model.norm.weight", "has another model.norm.weight than the mean of its students in layer [01]"),
])  # fmt: skip
def test_a_weight_that_was_written_wrong_is_noticed(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 2)

    def written_wrong(folder: Path, *rest: Any) -> None:
        tensor_files.write_folder(folder, *rest)
        spoil(folder, lambda state: state[name].zero_())

    monkeypatch.setattr("deepfusion.merging.write_folder", written_wrong)
    with pytest.raises(ModelError, match=f"the merged qwen2_moe {says}"):
        merged(tmp_path, "qwen2_moe", students, experts=4)
    assert not list(tmp_path.glob("moe*"))


def test_what_the_check_opens_does_not_grow_with_vocabulary_depth_and_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def opening(*args: Any, **kwargs: Any) -> Any:
        model = open_excerpt(*args, **kwargs)
        opened.append(model.num_parameters())
        return model

    monkeypatch.setattr("deepfusion.merging.open_excerpt", opening)
    largest: list[int] = []
    for number, (layers, vocabulary, experts) in enumerate([(2, 300, 2), (4, 3000, 8)]):
        target = target_of("qwen2_moe", num_hidden_layers=layers, layer_types=["full_attention"] * layers)
        target.vocab_size = vocabulary
        folder = tmp_path / str(number)
        merged(folder, "qwen2_moe", make_students(folder, families["qwen2_moe"], target, 2), experts=experts)
        largest.append(max(opened))
        opened.clear()
    assert largest[0] == largest[1]


def test_a_merge_for_which_there_is_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students = make_students(tmp_path, families["qwen2_moe"], target_of("qwen2_moe"), 2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskError, match=r"the MoE takes .* GiB, and 0.0 GiB are free; choose another disk"):
        merged(tmp_path, "qwen2_moe", students)
    assert not list(tmp_path.glob("moe*"))
