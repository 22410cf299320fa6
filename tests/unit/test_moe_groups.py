# SPDX-License-Identifier: Apache-2.0
"""Routers that choose a group of experts first: what is counted is what they chose, not the most probable experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from moe_world import V, make_batch, make_target

from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.moe import families
from deepfusion.moe.routing import balance_penalty, router_logits, routers, watch_routing
from deepfusion.stages.evaluate import expert_load
from deepfusion.stages.tune import TuneOptions, tuning_losses
from deepfusion.types import Corpus

E, GROUPS = 8, 4
GROUPED = [("deepseek_v2", {"topk_method": "group_limited_greedy"}), ("deepseek_v3", {})]


def grouped(name: str, changes: dict[str, Any]) -> Any:
    """A sure router that sends each token to the two experts of one of four groups."""
    model = from_config(make_target(name, E, 2, n_group=GROUPS, topk_group=1, **changes), seed=0).eval()
    with torch.no_grad():
        for router in routers(model):
            router.weight.mul_(20)  # type: ignore[operator]
    return model


def wanted_balance(name: str, logits: list[torch.Tensor], valid_BT: torch.Tensor) -> float:
    """By the groups' own scores: the best expert's in V2, the sum of the two best in V3."""
    losses: list[float] = []
    for logits_RE in logits:
        score_RE = logits_RE[valid_BT.flatten()].double()
        score_RE = score_RE.softmax(-1) if name == "deepseek_v2" else score_RE.sigmoid()
        score_RGe = score_RE.unflatten(-1, (GROUPS, -1))
        group_R = (score_RGe.amax(-1) if name == "deepseek_v2" else score_RGe.sum(-1)).argmax(-1)
        share_E = (torch.bincount(group_R, minlength=GROUPS) / len(group_R) / 2).repeat_interleave(E // GROUPS)
        losses.append(float(E * (share_E * (score_RE / score_RE.sum(-1, keepdim=True)).mean(0)).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("name", "changes"), GROUPED)
def test_the_balance_loss_counts_the_experts_of_the_chosen_groups(name: str, changes: dict[str, Any]) -> None:
    model, batch = grouped(name, changes), make_batch(rows=4)
    with router_logits(model) as logits, watch_routing(model, batch.valid_BT) as routing, torch.no_grad():
        forward(model, batch)
    wanted = wanted_balance(name, logits, batch.valid_BT)
    assert float(balance_penalty(model, 1.0)(routing)) == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        tuned = tuning_losses(model, [[], []], batch, [2, 2], families[name], TuneOptions())
    assert float(tuned["balance"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "changes"), GROUPED)
def test_experts_of_a_group_have_the_same_load(name: str, changes: dict[str, Any]) -> None:
    """A token that goes to one of the two goes to both."""
    corpus = Corpus(
        np.random.default_rng(0).integers(0, V, 60).astype(np.uint16), np.ones(60, bool), np.arange(0, 61, 10),
        np.zeros(0, np.uint8), np.zeros(7, np.int64), np.zeros(6, np.int64), ("text",), np.arange(6),
    )  # fmt: skip
    (shares,) = expert_load(grouped(name, changes), corpus, 16, family=families[name]).values()
    assert shares[0::2] == pytest.approx(shares[1::2])
    assert len({round(share, 6) for share in shares}) > 1, "the router is not even"
