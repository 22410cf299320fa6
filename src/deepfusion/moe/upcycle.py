# SPDX-License-Identifier: Apache-2.0
"""A base model out of pretrained weights: a dense model becomes one expert, a MoE's experts become their mean.

Sparse upcycling (arXiv 2212.05055). A dense model qualifies where its family's MoE differs in nothing but the FFN, so
that the base computes what the dense model does. OLMo-2 does not: it normalises after its blocks, OLMoE before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deepfusion.devices.configurations import known_keys
from deepfusion.errors import ModelError
from deepfusion.moe.base import BALANCING, DENSE, EXPERT, ROUTER, Family
from deepfusion.types import State

GROWS_INTO = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""Dense model types and the family whose expert their FFN can be."""
NOT_SHAPE = ("model_type", "architectures", "dtype", "transformers_version", "torch_dtype", "_name_or_path")
SHARED_EXPERT = ".mlp.shared_expert"


def family_name(base: PreTrainedConfig, known: Mapping[str, Family]) -> str:
    """Model type of the MoE that grows out of a base: its own, or the one of its dense kind.

    Raises:
        ModelError: it grows into none.
    """
    kind = str(base.model_type)
    if kind in known:
        return kind
    if kind not in GROWS_INTO:
        can = ", ".join([*GROWS_INTO, *known])
        raise ModelError(f"model type {kind} cannot become an expert; choose a base of one of {can}")
    return GROWS_INTO[kind]


def target_values(base: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """Configuration keys of the MoE whose experts are as large as the base's FFN; of a MoE base, its own."""
    config_class = cast(Any, CONFIG_MAPPING[family.model_type])
    known = known_keys(config_class) - {*NOT_SHAPE}
    values = {key: value for key, value in base.to_dict().items() if key in known}
    if base.model_type != family.model_type:
        width = int(base.intermediate_size)
        values[family.width_key] = width
        if "shared_expert_intermediate_size" in known:
            values["shared_expert_intermediate_size"] = max(1, width // 4)
    return {**values, "model_type": family.model_type}


def student_state(base: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor], width: str) -> State:
    """The state of the student (a MoE of one expert) that computes what the dense model `base` does.

    A shared expert that the dense model has not starts as it is in `fresh`, with a down-projection of zero.

    Args:
        fresh: state of a newly made student.
        width: configuration key of an expert's width, for the error.

    Raises:
        ModelError: a tensor of the dense model has no place in the student, or another shape there.
    """
    state: State = {}
    for name, tensor in base.items():
        kind = DENSE.search(name)
        if kind is None:
            state[name] = tensor
        elif kind[1] == "gate":
            up = base[name.replace("gate_proj", "up_proj")]
            state[name.replace("gate_proj.weight", "experts.gate_up_proj")] = torch.cat([tensor, up])[None]
        elif kind[1] == "down":
            state[name.replace("down_proj.weight", "experts.down_proj")] = tensor[None]
    for name, tensor in fresh.items():
        if ROUTER.search(name) or SHARED_EXPERT in name:
            silent = name.endswith("shared_expert.down_proj.weight")
            state[name] = torch.zeros_like(tensor) if silent else tensor
    return _fitting(state, fresh, width)


def mean_expert(
    base: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor], family: Family, config: PreTrainedConfig,
    weights: Sequence[float],
) -> State:  # fmt: skip
    """The student's state out of a MoE of the family: what is shared as it is, and the mean of the routed experts.

    Args:
        fresh: state of a newly made student; its router of one expert stays as it is.
        config: of the MoE.
        weights: what the weights of a token's experts sum to, for each MoE layer; the experts' outputs are scaled by it.

    Raises:
        ModelError: a tensor of the MoE has no place in the student, or another shape there.
    """
    experts, mean = family.num_experts(config), State()
    for index in range(experts):
        for name, tensor in family.expert_of(base, index, config).items():
            mean[name] = mean[name] + tensor / experts if name in mean else tensor / experts
    for layer, weight in zip(family.moe_layers(config), weights, strict=True):
        down = next(name for name in mean if name.startswith(f"model.layers.{layer}.mlp.") and "down_proj" in name)
        mean[down] = mean[down] * (weight / family.sure_weight(config))
    routers = {name: tensor for name, tensor in fresh.items() if ROUTER.search(name) or name.endswith(BALANCING)}
    return _fitting({**family.join(family.shared_of(base), mean), **routers}, fresh, family.width_key)


def _fitting(state: State, fresh: Mapping[str, torch.Tensor], width: str) -> State:
    """`state`, when it has the names and shapes of `fresh`; raises ModelError otherwise."""
    odd = [name for name in sorted({*state, *fresh}) if _shape(state, name) != _shape(fresh, name)]
    if odd:
        name, cure = odd[0], "choose a base without this tensor, or take the key out of [target.config]"
        if EXPERT.search(name):
            cure = f"leave {width} out of [target.config], or give what is cut out of one student"
        found, wanted = _shape(state, name), _shape(fresh, name)
        raise ModelError(f"{name} is {found} in the base and {wanted} in the student; {cure}")
    return state


def _shape(state: Mapping[str, torch.Tensor], name: str) -> object:
    return list(state[name].shape) if name in state else "missing"
