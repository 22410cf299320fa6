# SPDX-License-Identifier: Apache-2.0
"""Whether folders may be merged as they say themselves: one base model's students, and a MoE that is made of such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from deepfusion.devices.configurations import read_config
from deepfusion.devices.models import from_config
from deepfusion.errors import ModelError
from deepfusion.moe.base import Family
from deepfusion.moe.tensor_files import Spec

WITHOUT_EFFECT = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "initializer_range", "norm_topk_prob", "n_group", "topk_group", "topk_method", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "pretraining_tp", "num_mtp_layers", "num_nextn_predict_layers",
}  # fmt: skip
"""Keys that change nothing in what a trained student of one expert computes; nor do dropout and special tokens."""
CONSEQUENCES = {"layer_types", "first_k_dense_replace"}
"""Keys that mostly differ where another one does; that one is named."""


def student_of(folder: Path, family: Family) -> PreTrainedConfig:
    """A student's own configuration.

    Raises:
        ModelError: it is of another family, or no student: it has layers of several experts.
    """
    own = read_config(folder)
    if own.model_type != family.model_type:
        raise ModelError(
            f"{folder}: is a {own.model_type}, not a {family.model_type}; give the --family of the students"
        )
    cure = "merge folders of one expert each, as `deepfusion run` leaves in experts/"
    if family.student == "dense" and family.moe_layers(own):
        raise ModelError(f"{folder}: is a MoE of {family.num_experts(own)} experts, not a dense student; {cure}")
    if family.student == "single" and family.num_experts(own) != 1:
        raise ModelError(f"{folder}: {family.num_experts_key} = {family.num_experts(own)}, a student has one; {cure}")
    return own


def check_students(folders: Sequence[Path], *, family: Family, target: PreTrainedConfig, given: Path | None) -> None:
    """Raise ModelError where a student says of itself anything else than the target says of its students.

    Args:
        given: where the target was read; None where it was made after the first student.
    """
    wanted = family.student_config(target).to_dict()
    keys = _with_effect(family, target)
    for folder in folders:
        own = student_of(folder, family).to_dict()
        for key in sorted(keys, key=lambda key: (key in CONSEQUENCES, key)):
            mine, other = own.get(key), wanted.get(key)
            if mine == other:
                continue
            if given is None:
                asks, cure = f"a MoE made after {folders[0]}", "merge students of one base model only"
            else:
                asks, cure = str(given), f"mend {key} there, or give students of that target's base model"
            raise ModelError(f"{folder}: {key} = {mine!r}, but {asks} wants {other!r} of its students; {cure}")


def _with_effect(family: Family, target: PreTrainedConfig) -> set[str]:
    """Keys that decide on what a student computes."""
    known: dict[str, Any] = type(target)().to_dict()
    left_out = WITHOUT_EFFECT
    if family.student == "dense":  # has no such layers: the target says how its MLPs are cut
        cut = {family.num_experts_key, family.width_key, "num_experts_per_tok", "n_shared_experts"}
        left_out = left_out | cut | {"routed_scaling_factor"}
    return {key for key in known if key not in left_out and not key.endswith(("_token_id", "dropout"))}


def check_tensors(specs: Iterable[Spec], target: PreTrainedConfig, source: Path) -> None:
    """Raise ModelError unless these are the tensors, by name and shape, that transformers saves of the whole target.

    Args:
        source: a folder of the students, for the message.
    """
    with torch.device("meta"):
        model = from_config(target, 0)
    state = revert_weight_conversion(model, model.state_dict())
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {spec.name: spec.shape for spec in specs}
    spare = set(model.all_tied_weights_keys)  # saved under another name, and here perhaps under both
    for name in sorted({*wanted, *found} - (spare - found.keys())):
        have, want = found.get(name, "missing"), wanted.get(name, "absent")
        if have != want and not (name in spare and want == "absent"):
            raise ModelError(
                f"{source}: such students make a MoE whose {name} is {have}, but a {target.model_type} of this "
                f"configuration has it {want}; save them again with the installed transformers, or mend the target"
            )
