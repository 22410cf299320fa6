# SPDX-License-Identifier: Apache-2.0
"""Independent work gives the same results in the same order, wherever it is done."""

from __future__ import annotations

import os
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_world import Rows, make_world

from deepfusion.config import parse_config
from deepfusion.errors import ConfigError, DeepFusionError
from deepfusion.spread import open_ray, spread
from deepfusion.stages.distill import DistillOptions, Logits, distill
from deepfusion.training import Optimisation
from small_world import small_tree


@pytest.fixture(scope="module")
def ray() -> Generator[Any]:
    """Two workers of Ray on this machine, for all tests of this file."""
    pytest.importorskip("ray")
    with open_ray("test", 2) as opened:
        yield opened


def squared(number: int) -> tuple[int, int, int]:
    return number**2, os.getpid(), torch.get_num_threads()


def refused(number: int) -> int:
    raise DeepFusionError(f"number {number}: not this one")


def ended(number: int) -> int:
    os._exit(3)


def test_one_worker_is_this_process() -> None:
    results = spread(squared, [3, 1, 2], 1)
    assert results == [(n**2, os.getpid(), torch.get_num_threads()) for n in (3, 1, 2)]


def test_workers_are_other_processes_with_as_many_threads_and_results_keep_their_order(ray: Any) -> None:
    told: list[int] = []
    results = spread(squared, range(6), 2, done=told.append)
    assert [value for value, _, _ in results] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {process for _, process, _ in results}
    assert {threads for _, _, threads in results} == {torch.get_num_threads()}
    assert sorted(told) == [1, 2, 3, 4, 5, 6]


def test_what_a_worker_raises_is_raised_as_it_is(ray: Any) -> None:
    with pytest.raises(DeepFusionError, match=r"^number \d: not this one$"):
        spread(refused, range(3), 2)


def test_a_task_that_has_ended_is_not_cancelled(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[Any] = []
    monkeypatch.setattr(ray, "cancel", lambda job, **_: cancelled.append(job))
    with pytest.raises(DeepFusionError, match="number 0"):
        spread(refused, [0], 2)
    assert not cancelled


def test_a_lost_worker_is_an_error_with_a_cure(ray: Any) -> None:
    with pytest.raises(
        DeepFusionError, match=r"\[server\] workers: a worker of Ray was lost .*; run again with --resume"
    ):
        spread(ended, [0], 2)


def test_students_distilled_side_by_side_are_the_same_bytes(ray: Any, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    options = DistillOptions(steps=3, optimisation=Optimisation(batch_size=2))
    run = partial(
        distill, world.base, world.teachers, [Rows(k) for k in range(len(world.teachers))], rule=Logits(), recipe="paper",
        options=options, seed=0, **world.arguments,
    )  # fmt: skip
    alone = run(out=tmp_path / "alone", scratch=tmp_path / "scratch-1")
    together = run(out=tmp_path / "together", scratch=tmp_path / "scratch-2", workers=2)
    assert alone == together
    assert len(world.teachers) > 1
    for k in range(len(world.teachers)):
        model = Path(str(k)) / "model.safetensors"
        assert (tmp_path / "alone" / model).read_bytes() == (tmp_path / "together" / model).read_bytes()


def test_workers_need_independent_students(tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    with pytest.raises(ConfigError, match=r'\[server\] workers = 2: .* set recipe = "paper", or workers = 1'):
        parse_config({**tree, "recipe": "joint", "server": {"workers": 2}})
    assert parse_config({**tree, "recipe": "paper", "server": {"workers": 2}}).server.workers == 2
    with pytest.raises(ConfigError, match=r"\[server\] workers = 0: nobody would work; choose 1 or more"):
        parse_config({**tree, "server": {"workers": 0}})
