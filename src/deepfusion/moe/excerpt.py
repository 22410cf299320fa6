# SPDX-License-Identifier: Apache-2.0
"""One layer of a model on disk, with a few experts and a few tokens' embeddings: a small folder that transformers opens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from deepfusion.moe.base import LAYER, Family
from deepfusion.moe.stream import ROUTER_IN_FILE
from deepfusion.moe.tensor_files import stored_tensors

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")


def one_layer(
    config: PreTrainedConfig, *, family: Family, layer: int, tokens: int, experts: int | None
) -> PreTrainedConfig:
    """The configuration of layer `layer` alone.

    Args:
        tokens: the vocabulary that is left.
        experts: that are left; None leaves a student as it is.
    """
    values: dict[str, Any] = {**config.to_dict(), "num_hidden_layers": 1, "vocab_size": tokens}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][layer]]
    if family.layers == "sparse_step":
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if family.layers == "after_dense":
        values["first_k_dense_replace"] = int(experts is None and family.student == "dense")
    if experts is not None:
        values |= {family.num_experts_key: experts, "num_experts_per_tok": 1}
        if family.group_size:
            values |= {"n_group": 1, "topk_group": 1}
    return type(config).from_dict(values)


def write_excerpt(
    folder: Path, out: Path, config: PreTrainedConfig, *, layer: int, ids: Sequence[int], experts: Sequence[int] = (0,)
) -> Path:
    """Write to `out` what `config`, of `one_layer`, needs of a folder's tensors; nothing else is read. Returns `out`."""
    state: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, stored in stored_tensors(folder).items():
            found, expert = LAYER.search(name), _NUMBER.search(name)
            if (found and int(found[1]) != layer) or (expert and int(expert[0]) not in experts):
                continue
            if stored.file not in files:
                files[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
            rows = ids if name.endswith(BY_TOKEN) else None
            if ROUTER_IN_FILE.search(name) or name.endswith("e_score_correction_bias"):
                rows = experts
            if rows is None:
                tensor = files[stored.file].get_tensor(name)
            else:
                view = files[stored.file].get_slice(name)
                tensor = torch.cat([view[row : row + 1] for row in rows])
            if expert:
                name = _NUMBER.sub(str(list(experts).index(int(expert[0]))), name)
            state[LAYER.sub(".layers.0.", name)] = tensor.contiguous()
    out.mkdir(exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    return out
