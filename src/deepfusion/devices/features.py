# SPDX-License-Identifier: Apache-2.0
"""One forward pass of any causal LM: its logits, and the residual stream after chosen blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.errors import ModelError
from deepfusion.types import Batch


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass gives.

    Attributes:
        logits_BTV: unnormalised next-token scores.
        taps: hidden_BTH after each block that was asked for, before the model's final norm.
    """

    logits_BTV: torch.Tensor
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
    seen: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    layers = blocks(model) if taps else ()
    handles = [layers[number - 1].register_forward_hook(keep(number)) for number in sorted(set(taps))]
    padded = not bool(batch.valid_BT.all())
    inputs = {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.valid_BT.long() if padded else None,
        "use_cache": False,
    }
    try:
        result = model(**inputs) if parameters is None else functional_call(model, dict(parameters), (), inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Outputs(result.logits, tuple(seen[number] for number in taps))
