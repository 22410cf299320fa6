# SPDX-License-Identifier: Apache-2.0
"""A finished run's uploads, sent again: changed, in another format, or only from those who are asked. No device trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from deepfusion.artifacts import RunFolder, start_from, write_atomic
from deepfusion.config import RunConfig
from deepfusion.data.prepare import load_prepared
from deepfusion.devices.models import load
from deepfusion.federation.formats import shrink
from deepfusion.federation.payload import encode, read_file
from deepfusion.methods import DeepFusion
from deepfusion.methods.exchange import EMBEDDING, with_prefix
from deepfusion.methods.gathering import UploadOptions
from deepfusion.run import make_site
from deepfusion.stages.evaluate import Score, by_domain, score_documents
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Payload, State

Change = Callable[[str, State, State], State]
"""(device id, its model, the weights that it started from) -> the model that it sends."""


@dataclass
class Replay:
    """The door to a finished run's devices: each answers with the upload that it gave.

    Attributes:
        run: folder of the run.
        upload: how models are sent.
        change: what becomes of a model before that.
        down, up: bytes of all requests and answers.
    """

    run: Path
    upload: UploadOptions = field(default_factory=UploadOptions)
    change: Change = lambda device, model, start: model
    down: int = 0
    up: int = 0

    def __call__(self, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        """See `types.Call`."""
        for device, request in requests.items():
            answer = self.answer(device, request.what)
            self.down, self.up = self.down + len(encode(request)), self.up + len(encode(answer))
            yield device, answer

    def answer(self, device: str, what: str) -> Payload:
        """As the device's own code would answer, without its training."""
        whole = read_file(self.run / "uploads" / f"{device}.safetensors", source=device)
        embedding = {EMBEDDING: whole.arrays[EMBEDDING]}
        if what == EMBEDDING:
            return Payload(EMBEDDING, embedding, {"device": device})
        start = first_weights(self.run, str(whole.metadata["architecture"]))
        wire = shrink(self.change(device, with_prefix(whole, MODEL), start), self.upload.format, start)
        arrays = {MODEL + name: tensor for name, tensor in wire.items()}
        return replace(whole, arrays=arrays if self.upload.select == "medoids" else {**arrays, **embedding})


@cache
def first_weights(run: Path, architecture: str) -> State:
    """What the devices of an architecture started from."""
    folders = json.loads((run / "initial.json").read_text())
    return {name: tensor.clone() for name, tensor in distinct_state(load(folders[architecture])).items()}


@dataclass(frozen=True)
class Fused:
    """What was fused from answers that were sent again.

    Attributes:
        folder: of the run.
        moe: folder of the model.
        nats: log-perplexity on test text.
        by_domain: the same of each domain.
        down, up: bytes of all requests and answers.
    """

    folder: Path
    moe: Path
    nats: float
    by_domain: dict[str, float]
    down: int
    up: int


def fuse_again(config: RunConfig, folder: Path, replay: Replay) -> Fused:
    """DeepFusion from the proxies on, out of a replay's answers; what the folder holds already is not made again."""
    assert isinstance(config.method, DeepFusion)
    config = replace(config, method=replace(config.method, upload=replay.upload))
    start_from(replay.run, folder, only=("data",))
    site = make_site(config, RunFolder(folder), load_prepared(folder / "data"))
    moe = config.method.server(site, replay)
    traffic = folder / "traffic.json"
    if not traffic.exists():  # what has arrived is not sent again when the folder is opened once more
        write_atomic(traffic, json.dumps({"down": replay.down, "up": replay.up}))
    scores = score_documents(load(moe), site.data.test, site.sequence_length)
    domains = {name: score.log_perplexity for name, score in by_domain(scores, site.data.test).items()}
    return Fused(folder, moe, sum(scores, Score()).log_perplexity, domains, **json.loads(traffic.read_text()))


def shorter(config: RunConfig, distil: int, tune: int) -> RunConfig:
    """The run with so many steps of distillation and tuning, for comparisons that need many fusions."""
    method = config.method
    assert isinstance(method, DeepFusion)
    distillation, tuning = replace(method.distillation, steps=distil), replace(method.tune, steps=tune)
    return replace(config, method=replace(method, distillation=distillation, tune=tuning))
