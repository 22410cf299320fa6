# SPDX-License-Identifier: Apache-2.0
"""What happens on a device: a model is trained on its own text with plain cross-entropy (DeepFusion, eq. 2)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deepfusion.data.packing import PackedText
from deepfusion.devices.documents import PrivateDocuments
from deepfusion.devices.features import forward
from deepfusion.losses import next_token_losses
from deepfusion.moe.routing import Penalty, watching
from deepfusion.scores import Scores
from deepfusion.training import Checkpoint, Optimisation, accelerator, fit
from deepfusion.types import Batch, Progress, silent


def steps_for(
    num_tokens: int, sequence_length: int, optimisation: Optimisation, epochs: float, max_steps: int | None
) -> int:
    """Optimiser steps that read text of `num_tokens` tokens `epochs` times, at least 1 and at most `max_steps`."""
    sequences = epochs * num_tokens / sequence_length
    steps = max(1, math.ceil(sequences / (optimisation.batch_size * optimisation.accumulate)))
    return steps if max_steps is None else min(steps, max_steps)


def train_causal_lm(
    model: PreTrainedModel,
    text: PackedText | PrivateDocuments,
    *,
    steps: int,
    optimisation: Optimisation,
    seed: int,
    label: str,
    first_step: int = 0,
    penalty: Penalty | None = None,
    scratch: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Train `model` in place on `text` by next-token cross-entropy over counted tokens; returns the history.

    Args:
        text: how it is read decides how it is learnt: of documents that are private, by DP-SGD, and the history has no loss.
        first_step: steps that have read of this text before; this training reads on from there.
        penalty: what is added to the loss of a MoE, out of its routing.
    """
    compute = accelerator(optimisation.precision)
    model.to(compute.device).train()
    if optimisation.gradient_checkpointing:
        model.activation_checkpointing_enable()  # stays on: it changes no result, and nothing of it is saved
    micro = optimisation.batch_size

    def loss_of(batch: Batch) -> torch.Tensor:
        with watching(model, batch, penalty) as routing, compute.autocast():
            logits_BTV = forward(model, batch).logits_BTV
        loss, _ = next_token_losses(Scores(logits_BTV), [], batch, temperature=1.0)
        return loss + penalty(routing) if penalty and routing else loss

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def backward(step: int) -> dict[str, float]:
        if isinstance(text, PrivateDocuments):
            text.backward(first_step + step, parameters, lambda row: compute.backward(loss_of(row.to(compute.device))))
            return {}
        loss_sum = 0.0
        for part in range(optimisation.accumulate):
            batch = text.batch((first_step + step) * optimisation.accumulate + part, micro).to(compute.device)
            loss = loss_of(batch)
            compute.backward(loss / optimisation.accumulate)
            loss_sum += float(loss.detach())
            del loss  # or its graph would live on beside the next step's
        return {"loss": loss_sum / optimisation.accumulate}

    history = fit(
        parameters,
        backward,
        steps=steps,
        optimisation=optimisation,
        seed=seed,
        label=label,
        tokens_per_step=micro * optimisation.accumulate * text.sequence_length,
        progress=progress,
        checkpoint=Checkpoint(scratch / "training.safetensors") if scratch else None,
    )
    model.eval()
    return history
