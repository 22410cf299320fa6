# SPDX-License-Identifier: Apache-2.0
"""What the devices of a run are, and what it has spent: for its record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepfusion.config import RunConfig
from deepfusion.devices import memory
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.payload import read_metadata
from deepfusion.methods.base import Site
from deepfusion.methods.budget import rows
from deepfusion.methods.gathering import ASKED
from deepfusion.methods.rounds import read_round, round_folders
from deepfusion.record import BudgetRecord, ClusterRecord, DeviceRecord
from deepfusion.run import largest_trainings, private_corpus, shapes_of, text_is_here, trainings
from deepfusion.stages.local import steps_for


def devices_of(config: RunConfig, site: Site, ledger: Ledger, clusters: ClusterRecord | None) -> list[DeviceRecord]:
    """Each device: its architecture, memory, bytes, time, and the size of its text."""
    largest, private = largest_trainings(config), config.devices.privacy is not None
    sent, telemetry = ledger.by_device("up"), ledger.telemetry()
    found: list[DeviceRecord] = []
    for card in site.cards:
        hosted = largest[card.model.name]
        seconds, peak = telemetry.get(card.id, (None, None))
        found.append(DeviceRecord(
            id=card.id,
            architecture=card.model.name,
            parameters=memory.num_parameters(hosted.model) if hosted else 0,
            estimated_memory_bytes=hosted.memory(config.devices.training, site.sequence_length, private=private) if hosted else 0,
            peak_memory_bytes=peak,
            upload_bytes=sent.get(card.id, 0),
            cluster=clusters.labels.get(card.id) if clusters else None,
            seconds=seconds,
            epsilon=_spent(site, card.id) if private else None,
            **_text_of(config, site, card.id),
        ))  # fmt: skip
    return found


def _spent(site: Site, device_id: str) -> float | None:
    """Epsilon of a device's training, as its upload tells."""
    path = site.folder / "uploads" / f"{device_id}.safetensors"
    told = read_metadata(path).get("epsilon") if path.exists() else None
    return float(told) if isinstance(told, float | int) else None


def _text_of(config: RunConfig, site: Site, device_id: str) -> dict[str, Any]:
    """Size of a device's text: counted where the text is here, else as the device's upload tells, or unknown (0)."""
    if text_is_here(config, device_id):
        corpus = private_corpus(config, site.data, device_id)
        tokens = np.bincount(corpus.domain_U, weights=corpus.lengths_U, minlength=len(corpus.domains))
        domains = {name: int(t) for name, t in zip(corpus.domains, tokens, strict=True) if t}
        return {"documents": len(corpus), "tokens": corpus.num_tokens, "domains": domains}
    path = site.folder / "uploads" / f"{device_id}.safetensors"
    told = read_metadata(path) if path.exists() else {}
    return {"documents": told.get("documents", 0), "tokens": told.get("tokens", 0), "domains": {}}


def budget_of(
    config: RunConfig, site: Site, devices: Sequence[DeviceRecord], clusters: ClusterRecord | None
) -> BudgetRecord:
    """Tokens and FLOPs of devices and server (baselines, section 9); who was not asked for its own model has not trained it."""
    fleet, length, found = config.devices, site.sequence_length, trainings(config)
    private = read = flops = 0
    asked = json.loads(path.read_text()) if (path := site.folder / ASKED).exists() else None
    rounds = [read_round(folder) for folder in round_folders(site.folder.path, config.method)]
    for device in devices:
        if fleet.privacy is None:
            steps = steps_for(device.tokens, length, fleet.training, fleet.epochs, fleet.max_steps)
            each_row = float(length)
        else:  # a document a row, on average
            steps = steps_for(device.documents, 1, fleet.training, fleet.epochs, fleet.max_steps)
            each_row = min(length, device.tokens / max(1, device.documents))
        whole = steps * rows(fleet.training) * each_row
        private += round(whole)
        own = 0 if asked is None or device.id in asked else 1  # who was not asked for a model has not trained its own
        for number, training in enumerate(found[device.architecture][own:], own):
            in_rounds = rounds and number == len(found[device.architecture]) - 1
            share = _share_answered(device.id, steps, rounds) if in_rounds else training.share
            mine = round(whole * share)
            each = 3 * memory.forward_flops_per_token(training.model)
            read, flops = read + mine, flops + (mine + training.public_rows * length) * each
    shapes = shapes_of(config)
    domains = clusters.num_clusters if clusters else shapes.domains
    work = config.method.server_work(shapes._replace(private=private, domains=domains))
    return BudgetRecord(
        device_tokens=read,
        server_tokens=sum(training.tokens for training in work),
        device_flops=flops,
        server_flops=sum(training.tokens * training.flops_per_token for training in work),
    )


def _share_answered(device_id: str, steps: int, rounds: Sequence[Mapping[str, Any]]) -> float:
    """Of the steps that a device would take in all rounds, those of the rounds that it has answered."""
    parts = [steps * (number + 1) // len(rounds) - steps * number // len(rounds) for number in range(len(rounds))]
    return sum(part for part, told in zip(parts, rounds, strict=True) if device_id in told["answered"]) / steps
