# SPDX-License-Identifier: Apache-2.0
"""HFedMoE's choice of experts and weights of gates: the invariants of its equations, and brute force where that is possible."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepfusion.devices.configurations import make_config
from deepfusion.devices.features import forward
from deepfusion.devices.presets import PRESETS
from deepfusion.errors import ModelError
from deepfusion.federation.payload import encode
from deepfusion.methods import HFedMoE
from deepfusion.moe.base import MATRICES
from deepfusion.moe.routing import Routing, watch_routing
from deepfusion.stages.proxy import MODEL
from deepfusion.stages.selective import (
    ExpertSelection,
    SelectOptions,
    adapted_matrices,
    choose,
    divergence,
    fresh_adapters,
    gate_shares,
    importance,
    separate_experts,
    with_adapters,
)
from deepfusion.state_dicts import distinct_state
from deepfusion.training import Checkpoint, Optimisation, fit
from deepfusion.types import Batch, Payload


def probabilities(seed: int, units: int = 50, experts: int = 6, sharp: float = 2.0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (sharp * torch.randn(units, experts, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_importance_lies_between_the_mean_and_the_maximum(seed: int) -> None:
    p_XE = probabilities(seed)
    mean, mixed, most = (importance(p_XE, mixture) for mixture in (1.0, 0.5, 0.0))
    assert torch.equal(mean, p_XE.mean(0))
    assert torch.equal(most, p_XE.amax(0))
    assert bool(((mean <= mixed) & (mixed <= most) & (most <= 1)).all())


@pytest.mark.parametrize("seed", range(5))
def test_the_divergence_is_bounded_and_zero_for_constant_experts(seed: int) -> None:
    p_XE = probabilities(seed, sharp=8.0)
    mean_E = p_XE.mean(0)
    literal, both = divergence(p_XE), divergence(p_XE, bernoulli=True)
    assert bool((literal >= 0).all())
    assert bool((literal <= -mean_E * mean_E.log() + 1e-12).all())
    assert bool((literal <= 1 / math.e).all())
    entropy_E = -(mean_E * mean_E.log() + (1 - mean_E) * (1 - mean_E).log())
    assert bool(((both >= 0) & (both <= entropy_E + 1e-12) & (both <= math.log(2))).all())
    assert bool((divergence(mean_E.expand(7, -1)) < 1e-15).all())


def test_a_probability_of_zero_counts_as_zero() -> None:
    p_XE = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    found = divergence(p_XE)
    assert found.tolist() == pytest.approx([0.5 * math.log(2), 0.5 * math.log(2), 0.0])
    assert not bool(divergence(p_XE, bernoulli=True).isnan().any())


def test_the_value_ignores_the_order_of_the_units_follows_that_of_the_experts_and_falls_with_beta() -> None:
    p_XE = probabilities(1)
    values = []
    for beta in (0.0, 0.5, 2.0):
        options = SelectOptions(bottleneck=beta)
        value_E = options.value(p_XE, importance(p_XE, 0.5))
        shuffled = p_XE[torch.randperm(len(p_XE))]
        assert torch.allclose(options.value(shuffled, importance(shuffled, 0.5)), value_E, atol=1e-14)
        other = p_XE.flip(1)
        assert torch.allclose(options.value(other, importance(other, 0.5)), value_E.flip(0), atol=1e-14)
        values.append(value_E)
    assert bool((values[0] >= values[1]).all())
    assert bool((values[1] >= values[2]).all())
    assert torch.equal(SelectOptions(rank="importance").value(p_XE, values[0]), values[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=6, max_size=6), st.integers(1, 63), st.integers(1, 6))
def test_the_choice_is_the_best_subset_within_the_budget(numbers: list[int], used: int, budget: int) -> None:
    value_LE = torch.tensor(numbers, dtype=torch.float64).view(2, 3)
    used_LE = torch.tensor([used >> place & 1 for place in range(6)], dtype=torch.bool).view(2, 3)
    chosen_LE = choose(value_LE, used_LE, budget)
    assert 1 <= int(chosen_LE.sum()) <= budget
    assert bool((chosen_LE <= used_LE).all())
    candidates = [n for n, is_used in zip(numbers, used_LE.flatten().tolist(), strict=True) if is_used]
    sizes = range(1, min(budget, len(candidates)) + 1)
    best = max(sum(subset) for size in sizes for subset in combinations(candidates, size))
    assert float(value_LE[chosen_LE].sum()) == best
    assert bool((chosen_LE <= choose(value_LE, used_LE, budget + 1)).all()), "a larger budget takes the same and more"


def test_layers_may_have_budgets_of_their_own() -> None:
    value_LE, used_LE = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]]), torch.ones(2, 3, dtype=torch.bool)
    assert choose(value_LE, used_LE, 2).tolist() == [[True, True, False], [False] * 3]
    assert choose(value_LE, used_LE, 2, "layer").tolist() == [[True, False, False], [False, False, True]]


# ------------------------------------------------------------------------------------------------ in a model


def model_and_batch() -> tuple[torch.nn.Module, Batch]:
    torch.manual_seed(0)
    config = make_config(PRESETS["qwen2-moe-pico"].config, vocab_size=64, positions=16)
    model = AutoModelForCausalLM.from_config(config)
    ids_BT = torch.randint(0, 64, (3, 12))
    valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    valid_BT[2, 8:] = False
    return model, Batch(ids_BT, valid_BT, valid_BT)


def one_step(model: torch.nn.Module, batch: Batch, penalty: ExpertSelection | None) -> dict[str, torch.Tensor | None]:
    with watch_routing(model, batch.valid_BT) as routing:  # pyright: ignore[reportArgumentType]
        loss = forward(model, batch).logits_BTV.log_softmax(-1)[..., 0].mean()  # pyright: ignore[reportArgumentType]
        if penalty is not None:
            loss = loss + penalty(routing)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradient_of(found: dict[str, torch.Tensor | None], name: str) -> torch.Tensor | None:
    """Of a stacked matrix, whether it is stacked or in pieces; None where no piece has one."""
    if name in found:
        return found[name]
    pieces = [gradient for key, gradient in found.items() if key.startswith(f"{name}_of_each.")]
    return None if all(g is None for g in pieces) else torch.stack([g for g in pieces if g is not None])


def test_with_the_whole_budget_the_gradients_are_the_ordinary_ones_bit_for_bit() -> None:
    model, batch = model_and_batch()
    plain = one_step(model, batch, None)
    model.zero_grad()
    with separate_experts(model) as pieces:  # pyright: ignore[reportArgumentType]
        everything = ExpertSelection(model, pieces, SelectOptions(bottleneck=0.0), 8, None)  # pyright: ignore[reportArgumentType]
        found = one_step(model, batch, everything)
    assert bool(everything.routed_LE.all()), "or the next line would compare nothing with zero"
    for name, gradient in plain.items():
        ours = gradient_of(found, name)
        assert ours is not None
        assert gradient is not None
        assert torch.equal(ours, gradient), name


def test_experts_that_are_not_chosen_stay_as_they_are_with_their_moments_and_the_others_learn_exactly() -> None:
    model, batch = model_and_batch()
    plain = one_step(model, batch, None)
    model.zero_grad()
    with separate_experts(model) as pieces:  # pyright: ignore[reportArgumentType]
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        chooser = ExpertSelection(model, pieces, SelectOptions(), 3, None)  # pyright: ignore[reportArgumentType]
        before = [[[p.detach().clone() for p in expert] for expert in layer] for layer in pieces]
        found = one_step(model, batch, chooser)
        optimiser.step()
        assert int(chooser.count_LE.sum()) == 3
        for layer, experts in enumerate(pieces):
            for index, parameters in enumerate(experts):
                learns = bool(chooser.count_LE[layer, index])
                for parameter, old in zip(parameters, before[layer][index], strict=True):
                    assert torch.equal(parameter, old) is not learns
                    assert bool(optimiser.state[parameter]) is learns
    for name, gradient in plain.items():
        if not any(matrix in name for matrix in MATRICES):
            ours = found[name]
            assert ours is not None
            assert gradient is not None
            assert torch.equal(ours, gradient), f"{name}: gradients flow through experts that do not learn"


def test_an_expert_that_has_moments_and_sits_a_step_out_keeps_its_weights_and_moments_to_the_bit(
    tmp_path: Path,
) -> None:
    """In the trainings' own optimiser, which is fused, with decay and momentum that would move it."""
    model, batch = model_and_batch()
    batches = [Batch((batch.input_ids_BT * factor + 3) % 64, batch.counted_BT, batch.valid_BT) for factor in (1, 5, 11)]
    kept = Checkpoint(tmp_path / "state.safetensors", every_seconds=0)
    after: list[dict[str, torch.Tensor]] = []
    active: list[torch.Tensor] = []
    with separate_experts(model) as pieces:  # pyright: ignore[reportArgumentType]
        chooser = ExpertSelection(model, pieces, SelectOptions(), 4, None)  # pyright: ignore[reportArgumentType]

        def backward(step: int) -> dict[str, float]:
            if step:
                after.append(load_file(kept.path))
            before = chooser.count_LE.clone()
            one_step(model, batches[step], chooser)
            active.append(chooser.count_LE > before)
            return {}

        parameters = dict(model.named_parameters())
        rates = Optimisation(learning_rate=1e-2, weight_decay=0.1)
        fit(parameters, backward, steps=3, optimisation=rates, seed=0, checkpoint=kept)
        names = {id(parameter): name for name, parameter in parameters.items()}
        sat_out = 0
        for layer, experts in enumerate(pieces):
            for index, owned in enumerate(experts):
                learnt, again = (bool(active[step][layer, index]) for step in (0, 1))
                sat_out += learnt and not again
                for name in (names[id(parameter)] for parameter in owned):
                    first, second = ({k: t for k, t in state.items() if k.endswith(f"/{name}")} for state in after)
                    assert len(first) == (4 if learnt else 1), "the weight, AdamW's two moments and its count of steps"
                    if not again:
                        assert first.keys() == second.keys()
                    for key in first:
                        assert torch.equal(first[key], second[key]) is not again, key
    assert sat_out, "or nothing was tested"


def test_usage_sums_to_one_in_every_layer_and_padding_counts_for_nothing() -> None:
    model, batch = model_and_batch()
    with separate_experts(model) as pieces:  # pyright: ignore[reportArgumentType]
        chooser = ExpertSelection(model, pieces, SelectOptions(), 2, None)  # pyright: ignore[reportArgumentType]
        one_step(model, batch, chooser)
        rows = ExpertSelection(model, pieces, SelectOptions(unit="row"), 2, None)  # pyright: ignore[reportArgumentType]
        one_step(model, batch, rows)
    assert chooser.usage_LE.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert torch.allclose(chooser.usage_LE, rows.usage_LE)
    assert bool((rows.score_LE < chooser.score_LE).all()), "means over a row are flatter than tokens"
    padded = Batch(batch.input_ids_BT.masked_fill(~batch.valid_BT, 5), batch.counted_BT, batch.valid_BT)
    model.zero_grad()
    with separate_experts(model) as pieces:  # pyright: ignore[reportArgumentType]
        again = ExpertSelection(model, pieces, SelectOptions(), 2, None)  # pyright: ignore[reportArgumentType]
        one_step(model, padded, again)
    assert torch.allclose(again.usage_LE, chooser.usage_LE)


def test_what_is_learnt_is_in_the_stacked_tensors_afterwards() -> None:
    model, batch = model_and_batch()
    names, shapes = [n for n, _ in model.named_parameters()], [p.shape for p in model.parameters()]
    start = forward(model, batch).logits_BTV  # pyright: ignore[reportArgumentType]
    with separate_experts(model) as pieces:  # pyright: ignore[reportArgumentType]
        assert torch.equal(forward(model, batch).logits_BTV, start)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            pieces[1][2][0].fill_(7.0)
    assert {n for n, _ in model.named_parameters()} == set(names)
    assert sorted(map(str, shapes)) == sorted(str(p.shape) for p in model.parameters())
    assert float(model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach()[2].min()) == 7.0


def test_fresh_adapters_change_nothing_and_the_model_is_afterwards_what_it_was() -> None:
    model, batch = model_and_batch()
    start, before = forward(model, batch).logits_BTV, {n: t.clone() for n, t in model.state_dict().items()}  # pyright: ignore[reportArgumentType]
    adapters = fresh_adapters(distinct_state(model), 2, seed=0)
    with adapted_matrices(model, adapters) as pieces:  # pyright: ignore[reportArgumentType]
        assert torch.equal(forward(model, batch).logits_BTV, start)  # pyright: ignore[reportArgumentType]
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("_A." in name or "_B." in name or name.endswith(".mlp.gate.weight") for name in learning)
        with torch.no_grad():
            pieces[1][2][1].fill_(7.0)  # B of gate_up_proj
    assert float(adapters["lora_B.model.layers.1.mlp.experts.gate_up_proj"][2].min()) == 7.0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_gradients_of_adapters_are_those_of_the_product() -> None:
    """d loss / d B = dW A^T, d loss / d A = B^T dW, with dW the gradient of the whole weight."""
    model, batch = model_and_batch()
    adapters = fresh_adapters(distinct_state(model), 2, seed=0)
    torch.manual_seed(3)
    adapters = {n: torch.randn_like(t) * 0.05 if n.startswith("lora_B.") else t for n, t in adapters.items()}
    moved = with_adapters(distinct_state(model), adapters)
    frozen = {name: tensor.clone() for name, tensor in distinct_state(model).items()}
    model.load_state_dict(moved, strict=False)
    plain = one_step(model, batch, None)
    model.load_state_dict(frozen, strict=False)
    model.zero_grad()
    with adapted_matrices(model, adapters) as pieces:  # pyright: ignore[reportArgumentType]
        one_step(model, batch, None)
        for layer, experts in enumerate(pieces):
            name = f"model.layers.{layer}.mlp.experts.down_proj"
            gradient_EHI = plain[name]
            assert gradient_EHI is not None
            for index, (_, _, down, up) in enumerate(experts):
                assert down.grad is not None
                assert up.grad is not None
                assert torch.allclose(up.grad, gradient_EHI[index] @ down.detach().T, atol=1e-6)
                assert torch.allclose(down.grad, up.detach().T @ gradient_EHI[index], atol=1e-6)


def test_adapters_of_experts_that_are_not_chosen_do_not_learn() -> None:
    model, batch = model_and_batch()
    adapters = fresh_adapters(distinct_state(model), 2, seed=0)
    with adapted_matrices(model, adapters) as pieces:  # pyright: ignore[reportArgumentType]
        chooser = ExpertSelection(model, pieces, SelectOptions(), 3, None)  # pyright: ignore[reportArgumentType]
        one_step(model, batch, chooser)
        learns = [[all(p.grad is not None for p in expert) for expert in layer] for layer in pieces]
    assert torch.equal(torch.tensor(learns), chooser.count_LE.bool())
    assert int(chooser.count_LE.sum()) == 3


def test_a_router_of_nan_names_its_layer() -> None:
    model, batch = model_and_batch()
    with separate_experts(model) as pieces, torch.no_grad():  # pyright: ignore[reportArgumentType]
        chooser = ExpertSelection(model, pieces, SelectOptions(), 2, None)  # pyright: ignore[reportArgumentType]
        logits = [torch.zeros(36, 4), torch.full((36, 4), math.nan)]
        chosen = [torch.zeros(36, 2, dtype=torch.long)] * 2
        with pytest.raises(ModelError, match="MoE layer 1 gives NaN"):
            chooser(Routing([], logits, chosen, batch.valid_BT))


# ------------------------------------------------------------------------------------------------ whose gate counts


def test_gates_of_equal_devices_weigh_alike_and_the_literal_weights_shrink() -> None:
    usage_CLE = torch.full((4, 2, 8), 1 / 8)
    found = gate_shares(usage_CLE, usage_CLE, 0.5 / 8)
    assert found.weight_C.tolist() == pytest.approx([1 / 64] * 4), "u * s for even usage"
    assert float(found.weight_C.sum()) < 0.1, "literal eq. (21) would shrink the gate to a sixteenth"
    assert found.coverage_C.tolist() == [1.0] * 4


def test_a_device_that_uses_important_experts_weighs_more_and_coverage_is_a_share() -> None:
    usage_CLE = torch.tensor([[[0.9, 0.1, 0.0, 0.0]], [[0.3, 0.3, 0.2, 0.2]], [[0.0, 0.0, 0.0, 1.0]]])
    score_CLE = torch.tensor([[[0.9, 0.1, 0.1, 0.1]], [[0.3, 0.3, 0.3, 0.3]], [[0.0, 0.0, 0.0, 0.0]]])
    found = gate_shares(usage_CLE, score_CLE, 0.15)
    assert found.weight_C[0] > found.weight_C[1] > found.weight_C[2] == 0
    assert found.coverage_C.tolist() == [0.25, 1.0, 0.25]


EXPERTS, GATE, NORM = (
    f"model.{name}" for name in ("layers.0.mlp.experts.down_proj", "layers.0.mlp.gate.weight", "norm.weight")
)


def folded(folder: Path, gates: list[torch.Tensor], scale: float = 1.0, **options: Any) -> tuple[torch.Tensor, float]:
    """The next router of a layer of three experts, after answers with these, of unlike use and worth; the sum of all a(c)."""
    method = HFedMoE(threshold=0.1, **options)
    files: dict[str, Path] = {}
    for number, gate_EH in enumerate(gates):
        usage_LE = torch.tensor([[0.6, 0.3, 0.1]]).roll(number, 1)
        tables = {
            "usage": usage_LE,
            "score": scale * usage_LE * (number + 1) / 3,
            "count": torch.ones(1, 3, dtype=torch.int32),
        }
        arrays = {MODEL + GATE: gate_EH, MODEL + NORM: torch.ones(2), **tables}
        files[f"d{number}"] = folder / f"d{number}.safetensors"
        files[f"d{number}"].write_bytes(encode(Payload("moe", arrays, {"tokens": 10 * (number + 1), "routed": 3})))
    state = {EXPERTS: torch.zeros(3, 2, 2), GATE: torch.full((3, 2), 9.0), NORM: torch.zeros(2)}
    hosts = {device: [[0, 1, 2]] for device in files}
    told = method._fold(state, files, {}, hosts)  # pyright: ignore[reportPrivateUsage]
    return state[GATE], told["gate_scale"]


def test_the_gate_of_identical_devices_is_unchanged_and_of_unlike_ones_theirs_weighed(tmp_path: Path) -> None:
    same_EH = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    found_EH, scale = folded(tmp_path, [same_EH] * 3)
    assert torch.allclose(found_EH, same_EH, rtol=0, atol=1e-6)
    assert scale < 0.9
    shrunk_EH, _ = folded(tmp_path, [same_EH] * 3, gate_weights="literal")
    assert torch.allclose(shrunk_EH, same_EH * scale, atol=1e-6)
    ones = [torch.full((3, 2), value) for value in (1.0, 2.0, 3.0)]
    assert float(folded(tmp_path, ones)[0][0, 0]) == pytest.approx((1 * 1 + 2 * 2 + 3 * 3) / (1 + 2 + 3)), (
        "by u times s"
    )


def test_the_scale_of_all_worths_has_no_effect_on_the_gate(tmp_path: Path) -> None:
    gates = [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    (plain_EH, one), (scaled_EH, tenth) = (folded(tmp_path, gates, scale) for scale in (1.0, 0.1))
    assert tenth == pytest.approx(one / 10)
    assert torch.allclose(plain_EH, scaled_EH, rtol=0, atol=1e-6)


def test_where_no_expert_is_dominant_all_weights_are_zero() -> None:
    usage_CLE = torch.full((2, 1, 4), 0.25)
    found = gate_shares(usage_CLE, usage_CLE, 0.5)
    assert found.weight_C.tolist() == [0.0, 0.0]
    assert found.coverage_C.tolist() == [0.0, 0.0]
