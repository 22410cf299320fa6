# SPDX-License-Identifier: Apache-2.0
"""A small dense model grown into a larger student that predicts almost what it does (after Net2Net, arXiv 1511.05641).

What is new is silent at first: its outputs are zero, and channels that nobody writes to are read at random, so that they can
learn. Exact but for two things: the norm's epsilon, and rotary positions where heads become wider or turn at another rate (each
pair of numbers takes the place of the nearest frequency).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from deepfusion.moe.base import Family
from deepfusion.types import State

WIDENS_INTO = {"llama": ("mixtral", "qwen2_moe"), "mistral": ("mixtral", "qwen2_moe"), "qwen2": ("qwen2_moe",)}
"""Dense model types, and the families whose attention and norms are theirs."""


def cannot_grow(
    source: PreTrainedConfig, student: PreTrainedConfig, family: Family, sequence_length: int
) -> str | None:
    """Why a dense model cannot grow into this student; None where it can.

    Args:
        sequence_length: tokens of the longest text that they have to read alike.
    """
    kind = str(source.model_type)
    if family.model_type not in WIDENS_INTO.get(kind, ()):
        return f"a {kind} is not built like a {family.model_type}"
    if _too_many_biases(source, student):
        return "it has biases that the student has not"
    if source.hidden_act != student.hidden_act:
        return f"its activation function is {source.hidden_act}, the student's {student.hidden_act}"
    for mine, other in zip(_reaches(source, sequence_length), _reaches(student, sequence_length), strict=False):
        if mine != other:
            return f"its attention reaches over {mine} tokens, the student's over {other}"
    if student.tie_word_embeddings and not source.tie_word_embeddings:
        return "it has an output head of its own"
    if _group(source) != _group(student):
        return "its key and value heads serve another number of query heads"
    for name, least, most in (
        ("layers", source.num_hidden_layers, student.num_hidden_layers),
        ("channels", source.hidden_size, student.hidden_size),
        ("heads", source.num_attention_heads, student.num_attention_heads),
        ("numbers a head", _head(source), _head(student)),
        ("FFN neurons", source.intermediate_size, _neurons(student, family)),
        ("tokens of vocabulary", source.vocab_size, student.vocab_size),
    ):
        if least > most:
            return f"it has {least} {name}, the student {most}"
    return None


def grow(
    source: Mapping[str, torch.Tensor],
    source_config: PreTrainedConfig,
    fresh: Mapping[str, torch.Tensor],
    student: PreTrainedConfig,
    family: Family,
) -> State:
    """The student's state that predicts what the dense model does.

    Args:
        source: state of the dense model; `cannot_grow` finds no fault with its configuration.
        fresh: state of a newly made student, for what is new.
    """
    plan = _Plan(source_config, student, family)
    state = {name: tensor.clone() for name, tensor in fresh.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = source.get(name, source["model.embed_tokens.weight"])
        state[name].zero_()[: len(old), : old.shape[1]] = old
    state["model.norm.weight"] = plan.norm(source["model.norm.weight"])
    for layer in range(int(student.num_hidden_layers)):
        prefix = f"model.layers.{layer}."
        new = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        old = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
        plan.attention(old, new)
        plan.ffn(old, new)
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            if norm in old:
                state[prefix + norm] = plan.norm(old[norm])
    return state


def _too_many_biases(source: PreTrainedConfig, student: PreTrainedConfig) -> bool:
    """Whether the dense model has biases for which the student has no place; Qwen2 has them in q, k and v."""
    if source.model_type == "qwen2":
        return not student.qkv_bias
    return bool(getattr(source, "attention_bias", False) or getattr(source, "mlp_bias", False))


def _reaches(config: PreTrainedConfig, length: int) -> list[int]:
    """How many tokens each layer's attention reads of a text of `length`."""
    window = min(int(getattr(config, "sliding_window", None) or length), length)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers)
    return [window if kind == "sliding_attention" else length for kind in kinds]


def _group(config: PreTrainedConfig) -> float:
    """Query heads for each key and value head."""
    return config.num_attention_heads / config.num_key_value_heads


def _head(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _neurons(student: PreTrainedConfig, family: Family) -> int:
    """Neurons of the narrowest FFN among the student's layers."""
    sparse = int(getattr(student, family.width_key)) + int(getattr(student, "shared_expert_intermediate_size", 0) or 0)
    dense = len(family.moe_layers(student)) < int(student.num_hidden_layers)
    return min(sparse, int(student.intermediate_size)) if dense else sparse


def _frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """Rotary frequencies of the pairs of a head."""
    theta = float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0))
    return theta ** (-torch.arange(0, _head(config), 2).double() / _head(config))


class _Plan:
    """Where the numbers of a small model go in a larger one; writes into the tensors of one layer."""

    def __init__(self, source: PreTrainedConfig, student: PreTrainedConfig, family: Family) -> None:
        self._channels, self._more = int(source.hidden_size), int(student.hidden_size)
        heads, small, large = int(source.num_attention_heads), _head(source), _head(student)
        key_heads = int(source.num_key_value_heads)
        turning, plain = self._pairs(source, student), torch.arange(small)
        self._rows = {
            "q": torch.cat([turning + head * large for head in range(heads)]),
            "k": torch.cat([turning + head * large for head in range(key_heads)]),
            "v": torch.cat([plain + head * large for head in range(key_heads)]),
        }
        self._heads = {"q": heads * large, "k": key_heads * large, "v": key_heads * large}
        self._columns = torch.cat([plain + head * large for head in range(heads)])
        self._scale = {
            "q": math.sqrt(large / small),
            "k": 1.0,
            "v": 1.0,
        }  # scores are divided by the root of a head's width
        self._expert = int(getattr(student, family.width_key))

    @staticmethod
    def _pairs(source: PreTrainedConfig, student: PreTrainedConfig) -> torch.Tensor:
        """Places of a head's numbers in the wider head: each rotary pair at the nearest frequency that is free."""
        ours, theirs = _frequencies(student).log(), _frequencies(source).log()
        free = torch.ones(len(ours), dtype=torch.bool)
        places: list[int] = []
        for frequency in theirs:
            place = int((ours - frequency).abs().masked_fill(~free, math.inf).argmin())
            free[place] = False
            places.append(place)
        return torch.tensor(places + [place + len(ours) for place in places])

    def norm(self, old: torch.Tensor) -> torch.Tensor:
        """Silent channels make the root of the mean square smaller."""
        new = old.mean().expand(self._more).clone()
        new[: self._channels] = old
        return new * math.sqrt(self._channels / self._more)

    def attention(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        """Heads to the first heads, each in its place; an absent layer writes nothing."""
        output = new["self_attn.o_proj.weight"].zero_()
        for name in ("q", "k", "v"):
            if (bias := new.get(f"self_attn.{name}_proj.bias")) is not None:
                bias.zero_()
                if f"self_attn.{name}_proj.bias" in old:
                    bias[self._rows[name]] = old[f"self_attn.{name}_proj.bias"] * self._scale[name]
            if old:
                weight = new[f"self_attn.{name}_proj.weight"]
                # heads that are new read all at random, and are not heard yet
                weight[: self._heads[name], : self._channels] = 0
                weight[self._rows[name], : self._channels] = old[f"self_attn.{name}_proj.weight"] * self._scale[name]
        if old:
            output[: self._channels, self._columns] = old["self_attn.o_proj.weight"]

    def ffn(self, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
        """Neurons to the shared expert as far as it has room, the others to the routed one."""
        rest = 0
        if (gate := new.get("mlp.shared_expert_gate.weight")) is not None:
            gate.zero_()  # a sigmoid of a half, which the down-projection makes up for
            parts = tuple(new[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
            rest = self._neurons(old, *parts, first=0, double=2.0)
        if "mlp.experts.down_proj" in new:
            gate_up, down = new["mlp.experts.gate_up_proj"][0], new["mlp.experts.down_proj"][0]
            self._neurons(old, gate_up[: self._expert], gate_up[self._expert :], down, first=rest)
        else:
            self._neurons(old, *(new[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")), first=0)

    def _neurons(
        self, old: Mapping[str, torch.Tensor], gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, first: int,
        double: float = 1.0,
    ) -> int:  # fmt: skip
        """Fill an FFN with the neurons from `first` on, as far as it has room; the number of the next one."""
        down.zero_()
        if not old:
            return first
        last = min(first + len(gate), len(old["mlp.gate_proj.weight"]))
        for name, weight in (("gate", gate), ("up", up)):
            weight[: last - first, : self._channels] = old[f"mlp.{name}_proj.weight"][first:last]
        down[: self._channels, : last - first] = double * old["mlp.down_proj.weight"][:, first:last]
        return last
