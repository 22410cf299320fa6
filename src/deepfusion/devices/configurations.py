# SPDX-License-Identifier: Apache-2.0
"""Configurations of causal language models: of a preset, a folder or the hub, with the user's own keys, checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepfusion.devices.presets import PRESETS, Preset
from deepfusion.errors import ModelError
from deepfusion.registry import did_you_mean
from deepfusion.types import ModelSpec

POSITION_KEYS = ("max_position_embeddings", "n_positions")
SPECIAL_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
UNDECLARED = {kind: {"head_dim"} for kind in ("qwen2", "qwen2_moe", "qwen3_moe")}
"""Keys that a model type's attention reads, though its configuration does not declare them; other models ignore such keys."""


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
    known = known_keys(config_class)
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
        raise ModelError(f"{model_type}: its configuration is refused: {reason(error)}; mend the value") from error
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
    preset = preset_of(spec)
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
            config = with_overrides(read_config(spec.folder or spec.hub or ""), spec.config)
            if vocab_size is not None:
                config.vocab_size = vocab_size
        check_reach(config, positions)
    except ModelError as error:
        raise ModelError(f'[devices.models] "{spec.name}": {error}') from error
    return config


def read_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a folder or hub name; raises ModelError where there is none."""
    _check_folder(source)
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{source}: no model there: {reason(error)}; check the folder or hub name") from error


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
            f"a model's configuration was sent that cannot be read: {reason(error)}; use one version"
        ) from error


def reach_of(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model of this configuration reads; None where it names no limit."""
    return min((int(getattr(config, key)) for key in POSITION_KEYS if getattr(config, key, None)), default=None)


def check_reach(config: PreTrainedConfig, positions: int) -> None:
    """Raise ModelError unless a model of this configuration reads sequences of `positions` tokens."""
    reach = reach_of(config)
    if reach is not None and reach < positions:
        said = f"reaches {reach} positions, fewer than [data] sequence_length = {positions}"
        raise ModelError(f"{said}; lower that to {reach}")


def with_overrides(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration with some of its keys changed; raises ModelError for a key or value that it does not take."""
    if not overrides:
        return config
    config_class = cast(Any, type(config))
    _check_keys(overrides, known_keys(config_class) | set(config.to_dict()), str(config.model_type))
    try:
        return cast(PreTrainedConfig, config_class.from_dict({**config.to_dict(), **overrides}))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"its configuration is refused: {reason(error)}; mend the value") from error


def preset_of(spec: ModelSpec) -> Preset | None:
    """The preset that an architecture names, or that describes its hub model; raises ModelError for an unknown name."""
    if spec.preset is not None:
        if spec.preset not in PRESETS:
            hint = did_you_mean(spec.preset, tuple(PRESETS))
            raise ModelError(f'"{spec.name}": preset = "{spec.preset}": unknown{hint}; see `deepfusion list`')
        return PRESETS[spec.preset]
    return next((p for p in PRESETS.values() if spec.hub is not None and p.hub == spec.hub), None)


def known_keys(config_class: Any) -> set[str]:
    """Keys that a model of this configuration class takes."""
    undeclared = UNDECLARED.get(config_class.model_type, ())
    return {*config_class().to_dict(), *config_class.attribute_map, *undeclared, "rope_theta"}


def _check_keys(keys: Mapping[str, Any], known: set[str], model_type: str) -> None:
    for key, value in keys.items():
        if key not in known:
            hint = did_you_mean(key, tuple(known))
            raise ModelError(f'config key "{key}": {model_type} has no such key{hint}; remove or rename it')
        if key in UNDECLARED.get(model_type, ()) and not (isinstance(value, int) and value > 0 and value % 2 == 0):
            raise ModelError(
                f"{key} = {value}: must be an even number above 0, for positions turn pairs; mend the value"
            )


def _check_heads(config: PreTrainedConfig) -> None:
    """Transformers reports heads that do not divide the width deep inside a layer, or not at all."""
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    if getattr(config, "head_dim", None) is None and width % heads:
        raise ModelError(
            f"{config.model_type}: {heads} attention heads do not divide the width {width}; change one of them"
        )


def _check_folder(source: str | Path) -> None:
    """Raise ModelError where `source` is a folder without a model, or reads like the path of one that is not there."""
    folder, moe = Path(source), Path(source) / "moe"
    if folder.exists() and not (folder / "config.json").exists():
        cure = f"did you mean {moe}?" if (moe / "config.json").exists() else "give a folder that save_pretrained made"
        raise ModelError(f"{source}: no config.json in it; {cure}")
    # Hub names are "name" or "owner/name"; "./name" is none, and whatever lies in a folder that is here is meant to be here.
    local = len(folder.parts) > 1 and (len(folder.parts) > 2 or folder.is_absolute() or folder.parent.is_dir())
    if (local or str(source).startswith(".")) and not folder.exists():
        raise ModelError(f"{source}: no such folder; check the path")


def reason(error: Exception) -> str:
    """First line of what a library said."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
