# SPDX-License-Identifier: Apache-2.0
"""A MoE of which somebody holds some experts: what is sent to a holder, and how what comes back is put in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from deepfusion.moe import families
from deepfusion.moe.base import EXPERT, LAYER, ROUTER
from deepfusion.types import State

_INDEX = re.compile(r"[0-9]{1,6}")


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
            found |= {f"{name}:{e}": tensor[place] for place, e in enumerate(hosted)}
        elif ROUTER.search(name):
            found |= {f"{name}:{e}": tensor[e] for e in hosted}
        else:
            found[name] = tensor
    return found


def apart(state: Mapping[str, torch.Tensor]) -> State:
    """The state with each expert's tensors by themselves, named as `put_back` asks; all else as it is."""
    found: State = {}
    for name, tensor in state.items():
        found |= {f"{name}:{e}": piece for e, piece in enumerate(tensor)} if EXPERT.search(name) else {name: tensor}
    return found


def together(pieces: Mapping[str, torch.Tensor], hosted: Sequence[Sequence[int]], layers: Sequence[int]) -> State:
    """The state of a model with the experts `hosted` of each MoE layer, in this order, and their rows of the router.

    Args:
        pieces: as `apart` gives them; experts that are not hosted need not be there.
        layers: numbers of the MoE layers.
    """
    found = {name: tensor for name, tensor in pieces.items() if ":" not in name}
    rows = {layer: list(experts) for layer, experts in zip(layers, hosted, strict=True)}
    for name in sorted({name.partition(":")[0] for name in pieces.keys() - found.keys()}):
        layer = LAYER.search(name)
        assert layer, name
        found[name] = torch.stack([pieces[f"{name}:{e}"] for e in rows[int(layer[1])]])
    for number, experts in rows.items():
        router = f"model.layers.{number}.mlp.gate.weight"
        found[router] = found[router][experts]
    return found


def sent_back(
    state: Mapping[str, torch.Tensor], pieces: Mapping[str, torch.Tensor], hosted: Sequence[Sequence[int]],
    layers: Sequence[int], sent_LE: torch.Tensor,
) -> State:  # fmt: skip
    """The pieces of `together`'s model: what is shared, whole routers, and those of the hosted experts that are to be sent.

    Args:
        pieces: what the model was made of: the routers' rows of experts that are not hosted go back as they came.
        sent_LE: bool, one row a MoE layer, over all experts.
    """
    found: State = {}
    rows = {layer: (list(experts), sent_E) for layer, experts, sent_E in zip(layers, hosted, sent_LE, strict=True)}
    for name, tensor in apart(state).items():
        if (at := expert_of(name)) is not None:
            experts, sent_E = rows[at[0]]
            if bool(sent_E[experts[at[1]]]):
                found[f"{name.partition(':')[0]}:{experts[at[1]]}"] = tensor
        elif ROUTER.search(name) and (layer := LAYER.search(name)):
            experts, _ = rows[int(layer[1])]
            found[name] = pieces[name].clone().index_copy_(0, torch.tensor(experts), tensor.cpu())
        else:
            found[name] = tensor
    return found


def gate_rows(gates: Mapping[str, torch.Tensor], hosted: Sequence[Sequence[int]]) -> State:
    """The rows of the routers of each MoE layer's hosted experts, each by itself, named as `put_back` asks."""
    rows = zip(by_layer(gates).items(), hosted, strict=True)
    return {f"{name}:{e}": tensor[e] for (name, tensor), experts in rows for e in experts}


def by_layer(tensors: Mapping[str, torch.Tensor]) -> State:
    """One tensor of each layer in the order of the layers; on the wire they come in that of their names."""
    return dict(sorted(tensors.items(), key=lambda item: int(found[1]) if (found := LAYER.search(item[0])) else -1))


def expert_of(name: str) -> tuple[int, int] | None:
    """Number of the layer and index of the expert that a piece belongs to; None for what is no expert's."""
    whole, _, index = name.partition(":")
    layer = LAYER.search(whole)
    return (int(layer[1]), int(index)) if layer and EXPERT.search(whole) and _INDEX.fullmatch(index) else None


def put_back(state: State, pieces: Mapping[str, torch.Tensor]) -> State:
    """`state` with the pieces in their places; what has no piece stays as it was."""
    result = {name: tensor.clone() for name, tensor in state.items()}
    for name, piece in pieces.items():
        whole, _, row = name.partition(":")
        result[whole][int(row) if row else ...] = piece
    return result
