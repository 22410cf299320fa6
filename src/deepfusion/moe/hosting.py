# SPDX-License-Identifier: Apache-2.0
"""A MoE of which somebody holds some experts: what is sent to a holder, and how what comes back is put in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from deepfusion.moe import families
from deepfusion.moe.base import EXPERT, ROUTER
from deepfusion.types import State


def with_experts(target: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The target's configuration with `count` experts, of which a token uses as many as it did, or all."""
    values, key = target.to_dict(), families[str(target.model_type)].num_experts_key
    return type(target).from_dict(
        {**values, key: count, "num_experts_per_tok": min(count, int(target.num_experts_per_tok))}
    )


def part(state: Mapping[str, torch.Tensor], hosted: Sequence[int]) -> State:
    """What a holder of the experts `hosted` is sent: those, in this order, all that is shared, and the whole routers."""
    index = list(hosted)
    return {name: tensor[index] if EXPERT.search(name) else tensor for name, tensor in state.items()}


def pieces(state: State, hosted: Sequence[int]) -> State:
    """A holder's tensors, as `part` gives them: each expert and each hosted gate row by itself, named as `put_back` asks."""
    found: State = {}
    for name, tensor in state.items():
        if EXPERT.search(name):
            found |= {f"{name}#{e}": tensor[place] for place, e in enumerate(hosted)}
        elif ROUTER.search(name):
            found |= {f"{name}#{e}": tensor[e] for e in hosted}
        else:
            found[name] = tensor
    return found


def put_back(state: State, pieces: Mapping[str, torch.Tensor]) -> State:
    """`state` with the pieces in their places; what has no piece stays as it was."""
    result = {name: tensor.clone() for name, tensor in state.items()}
    for name, piece in pieces.items():
        whole, _, row = name.partition("#")
        result[whole][int(row) if row else ...] = piece
    return result
