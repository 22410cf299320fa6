# SPDX-License-Identifier: Apache-2.0
"""How much of a MoE a device may hold and train, which experts, what it keeps and may send back (HFedMoE, arXiv 2601.00583)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard
from deepfusion.devices.memory import training_memory
from deepfusion.errors import ModelError, UploadError
from deepfusion.federation.payload import check_state
from deepfusion.methods.base import Site
from deepfusion.methods.learning import FROZEN, Everything
from deepfusion.moe.hosting import expert_of, with_experts
from deepfusion.stages.proxy import MODEL
from deepfusion.training import derive_seed
from deepfusion.types import Payload, State

KEPT = "experts.safetensors"
"""What a device keeps of what it was sent last, in its scratch folder."""
TOLERANCE = 1e-3
"""By how much probabilities may miss their sum."""
TABLES = {"usage": torch.float32, "score": torch.float32, "count": torch.int32}
"""What a device tells of its experts, each (L, E): mean probability, mean importance, batches on which it was trained."""


class Means(NamedTuple):
    """What a device may use of the MoE: the experts that it holds in each layer, and how many it trains on a batch."""

    held: int
    budget: int


def held_of(share: float, experts: int, top: int) -> int:
    """Experts of a layer that a device of this budget holds."""
    return min(experts, max(top, int(share * experts)))


def fitting(site: Site, card: DeviceCard, target: PreTrainedConfig, experts: int, top: int) -> int:
    """Most experts of a layer whose training fits the device's memory."""
    if card.memory_limit_bytes is None:
        return experts
    for count in range(experts, top, -1):
        part = with_experts(target, count)
        need = training_memory(
            part, site.fleet.training, site.sequence_length, remade=Everything().num_remade(part)
        ).total
        if need <= card.memory_limit_bytes:
            return count
    return top


def choose_hosted(
    site: Site, card: DeviceCard, held: int, usage: Sequence[Sequence[float]] | None, layers: int, experts: int
) -> list[list[int]]:
    """The experts that a device holds in each layer: the most used ones of its last round, at first drawn ones."""
    if held == experts:
        return [list(range(experts))] * layers
    if usage is not None:
        return [sorted(np.argsort(-np.asarray(row), kind="stable")[:held].tolist()) for row in usage]
    drawn = np.random.default_rng(derive_seed(site.seed, "hosted", card.id))
    return [sorted(drawn.permutation(experts)[:held].tolist()) for _ in range(layers)]


def check_returned(
    shapes: Mapping[str, torch.Tensor], threshold: float | None, device_id: str, payload: Payload, request: Payload
) -> None:
    """Check an answer: the tables, all that is shared, and of the experts that the device was sent some, whole.

    Args:
        shapes: the MoE's tensors as `apart` names them; only shapes and dtypes are looked at.
        threshold: usage from which an expert may be sent; None where all are.

    Raises:
        UploadError: names the device, what is wrong, and the cure.
    """
    hosted = json.loads(str(request.metadata["hosted"]))
    arrays, experts = dict(payload.arrays), 1 + max(at[1] for name in shapes if (at := expert_of(name)))
    tables = {name: arrays.pop(name, torch.empty(0)) for name in TABLES}
    for name, dtype in TABLES.items():
        table_LE = tables[name]
        most = 1.0 + TOLERANCE if dtype.is_floating_point else torch.iinfo(dtype).max
        good = table_LE.shape == (len(hosted), experts) and table_LE.dtype == dtype
        if not good or bool((table_LE < 0).any()) or bool((table_LE > most).any()):
            what = f"a table [{len(hosted)}, {experts}] of {dtype}, from 0 to {most:g}"
            raise UploadError(f"device {device_id}: its {name} of the experts is not {what}; count as HFedMoE says")
    sum_L = tables["usage"].double().sum(1)
    if not bool(((sum_L - 1).abs() <= TOLERANCE).all()) and bool(tables["usage"].any()):
        raise UploadError(
            f"device {device_id}: its usage of a layer's experts does not sum to 1; send mean probabilities"
        )
    routed = payload.metadata.get("routed")
    if type(routed) is not int or not 0 <= routed <= len(hosted) * experts:
        raise UploadError(
            f"device {device_id}: it says routed = {routed!r:.40}; count the experts that any token was sent to"
        )
    layers = sorted({at[0] for name in shapes if (at := expert_of(name))})
    held = {(layer, expert) for layer, row in zip(layers, hosted, strict=True) for expert in row}
    came = {at for name in arrays if (at := expert_of(name))}
    due = {MODEL + n: t for n, t in shapes.items() if (at := expert_of(n)) is None or (at in held and at in came)}
    check_state(arrays, due, device_id)
    worth_LE = (tables["count"] > 0) & (tables["usage"] >= (threshold or 0.0))
    idle = [at for at in sorted(came) if not worth_LE[layers.index(at[0]), at[1]]]
    if idle and threshold is not None:
        layer, expert = idle[0]
        said = (
            f"device {device_id}: it sent expert {expert} of layer {layer}, which it says that it did not use and train"
        )
        raise UploadError(f"{said}; send the experts that were used and trained")


def with_kept(device: Device, sent: State, number: int, since: int) -> State:
    """On the device: what it was sent in round `number` and, of what has not changed, its own copy, kept for the next round.

    Args:
        since: the round whose copy the server counts on; -1 where it has sent everything.

    Raises:
        ModelError: the device has not that copy.
    """
    path = device.scratch / KEPT if device.scratch else None
    if since >= 0:
        found = -1
        if path is not None and path.exists():
            with safe_open(path, framework="pt") as file:
                found = int(file.metadata()["round"])
        if path is None or not since <= found <= number:  # newer than counted on, when an answer got lost
            raise ModelError(
                f"{device.id} has not kept the experts of round {since}; begin a new run folder, so that they are sent again"
            )
        sent = {**load_file(path), **sent}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: t.contiguous() for name, t in sent.items() if expert_of(name) or name.startswith(FROZEN)}
        partial_path = path.with_suffix(".partial")
        save_file(kept, partial_path, metadata={"round": str(number)})
        partial_path.replace(path)
    return sent
