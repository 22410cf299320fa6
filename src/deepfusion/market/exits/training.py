# SPDX-License-Identifier: Apache-2.0
"""Training of exit heads on a frozen model: L = sum_m w_m CE_m with w_m = x_m / L (aeria, section 3)."""

from __future__ import annotations

import torch

from deepfusion.losses import next_token_losses
from deepfusion.market.exits.backbone import Run
from deepfusion.market.exits.heads import ExitHeads
from deepfusion.training import Optimisation, accelerator, fit
from deepfusion.types import Batch, Progress, Text, silent


@torch.no_grad()
def states_at(heads: ExitHeads, batch: Batch) -> dict[int, torch.Tensor]:
    """The state BTH after each early exit's block; nothing after the last of these runs."""
    seen: dict[int, torch.Tensor] = {}

    def step(number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
        out_BTH = run(hidden_BTH)
        if number in heads.early:
            seen[number] = out_BTH
        return out_BTH

    if heads.early:
        heads.backbone.stop_before(heads.early[-1] + 1, batch, step)
    return seen


def train_heads(
    heads: ExitHeads,
    text: Text,
    *,
    steps: int,
    optimisation: Optimisation,
    seed: int = 0,
    label: str = "train exits",
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Train all heads at once; the model, and with it the last exit, stays as it is. Memory does not grow with B T V.

    Returns:
        What was logged of each step: the weighted `loss`, and `ce-<x>` of the exit after block x.
    """
    compute = accelerator(optimisation.precision)
    if not heads.early:
        return []

    def backward(step: int) -> dict[str, float]:
        batch = text.batch(step, optimisation.batch_size).to(compute.device)
        logged: dict[str, float] = {"loss": 0.0}
        with compute.autocast():
            for block, state_BTH in states_at(heads, batch).items():
                weight = block / heads.backbone.num_blocks
                loss, parts = next_token_losses(heads.scores(block, state_BTH), [], batch, 1.0)
                (weight * loss).backward()  # one exit after the other: the graph of one is held
                logged[f"ce-{block}"] = float(parts.cross_entropy)
                logged["loss"] += weight * logged[f"ce-{block}"]
        return logged

    heads.train()
    history = fit(
        dict(heads.named_parameters()), backward, steps=steps, optimisation=optimisation, seed=seed, label=label,
        tokens_per_step=optimisation.batch_size * text.sequence_length, progress=progress,
    )  # fmt: skip
    heads.eval()
    return history
