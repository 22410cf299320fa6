# SPDX-License-Identifier: Apache-2.0
"""The one-shot exchange that model-uploading methods share: the text described, one training, answers that are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deepfusion.data.packing import PackedText
from deepfusion.data.tokenizer import open_tokenizer, vocabulary_of
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.documents import PrivateDocuments
from deepfusion.devices.memory import gib, num_parameters
from deepfusion.devices.privacy import PrivacyOptions, draws_for, epsilon_of
from deepfusion.devices.releases import Release, text_digest
from deepfusion.errors import MemoryLimitError, UploadError
from deepfusion.federation.spool import Check, Open, Spool, as_it_came, collect
from deepfusion.methods.base import Site, Training
from deepfusion.stages.embed import Embedding, HashedTfidf
from deepfusion.stages.local import Penalty, steps_for, train_causal_lm
from deepfusion.training import derive_seed
from deepfusion.types import Call, Payload, State

PUBLISHED = "published/"
"""Prefix of what the server publishes for embeddings, in a request."""
Told = dict[str, str | int | float | bool]
"""What an answer says of a training."""
EMBEDDING = "embedding"
"""Name of the embedding in an answer."""
CHECKPOINTS = "checkpoints"
"""In a device's scratch folder: of trainings that have not been answered with yet."""


def published_bytes(embed: Embedding) -> int:
    """About what the server publishes for the embeddings, to each device."""
    return 2 * 2 * 2**embed.hash_bits if isinstance(embed, HashedTfidf) else 0


def check_fits(device: Device, training: Training) -> None:
    """On the device: refuse, before a model is built, to train what needs more memory than the device gives.

    Raises:
        MemoryLimitError: names the device, both sizes and the cure.
    """
    if device.memory_limit_bytes is None:
        return
    need = training.memory(device.training, device.sequence_length, private=device.privacy is not None)
    kind = training.model.model_type
    if need > device.memory_limit_bytes:
        raise MemoryLimitError(
            f"{device.id} gives {gib(device.memory_limit_bytes)}, the training of a {kind} needs {gib(need)}; "
            "raise its memory_gib, or ask for smaller batches or a smaller model"
        )


def check_vocabulary(device: Device, model: PreTrainedModel) -> None:
    """On the device: refuse, before it reads any private text, a model that does not know each token of the run's tokenizer.

    It would fail where such a token stands in the text, and to the server, who chose both, the failure would say so.

    Raises:
        UploadError: names both sizes.
    """
    rows, end = int(model.config.vocab_size), model.config.eos_token_id
    needed = max(vocabulary_of(open_tokenizer(device.tokenizer)), 1 + end if isinstance(end, int) else 0)
    if needed > rows:
        raise UploadError(
            f"server: its model knows tokens 0 to {rows - 1}, its tokenizer and end of text go up to {needed - 1}; "
            "send both of one run"
        )


def describe_text(device: Device, request: Payload, embed: Embedding) -> torch.Tensor:
    """On the device: the embedding of its text, as it crosses the wire.

    Raises:
        PrivacyError: the device's owner gives no such embedding away.
    """
    if embed.dimension == 0:
        return torch.zeros(0, dtype=torch.float16)
    epsilon = math.inf if embed.epsilon is None else embed.epsilon
    release = Release(what="embedding", text=text_digest(device.corpus), epsilon=epsilon, delta=embed.delta)
    published, run_seed = with_prefix(request, PUBLISHED), int(request.metadata["run_seed"])
    vector_D = embed.embed(device.corpus, published, run_seed, lambda: device.releases.grant(release))
    return torch.from_numpy(vector_D).half()


def train_here(
    device: Device, model: PreTrainedModel, *, penalty: Penalty | None = None, part: int = 0, parts: int = 1
) -> Told:
    """On the device: train a model in place on the device's text; what the answer says of it.

    Args:
        penalty: what is added to the loss of a MoE.
        part, parts: of the device's steps, which are the same in sum whatever the number of parts.

    Raises:
        PrivacyError: the device's owner gives no such model away.
        UploadError: the model does not know each token of the run's tokenizer.
    """
    check_vocabulary(device, model)
    if device.privacy is not None:
        assert (penalty, parts) == (None, 1), "of methods that train privately"
        return _train_privately(device, model, device.privacy)
    started_from = models.init_id(model)
    length, training = device.sequence_length, device.training
    device.releases.grant(Release(what="training", text=text_digest(device.corpus)))
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
        scratch=device.scratch / CHECKPOINTS / started_from if device.scratch else None,
    )
    told = _told(device, model, started_from, device.corpus.num_tokens, stop - first)
    if history:
        told |= {"first_loss": round(history[0]["loss"], 4), "last_loss": round(history[-1]["loss"], 4)}
    return told


def _train_privately(device: Device, model: PreTrainedModel, privacy: PrivacyOptions) -> Told:
    """The same by DP-SGD. What is told of it has no loss, and tokens as if every document filled a sequence."""
    started_from, documents = models.init_id(model), len(device.corpus)
    training, length = device.training, device.sequence_length
    steps = steps_for(documents, 1, training, device.epochs, device.max_steps)
    rate = min(1.0, training.batch_size * training.accumulate / max(1, documents))
    draws = draws_for(privacy, rate, steps)
    epsilon, text = epsilon_of([draws], privacy.delta), text_digest(device.corpus)
    release = Release(what="training", text=text, epsilon=epsilon, delta=privacy.delta, draws=draws)
    noise = device.releases.grant(release)
    train_causal_lm(
        model,
        PrivateDocuments(device.corpus, length, draws, privacy.max_grad_norm, noise),
        steps=steps,
        optimisation=training,
        seed=device.seed,
        label=device.id,
        scratch=device.scratch / CHECKPOINTS / started_from if device.scratch else None,
    )
    told = _told(device, model, started_from, documents * length, steps)
    return {
        **told,
        "epsilon": round(epsilon, 4),
        "delta": privacy.delta,
        "noise_multiplier": round(draws.multiplier, 4),
    }


def _told(device: Device, model: PreTrainedModel, started_from: str, tokens: int, steps: int) -> Told:
    return {
        "device": device.id,
        "init_id": started_from,
        "documents": len(device.corpus),
        "tokens": tokens,
        "parameters": num_parameters(model.config),
        "steps": steps,
    }


def spool_answers(
    site: Site, call: Call, requests: Mapping[str, Payload], check: Check, key: str, place: str = "uploads",
    opened: Open = as_it_came,
) -> dict[str, Path]:  # fmt: skip
    """Ask the devices whose answer is not on the disk yet; the files of the good answers, in the order of `requests`.

    Args:
        check: see `collect`; what it refuses becomes a note of the run, and its device one that had no part.
        key: hash of what the answers depend on besides their device's own part of [devices]; answers of another key are
            thrown away.
        place: folder of the answers within the run's.
        opened: see `collect`.
    """
    spool = Spool(site.folder / place, site.by_device(key))
    have = collect(call, requests, spool, check, site.quorum, opened, site.failures)
    for device_id, reason in spool.rejected().items():
        site.note(f"upload of {device_id} was refused: {reason}")
    return {device_id: spool.path(device_id) for device_id in have}


def with_prefix(payload: Payload, prefix: str) -> State:
    """The payload's tensors whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in payload.arrays.items() if name.startswith(prefix)}
