# SPDX-License-Identifier: Apache-2.0
"""Causal language models: built from a preset, a folder or the hub; opened and saved as Hugging Face folders."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from deepfusion.devices.presets import PRESETS, Preset
from deepfusion.devices.vocabulary import transfer_vocabulary
from deepfusion.errors import ModelError
from deepfusion.registry import did_you_mean
from deepfusion.types import ModelSpec

POSITION_KEYS = ("max_position_embeddings", "n_positions")
SPECIAL_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")

logging.disable_progress_bar()  # transformers' own, one a file, would drown ours


def make_config(
    values: Mapping[str, Any], *, vocab_size: int | None, positions: int, eos_id: int | None = None
) -> PreTrainedConfig:
    """A Hugging Face configuration out of its keys (`model_type` among them).

    The padding token stays unset, because transformers neither starts nor trains the embedding of a padding token, and
    ours is the end-of-text token; `save` names it where generation looks for it.

    Args:
        vocab_size: takes the place of the configuration's own when given.
        positions: least number of positions that the model must reach.
        eos_id: the token that ends and begins a text.

    Raises:
        ModelError: unknown model type or key, or values that the configuration refuses.
    """
    keys = dict(values)
    model_type = str(keys.pop("model_type", None))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = did_you_mean(model_type, tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        raise ModelError(f'model_type = "{model_type}": not a causal LM of transformers{hint}; choose one that is')
    config_class = cast(Any, CONFIG_MAPPING[model_type])
    known = _known_keys(config_class)
    _check_keys(keys, known, model_type)
    for key in POSITION_KEYS:
        if key in known and key not in config_class.attribute_map:
            keys[key] = max(int(keys.get(key, 0)), positions)
    if vocab_size is not None:
        keys |= {"vocab_size": vocab_size, **dict.fromkeys(SPECIAL_KEYS)}
    if eos_id is not None:
        keys |= {"eos_token_id": eos_id, "bos_token_id": eos_id, "pad_token_id": None}
    try:
        config = cast(PreTrainedConfig, config_class(**keys))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{model_type}: its configuration is refused: {_reason(error)}; mend the value") from error
    _check_heads(config)
    return config


def config_of(
    spec: ModelSpec, *, vocab_size: int | None = None, positions: int = 1, eos_id: int | None = None
) -> PreTrainedConfig:
    """The configuration of the model that `build` makes. Needs no network where a preset describes the hub model.

    Args:
        vocab_size: the run's; None keeps the configuration's own.
        positions: the run's tokens of a sequence.

    Raises:
        ModelError: names the architecture and says what is wrong.
    """
    preset = _preset_of(spec)
    try:
        if preset is not None:
            least = positions if preset.hub is None else 1  # a trained model's reach is what it is
            values = {**preset.config, **spec.config}
            config = make_config(values, vocab_size=vocab_size, positions=least, eos_id=eos_id)
        else:
            if spec.folder is not None and not Path(spec.folder).is_dir():  # or it would be asked for on the hub
                raise ModelError(
                    f'folder = "{spec.folder}": there is no such folder; mend the path, or use hub = "..."'
                )
            config = _with_overrides(read_config(spec.folder or spec.hub or ""), spec.config)
            if vocab_size is not None:
                config.vocab_size = vocab_size
        check_reach(config, positions)
    except ModelError as error:
        raise ModelError(f'[devices.models] "{spec.name}": {error}') from error
    return config


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
    preset = _preset_of(spec)
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
    own, level = _with_overrides(read_config(source), config or {}), logging.get_verbosity()
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
        cure = "give a causal LM with safetensors weights, by folder or hub name"
        raise ModelError(f"{source}: cannot be opened as a causal LM: {_reason(error)}; {cure}") from error
    finally:
        logging.set_verbosity(level)
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    missing = sorted(info["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(f"{source}: {len(missing)} weights are missing ({names}); save the whole model again")
    return model.eval()


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


def _preset_of(spec: ModelSpec) -> Preset | None:
    if spec.preset is not None:
        if spec.preset not in PRESETS:
            hint = did_you_mean(spec.preset, tuple(PRESETS))
            raise ModelError(f'"{spec.name}": preset = "{spec.preset}": unknown{hint}; see `deepfusion list`')
        return PRESETS[spec.preset]
    return next((p for p in PRESETS.values() if spec.hub is not None and p.hub == spec.hub), None)


def _known_keys(config_class: Any) -> set[str]:
    return {*config_class().to_dict(), *config_class.attribute_map, "rope_theta"}


def _check_keys(keys: Mapping[str, Any], known: set[str], model_type: str) -> None:
    for key in keys:
        if key not in known:
            hint = did_you_mean(key, tuple(known))
            raise ModelError(f'config key "{key}": {model_type} has no such key{hint}; remove or rename it')


def _check_heads(config: PreTrainedConfig) -> None:
    """Transformers reports heads that do not divide the width deep inside a layer, or not at all."""
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    if getattr(config, "head_dim", None) is None and width % heads:
        raise ModelError(
            f"{config.model_type}: {heads} attention heads do not divide the width {width}; change one of them"
        )


def reach_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model of this configuration reads; None where it names no limit."""
    return min((int(getattr(config, key)) for key in POSITION_KEYS if getattr(config, key, None)), default=None)


def check_reach(config: PreTrainedConfig, positions: int) -> None:
    """Raise ModelError unless a model of this configuration reads sequences of `positions` tokens."""
    reach = reach_of(config)
    if reach is not None and reach < positions:
        said = f"reaches {reach} positions, fewer than [data] sequence_length = {positions}"
        raise ModelError(f"{said}; lower that to {reach}")


def _with_overrides(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    if not overrides:
        return config
    config_class = cast(Any, type(config))
    _check_keys(overrides, _known_keys(config_class) | set(config.to_dict()), str(config.model_type))
    try:
        return cast(PreTrainedConfig, config_class.from_dict({**config.to_dict(), **overrides}))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"its configuration is refused: {_reason(error)}; mend the value") from error


def config_from_json(text: str) -> PreTrainedConfig:
    """The configuration that `to_json_string` wrote. Raises ModelError when it describes no causal LM."""
    try:
        values = json.loads(text)
        model_type = values["model_type"]
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f'model_type = "{model_type}" is not a causal LM of transformers')
        return cast(PreTrainedConfig, cast(Any, CONFIG_MAPPING[model_type]).from_dict(values))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"a model's configuration was sent that cannot be read: {_reason(error)}; use one version"
        ) from error


def _check_folder(source: str | Path) -> None:
    """Raise ModelError where `source` is a folder without a model, or reads like the path of one that is not there."""
    folder, moe = Path(source), Path(source) / "moe"
    if folder.exists() and not (folder / "config.json").exists():
        cure = f"did you mean {moe}?" if (moe / "config.json").exists() else "give a folder that save_pretrained made"
        raise ModelError(f"{source}: no config.json in it; {cure}")
    # Hub names are "name" or "owner/name"; whatever lies in a folder that is here is meant to be here.
    local = len(folder.parts) > 1 and (len(folder.parts) > 2 or folder.is_absolute() or folder.parent.is_dir())
    if local and not folder.exists():
        raise ModelError(f"{source}: no such folder; check the path")


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a folder or hub name; raises ModelError where there is none."""
    _check_folder(source)
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{source}: no model there: {_reason(error)}; check the folder or hub name") from error


def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source}: no tokenizer there: {_reason(error)}; save it beside the model") from error


def _reason(error: Exception) -> str:
    """First line of what a library said."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
