# SPDX-License-Identifier: Apache-2.0
"""Tuning the merged model: what moves, what must not, and what a batch holds (method, section 9)."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_world import Rows, T, V, World, file_bytes, make_world
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from deepfusion.devices.features import read
from deepfusion.devices.models import from_config, load, save
from deepfusion.moe import families
from deepfusion.moe.base import expert_parameters
from deepfusion.moe.routing import balance_penalty
from deepfusion.stages import tune as stage
from deepfusion.stages.local import train_causal_lm
from deepfusion.stages.tune import TuneOptions, domain_rows, tune, tuning_losses
from deepfusion.training import Checkpoint, Optimisation
from deepfusion.types import Batch, split_rows

FAMILIES = ("qwen2_moe", "deepseek_v2", "deepseek_v3")
FAST = Optimisation(batch_size=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return with_moe(make_world(tmp_path_factory.mktemp("world")))


def with_moe(world: World) -> World:
    save(from_config(world.target, seed=3), world.base.parent / "moe", world.tokenizer)
    return world


def moe(world: World) -> Path:
    return world.base.parent / "moe"


def run(world: World, out: Path, *, teachers: Any = None, domains: int = 2, **changes: Any) -> list[dict[str, float]]:
    keywords = {k: changes.pop(k) for k in ("scratch", "progress", "shards") if k in changes}
    options = TuneOptions(**{"steps": 3, "optimisation": FAST, **changes})
    return tune(
        moe(world), world.teachers[:domains] if teachers is None else teachers, [Rows(k) for k in range(domains)],
        family=world.family, options=options, seed=5, tokenizer_folder=world.tokenizer, out=out, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_frozen_experts_keep_every_bit_and_the_rest_moves(model_type: str, tmp_path: Path) -> None:
    world = with_moe(make_world(tmp_path / "world", model_type))
    run(world, tmp_path / "out", experts="freeze")
    before, after = load(moe(world)), load(tmp_path / "out")
    experts = set(expert_parameters(before))
    assert experts
    for name, parameter in before.named_parameters():
        same = torch.equal(parameter, after.get_parameter(name))
        assert same is (name in experts), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_everything_moves_when_experts_are_trained_and_experts_the_least(model_type: str, tmp_path: Path) -> None:
    world = with_moe(make_world(tmp_path / "world", model_type))
    run(world, tmp_path / "out", experts="train", expert_rate=0.1, steps=1)
    before, after = load(moe(world)), load(tmp_path / "out")
    experts = set(expert_parameters(before))
    moved = {n: float((p - after.get_parameter(n)).detach().abs().max()) for n, p in before.named_parameters()}
    assert all(distance > 0 for distance in moved.values())
    largest_expert = max(moved[name] for name in experts)
    largest_other = max(distance for name, distance in moved.items() if name not in experts)
    assert largest_expert == pytest.approx(0.1 * largest_other, rel=0.05)


def test_the_tuned_model_is_an_ordinary_folder_that_learned(world: World, tmp_path: Path) -> None:
    history = run(world, tmp_path, steps=15)
    assert json.loads((tmp_path / "history.json").read_text()) == history
    assert len(history) == 15
    assert history[-1]["ce"] < history[0]["ce"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"loss", "ce", "kl", "balance"} < set(history[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    answer = model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)
    assert answer.shape[1] <= 5


def test_the_same_seed_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "once")
    run(world, tmp_path / "again")
    assert file_bytes(tmp_path / "once") == file_bytes(tmp_path / "again")


def test_one_text_without_teachers_trains_by_cross_entropy_alone(world: World, tmp_path: Path) -> None:
    history = run(world, tmp_path / "kept", domains=1, teachers=[[]], beta=1.0, balance=0.0)
    assert all(row["kl"] == 0 and row["loss"] == row["ce"] for row in history)
    run(world, tmp_path / "paper", domains=1, beta=0.0, balance=0.0)
    assert file_bytes(tmp_path / "kept") == file_bytes(tmp_path / "paper")


def test_the_servers_training_is_a_devices_where_both_read_the_same_batches(world: World, tmp_path: Path) -> None:
    """So centralised training on one device's text is FedAvg of that device (baselines, section 11, number 7)."""
    run(world, tmp_path / "server", domains=1, teachers=[[]], experts="train", expert_rate=1.0, balance=0.01, steps=4)
    model = load(moe(world))
    penalty = balance_penalty(model, 0.01)
    train_causal_lm(model, Rows(0), steps=4, optimisation=FAST, seed=9, label="device", penalty=penalty)  # type: ignore[arg-type]
    before, server = load(moe(world)).state_dict(), load(tmp_path / "server").state_dict()
    for name, tensor in model.state_dict().items():
        moved = float((tensor - before[name]).abs().max())
        torch.testing.assert_close(server[name], tensor, rtol=0, atol=1e-3 * moved, msg=name)


def test_no_steps_leave_the_merged_weights_as_they_are(world: World, tmp_path: Path) -> None:
    assert run(world, tmp_path, steps=0) == []
    before, after = load(moe(world)).state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_crash_in_the_middle_changes_no_byte(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "Checkpoint", functools.partial(Checkpoint, every_seconds=0.0))

    def fail(_label: str, done: int, _total: int, _note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    run(world, tmp_path / "whole", steps=5)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "broken", steps=5, scratch=tmp_path / "scratch", progress=fail)
    run(world, tmp_path / "resumed", steps=5, scratch=tmp_path / "scratch")
    assert file_bytes(tmp_path / "resumed") == file_bytes(tmp_path / "whole")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recomputing_activations_changes_nothing(model_type: str, tmp_path: Path) -> None:
    world = with_moe(make_world(tmp_path / "world", model_type))
    plain = run(world, tmp_path / "plain")
    saving = run(world, tmp_path / "saving", optimisation=replace(FAST, gradient_checkpointing=True))
    for row, other in zip(plain, saving, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)


class Counted:
    """Rows whose first token is their number in the stream."""

    sequence_length = 4

    def __init__(self, domain: int) -> None:
        self.domain = domain

    def batch(self, step: int, batch_size: int) -> Batch:
        ids_BT = torch.arange(step * batch_size, (step + 1) * batch_size)[:, None].repeat(1, 4)
        ids_BT[:, 1] = self.domain
        return Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.ones_like(ids_BT, dtype=torch.bool))


@given(domains=st.integers(1, 6), size=st.integers(1, 9), steps=st.integers(1, 12))
def test_every_domain_is_read_in_order_and_equally_often(domains: int, size: int, steps: int) -> None:
    texts = [Counted(k) for k in range(domains)]
    read: list[list[int]] = [[] for _ in texts]
    for step in range(steps):
        batch, rows = domain_rows(texts, step, size)
        assert len(batch.input_ids_BT) == size
        for domain, (part, mine) in enumerate(zip(split_rows(batch, [len(r) for r in rows]), rows, strict=True)):
            assert bool((part.input_ids_BT[:, 1] == domain).all())
            assert part.input_ids_BT[:, 0].tolist() == list(mine)
            read[domain] += mine
    assert all(numbers == list(range(len(numbers))) for numbers in read)
    assert max(map(len, read)) - min(map(len, read)) <= 1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_padding_holds_never_changes_any_part_of_the_loss(model_type: str, tmp_path: Path) -> None:
    world = with_moe(make_world(tmp_path, model_type))
    model = load(moe(world))
    clean, rows = domain_rows([Rows(k, padded=True) for k in range(2)], 0, 4)
    counts = [len(mine) for mine in rows]
    valid_BT = torch.ones(4, T, dtype=torch.bool)
    valid_BT[1, 5:] = valid_BT[2, 9:] = False
    parts = []
    for filler in (0, V - 1):
        batch = Batch(torch.where(valid_BT, clean.input_ids_BT, filler), clean.counted_BT, valid_BT)
        mine = list(zip(world.teachers, split_rows(batch, counts), strict=True))
        reads = [[(read(load(p.folder), rows), p.weight) for p in proxies] for proxies, rows in mine]
        parts.append(tuning_losses(model, reads, batch, counts, families[model_type], TuneOptions()))
    for key, value in parts[0].items():
        torch.testing.assert_close(value, parts[1][key], rtol=1e-6, atol=0)


def test_the_balance_loss_reaches_the_router(world: World) -> None:
    model = load(moe(world))
    batch, _ = domain_rows([Rows(0), Rows(1)], 0, 4)
    tuning_losses(model, [[], []], batch, [2, 2], world.family, TuneOptions(balance=1.0))["balance"].backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in gates)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": -1}, "steps = -1: must not be negative"),
        ({"beta": -0.5}, "beta = -0.5: must be finite and not negative"),
        ({"balance": float("inf")}, "balance = inf: must be finite and not negative"),
        ({"temperature": -1.0}, "temperature = -1.0: must be finite and above 0"),
        ({"expert_rate": 0.0}, 'expert_rate = 0.0: must be finite and above 0; use experts = "freeze"'),
    ],
)
def test_impossible_options_are_faults_with_a_cure(changes: dict[str, Any], fault: str) -> None:
    (text,) = TuneOptions(**changes).faults()
    assert text.startswith(fault)


def test_a_model_divided_over_two_processes_is_tuned_as_if_it_were_not(world: World, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    options = {"steps": 4, "optimisation": replace(FAST, batch_size=2, accumulate=2), "experts": "train"}
    alone = run(world, tmp_path / "alone", **options)
    divided = run(world, tmp_path / "divided", shards=2, progress=lambda *said: told.append(said[:3]), **options)
    assert told[-1] == ("tune", 4, 4)
    assert [row["step"] for row in divided] == [0, 1, 2, 3]
    for one, other in zip(alone, divided, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    before, after = load(tmp_path / "alone"), load(tmp_path / "divided")
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter, rtol=0, atol=2e-4, msg=name)
