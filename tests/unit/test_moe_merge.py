# SPDX-License-Identifier: Apache-2.0
"""The merge is exact, checks itself, refuses what cannot be merged, and leaves a model that needs nothing of ours."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_world import H, I, equal, logits_of, make_batch, make_student, make_target, merged_from, write_students

from deepfusion.devices.models import from_config, load
from deepfusion.errors import ModelError
from deepfusion.moe import families
from deepfusion.moe.routing import force_experts, routers
from deepfusion.stages.merge import MergeOptions, calibrate_scale, check_merge, merge, open_students
from deepfusion.stages.router import random_router

EVERY = sorted(families)
NORMALISED = sorted(set(families) - {"deepseek_v2"})


@pytest.mark.parametrize("name", EVERY)
def test_forced_routing_to_an_expert_gives_its_student(name: str, tmp_path: Path) -> None:
    family, target, batch = families[name], make_target(name), make_batch()
    moe, students, options = merged_from(write_students(tmp_path, family, target, [1, 2, 3, 4]), family, target)
    assert check_merge(moe, students, batch, family=family, options=options) < 1e-5
    forced: list[torch.Tensor] = []
    for index in range(4):
        with force_experts(moe, family, [index]):
            forced.append(logits_of(moe, batch))
    assert float((forced[0] - forced[1]).abs().max()) > 0.1  # the check can tell experts apart


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("top", [1, 2, 4])
def test_moe_of_identical_experts_equals_its_base_for_any_top_k(name: str, top: int, tmp_path: Path) -> None:
    family, target, batch = families[name], make_target(name, top=top), make_batch()
    paths = write_students(tmp_path, family, target, [7, 7])
    moe, _, _ = merged_from(paths, family, target, noise=0.0)  # E = 4 > K = 2
    wanted = logits_of(load(paths[0]), batch)
    torch.testing.assert_close(logits_of(moe, batch), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("top", "largest"), [(4, 1e-5), (2, 0.05), (1, 0.1)])
def test_deepseek_v2_of_identical_experts_equals_its_base_up_to_the_calibrated_scale(
    top: int, largest: float, tmp_path: Path
) -> None:
    family, target, batch = families["deepseek_v2"], make_target("deepseek_v2", top=top), make_batch()
    paths = write_students(tmp_path, family, target, [7, 7])
    moe, students, options = merged_from(paths, family, target, noise=0.0)
    wanted = logits_of(load(paths[0]), batch)
    raw = float((logits_of(moe, batch) - wanted).abs().max())
    scale = calibrate_scale(moe, [batch], family=family)
    worst = float((logits_of(moe, batch) - wanted).abs().max())
    print(f"top-{top}: scale {scale:.4f}, largest difference {raw:.3g} before, {worst:.3g} after")
    assert 1 - 1e-6 <= scale <= 4 / top * 1.1
    assert worst <= largest
    assert top == 4 or worst < raw / 10
    assert moe.config.routed_scaling_factor == scale
    assert target.routed_scaling_factor == 1.0
    assert check_merge(moe, students, batch, family=family, options=options) < 1e-5


@pytest.mark.parametrize("name", NORMALISED)
def test_families_that_normalise_need_no_calibration(name: str) -> None:
    target = make_target(name)
    moe = from_config(target, 0)
    assert calibrate_scale(moe, [make_batch()], family=families[name]) == 1.0
    assert moe.config.to_dict() == from_config(target, 0).config.to_dict()


@pytest.mark.parametrize("name", EVERY)
def test_replicated_experts_are_noisy_copies_and_pass_the_check(name: str, tmp_path: Path) -> None:
    family, target, batch = families[name], make_target(name, experts=5), make_batch()
    paths = write_students(tmp_path, family, target, [1, 2])
    moe, students, options = merged_from(paths, family, target)
    assert check_merge(moe, students, batch, family=family, options=options) < 1e-5
    for index in range(5):
        own = family.expert_of(moe.state_dict(), index, moe.config)
        for tensor_name, tensor in students.experts[index % 2].items():
            spread = float((own[tensor_name] - tensor).square().mean().sqrt() / tensor.std())
            assert (spread < 1e-6) if index < 2 else (0.008 < spread < 0.012), (index, tensor_name)


@pytest.mark.parametrize("name", EVERY)
def test_split_experts_average_to_their_student(name: str, tmp_path: Path) -> None:
    changes = {"deepseek_v2": {"n_shared_experts": 2}, "deepseek_v3": {"intermediate_size": 3 * I}}.get(name, {})
    family, target, batch = families[name], make_target(name, **changes), make_batch()
    paths = write_students(tmp_path, family, target, [1, 2], slices=2)
    moe, students, options = merged_from(paths, family, target, fill="split")
    assert check_merge(moe, students, batch, family=family, options=options) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_split_with_all_experts_and_a_uniform_gate_equals_the_base(name: str, tmp_path: Path) -> None:
    changes = {"deepseek_v2": {"n_shared_experts": 4}, "deepseek_v3": {"intermediate_size": 5 * I}}.get(name, {})
    family, target, batch = families[name], make_target(name, top=4, **changes), make_batch()
    paths = write_students(tmp_path, family, target, [3], slices=4)
    moe, _, _ = merged_from(paths, family, target, fill="split", router=[torch.zeros(4, H)] * 2)
    wanted = logits_of(load(paths[0]), batch)
    torch.testing.assert_close(logits_of(moe, batch), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    family, target, batch = families[name], make_target(name, tie_word_embeddings=True), make_batch()
    moe, students, options = merged_from(write_students(tmp_path, family, target, [1, 2]), family, target)
    assert moe.get_output_embeddings().weight is moe.get_input_embeddings().weight
    assert check_merge(moe, students, batch, family=family, options=options) < 1e-5
    moe.save_pretrained(tmp_path / "moe")
    torch.testing.assert_close(logits_of(load(tmp_path / "moe"), batch), logits_of(moe, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_shared_layers_of_identical_students_are_theirs_bit_for_bit(name: str, tmp_path: Path) -> None:
    family, target = families[name], make_target(name)
    paths = write_students(tmp_path, family, target, [7, 7, 7])
    students = open_students(paths, family=family, target=target, slices=1)
    shared, expert = family.split(load(paths[0]).state_dict(), target)
    assert equal(students.shared, shared)
    assert equal(students.experts[2], expert)


def test_the_order_of_the_students_matters_to_the_order_of_the_experts_only(tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe", experts=3)
    paths = write_students(tmp_path, family, target, [1, 2, 3])
    router = random_router(target, family=family, seed=0)
    order = [2, 0, 1]
    there, _, _ = merged_from(paths, family, target, router=router)
    moved, _, _ = merged_from([paths[i] for i in order], family, target, router=[w[order] for w in router])
    batch = make_batch()
    torch.testing.assert_close(logits_of(there, batch), logits_of(moved, batch), rtol=0, atol=1e-5)
    left, right = there.state_dict(), moved.state_dict()
    for tensor_name, tensor in left.items():
        by_expert = ".experts." in tensor_name or tensor_name.endswith("mlp.gate.weight")
        wanted = tensor[order] if by_expert else tensor
        torch.testing.assert_close(wanted, right[tensor_name], rtol=0, atol=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_the_target_is_left_alone(tmp_path: Path) -> None:
    family, target = families["deepseek_v2"], make_target("deepseek_v2")
    paths, before = write_students(tmp_path, family, target, [1, 2]), target.to_dict()
    first, _, _ = merged_from(paths, family, target)
    calibrate_scale(first, [make_batch()], family=family)
    second, _, _ = merged_from(paths, family, target)
    assert equal(first.state_dict(), second.state_dict())
    assert target.to_dict() == before


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("part", ["experts.down_proj", "experts.gate_up_proj", "input_layernorm.weight", "dense"])
def test_a_corrupted_merge_is_caught(name: str, part: str, tmp_path: Path) -> None:
    family, target = families[name], make_target(name)
    moe, students, options = merged_from(write_students(tmp_path, family, target, [1, 2]), family, target)
    dense = "model.layers.0.mlp.down_proj.weight"
    suffix = (dense if dense in moe.state_dict() else "self_attn.o_proj.weight") if part == "dense" else part
    tensor = [t for n, t in moe.state_dict().items() if n.endswith(suffix)][-1]
    tensor[-1] *= 1.5 if part == "experts.down_proj" else 0.0  # of experts: the last, a noisy copy
    with pytest.raises(ModelError, match="not written"):
        check_merge(moe, students, make_batch(), family=family, options=options)


def test_not_a_number_is_no_small_difference(tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    moe, students, options = merged_from(write_students(tmp_path, family, target, [1, 2, 3, 4]), family, target)
    moe.get_parameter("model.norm.weight").data[0] = torch.nan
    with pytest.raises(ModelError, match="nan in a logit"):
        check_merge(moe, students, make_batch(), family=family, options=options)


WITHOUT_US = """
import sys
sys.modules["deepfusion"] = None  # importing it now raises
import torch
from transformers import AutoModelForCausalLM
folder, *names = sys.argv[1:]
tokens = torch.load(f"{folder}/tokens.pt", weights_only=True)
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}/moe").eval()
    made = model.generate(tokens[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    torch.save([model(tokens).logits.detach(), made], f"{folder}/{name}/answer.pt")
"""


def test_saved_models_run_and_generate_without_this_package(tmp_path: Path) -> None:
    batch, here = make_batch(), {}
    torch.save(batch.input_ids_BT, tmp_path / "tokens.pt")
    for name in EVERY:
        family, target = families[name], make_target(name)
        moe, _, _ = merged_from(write_students(tmp_path / name, family, target, [1, 2]), family, target)
        calibrate_scale(moe, [batch], family=family)
        moe.save_pretrained(tmp_path / name / "moe")
        here[name] = moe(batch.input_ids_BT).logits.detach()
    subprocess.run([sys.executable, "-c", WITHOUT_US, str(tmp_path), *EVERY], check=True, timeout=300)
    for name, wanted in here.items():
        logits, made = torch.load(tmp_path / name / "answer.pt", weights_only=True)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
        assert made.shape == (1, batch.input_ids_BT.shape[1] + 5), name


@pytest.mark.parametrize(
    ("options", "num_students", "said"),
    [
        ({}, 5, "num_clusters = 5, but the target has 4 experts; lower num_clusters to 4"),
        ({"fill": "split"}, 3, "choose a num_clusters that divides 4"),
    ],
)
def test_students_that_do_not_fit_the_experts_are_refused(
    options: dict[str, str], num_students: int, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        MergeOptions(**options).slices(num_students, 4)  # pyright: ignore[reportArgumentType]


def test_a_student_of_another_shape_is_named_with_its_tensor(tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    paths = write_students(tmp_path, family, target, [1])
    other = make_target("qwen2_moe", moe_intermediate_size=I + 8)
    make_student(family, other, 2).save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match=r"odd: model\.layers\.1\.mlp\.experts\.down_proj is \(1, 32, 32\)"):
        open_students([*paths, tmp_path / "odd"], family=family, target=target, slices=1)
    shutil.rmtree(tmp_path / "odd")
    with pytest.raises(ModelError, match="odd"):
        open_students([*paths, tmp_path / "odd"], family=family, target=target, slices=1)


@pytest.mark.parametrize("part", ["model.norm.weight", "model.layers.1.mlp.experts.down_proj"])
def test_a_student_that_holds_infinity_is_named(part: str, tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    student = make_student(family, target, 1)
    student.get_parameter(part).data.view(-1)[3] = torch.inf
    student.save_pretrained(tmp_path / "wild")
    with pytest.raises(ModelError, match=f"wild: tensor {part} holds NaN or infinity"):
        open_students([tmp_path / "wild"], family=family, target=target, slices=1)


def test_a_router_of_another_shape_is_refused(tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    _, students, options = merged_from(write_students(tmp_path, family, target, [1, 2]), family, target)
    for router in ([torch.zeros(4, H)], [torch.zeros(3, H)] * 2):
        with pytest.raises(ModelError, match=r"2 MoE layers and wants \(4, 32\)"):
            merge(students, router, family=family, target=target, options=options, seed=0)


def test_hooks_of_the_check_are_gone_afterwards(tmp_path: Path) -> None:
    family, target = families["deepseek_v3"], make_target("deepseek_v3")
    moe, students, options = merged_from(write_students(tmp_path, family, target, [1, 2]), family, target)
    check_merge(moe, students, make_batch(), family=family, options=options)
    assert all(not router._forward_hooks for router in routers(moe))


@pytest.mark.parametrize(
    ("options", "said"), [({"noise": -0.1}, "noise = -0.1"), ({"tolerance": 0.0}, "tolerance = 0.0"), ({}, None)]
)
def test_merge_options_name_their_faults(options: dict[str, float], said: str | None) -> None:
    faults = list(MergeOptions(**options).faults())  # pyright: ignore[reportArgumentType]
    assert [fault.partition(":")[0] for fault in faults] == ([said] if said else [])
