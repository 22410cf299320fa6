# SPDX-License-Identifier: Apache-2.0
"""One forward pass of any causal LM: its next-token scores, and the residual stream after chosen blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.errors import ModelError
from deepfusion.scores import Scores
from deepfusion.types import Batch

LOGITS_HELD = 1 << 22
"""A batch's logits are held when there are no more than this; above, `read` leaves them to be made a piece at a time."""
HEAD_TOLERANCE = 1e-4
"""Largest difference between a model's logits and its last hidden state times its output matrix, by the largest logit."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass gives.

    Attributes:
        logits_BTV: unnormalised next-token scores.
        taps: hidden_BTH after each block that was asked for, before the model's final norm.
    """

    logits_BTV: torch.Tensor
    taps: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model makes of a batch.

    Attributes:
        scores: for the next tokens; made when they are looked at, where the batch's logits would be many.
        taps: hidden_BTH after each block that was asked for, before the model's final norm.
    """

    scores: Scores
    taps: tuple[torch.Tensor, ...]


def num_blocks(config: PreTrainedConfig) -> int:
    """Number of decoder blocks that a configuration describes."""
    return int(config.num_hidden_layers)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal LM, first to last.

    Raises:
        ModelError: the model has no list of blocks of the length that its configuration says.
    """
    depth = num_blocks(model.config)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(model).__name__}: has no list of {depth} decoder blocks; use a decoder-only causal LM")


def forward(
    model: PreTrainedModel,
    batch: Batch,
    *,
    parameters: Mapping[str, torch.Tensor] | None = None,
    taps: Sequence[int] = (),
) -> Outputs:
    """Run `model` on `batch`.

    Args:
        parameters: tensors that take the place of the model's own, by state-dict name (the model is not changed).
        taps: 1-based numbers of the blocks whose output is wanted, in any order.

    Returns:
        The logits, and one hidden_BTH for each of `taps`. Hidden states come from hooks on the blocks, because
        transformers' `hidden_states[-1]` is taken after the final norm.
    """

    def call(inputs: dict[str, Any]) -> Any:
        return model(**inputs) if parameters is None else functional_call(model, dict(parameters), (), inputs)

    result, tapped = _run(model, call, batch, taps)
    return Outputs(result.logits, tapped)


def read(model: PreTrainedModel, batch: Batch, *, taps: Sequence[int] = ()) -> Reading:
    """`forward` for losses that can do without all logits at once: memory that does not grow with the vocabulary.

    Models whose logits are more than a product (scaled or capped ones) are found out at their first batch and give logits.
    """
    if batch.input_ids_BT.numel() * int(model.config.vocab_size) <= LOGITS_HELD or not _has_plain_head(model, batch):
        outputs = forward(model, batch, taps=taps)
        return Reading(Scores(outputs.logits_BTV), outputs.taps)
    result, tapped = _run(model, lambda inputs: model.base_model(**inputs), batch, taps)
    head: Any = model.get_output_embeddings()
    return Reading(Scores(result.last_hidden_state, head.weight, head.bias), tapped)


_plain_heads: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def _has_plain_head(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether logits = last hidden state times output matrix; tried on the batch's last position, once for a model."""
    if model not in _plain_heads:
        head, training = model.get_output_embeddings(), model.training
        if not isinstance(head, nn.Linear) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
            _plain_heads[model] = False
            return False
        model.eval()  # dropout would make a difference
        whole, _ = _run(model, lambda inputs: model(**inputs, logits_to_keep=1), batch, ())
        part, _ = _run(model, lambda inputs: model.base_model(**inputs), batch, ())
        model.train(training)
        gap_BV = whole.logits[:, -1].float() - head(part.last_hidden_state[:, -1]).float()
        _plain_heads[model] = bool(gap_BV.abs().max() <= HEAD_TOLERANCE * whole.logits.float().abs().max())
    return _plain_heads[model]


def _run(
    model: PreTrainedModel, call: Callable[[dict[str, Any]], Any], batch: Batch, taps: Sequence[int]
) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """What `call` gives for the batch, and the outputs of the tapped blocks."""
    seen: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    layers = blocks(model) if taps else ()
    handles = [layers[number - 1].register_forward_hook(keep(number)) for number in sorted(set(taps))]
    padded = not bool(batch.valid_BT.all())
    mask = batch.valid_BT.long() if padded else None
    try:
        result = call({"input_ids": batch.input_ids_BT, "attention_mask": mask, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    return result, tuple(seen[number] for number in taps)
