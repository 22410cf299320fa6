# SPDX-License-Identifier: Apache-2.0
"""Causal language models: built from a preset, a folder or the hub; opened and saved as Hugging Face folders."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from deepfusion.devices.configurations import config_of, preset_of, read_config, reason, with_overrides
from deepfusion.devices.vocabulary import transfer_vocabulary
from deepfusion.errors import ModelError, few
from deepfusion.types import ModelSpec

logging.disable_progress_bar()  # transformers' own, one a file, would drown ours


def from_config(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A randomly initialised model, the same for the same seed; no other random stream is disturbed.

    It has a configuration of its own: changing the model's leaves the caller's as it was.
    """
    config = copy.deepcopy(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def build(
    spec: ModelSpec, *, vocab_size: int, positions: int, seed: int, eos_id: int, tokenizer_folder: Path
) -> PreTrainedModel:
    """A device's model before training, in float32, in eval mode.

    A preset of ours starts from random weights drawn from `seed`; a folder or hub model keeps its own. Where such a model
    has another vocabulary than the run, its embeddings are carried over token by token (`transfer_vocabulary`).

    Raises:
        ModelError: names the architecture and says what is wrong.
    """
    config = config_of(spec, vocab_size=vocab_size, positions=positions, eos_id=eos_id)
    preset = preset_of(spec)
    source = spec.folder or spec.hub or (preset.hub if preset else None)
    if source is None:
        return from_config(config, seed)
    # A published model's own configuration may hold more than our preset of it; only dropout is not wanted.
    without_dropout = {key: value for key, value in preset.config.items() if "drop" in key} if preset else {}
    try:
        return pretrained(
            source,
            {**without_dropout, **spec.config},
            vocab_size=vocab_size,
            eos_id=eos_id,
            tokenizer_folder=tokenizer_folder,
        )
    except ModelError as error:
        raise ModelError(f'[devices.models] "{spec.name}": {error}') from error


def pretrained(
    source: str | Path, config: Mapping[str, Any], *, vocab_size: int, eos_id: int, tokenizer_folder: Path
) -> PreTrainedModel:
    """A folder's or hub model with its own weights, and with the run's vocabulary (`transfer_vocabulary`).

    Args:
        config: configuration keys that override the model's own.

    Raises:
        ModelError: it cannot be opened, or holds no tokenizer.
    """
    model = load(source, config)
    old, new = _tokenizer(source), _tokenizer(tokenizer_folder)
    if int(model.config.vocab_size) != vocab_size or old.get_vocab() != new.get_vocab():
        transfer_vocabulary(model, old, new, vocab_size)
    model.config.eos_token_id = model.config.bos_token_id = eos_id
    model.config.pad_token_id = None
    return model


def load(source: str | Path, config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Open a causal LM in float32 from a folder or by hub name: safetensors only, and never code out of the model.

    Args:
        config: configuration keys that override the model's own.

    Raises:
        ModelError: there is no such model, weights are missing, or it cannot be opened safely.
    """
    own, level = with_overrides(read_config(source), config or {}), logging.get_verbosity()
    try:
        if config:  # of a smaller model than the folder's, what else is there is left out on purpose
            logging.set_verbosity_error()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=own,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        said = _broken_file(source) or reason(error)
        cure = "give a causal LM with whole safetensors weights, by folder or hub name"
        raise ModelError(f"{source}: cannot be opened as a causal LM: {said}; {cure}") from error
    finally:
        logging.set_verbosity(level)
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{source}: {len(missing)} weights are missing ({few(missing)}); save the whole model again")
    return model.eval()


def _broken_file(source: str | Path) -> str | None:
    """The first of a folder's files that is not what safetensors wrote, and why."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                continue
        except (OSError, SafetensorError) as error:
            return f"{path.name}, {path.stat().st_size:,} bytes: {reason(error)}"
    return None


def save(model: PreTrainedModel, folder: Path, tokenizer_folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer open with nothing of ours installed."""
    generation = cast(Any, model.generation_config)
    generation.eos_token_id = generation.bos_token_id = generation.pad_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    _tokenizer(tokenizer_folder).save_pretrained(folder)


def init_id(model: PreTrainedModel) -> str:
    """Hash of names, shapes and values of all weights: models may be averaged only when they started from equal ones."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source}: no tokenizer there: {reason(error)}; save it beside the model") from error
