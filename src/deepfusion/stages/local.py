# SPDX-License-Identifier: Apache-2.0
"""What happens on a device: a model is trained on its own text with plain cross-entropy (DeepFusion, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from deepfusion.data.packing import PackedText
from deepfusion.devices.features import forward
from deepfusion.fused import Scores
from deepfusion.losses import balance_loss, next_token_losses
from deepfusion.moe import families
from deepfusion.moe.base import router_inputs, router_logits
from deepfusion.training import Checkpoint, Optimisation, accelerator, fit
from deepfusion.types import Batch, Progress, silent


def steps_for(
    num_tokens: int, sequence_length: int, optimisation: Optimisation, epochs: float, max_steps: int | None
) -> int:
    """Optimiser steps that read text of `num_tokens` tokens `epochs` times, at least 1 and at most `max_steps`."""
    sequences = epochs * num_tokens / sequence_length
    steps = max(1, math.ceil(sequences / (optimisation.batch_size * optimisation.accumulate)))
    return steps if max_steps is None else min(steps, max_steps)


class Routing(NamedTuple):
    """How a MoE has routed a batch.

    Attributes:
        inputs: each MoE layer's router input, (B*T, H), with gradient.
        logits: each MoE layer's router logits, (B*T, E), with gradient.
        valid_BT: False on padding.
    """

    inputs: Sequence[torch.Tensor]
    logits: Sequence[torch.Tensor]
    valid_BT: torch.Tensor


Penalty = Callable[[Routing], torch.Tensor]
"""A scalar with gradient."""


def balance_penalty(model: PreTrainedModel, weight: float) -> Penalty:
    """The balance loss over the experts, weighted."""
    family, top_k = families[model.config.model_type], int(model.config.num_experts_per_tok)

    def penalty(routing: Routing) -> torch.Tensor:
        shares = [family.probabilities(logits_RE.float()) for logits_RE in routing.logits]
        return weight * balance_loss(shares, top_k, routing.valid_BT)

    return penalty


def _read(model: PreTrainedModel, batch: Batch, *, watch: bool) -> tuple[torch.Tensor, Routing | None]:
    """The model's logits, and how it has routed the batch if that is watched."""
    if not watch:
        return forward(model, batch).logits_BTV, None
    with router_logits(model) as logits, router_inputs(model) as inputs:
        return forward(model, batch).logits_BTV, Routing(inputs, logits, batch.valid_BT)


def train_causal_lm(
    model: PreTrainedModel,
    text: PackedText,
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

    Used on a device for its private text and on the server for warm starts on public text.

    Args:
        first_step: steps that have read of this text before; this training reads on from there.
        penalty: what is added to the loss of a MoE, out of its routing.
    """
    compute = accelerator(optimisation.precision)
    model.to(compute.device).train()
    if optimisation.gradient_checkpointing:
        model.activation_checkpointing_enable()  # stays on: it changes no result, and nothing of it is saved
    micro = optimisation.batch_size

    def backward(step: int) -> dict[str, float]:
        loss_sum = 0.0
        for part in range(optimisation.accumulate):
            batch = text.batch((first_step + step) * optimisation.accumulate + part, micro).to(compute.device)
            with compute.autocast():
                logits_BTV, routing = _read(model, batch, watch=penalty is not None)
            loss, _ = next_token_losses(Scores(logits_BTV), [], batch, temperature=1.0)
            if penalty is not None and routing is not None:
                loss = loss + penalty(routing)
            compute.backward(loss / optimisation.accumulate)
            loss_sum += float(loss.detach())
            del logits_BTV, routing, loss  # or they would live on beside the next step's
        return {"loss": loss_sum / optimisation.accumulate}

    history = fit(
        dict(model.named_parameters()),
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
