# SPDX-License-Identifier: Apache-2.0
"""Phase I up to the domains: embeddings and models of the devices, all at once, or models of each domain's medoids only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deepfusion.artifacts import file_digest, write_atomic
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.errors import FederationError, UploadError
from deepfusion.federation.formats import Format, Plain, shrink
from deepfusion.federation.payload import check_embedding
from deepfusion.methods import exchange
from deepfusion.methods.arrivals import collect_uploads
from deepfusion.methods.base import Site
from deepfusion.methods.warm_start import ask_everyone, first_model
from deepfusion.stages import evaluate
from deepfusion.stages.embed import Embedding, ServerProbe
from deepfusion.stages.proxy import MODEL, load_upload
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Call, Clusters, Payload, State, Upload

ASKED = "asked.json"
"""In the run folder: the devices that were asked for their model, where not all were."""


@dataclass(frozen=True, kw_only=True)
class UploadOptions:
    """[upload]: how devices send their models.

    Attributes:
        format: "fp32" whole; "bf16" half; "int8" a byte and "nf4" half a byte a number; "delta-int8" a byte for what the training
            has changed. Codes are compressed. Vectors (norms, biases) are always whole.
        select: "all" devices send their model; with "medoids" all send their embedding first, and then only the most central
            devices of each domain and architecture train and send a model.
        medoids: how many of each, for select = "medoids".
    """

    format: Format = "fp32"
    select: Literal["all", "medoids"] = "all"
    medoids: int = 2

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.medoids < 1:
            yield f"medoids = {self.medoids}: no model would arrive; choose at least 1"

    def senders(self, devices: int, domains: int) -> int:
        """How many of so many devices of one architecture send their model, at most."""
        return min(devices, self.medoids * domains) if self.select == "medoids" else devices


class Described(NamedTuple):
    """What the server knows of N devices before it groups them."""

    ids: tuple[str, ...]
    architectures: tuple[str, ...]
    embedding_ND: np.ndarray


Group = Callable[[Described], Clusters]
"""Finds the domains."""


@dataclass(frozen=True, eq=False)
class Gathering:
    """How the server comes by what it knows of the devices.

    Attributes:
        initials: folder of each architecture's first weights.
        published: what the server publishes for the embeddings.
        first_weights: how requests hold the first weights; None where they do not.
        key: hash of what the uploads depend on besides their device's own part of [devices].
    """

    site: Site
    call: Call
    embed: Embedding
    upload: UploadOptions
    initials: Mapping[str, Path]
    published: State
    first_weights: Plain | None
    key: str

    def gather(self, document_UD: np.ndarray, group: Group) -> tuple[list[Upload], Clusters]:
        """The uploads, and the domains with those who uploaded.

        Args:
            document_UD: embeddings of the public documents.
        """
        return self._medoids(group) if self.upload.select == "medoids" else self._all(document_UD, group)

    def _all(self, document_UD: np.ndarray, group: Group) -> tuple[list[Upload], Clusters]:
        """Every device's model and embedding, which come together, and the domains."""
        (self.site.folder / ASKED).unlink(missing_ok=True)  # of a run that asked for medoids
        requests = ask_everyone(self.site, self.initials, self.published, self.first_weights)
        uploads = self._collect(requests, self.embed.dimension)
        if isinstance(self.embed, ServerProbe):
            uploads = probe_uploads(self.site, self.embed, uploads, self.initials, document_UD)
        ids, architectures = (tuple(getattr(u, name) for u in uploads) for name in ("device_id", "architecture"))
        return uploads, group(Described(ids, architectures, np.stack([u.embedding_D for u in uploads])))

    def _medoids(self, group: Group) -> tuple[list[Upload], Clusters]:
        """Every device's embedding, the domains, and then the models of the most central devices of each group.

        A group is the devices of one domain and architecture. Where one of its medoids fails, the next is asked. Devices that
        are not asked train nothing.

        Raises:
            FederationError: a domain is left without a model; names it.
        """
        described = self._describe()
        clusters, embeddings = group(described), dict(zip(described.ids, described.embedding_ND, strict=True))
        queues = list(by_centrality(clusters, described))
        requests = ask_everyone(self.site, self.initials, {}, self.first_weights)
        asked: set[str] = set()
        good: dict[str, Upload] = {}
        while more := {device for queue in queues for device in self._next(queue, asked, good)}:
            asked |= more
            try:
                found = self._collect({id: request for id, request in requests.items() if id in more}, None)
            except FederationError as error:  # all of this wave failed: the next ones may not
                self.site.note(f"medoids {', '.join(sorted(more))}: {error}")
                continue
            good |= {upload.device_id: replace(upload, embedding_D=embeddings[upload.device_id]) for upload in found}
        write_atomic(self.site.folder / ASKED, json.dumps(sorted(asked)))
        self.site.note(
            f"{len(asked)} of {len(requests)} devices were asked for their models: the medoids of their groups"
        )
        here = [index for index, device in enumerate(clusters.device_ids) if device in good]
        left = replace(clusters, device_ids=tuple(clusters.device_ids[i] for i in here), label_N=clusters.label_N[here])
        for domain in range(clusters.num_clusters):
            if not left.members(domain):
                raise FederationError(f"no model of domain {domain} arrived; start its devices again and resume")
        return [good[device] for device in left.device_ids], left

    def _next(self, queue: list[str], asked: set[str], good: Mapping[str, Upload]) -> list[str]:
        lacking = self.upload.medoids - sum(device in good for device in queue)
        return [device for device in queue if device not in asked][: max(0, lacking)]

    def _collect(self, requests: Mapping[str, Payload], embedding_size: int | None) -> list[Upload]:
        # Of medoids the quorum is that of the embeddings: who fails is replaced by the next.
        site = self.site if self.upload.select == "all" else replace(self.site, quorum=1)
        return collect_uploads(site, self.call, requests, self.initials, self.upload.format, self.key, embedding_size)

    def _describe(self) -> Described:
        arrays = {exchange.PUBLISHED + name: tensor for name, tensor in self.published.items()}
        sent = Payload(exchange.EMBEDDING, arrays, {"run_seed": self.site.seed})

        def check(device_id: str, payload: Payload) -> None:
            check_embedding(payload, self.embed.dimension, device_id)
            if set(payload.arrays) != {exchange.EMBEDDING} or payload.metadata.get("device") != device_id:
                raise UploadError(f"device {device_id}: its answer is not its embedding and its id; send these alone")

        requests = {card.id: sent for card in self.site.cards}
        files = exchange.spool_answers(self.site, self.call, requests, check, self.key, "embeddings")
        cards = [card for card in self.site.cards if card.id in files]
        return Described(
            tuple(card.id for card in cards),
            tuple(card.model.name for card in cards),
            np.stack([_embedding(files[card.id]) for card in cards]),
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


def answer_with_model(
    device: Device, request: Payload, embed: Embedding, upload: UploadOptions, first: Plain
) -> Payload:
    """On the device: start its own model as the request says, train it on its text, and answer with it and the embedding.

    A server that asks for medoids wants the embedding first, and the model later from some.

    Args:
        first: how the request's first weights are written.
    """
    if request.what == exchange.EMBEDDING:
        return Payload(
            exchange.EMBEDDING,
            {exchange.EMBEDDING: exchange.describe_text(device, request, embed)},
            {"device": device.id},
        )
    # First, because a refusal to give it away should not come after hours of training.
    described = {exchange.EMBEDDING: exchange.describe_text(device, request, embed)} if upload.select == "all" else {}
    model = first_model(device, request, first)
    start = {n: t.clone() for n, t in distinct_state(model).items()} if upload.format == "delta-int8" else {}
    told = exchange.train_here(device, model)
    wire = shrink({name: tensor.detach().cpu() for name, tensor in distinct_state(model).items()}, upload.format, start)
    arrays = {**{MODEL + name: tensor for name, tensor in wire.items()}, **described}
    return Payload("model", arrays, {**told, "architecture": device.model.name})


def by_centrality(clusters: Clusters, described: Described) -> Iterator[list[str]]:
    """The devices of each domain and architecture, the one nearest to all others of its group first."""
    architecture = dict(zip(described.ids, described.architectures, strict=True))
    place = {device: index for index, device in enumerate(described.ids)}
    for domain in range(clusters.num_clusters):
        members = clusters.members(domain)
        for name in sorted({architecture[device] for device in members}):
            group = [device for device in members if architecture[device] == name]
            own_MD = described.embedding_ND[[place[device] for device in group]]
            yield [group[i] for i in np.argsort(-(own_MD @ own_MD.sum(0)), kind="stable")]


def _embedding(path: Path) -> np.ndarray:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(exchange.EMBEDDING).float().numpy()
