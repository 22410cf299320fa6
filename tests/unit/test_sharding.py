# SPDX-License-Identifier: Apache-2.0
"""Processes that hold a model together: each a share of the blocks, all the same gradients, and one checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_world import V, config

from deepfusion import sharding
from deepfusion.devices.features import blocks
from deepfusion.devices.models import from_config
from deepfusion.errors import DeepFusionError
from deepfusion.training import Checkpoint, Optimisation, accelerator, fit
from deepfusion.types import Progress

FAST = Optimisation(learning_rate=3e-3)
MOST = 0.1
"""Norm that gradients are clipped to in the tests, well below theirs."""


def new_model() -> Any:
    return from_config(config("llama-pico"), seed=1)


def loss_of(model: Any, process: int) -> torch.Tensor:
    """A batch of its own for each process."""
    ids_BT = torch.randint(0, V, (2, 8), generator=torch.Generator().manual_seed(process))
    return model(input_ids=ids_BT, labels=ids_BT).loss


def member(folder: Path, progress: Progress) -> None:
    """One of two processes; writes down what it holds and finds."""
    device, model = accelerator().device, new_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharding.divide(blocks(model), device)
    inside = [p for p in blocks(model).parameters() if sharding.divided(p)]
    held = sum(p.to_local().numel() for p in inside)  # type: ignore[attr-defined]
    same = all(torch.equal(sharding.whole(p.detach()), before[name]) for name, p in model.named_parameters())
    again = all(
        torch.equal(sharding.whole(sharding.like(before[n], p)), before[n]) for n, p in model.named_parameters()
    )
    loss = loss_of(model, sharding.number())
    loss.backward()
    sharding.average_gradients(model.parameters())
    norms = [sharding.clip(model.parameters(), MOST) for _ in range(2)]
    gradients = {name: sharding.whole(p.grad) for name, p in model.named_parameters()}
    mean = sharding.average(float(loss.detach()))
    answer = sharding.agreed(sharding.number() == 0)
    told = {
        "held": held,
        "blocks": sum(p.numel() for p in blocks(model).parameters()),
        "same": same,
        "again": again,
        "norms": norms,
        "mean": mean,
        "agreed": answer,
        "gradients": {name: gradient.tolist() for name, gradient in gradients.items()},
    }
    (folder / f"{sharding.number()}.json").write_text(json.dumps(told))
    progress("member", 1, 1, "")


def trained(folder: Path, progress: Progress, *, steps: int, crash: bool) -> None:
    """A training of four steps that may end after its checkpoint."""
    device, model = accelerator().device, new_model()
    sharding.divide(blocks(model), device)

    def backward(step: int) -> dict[str, float]:
        if crash and step == 2:
            raise RuntimeError("the power went")
        loss = loss_of(model, 10 * step + sharding.number())
        loss.backward()
        return {"loss": sharding.average(float(loss.detach()))}

    history = fit(
        dict(model.named_parameters()), backward, steps=steps, optimisation=FAST, seed=0,
        checkpoint=Checkpoint(folder / "kept.safetensors", every_seconds=0.0),
    )  # fmt: skip
    state = {name: sharding.whole(p.detach()).tolist() for name, p in model.named_parameters()}
    if sharding.number() == 0:
        (folder / "result.json").write_text(json.dumps({"history": history, "state": state}))


def test_two_processes_hold_half_the_blocks_each_and_find_the_gradients_of_one(tmp_path: Path) -> None:
    heard: list[tuple[Any, ...]] = []
    sharding.together(partial(member, tmp_path), 2, lambda *said: heard.append(said))
    assert heard == [("member", 1, 1, "")], "only the first process is heard"
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    assert first["held"] + second["held"] == first["blocks"]
    assert abs(first["held"] - second["held"]) <= 0.1 * first["blocks"]
    model = new_model()
    loss = (loss_of(model, 0) + loss_of(model, 1)) / 2
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), MOST))
    for told in (first, second):
        assert told["same"]
        assert told["again"]
        assert told["agreed"] is True
        assert told["mean"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert told["norms"] == pytest.approx([norm, MOST], rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(torch.tensor(told["gradients"][name]), parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_divided_training_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    sharding.together(partial(trained, whole, steps=4, crash=False), 2)
    with pytest.raises(
        DeepFusionError, match=r"\[server\] shards: process \d of 2 failed: RuntimeError: the power went"
    ):
        sharding.together(partial(trained, cut, steps=4, crash=True), 2)
    assert not (cut / "result.json").exists()
    sharding.together(partial(trained, cut, steps=4, crash=False), 2)
    assert (cut / "result.json").read_text() == (whole / "result.json").read_text()
    assert [row["step"] for row in json.loads((whole / "result.json").read_text())["history"]] == [0, 1, 2, 3]


def test_a_process_alone_is_the_first_of_one() -> None:
    tensor = torch.arange(3.0)
    assert (sharding.count(), sharding.number()) == (1, 0)
    assert sharding.whole(tensor) is tensor
    assert sharding.average(2.5) == 2.5
    assert sharding.agreed(False) is False
    assert not sharding.divided(tensor)
