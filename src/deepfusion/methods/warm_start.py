# SPDX-License-Identifier: Apache-2.0
"""What devices' models start as: made from a seed, a folder or the hub, warm-started on public text, and sent down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.artifacts import key_of, write_atomic
from deepfusion.data.packing import PackedText
from deepfusion.devices import configurations, models
from deepfusion.devices.device import Device
from deepfusion.devices.memory import skeleton_state
from deepfusion.federation.formats import Plain, as_read, restore, shrink, wire_bytes
from deepfusion.methods.base import Site, Training
from deepfusion.methods.exchange import PUBLISHED, check_fits, with_prefix
from deepfusion.stages.local import train_causal_lm
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state, load_distinct
from deepfusion.training import Optimisation, derive_seed
from deepfusion.types import ModelSpec, Payload, State


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """[warm_start]: each architecture is first trained on public text, once, and then sent to its devices.

    Attributes:
        steps: optimiser steps; 0 sends nothing down: a device builds its first weights from the run's seed.
        format: how the checkpoints cross the wire, see [upload]; server and devices both go on from what is read there.
        training: [warm_start.training] how the checkpoints are optimised.
    """

    steps: int = 0
    format: Plain = "fp32"
    training: Optimisation = field(default_factory=Optimisation)

    @property
    def sent(self) -> Plain | None:
        """How first weights are sent; None where they are not."""
        return self.format if self.steps else None

    def bytes_down(self, own: PreTrainedConfig) -> int:
        """Of a device's first weights, at most; without the message around them."""
        return wire_bytes(skeleton_state(own), self.sent) if self.sent else 0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.steps < 0:
            yield f"steps = {self.steps}: cannot be negative; 0 starts devices from random weights"


def initial_models(site: Site, warm_start: WarmStart) -> dict[str, Path]:
    """Folder of each architecture's first weights: from the seed, a folder or the hub, then warm-started.

    Warm-started checkpoints are kept in `site.cache`, where other runs on the same public text find them.
    """
    folders: dict[str, Path] = {}
    for spec in {card.model.name: card.model for card in site.cards}.values():
        seed = derive_seed(site.seed, "initial", spec.name)
        versions = (version("deepfusion-moe"), version("torch"))
        parts = (spec, seed, warm_start, site.data_key, site.sequence_length, *versions)
        name = f"initial/{spec.name}-{key_of(*parts)[:12]}"

        def make(folder: Path, spec: ModelSpec = spec, seed: int = seed, name: str = name) -> None:
            model = models.build(
                spec,
                vocab_size=site.data.vocab_size,
                positions=site.sequence_length,
                seed=seed,
                eos_id=site.data.eos_id,
                tokenizer_folder=site.data.tokenizer,
            )
            if warm_start.steps:
                train_causal_lm(
                    model,
                    PackedText(site.data.public, site.sequence_length, seed),
                    steps=warm_start.steps,
                    optimisation=warm_start.training,
                    seed=seed,
                    label=f"warm start {spec.name}",
                    scratch=site.cache.scratch(name),
                    progress=site.progress,
                )
                load_distinct(model, as_read(distinct_state(model), warm_start.format))
            models.save(model, folder, site.data.tokenizer)

        keeper = site.cache if warm_start.steps else site.folder
        folders[spec.name] = keeper.keep(name, make, *parts)
    write_atomic(site.folder / "initial.json", json.dumps({name: str(path) for name, path in folders.items()}))
    site.reached("initial")
    return folders


def ask_everyone(site: Site, initials: Mapping[str, Path], published: State, sent: Plain | None) -> dict[str, Payload]:
    """One request a device: how to start its model, and what the server publishes for the embeddings.

    Args:
        sent: format of the first weights; None where each device makes them from the seed.
    """
    weights = (
        {name: shrink(distinct_state(models.load(folder)), sent, {}) for name, folder in initials.items()}
        if sent
        else {}
    )
    requests: dict[str, Payload] = {}
    for card in site.cards:
        arrays = {PUBLISHED + name: tensor for name, tensor in published.items()}
        arrays |= {MODEL + name: tensor for name, tensor in weights.get(card.model.name, {}).items()}
        metadata: dict[str, str | int | float | bool] = {
            "vocab_size": site.data.vocab_size,
            "eos_id": site.data.eos_id,
            "seed": derive_seed(site.seed, "initial", card.model.name),
            "run_seed": site.seed,
        }
        requests[card.id] = Payload("init" if sent else "statistics", arrays, metadata)
    return requests


def first_model(device: Device, request: Payload, form: Plain) -> PreTrainedModel:
    """On the device: its own model before any training, with the weights of the request or else from the request's seed.

    Args:
        form: how the request's weights are written.
    """
    vocabulary, length = int(request.metadata["vocab_size"]), device.sequence_length
    check_fits(device, Training(configurations.config_of(device.model, vocab_size=vocabulary, positions=length)))
    model = models.build(
        device.model,
        vocab_size=vocabulary,
        positions=length,
        seed=int(request.metadata["seed"]),
        eos_id=int(request.metadata["eos_id"]),
        tokenizer_folder=device.tokenizer,
    )
    if sent := with_prefix(request, MODEL):
        load_distinct(model, restore(sent, distinct_state(model), form, {}, "server"))
    return model
