# SPDX-License-Identifier: Apache-2.0
"""The one-shot exchange that model-uploading methods share: a starting checkpoint down, one trained model up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deepfusion.artifacts import file_digest, key_of, write_atomic
from deepfusion.data.packing import PackedText
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.memory import num_parameters
from deepfusion.federation.payload import check_embedding, check_metadata, check_state, read_metadata
from deepfusion.federation.spool import Check, Spool, collect
from deepfusion.methods.base import Site
from deepfusion.stages import evaluate
from deepfusion.stages.embed import Embedding, HashedTfidf, ServerProbe
from deepfusion.stages.local import Penalty, steps_for, train_causal_lm
from deepfusion.stages.proxy import MODEL, load_upload
from deepfusion.state_dicts import distinct_state, load_distinct
from deepfusion.training import Optimisation, derive_seed
from deepfusion.types import Call, ModelSpec, Payload, State, Upload

PUBLISHED = "published/"
"""Prefix of what the server publishes for embeddings, in a request."""
EMBEDDING = "embedding"
"""Name of the embedding in an answer."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """[warm_start]: each architecture is first trained on public text, once, and then sent to its devices.

    Attributes:
        steps: optimiser steps; 0 sends nothing down: a device builds its first weights from the run's seed.
        training: [warm_start.training] how the checkpoints are optimised.
    """

    steps: int = 0
    training: Optimisation = field(default_factory=Optimisation)

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
            models.save(model, folder, site.data.tokenizer)

        keeper = site.cache if warm_start.steps else site.folder
        folders[spec.name] = keeper.keep(name, make, *parts)
    write_atomic(site.folder / "initial.json", json.dumps({name: str(path) for name, path in folders.items()}))
    site.reached("initial")
    return folders


def published_bytes(embed: Embedding) -> int:
    """About what the server publishes for the embeddings, to each device."""
    return 2 * 2 * 2**embed.hash_bits if isinstance(embed, HashedTfidf) else 0


def ask_everyone(
    site: Site, initials: Mapping[str, Path], published: State, *, send_weights: bool
) -> dict[str, Payload]:
    """One request a device: how to start its model, and what the server publishes for the embeddings."""
    weights = {name: distinct_state(models.load(folder)) for name, folder in initials.items()} if send_weights else {}
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
        requests[card.id] = Payload("init" if send_weights else "statistics", arrays, metadata)
    return requests


def answer_with_model(device: Device, request: Payload, embed: Embedding) -> Payload:
    """On the device: start its own model as the request says, train it on its text, and answer with both."""
    model = first_model(device, request)
    told = train_here(device, model)
    arrays = {MODEL + name: tensor.detach().cpu() for name, tensor in distinct_state(model).items()}
    arrays[EMBEDDING] = describe_text(device, request, embed)
    return Payload("model", arrays, {**told, "architecture": device.model.name})


def first_model(device: Device, request: Payload) -> PreTrainedModel:
    """On the device: its own model before any training, with the weights of the request or else from the request's seed."""
    model = models.build(
        device.model,
        vocab_size=int(request.metadata["vocab_size"]),
        positions=device.sequence_length,
        seed=int(request.metadata["seed"]),
        eos_id=int(request.metadata["eos_id"]),
        tokenizer_folder=device.tokenizer,
    )
    if sent := with_prefix(request, MODEL):
        load_distinct(model, sent)
    return model


def describe_text(device: Device, request: Payload, embed: Embedding) -> torch.Tensor:
    """On the device: the embedding of its text, as it crosses the wire."""
    published, run_seed = with_prefix(request, PUBLISHED), int(request.metadata["run_seed"])
    return torch.from_numpy(embed.embed(device.corpus, published, run_seed, noise_seed=device.seed)).half()


def train_here(
    device: Device, model: PreTrainedModel, *, penalty: Penalty | None = None, part: int = 0, parts: int = 1
) -> dict[str, str | int | float | bool]:
    """On the device: train a model in place on the device's text; what the answer says of it.

    Args:
        penalty: what is added to the loss of a MoE.
        part, parts: of the device's steps, which are the same in sum whatever the number of parts.
    """
    started_from = models.init_id(model)
    length, training = device.sequence_length, device.training
    steps = steps_for(device.corpus.num_tokens, length, training, device.epochs, device.max_steps)
    first, stop = steps * part // parts, steps * (part + 1) // parts
    history = train_causal_lm(
        model,
        PackedText(device.corpus, length, device.seed),
        steps=stop - first,
        optimisation=training,
        seed=device.seed if parts == 1 else derive_seed(device.seed, "part", part),
        label=device.id,
        first_step=first,
        penalty=penalty,
        scratch=device.scratch / started_from if device.scratch else None,
    )
    told: dict[str, str | int | float | bool] = {
        "device": device.id,
        "init_id": started_from,
        "documents": len(device.corpus),
        "tokens": device.corpus.num_tokens,
        "parameters": num_parameters(model.config),
        "steps": stop - first,
    }
    if history:
        told |= {"first_loss": round(history[0]["loss"], 4), "last_loss": round(history[-1]["loss"], 4)}
    return told


def collect_uploads(
    site: Site, call: Call, requests: Mapping[str, Payload], initials: Mapping[str, Path], embedding_size: int, key: str
) -> list[Upload]:
    """Ask the devices whose upload is not on the disk yet, check each arrival; the good ones in the fleet's order.

    Args:
        key: hash of what the uploads depend on; uploads of another key are thrown away.
    """
    starts = {name: models.load(folder) for name, folder in initials.items()}
    shapes = {name: {MODEL + key: t.to("meta") for key, t in distinct_state(m).items()} for name, m in starts.items()}
    start_ids = {name: models.init_id(model) for name, model in starts.items()}
    del starts
    architectures = {card.id: card.model.name for card in site.cards}

    def check(device_id: str, payload: Payload) -> None:
        name = architectures[device_id]
        check_metadata(payload, device_id, name, start_ids[name])
        check_state({k: t for k, t in payload.arrays.items() if k != EMBEDDING}, shapes[name], device_id)
        check_embedding(payload, embedding_size, device_id)

    files = spool_answers(site, call, requests, check, key)
    site.reached("uploads")
    return [read_upload(path) for path in files.values()]


def spool_answers(
    site: Site, call: Call, requests: Mapping[str, Payload], check: Check, key: str, place: str = "uploads"
) -> dict[str, Path]:
    """Ask the devices whose answer is not on the disk yet; the files of the good answers, in the order of `requests`.

    Args:
        check: see `collect`; what it refuses becomes a note of the run.
        key: hash of what the answers depend on; answers of another key are thrown away.
        place: folder of the answers within the run's.
    """
    spool = Spool(site.folder / place, key)
    have = collect(call, requests, spool, check)
    for device_id, reason in spool.rejected().items():
        site.note(f"upload of {device_id} was refused: {reason}")
    return {device_id: spool.path(device_id) for device_id in have}


def read_upload(path: Path) -> Upload:
    """What the server knows of an upload in the spool; its model stays on the disk."""
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        embedding_D = file.get_tensor(EMBEDDING).float().numpy()
    return Upload(
        device_id=str(metadata["device"]),
        architecture=str(metadata["architecture"]),
        init_id=str(metadata["init_id"]),
        path=path,
        embedding_D=embedding_D,
        num_tokens=int(metadata["tokens"]),
    )


def probe_uploads(
    site: Site, embed: ServerProbe, uploads: Sequence[Upload], initials: Mapping[str, Path], document_UD: np.ndarray
) -> list[Upload]:
    """The uploads with the embeddings that the server gives them, by scoring each on public documents.

    Args:
        document_UD: embeddings of the public documents.
    """
    rows_Q = embed.probes(site.data.public, site.seed)
    probes = site.data.public.select(rows_Q)
    bytes_Q = np.maximum(1, [len(probes.text(index).encode()) for index in range(len(probes))])

    def bits_Q(model: PreTrainedModel) -> np.ndarray:
        scores = evaluate.score_documents(model, probes, site.sequence_length)
        return np.asarray([score.nll for score in scores]) / bytes_Q / math.log(2)

    def make(folder: Path) -> None:
        first = {name: bits_Q(models.load(initials[name])) for name in {upload.architecture for upload in uploads}}
        gains: list[np.ndarray] = []
        for done, upload in enumerate(uploads, 1):
            gains.append(first[upload.architecture] - bits_Q(load_upload(upload.path, initials[upload.architecture])))
            site.progress("probe uploads", done, len(uploads), upload.device_id)
        save_file({"gain_NQ": torch.from_numpy(np.stack(gains))}, folder / "gains.safetensors")

    digests = {upload.device_id: file_digest(upload.path) for upload in uploads}
    folder = site.folder.keep("probes", make, site.seed, embed, digests, site.data_key, site.sequence_length)
    gain_NQ = load_file(folder / "gains.safetensors")["gain_NQ"].numpy()
    embedding_ND = embed.embeddings_of(gain_NQ, document_UD[rows_Q])
    return [replace(upload, embedding_D=row) for upload, row in zip(uploads, embedding_ND, strict=True)]


def with_prefix(payload: Payload, prefix: str) -> State:
    """The payload's tensors whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in payload.arrays.items() if name.startswith(prefix)}
