# SPDX-License-Identifier: Apache-2.0
"""Learning from the best of several models' predictions of the same text (FedMKT, arXiv 2406.02224; baselines, section 4).

A model's prediction of a position is its largest logits and where they are: that is all that crosses the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from deepfusion.devices.features import forward
from deepfusion.losses import next_token_losses
from deepfusion.moe.routing import Penalty, watching
from deepfusion.scores import Scores
from deepfusion.training import Optimisation, accelerator, derive_seed, fit
from deepfusion.types import Batch, Progress, silent

AT_ONCE = 8
"""Rows that are predicted together."""


class Predictions(NamedTuple):
    """What a model says of S rows of T tokens.

    Attributes:
        value_STK: its K largest logits at each position, largest first, as float16; the largest is 0 (softmax does not mind).
        index_STK: their tokens, as int16 (read as unsigned) where the vocabulary allows, else int32.
        loss_S: mean cross-entropy of each row's counted next tokens, float32; 0 where none is counted.
    """

    value_STK: torch.Tensor
    index_STK: torch.Tensor
    loss_S: torch.Tensor

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens of some rows, as int64."""
        return tokens_of(self.index_STK[rows])


def index_type(vocab_size: int) -> torch.dtype:
    """What token indices are sent as: two bytes where they suffice."""
    return torch.int16 if vocab_size <= 1 << 16 else torch.int32


def tokens_of(index: torch.Tensor) -> torch.Tensor:
    """Token indices as they are sent, as int64."""
    return index.long() & 0xFFFF if index.dtype is torch.int16 else index.long()


@torch.no_grad()
def predict(model: PreTrainedModel, rows: Batch, kept: int) -> Predictions:
    """The model's predictions of the rows, `kept` logits a position (all, of a smaller vocabulary)."""
    compute = accelerator()
    model.to(compute.device).eval()  # pyright: ignore[reportArgumentType]
    parts: list[Predictions] = []
    for first in range(0, len(rows.input_ids_BT), AT_ONCE):
        batch = _take(rows, torch.arange(first, min(first + AT_ONCE, len(rows.input_ids_BT)))).to(compute.device)
        with compute.autocast():
            logits_BTV = forward(model, batch).logits_BTV.float()
        top = logits_BTV.topk(min(kept, logits_BTV.shape[-1]), dim=-1)
        value_BTK = (top.values - top.values[..., :1]).clamp(min=-60_000).half()
        losses = [next_token_losses(Scores(logits_BTV[b : b + 1]), [], _take(batch, torch.tensor([b])), 1.0)[0]
                  for b in range(len(logits_BTV))]  # fmt: skip
        index_BTK = top.indices.to(index_type(logits_BTV.shape[-1]))
        parts.append(Predictions(value_BTK.cpu(), index_BTK.cpu(), torch.stack(losses).float().cpu()))
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def best_of(sources: Iterable[Predictions]) -> Predictions:
    """For each row the predictions of the source whose loss is the lowest (DualMinCE); of equal ones, the first.

    Sources come one after another; two are in memory, whatever their number. The first should be the learner's own: on a row
    that it predicts best it then learns what it said before.
    """
    iterator = iter(sources)
    best = Predictions(*(tensor.clone() for tensor in next(iterator)))
    for source in iterator:
        better_S = source.loss_S < best.loss_S
        for kept, new in zip(best, source, strict=True):
            kept[better_S] = new[better_S]
    return best


def least_loss(found: Predictions, rows: Batch) -> torch.Tensor:
    """A lower bound of each row's loss that follows from the predictions alone, (S,): who sends less makes it up.

    Of the kept logits' softmax the whole is left out, which makes every token's probability larger than it is; a token that
    is not kept has at most the last logit that is.
    """
    value_STK = found.value_STK.float()
    kept_ST = value_STK.logsumexp(-1)[:, :-1]
    target_ST = rows.input_ids_BT[:, 1:, None]
    hit_STK = found.tokens(torch.arange(len(found.loss_S)))[:, :-1] == target_ST
    logit_ST = torch.where(hit_STK.any(-1), (value_STK[:, :-1] * hit_STK).sum(-1), value_STK[:, :-1, -1])
    counted_ST = (rows.counted_BT & rows.valid_BT)[:, 1:]
    return ((kept_ST - logit_ST) * counted_ST).sum(-1) / counted_ST.sum(-1).clamp(min=1)


def knowledge_loss(logits_BTV: torch.Tensor, teacher: Predictions, rows: torch.Tensor, valid_BT: torch.Tensor,
                   temperature: float) -> torch.Tensor:  # fmt: skip
    """Mean over the valid positions of -sum q log p: q is the softmax over the teacher's kept logits, 0 elsewhere."""
    scaled_BTV = logits_BTV.float() / temperature
    q_BTK = (teacher.value_STK[rows].to(scaled_BTV.device).float() / temperature).softmax(-1)
    logp_BTK = scaled_BTV.gather(-1, teacher.tokens(rows).to(scaled_BTV.device)) - scaled_BTV.logsumexp(
        -1, keepdim=True
    )
    loss_BT = -(q_BTK * logp_BTK).sum(-1)
    return (loss_BT * valid_BT).sum() / valid_BT.sum().clamp(min=1)


def learn(
    model: PreTrainedModel,
    rows: Batch,
    teacher: Predictions,
    *,
    mixture: float,
    temperature: float,
    optimisation: Optimisation,
    seed: int,
    label: str,
    penalty: Penalty | None = None,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Train the model in place on the rows, once: mixture * cross-entropy + (1 - mixture) * `knowledge_loss`.

    Args:
        teacher: predictions of these rows.
        penalty: what is added to the loss of a MoE, out of its routing.
    """
    compute = accelerator(optimisation.precision)
    if optimisation.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(compute.device).train()  # pyright: ignore[reportArgumentType]
    count, micro, accumulate = len(rows.input_ids_BT), optimisation.batch_size, optimisation.accumulate
    order_S = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "order")))
    parts = order_S.split(micro)

    def backward(step: int) -> dict[str, float]:
        mine = parts[step * accumulate : (step + 1) * accumulate]
        sums = {"loss": 0.0, "ce": 0.0, "kl": 0.0}
        for chosen in mine:
            batch = _take(rows, chosen).to(compute.device)
            with watching(model, batch, penalty) as routing, compute.autocast():
                logits_BTV = forward(model, batch).logits_BTV
            entropy, _ = next_token_losses(Scores(logits_BTV), [], batch, temperature=1.0)
            knowledge = knowledge_loss(logits_BTV, teacher, chosen, batch.valid_BT, temperature)
            loss = mixture * entropy + (1 - mixture) * knowledge
            loss = loss + penalty(routing) if penalty and routing else loss
            compute.backward(loss / len(mine))
            for name, value in (("loss", loss), ("ce", entropy), ("kl", knowledge)):
                sums[name] += float(value.detach()) / len(mine)
        return sums

    history = fit(
        dict(model.named_parameters()), backward, steps=-(-len(parts) // accumulate), optimisation=optimisation,
        seed=seed, label=label, tokens_per_step=micro * accumulate * rows.input_ids_BT.shape[1], progress=progress,
    )  # fmt: skip
    model.eval()
    return history


def _take(rows: Batch, chosen: torch.Tensor) -> Batch:
    return Batch(*(part[chosen] for part in (rows.input_ids_BT, rows.counted_BT, rows.valid_BT)))
