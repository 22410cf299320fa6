# SPDX-License-Identifier: Apache-2.0
"""Centralised training: every device hands over its text, and the server trains the same MoE on all of it.

No federation, and no privacy: the bound that federated methods are measured against (baselines, section 8). It begins from the
others' M_0, and reads as many public tokens as their server, and beside them as many private tokens as their devices together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedConfig

from deepfusion.artifacts import file_digest, key_of
from deepfusion.data.mixed import MixedText
from deepfusion.data.packing import PackedText
from deepfusion.devices.device import Device
from deepfusion.devices.memory import forward_flops_per_token
from deepfusion.errors import UploadError
from deepfusion.federation.payload import read_file
from deepfusion.methods import assembly, beginning, exchange
from deepfusion.methods.base import Site, Training, methods
from deepfusion.methods.budget import Shapes, Work, rows, work
from deepfusion.stages.local import steps_for
from deepfusion.training import derive_seed
from deepfusion.types import Call, Corpus, Payload


@methods.register("centralised")
@dataclass(frozen=True, kw_only=True)
class Centralised(beginning.Beginning):
    """One MoE trained on everybody's text, public and private together: a base copied to the experts, all trained, then tuned.

    Steps of its [training] are of public text; steps for the private text come on top.
    """

    stages: ClassVar[tuple[str, ...]] = ("data", "uploads", "initial", "merged", "trained", "moe")

    @property
    def trains_privately(self) -> bool:
        """No: they hand over their text."""
        return False

    def client(self, device: Device, request: Payload) -> Payload:
        """The device's text as it is: token ids, which of them count as targets, and the documents' lengths."""
        corpus = device.corpus
        documents = [corpus.document(index) for index in range(len(corpus))]
        arrays = {
            "token_ids": torch.from_numpy(_joined([ids for ids, _ in documents], np.int32)),
            "counted": torch.from_numpy(_joined([flags for _, flags in documents], np.bool_)),
            "lengths": torch.from_numpy(corpus.lengths_U.astype(np.int64)),
        }
        return Payload("text", arrays, {"device": device.id})

    def server(self, site: Site, call: Call) -> Path:
        """Collect the text, train on it and on the public text, each in its share."""
        corpus, read, digests = self.collect_text(site, call)
        first, last = self.training, self.tune
        steps = first.steps + -(-read // (rows(first.optimisation) * site.sequence_length))
        whole = (steps * rows(first.optimisation) + last.steps * rows(last.optimisation)) * site.sequence_length
        public = PackedText(site.data.public, site.sequence_length, derive_seed(site.seed, "public"))
        private = PackedText(corpus, site.sequence_length, derive_seed(site.seed, "private"))
        text = MixedText(public, private, read / whole)
        start = assembly.upcycled(
            site, "", text, self.start(site), digests, training=replace(first, steps=0), noise=self.noise
        )
        options = replace(last, steps=steps, optimisation=first.optimisation, experts="train", expert_rate=1.0)
        moe = assembly.tuned_on_text(site, "trained", start, text, assembly.digests(start), digests, options=options)
        return assembly.tuned_on_text(site, "moe", moe, text, assembly.digests(moe), options=last)

    def collect_text(self, site: Site, call: Call) -> tuple[Corpus, int, list[str]]:
        """All devices' text; how many tokens of it their own trainings would read; the files' hashes."""
        requests = {card.id: Payload("request") for card in site.cards}

        def check(device_id: str, payload: Payload) -> None:
            check_text(payload, device_id, site.data.vocab_size)

        key = key_of("text", site.seed, site.data_key, site.sequence_length)
        files = exchange.spool_answers(site, call, requests, check, key)
        site.reached("uploads")
        payloads = [read_file(path, source=f"device {device_id}") for device_id, path in files.items()]
        counts = [len(payload.arrays["token_ids"]) for payload in payloads]
        fleet, length = site.fleet, site.sequence_length
        steps = sum(steps_for(count, length, fleet.training, fleet.epochs, fleet.max_steps) for count in counts)
        read = steps * fleet.training.batch_size * fleet.training.accumulate * length
        return _corpus(payloads), read, [file_digest(path) for path in files.values()]

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """Devices train nothing."""
        return ()

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> None:
        """The device's text."""

    def server_work(self, shapes: Shapes) -> tuple[Work, ...]:
        """The MoE's training on public and private text, and its tuning."""
        each = 3 * forward_flops_per_token(shapes.target)
        return (
            work(self.training.steps, self.training.optimisation, shapes, shapes.target),
            work(self.tune.steps, self.tune.optimisation, shapes, shapes.target),
            Work(shapes.private, each),
        )


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([part.astype(dtype) for part in parts]) if parts else np.zeros(0, dtype)


def check_text(payload: Payload, device_id: str, vocab_size: int) -> None:
    """Check a device's text. Raises UploadError naming the device, what is wrong, and the cure."""
    shapes = {"token_ids": torch.int32, "counted": torch.bool, "lengths": torch.int64}
    arrays, fault = payload.arrays, ""
    if {name: tensor.dtype for name, tensor in arrays.items() if tensor.dim() == 1} != shapes:
        fault = f"its tensors are not the vectors {', '.join(shapes)}"
    elif payload.metadata.get("device") != device_id:
        fault = f"it says that it comes from {payload.metadata.get('device')!r:.80}"
    elif not _adds_up(arrays["lengths"], len(arrays["token_ids"])):
        fault = "the lengths of its documents do not add up to its tokens"
    elif len(arrays["counted"]) != len(arrays["token_ids"]):
        fault = f"it has {len(arrays['token_ids'])} tokens and {len(arrays['counted'])} flags"
    elif len(ids := arrays["token_ids"]) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        fault = f"token ids from {int(ids.min())} to {int(ids.max())}, where the vocabulary has {vocab_size}"
    if fault:
        raise UploadError(f"device {device_id}: {fault}; send the text as this run's tokenizer cuts it")


def _adds_up(lengths_U: torch.Tensor, tokens: int) -> bool:
    """Whether the lengths are positive and sum to `tokens`; the first two keep the sum from running over."""
    return not len(lengths_U) or (
        int(lengths_U.min()) >= 1 and int(lengths_U.max()) <= tokens and int(lengths_U.sum()) == tokens
    )


def _corpus(payloads: Sequence[Payload]) -> Corpus:
    """The documents of all payloads, without their text."""
    parts = {
        name: torch.cat([payload.arrays[name] for payload in payloads]) for name in ("token_ids", "counted", "lengths")
    }
    starts = np.concatenate([[0], np.cumsum(parts["lengths"].numpy())])
    count = len(starts) - 1
    return Corpus(
        token_ids=parts["token_ids"].numpy(),
        counted=parts["counted"].numpy(),
        token_starts=starts,
        text_bytes=np.zeros(0, np.uint8),
        text_starts=np.zeros(count + 1, np.int64),
        domain_ids=np.zeros(count, np.int32),
        domains=("private",),
        rows_U=np.arange(count),
    )
