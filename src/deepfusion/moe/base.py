# SPDX-License-Identifier: Apache-2.0
"""What a Mixture-of-Experts family is: a table of parameter names, and how one expert is a dense model's FFN.

The base model of a family ("student", DeepFusion section IV) has the target's depth, width, attention, vocabulary and
shared expert, and exactly one routed expert. Its state dict splits into what all domains share and what becomes an
expert (eq. 12, 13); `join` is the inverse. Names are those in memory: `experts.gate_up_proj` is (E, 2I, H), gate first,
`experts.down_proj` (E, H, I), the router's weight (E, H). `save_pretrained` and `from_pretrained` translate to the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.errors import ModelError
from deepfusion.types import State

EXPERT = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
ROUTER = re.compile(r"\.mlp\.gate\.weight$")
BALANCING = ".e_score_correction_bias"
"""Ends the name of what a router of sigmoids adds to its scores when it chooses."""
DENSE = re.compile(r"\.mlp\.(gate|up|down)_proj\.weight$")
LAYER = re.compile(r"\.layers\.(\d+)\.")
MATRICES = ("gate_up_proj", "down_proj")
"""The stacked matrices of a layer's experts."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One Mixture-of-Experts architecture of transformers.

    Attributes:
        model_type: its Hugging Face model type, and its name in this project.
        num_experts_key: configuration key of the number of routed experts E.
        width_key: configuration key of one expert's intermediate size I.
        layers: which layers have experts: every `decoder_sparse_step`-th, all after `first_k_dense_replace`, or all.
        student: "single" trains a MoE of one expert; "dense" trains plain MLPs, of which the first I neurons become the
            routed expert and the others the shared one (for families that cannot be built with one expert).
        scores: how the router makes weights out of logits.
        scaling: `routed_scaling_factor` is absent ("none"); divided out of the experts, whose weights sum to 1
            ("folded"); or chosen so that weights that do not sum to 1 do so on average ("calibrated", see
            docs/decisions/0003-deepseek-v2-scale.md).
        group_size: least experts of a group in routers that choose groups first; 0 for routers without groups.
    """

    model_type: str
    num_experts_key: str
    width_key: str = "moe_intermediate_size"
    layers: Literal["sparse_step", "after_dense", "all"]
    student: Literal["single", "dense"]
    scores: Literal["softmax", "sigmoid"] = "softmax"
    scaling: Literal["none", "folded", "calibrated"] = "none"
    group_size: int = 0

    def num_experts(self, config: PreTrainedConfig) -> int:
        """E."""
        return int(getattr(config, self.num_experts_key))

    def moe_layers(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Indices (from 0) of the layers that have experts."""
        depth = int(config.num_hidden_layers)
        if self.layers == "all":
            return tuple(range(depth))
        if self.layers == "after_dense":
            return tuple(range(int(config.first_k_dense_replace), depth))
        step, plain = int(config.decoder_sparse_step), config.mlp_only_layers or ()
        return tuple(layer for layer in range(depth) if layer not in plain and (layer + 1) % step == 0)

    def ready_target(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy of the target's configuration with what an exact merge needs (normalised weights, no built-in loss).

        Raises:
            ModelError: fewer experts than are used for a token, or no layer with experts.
        """
        target = type(config).from_dict(config.to_dict())
        if hasattr(target, "norm_topk_prob"):
            target.norm_topk_prob = True
        target.output_router_logits = False
        experts, top = self.num_experts(target), int(target.num_experts_per_tok or 0)
        if not 1 <= top <= experts:
            raise ModelError(
                f"[target] num_experts_per_tok = {top}: not between 1 and {self.num_experts_key} = {experts}; change one of them"
            )
        if not self.moe_layers(target):
            raise ModelError("[target] no layer has experts; lower first_k_dense_replace or decoder_sparse_step")
        if self.group_size and getattr(target, "topk_method", "") != "greedy":
            self._check_groups(target, experts, top)
        return target

    def _check_groups(self, target: PreTrainedConfig, experts: int, top: int) -> None:
        groups, chosen = int(target.n_group or 1), int(target.topk_group or 1)
        size = experts // groups
        if experts % groups or size < self.group_size or chosen > groups or chosen * size < top:
            raise ModelError(
                f"[target] n_group = {groups}, topk_group = {chosen}: {experts} experts must come in equal groups of at "
                f"least {self.group_size}, and the chosen groups must hold num_experts_per_tok = {top} experts; "
                "set n_group = 1 and topk_group = 1, or change the numbers"
            )

    def student_config(self, target: PreTrainedConfig, *, slices: int = 1) -> PreTrainedConfig:
        """Configuration of the base model: the target with one routed expert of `slices` times an expert's width.

        Raises:
            ModelError: the family needs a dense student, and the target's dense layers have another width.
        """
        values = target.to_dict()
        width = int(getattr(target, self.width_key))
        if self.student == "single":
            values |= {self.num_experts_key: 1, "num_experts_per_tok": 1, self.width_key: slices * width}
            if "n_shared_experts" in values:  # their width is counted in experts
                values["n_shared_experts"] = self._shared_experts(target, slices)
            if self.scaling != "none":
                values["routed_scaling_factor"] = 1.0
            if self.group_size:
                values |= {"n_group": 1, "topk_group": 1}
            return type(target).from_dict(values)
        dense = width * (slices + int(target.n_shared_experts))
        if int(target.first_k_dense_replace) > 0 and int(target.intermediate_size) != dense:
            raise ModelError(
                f"[target] intermediate_size = {target.intermediate_size}: a {self.model_type} student is dense with one width "
                f"for all layers, here {dense}; set intermediate_size = {dense} or first_k_dense_replace = 0"
            )
        values |= {"first_k_dense_replace": int(target.num_hidden_layers), "intermediate_size": dense}
        return type(target).from_dict(values)

    def _shared_experts(self, target: PreTrainedConfig, slices: int) -> int:
        count = int(target.n_shared_experts)
        if count % slices:
            raise ModelError(
                f'[merge] fill = "split": a {self.model_type} student {slices} experts wide cannot hold '
                f'n_shared_experts = {count}; use fill = "replicate", or a multiple of {slices} shared experts'
            )
        return count // slices

    def split(
        self, student: Mapping[str, torch.Tensor], target: PreTrainedConfig, *, slices: int = 1
    ) -> tuple[State, State]:
        """A student's tensors as (what all domains share, what becomes the domain's expert), under the same names.

        The single expert's router is in neither: its softmax over one expert is 1 whatever its weight.
        """
        shared: State = {}
        expert: State = {}
        width, layers = slices * int(getattr(target, self.width_key)), self.moe_layers(target)
        for name, tensor in student.items():
            if self.student == "single":
                if not ROUTER.search(name):
                    (expert if EXPERT.search(name) else shared)[name] = tensor
            elif (kind := DENSE.search(name)) and _layer(name) in layers:
                axis = 1 if kind[1] == "down" else 0
                expert[name], shared[name] = tensor.tensor_split([width], dim=axis)
            else:
                shared[name] = tensor
        return shared, expert

    def join(self, shared: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor]) -> State:
        """The student's tensors: inverse of `split` (but for the router of one expert). Gradients flow to both parts."""
        student = dict(shared)
        for name, tensor in expert.items():
            if name in shared:
                axis = 1 if (kind := DENSE.search(name)) and kind[1] == "down" else 0
                student[name] = torch.cat([tensor, shared[name]], dim=axis)
            else:
                student[name] = tensor
        return student

    def expert_matrices(self, expert: Mapping[str, torch.Tensor], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer of an expert as the MoE holds it: gate and up (2I, H), down (H, I)."""
        prefix = f"model.layers.{layer}.mlp."
        if self.student == "single":
            return expert[prefix + "experts.gate_up_proj"][0], expert[prefix + "experts.down_proj"][0]
        gate, up = expert[prefix + "gate_proj.weight"], expert[prefix + "up_proj.weight"]
        return torch.cat([gate, up]), expert[prefix + "down_proj.weight"]

    def merged_state(
        self,
        shared: Mapping[str, torch.Tensor],
        experts: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
        router: Sequence[torch.Tensor],
        target: PreTrainedConfig,
    ) -> State:
        """The target's state dict.

        Args:
            shared: the shared tensors, under the student's names.
            experts: for each MoE layer, E pairs of matrices (`expert_matrices`).
            router: for each MoE layer, the router's weight (E, H).
        """
        layers = self.moe_layers(target)
        state: State = {}
        for name, tensor in shared.items():
            inner = DENSE.search(name) is not None and _layer(name) in layers and self.student == "dense"
            state[name.replace(".mlp.", ".mlp.shared_experts.") if inner else name] = tensor
        scale = self.sure_weight(target)
        for layer, pairs, weight in zip(layers, experts, router, strict=True):
            prefix = f"model.layers.{layer}.mlp."
            state[prefix + "experts.gate_up_proj"] = torch.stack([gate_up for gate_up, _ in pairs])
            state[prefix + "experts.down_proj"] = torch.stack([down for _, down in pairs]) / scale
            state[prefix + "gate.weight"] = weight
            if self.scores == "sigmoid":
                state[prefix + "gate.e_score_correction_bias"] = torch.zeros(len(pairs))
        return state

    def probabilities(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Router logits as one distribution over the experts for each token."""
        if self.scores == "softmax":
            return logits_TE.softmax(-1)
        score_TE = logits_TE.sigmoid()
        return score_TE / score_TE.sum(-1, keepdim=True)

    def sure_weight(self, config: PreTrainedConfig) -> float:
        """Router output that makes an expert's contribution that of its student; down-projections are divided by it."""
        return float(config.routed_scaling_factor) if self.scaling == "folded" else 1.0

    def shared_of(self, merged: Mapping[str, torch.Tensor]) -> State:
        """What the experts of a merged state dict share, under the student's names, as `split` gives it."""
        return {
            name.replace(".mlp.shared_experts.", ".mlp.") if self.student == "dense" else name: tensor
            for name, tensor in merged.items()
            if not (EXPERT.search(name) or ROUTER.search(name) or name.endswith(BALANCING))
        }

    def expert_of(self, merged: Mapping[str, torch.Tensor], index: int, target: PreTrainedConfig) -> State:
        """Expert `index` of a merged state dict under the student's names, as `split` gives it."""
        expert: State = {}
        for prefix in (f"model.layers.{layer}.mlp." for layer in self.moe_layers(target)):
            gate_up = merged[prefix + "experts.gate_up_proj"][index]
            down = merged[prefix + "experts.down_proj"][index] * self.sure_weight(target)
            if self.student == "single":
                expert |= {prefix + "experts.gate_up_proj": gate_up[None], prefix + "experts.down_proj": down[None]}
            else:
                gate, up = gate_up.chunk(2)
                expert |= {prefix + "gate_proj.weight": gate, prefix + "up_proj.weight": up}
                expert[prefix + "down_proj.weight"] = down
        return expert


def _layer(name: str) -> int:
    found = LAYER.search(name)
    return int(found[1]) if found else -1


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the routed experts' parameters."""
    return [name for name, _ in model.named_parameters() if EXPERT.search(name)]


def router_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the routers' weights."""
    return [name for name, _ in model.named_parameters() if ROUTER.search(name)]
