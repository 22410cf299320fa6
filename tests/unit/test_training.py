# SPDX-License-Identifier: Apache-2.0
"""Properties of the one training loop: the same bytes across crashes, a rate of the right shape, no silent NaN."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.errors import ConfigError
from deepfusion.training import Checkpoint, Optimisation, accelerator, derive_seed, fit
from deepfusion.types import State

STEPS = 12
OPTIONS = Optimisation(learning_rate=0.05, warmup=0.2)


def parameters() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(5, 3, generator=generator).requires_grad_(),
        "bias": torch.zeros(3).requires_grad_(),
    }


def task(state: State, dies_at: int = -1) -> Callable[[int], Mapping[str, float]]:
    """Linear regression on rows of the step's number, with dropout out of torch's own generator."""

    def backward(step: int) -> Mapping[str, float]:
        if step == dies_at:
            raise KeyboardInterrupt
        rows_BD = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        kept_BD = torch.nn.functional.dropout(rows_BD, 0.2)
        loss = (kept_BD @ state["weight"] + state["bias"] - rows_BD[:, :3] - 0.5).square().mean()
        loss.backward()
        return {"loss": float(loss.detach())}

    return backward


def trained(checkpoint: Checkpoint | None = None, seed: int = 3) -> tuple[State, list[dict[str, float]]]:
    state = parameters()
    return state, fit(state, task(state), steps=STEPS, optimisation=OPTIONS, seed=seed, checkpoint=checkpoint)


def same_bytes(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


def test_training_lowers_the_loss_and_tells_every_step() -> None:
    _, history = trained()
    assert [row["step"] for row in history] == list(range(STEPS))
    assert sum(row["loss"] for row in history[-3:]) < 0.8 * sum(row["loss"] for row in history[:3])
    assert [row["learning_rate"] for row in history] == [OPTIONS.rate_at(step, STEPS) for step in range(STEPS)]
    assert all(row["gradient_norm"] > 0 for row in history)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    torch.manual_seed(1)
    first, history = trained()
    torch.manual_seed(2)
    again, same_history = trained()
    other, _ = trained(seed=4)
    assert same_bytes(first, again)
    assert history == same_history
    assert not same_bytes(first, other)


@pytest.mark.parametrize("dies_at", [0, 1, 5, STEPS - 1])
def test_a_training_that_died_goes_on_to_the_same_bytes(tmp_path: Path, dies_at: int) -> None:
    checkpoint = Checkpoint(tmp_path / "training.safetensors", every_seconds=0)
    state = parameters()
    with pytest.raises(KeyboardInterrupt):
        fit(state, task(state, dies_at), steps=STEPS, optimisation=OPTIONS, seed=3, checkpoint=checkpoint)
    assert checkpoint.path.exists() is (dies_at > 0)
    seen: list[int] = []

    def watch(label: str, done: int, total: int, note: str) -> None:
        seen.append(done)

    resumed = parameters()
    history = fit(
        resumed, task(resumed), steps=STEPS, optimisation=OPTIONS, seed=3, checkpoint=checkpoint, progress=watch
    )
    straight, straight_history = trained()
    assert same_bytes(resumed, straight)
    assert history == straight_history
    assert seen == list(range(dies_at + 1, STEPS + 1)), "steps that were done are not done again"


def test_what_adamw_remembers_comes_back_to_where_its_parameter_is(tmp_path: Path) -> None:
    """As `Optimizer.load_state_dict` has it: the fused AdamW wants its `step` on the parameter's device, in float32."""
    checkpoint = Checkpoint(tmp_path / "training.safetensors", every_seconds=0)
    trained(checkpoint)
    away = {name: p.detach().to("meta").requires_grad_() for name, p in parameters().items()}
    optimiser = torch.optim.AdamW(away.values(), fused=False)
    assert checkpoint.load(away, optimiser)[0] == STEPS - 1
    for p in away.values():
        assert optimiser.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.device.type for value in optimiser.state[p].values()} == {"meta"}
        assert {value.dtype for value in optimiser.state[p].values()} == {torch.float32}


def test_a_write_that_dies_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "training.safetensors", every_seconds=0)
    state = parameters()
    with pytest.raises(KeyboardInterrupt):
        fit(state, task(state, 4), steps=STEPS, optimisation=OPTIONS, seed=3, checkpoint=checkpoint)
    before = checkpoint.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            trained(checkpoint)
    assert checkpoint.path.read_bytes() == before
    assert same_bytes(trained(checkpoint)[0], trained()[0])


def test_checkpoints_are_not_written_more_often_than_asked(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "training.safetensors", every_seconds=3600)
    trained(checkpoint)
    assert not checkpoint.path.exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_with_label_step_and_cure(bad: float) -> None:
    state = parameters()
    before = {}

    def backward(step: int) -> Mapping[str, float]:
        before.update({name: p.detach().clone() for name, p in state.items()})
        (state["weight"].sum() * (bad if step == 2 else 1.0)).backward()
        state["bias"].grad = torch.zeros(3)
        return {}

    with pytest.raises(
        FloatingPointError, match=r"student 1: gradient norm (nan|inf) at step 2; lower the learning rate"
    ):
        fit(state, backward, steps=5, optimisation=OPTIONS, seed=0, label="student 1")
    assert same_bytes({name: p.detach() for name, p in state.items()}, before), "the bad step must not be taken"


def test_gradients_start_from_zero_at_every_step_and_are_clipped_together() -> None:
    state = parameters()

    def backward(step: int) -> Mapping[str, float]:
        assert all(p.grad is None for p in state.values())
        for p in state.values():
            p.grad = torch.full_like(p, 100.0)
        return {}

    options = replace(OPTIONS, clip=1.0, weight_decay=0.0)
    history = fit(state, backward, steps=2, optimisation=options, seed=0)
    assert history[0]["gradient_norm"] == pytest.approx(100 * math.sqrt(18))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in state.values() if p.grad is not None))
    assert norm == pytest.approx(1, rel=1e-4)


def test_only_matrices_decay_and_a_rate_of_zero_moves_nothing() -> None:
    state = {
        name: torch.ones(shape).requires_grad_() for name, shape in {"m": (2, 2), "v": (2,), "held": (2, 2)}.items()
    }

    def backward(step: int) -> Mapping[str, float]:
        for p in state.values():
            p.grad = torch.zeros_like(p)
        return {}

    options = Optimisation(learning_rate=0.1, weight_decay=0.5, warmup=0.0, final_rate=1.0)
    fit(state, backward, steps=3, optimisation=options, seed=0, rates={"held": 0.0})
    assert float(state["m"].detach().mean()) == pytest.approx((1 - 0.1 * 0.5) ** 3)
    assert state["v"].tolist() == [1, 1]
    assert state["held"].tolist() == [[1, 1], [1, 1]]


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_its_share(steps: int, warmup: float, final: float) -> None:
    options = Optimisation(learning_rate=0.01, warmup=warmup, final_rate=final)
    rates = [options.rate_at(step, steps) for step in range(steps)]
    top = max(1, round(warmup * steps)) - 1
    assert rates[top] == pytest.approx(0.01)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    assert all(0 < rate <= 0.01 * (1 + 1e-12) or final == 0 for rate in rates)
    assert min(rates[top:]) >= 0.01 * final * (1 - 1e-12)


def test_the_rate_ends_near_its_final_share() -> None:
    assert Optimisation(learning_rate=1e-3, final_rate=0.1).rate_at(9_999, 10_000) == pytest.approx(1e-4, rel=1e-3)


def test_usual_options_have_no_fault_and_bad_ones_one_each() -> None:
    assert list(Optimisation().faults()) == []
    bad: dict[str, object] = {
        "batch_size": 0, "accumulate": 0, "learning_rate": 1.0, "final_rate": 1.5, "warmup": -0.1, "weight_decay": -1.0,
        "clip": 0.0, "betas": (0.9, 1.0),
    }  # fmt: skip
    for name, value in bad.items():
        faults = list(Optimisation(**{name: value}).faults())  # type: ignore[arg-type]
        assert len(faults) == 1, name
        assert faults[0].startswith(f"{name} = ")
        assert ";" in faults[0] or "usual" in faults[0], "no cure"
    assert len(list(Optimisation(batch_size=0, clip=-1.0).faults())) == 2


@given(st.lists(st.integers(0, 2**40) | st.text(max_size=5), min_size=1, max_size=4))
def test_seeds_fit_torch_and_depend_on_every_part(parts: list[str | int]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)
    assert seed not in {derive_seed(*parts, 0), derive_seed(*parts, ""), derive_seed("x", *parts)}


def test_seeds_tell_numbers_from_texts_and_borders_from_content() -> None:
    assert len({derive_seed(1), derive_seed("1"), derive_seed("a", "b"), derive_seed("ab"), derive_seed("a b")}) == 5


def test_seeds_do_not_hang_on_the_process() -> None:
    code = "from deepfusion.training import derive_seed; print(derive_seed(0, 'device', 3))"
    salted = {**os.environ, "PYTHONHASHSEED": "4242"}
    other = subprocess.run([sys.executable, "-c", code], env=salted, capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(0, "device", 3)


def test_on_a_cpu_auto_is_float32_and_bf16_is_autocast() -> None:
    """In processes of their own, forked from one: accelerate knows one precision for each process."""
    code = """
import os, torch
from deepfusion.training import accelerator
torch.cuda.is_available = lambda: False
for precision in ("auto", "fp32", "bf16"):
    if not (child := os.fork()):
        a, w = accelerator(precision), torch.nn.Linear(2, 2)
        with a.autocast():
            y = w(torch.ones(1, 2))
        print(precision, a.mixed_precision, y.dtype, w.weight.dtype, accelerator() is a, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "auto no torch.float32 torch.float32 True",
        "fp32 no torch.float32 torch.float32 True",
        "bf16 bf16 torch.bfloat16 torch.float32 True",
    ]


def test_a_second_precision_in_one_process_is_refused() -> None:
    used = accelerator().mixed_precision
    other = "bf16" if used == "no" else "fp32"
    with pytest.raises(ConfigError, match=f'precision = "{other}".*"{used}" already; give all sections'):
        accelerator(other)
