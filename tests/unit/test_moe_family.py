# SPDX-License-Identifier: Apache-2.0
"""A family's table: configurations, split and join, hooks on the routers, and targets that cannot work."""

import pytest
import torch
from moe_world import OWN, H, I, equal, make_batch, make_student, make_target

from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.errors import ModelError
from deepfusion.moe import families
from deepfusion.moe.base import ROUTER, expert_parameters, router_parameters
from deepfusion.moe.routing import force_experts, router_inputs, router_logits, router_weights, routers

EVERY = sorted(families)


@pytest.mark.parametrize("name", EVERY)
def test_a_student_is_the_target_with_one_expert(name: str) -> None:
    family, target = families[name], make_target(name)
    config = family.student_config(target)
    student, moe = from_config(config, 0), from_config(target, 0)
    assert (config.num_hidden_layers, config.hidden_size) == (target.num_hidden_layers, target.hidden_size)
    one_expert = 3 * H * I
    extra = family.num_experts(target) - 1
    routers_of = (extra + 1) * H if family.student == "dense" else extra * H  # a dense student has no router
    layers = len(family.moe_layers(target))
    assert layers == 2
    assert moe.num_parameters() - student.num_parameters() == layers * (extra * one_expert + routers_of)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("slices", [1, 2])
def test_join_undoes_split_bit_by_bit(name: str, slices: int) -> None:
    family = families[name]
    changes = {"deepseek_v2": {"n_shared_experts": 2}, "deepseek_v3": {"intermediate_size": I * 3}}
    target = make_target(name, **(changes.get(name, {}) if slices == 2 else {}))
    state = make_student(family, target, 1, slices).state_dict()
    shared, expert = family.split(state, target, slices=slices)
    routed = {n: t for n, t in state.items() if not (family.student == "single" and ROUTER.search(n))}
    assert equal(family.join(shared, expert), routed)
    assert sum(t.numel() for t in expert.values()) == 2 * 3 * H * I * slices  # two MoE layers


@pytest.mark.parametrize("name", EVERY)
def test_gradient_flows_through_join_to_both_parts_and_gives_the_students_logits(name: str) -> None:
    family, target, batch = families[name], make_target(name), make_batch()
    student = make_student(family, target, 1)
    shared, expert = family.split(dict(student.named_parameters()), target)
    shared, expert = ({n: t.detach().clone().requires_grad_() for n, t in part.items()} for part in (shared, expert))
    logits = forward(student, batch, parameters=family.join(shared, expert)).logits_BTV
    torch.testing.assert_close(logits, forward(student, batch).logits_BTV, rtol=0, atol=0)
    logits.square().mean().backward()
    for part in (shared, expert):
        assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in part.values())


@pytest.mark.parametrize("name", EVERY)
def test_hooks_see_every_router_and_leave_nothing_behind(name: str) -> None:
    family, target, batch = families[name], make_target(name, experts=4, top=3), make_batch()
    moe = from_config(target, 3)
    tokens = batch.input_ids_BT.numel()
    before = forward(moe, batch).logits_BTV
    with router_logits(moe) as logits, router_inputs(moe) as inputs, router_weights(moe) as weights:
        forward(moe, batch)
    assert [tuple(t.shape) for t in logits] == [(tokens, 4)] * 2
    assert [tuple(t.shape) for t in inputs] == [(tokens, H)] * 2
    assert [tuple(t.shape) for t in weights] == [(tokens, 3)] * 2
    assert logits[0].requires_grad
    weight_EH = moe.get_parameter(router_parameters(moe)[0])
    torch.testing.assert_close(logits[0], inputs[0] @ weight_EH.T)
    probability_TE = family.probabilities(logits[0])
    torch.testing.assert_close(probability_TE.sum(-1), torch.ones(tokens))
    with pytest.raises(ZeroDivisionError), force_experts(moe, family, [1]):
        raise ZeroDivisionError
    assert all(not router._forward_hooks for router in routers(moe))
    assert torch.equal(forward(moe, batch).logits_BTV, before)
    assert len(logits) == 2


@pytest.mark.parametrize("name", EVERY)
def test_parameter_names_single_out_experts_and_routers(name: str) -> None:
    moe = from_config(make_target(name), 0)
    numel = {n: p.numel() for n, p in moe.named_parameters()}
    assert sum(numel[n] for n in expert_parameters(moe)) == 2 * 4 * 3 * H * I
    assert sum(numel[n] for n in router_parameters(moe)) == 2 * 4 * H
    assert not {*expert_parameters(moe)} & {*router_parameters(moe)}


def test_every_second_layer_has_experts_where_the_configuration_says_so() -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[])
    assert family.moe_layers(target) == (1,)
    assert len(routers(from_config(target, 0))) == 1


def test_the_callers_configuration_is_not_changed() -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe", norm_topk_prob=False)
    target.norm_topk_prob = False
    assert family.ready_target(target).norm_topk_prob is True
    assert target.norm_topk_prob is False


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2_moe", {"top": 5}, "num_experts_per_tok = 5: not between 1 and num_experts = 4"),
        ("qwen2_moe", {"top": 0}, "num_experts_per_tok = 0"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ("deepseek_v2", {"first_k_dense_replace": 3}, "lower first_k_dense_replace"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok = 0"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}, "set n_group = 1"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1, "top": 3}, "must hold num_experts_per_tok = 3"),
        ("deepseek_v3", {"experts": 1, "top": 1}, "at least 2"),
    ],
)
def test_a_target_that_cannot_work_is_refused_with_its_cure(name: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        make_target(name, **changes)  # pyright: ignore[reportArgumentType]


def test_unequal_dense_layers_are_refused_for_a_dense_student_and_kept_for_a_single_one() -> None:
    with pytest.raises(ModelError, match=f"set intermediate_size = {2 * I} or first_k_dense_replace = 0"):
        families["deepseek_v3"].student_config(make_target("deepseek_v3", intermediate_size=64))
    free = make_target("deepseek_v3", intermediate_size=64, first_k_dense_replace=0)
    assert families["deepseek_v3"].student_config(free).intermediate_size == 2 * I
    kept = families["deepseek_v2"].student_config(make_target("deepseek_v2"))
    assert kept.intermediate_size == OWN["deepseek_v2"]["intermediate_size"]


def test_a_split_that_shared_experts_cannot_follow_is_refused() -> None:
    with pytest.raises(ModelError, match="multiple of 2 shared experts"):
        families["deepseek_v2"].student_config(make_target("deepseek_v2"), slices=2)
