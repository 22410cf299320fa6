# SPDX-License-Identifier: Apache-2.0
"""One layer of a model on disk, with a few experts and a few tokens' embeddings: a small model that transformers opens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deepfusion.errors import ModelError, few
from deepfusion.moe.base import BALANCING, LAYER, Family
from deepfusion.moe.stream import ROUTER_IN_FILE
from deepfusion.moe.tensor_files import DTYPES, Reader, Stored, memory, stored_tensors

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


def open_excerpt(
    folder: Path, config: PreTrainedConfig, *, layer: int, ids: Sequence[int], experts: Sequence[int] = (0,)
) -> PreTrainedModel:
    """What `config`, of `one_layer`, needs of a folder's tensors, opened by transformers in float32; nothing else is read.

    Raises:
        ModelError: the folder has not all of it, or something besides.
    """
    state: dict[str, torch.Tensor] = {}
    with Reader() as reader:
        for name, stored in stored_tensors(folder).items():
            found, expert = LAYER.search(name), _NUMBER.search(name)
            if (found and int(found[1]) != layer) or (expert and int(expert[0]) not in experts):
                continue
            rows = ids if name.endswith(BY_TOKEN) else None
            if ROUTER_IN_FILE.search(name) or name.endswith(BALANCING):
                rows = experts
            if expert:
                name = _NUMBER.sub(str(list(experts).index(int(expert[0]))), name)
            state[LAYER.sub(".layers.0.", name)] = _read(reader, stored, rows)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    opened = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True)
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], opened)
    if odd := sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]}):
        raise ModelError(
            f"{folder}: layer {layer} does not open with transformers: {few(odd)} missing, unknown or misshapen"
        )
    return model.eval()


def _read(reader: Reader, stored: Stored, rows: Sequence[int] | None) -> torch.Tensor:
    """A tensor on disk, or some of its rows."""
    shape, dtype = stored.spec.shape, DTYPES[stored.spec.dtype]
    if rows is None:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            reader.into(memory(tensor), stored.file, stored.begin)
        return tensor
    tensor, size = torch.empty((len(rows), *shape[1:]), dtype=dtype), stored.spec.nbytes // shape[0]
    for place, row in enumerate(rows):
        reader.into(memory(tensor[place]), stored.file, stored.begin + row * size)
    return tensor
