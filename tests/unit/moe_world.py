# SPDX-License-Identifier: Apache-2.0
"""Pico targets of every family, students of them on disk, and batches: the world of the merge's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config
from deepfusion.moe import Family, families
from deepfusion.stages.merge import MergeOptions, Students, merge, open_students
from deepfusion.stages.router import random_router
from deepfusion.types import Batch, State

V, H, I = 128, 32, 24  # noqa: E741 (the letters of the shapes)

COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": H, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "moe_intermediate_size": I, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 40, "intermediate_size": 56, "mlp_only_layers": [0]},
    "qwen3_moe": {"head_dim": 16, "mlp_only_layers": [0], "intermediate_size": 56},
    "mixtral": {"intermediate_size": I, "num_hidden_layers": 2},
    "olmoe": {"intermediate_size": I, "num_hidden_layers": 2},
    "deepseek_v2": {**LATENT, "intermediate_size": 56},
    "deepseek_v3": {**LATENT, "intermediate_size": 2 * I, "routed_scaling_factor": 2.5},
}


def make_target(name: str, experts: int = 4, top: int = 2, **changes: Any) -> PreTrainedConfig:
    family = families[name]
    values = {**COMMON, **OWN[name], family.num_experts_key: experts, "num_experts_per_tok": top, **changes}
    return family.ready_target(AutoConfig.for_model(name, **values))


def make_student(family: Family, target: PreTrainedConfig, seed: int, slices: int = 1) -> PreTrainedModel:
    """A base model whose weights are large enough that its experts matter."""
    model = from_config(family.student_config(target, slices=slices), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def write_students(
    folder: Path, family: Family, target: PreTrainedConfig, seeds: Sequence[int], slices: int = 1
) -> list[Path]:
    paths = [folder / f"student-{place}" for place in range(len(seeds))]
    for path, seed in zip(paths, seeds, strict=True):
        make_student(family, target, seed, slices).save_pretrained(path)
    return paths


def make_batch(seed: int = 0, rows: int = 3, length: int = 12, low: int = 0, high: int = V) -> Batch:
    """Random tokens of [low, high); the last row ends in padding."""
    token_BT = torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))
    valid_BT = torch.ones(rows, length, dtype=torch.bool)
    valid_BT[-1, length - 3 :] = False
    return Batch(token_BT * valid_BT, valid_BT, valid_BT)


def merged_from(
    paths: Sequence[Path], family: Family, target: PreTrainedConfig, *, seed: int = 5, router: list[torch.Tensor] | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Students, MergeOptions]:  # fmt: skip
    """The merge of the students in `paths`, with a random router unless one is given."""
    chosen = MergeOptions(**options)
    slices = chosen.slices(len(paths), family.num_experts(target))
    students = open_students(paths, family=family, target=target, slices=slices)
    start = router or random_router(target, family=family, seed=seed)
    return merge(students, start, family=family, target=target, options=chosen, seed=seed), students, chosen


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of the tokens that are not padding: (valid tokens, V)."""
    return forward(model, batch).logits_BTV[batch.valid_BT]


def equal(left: State, right: State) -> bool:
    """Whether two states are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
