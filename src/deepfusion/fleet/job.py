# SPDX-License-Identifier: Apache-2.0
"""A job: all that a device is told of a run besides its requests, and what the device makes of it on its own disk."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch

from deepfusion.artifacts import LOCK, RunFolder, file_digest, hold, key_of, write_atomic
from deepfusion.config import RunConfig
from deepfusion.data.files import find_files
from deepfusion.data.prepare import corpus_from_source, load_corpus, write_corpus
from deepfusion.data.tokenizer import open_tokenizer, tokenizer_from_json
from deepfusion.devices.device import Device
from deepfusion.devices.privacy import PrivacyOptions
from deepfusion.errors import (
    ConfigError,
    DeepFusionError,
    FederationError,
    MemoryLimitError,
    ModelError,
    PrivacyError,
    UploadError,
)
from deepfusion.federation.payload import parts
from deepfusion.federation.spool import Spool
from deepfusion.fleet.account import Account
from deepfusion.fleet.device_file import DeviceFile, below
from deepfusion.methods.base import Method, methods
from deepfusion.methods.exchange import CHECKPOINTS
from deepfusion.schema import parse_options, plain
from deepfusion.stages.embed import FrozenEncoder
from deepfusion.training import Optimisation, derive_seed
from deepfusion.types import Payload

JOB = "job"
"""What the ledger books a job as."""
IDENTITY = "identity"
"""In a run folder: what tells the run from all others, to its devices."""
_TOKENIZER = "tokenizer.json"
_OPEN = (ConfigError, FederationError, MemoryLimitError, ModelError, PrivacyError, UploadError)
"""What is wrong with a job, a request, the device's model, limits or account: none of it comes of the text."""
FAILED = "its work on its text failed; its owner demands privacy, so the reason stands in the device's log alone"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a device has to know of a run, and may: none of it names a place on the device.

    Attributes:
        seed: the run's seed.
        sequence_length, counted: see [data].
        epochs, max_steps, training, privacy: see [devices].
        method: the federated method with its options.
    """

    seed: int
    sequence_length: int
    counted: Literal["answer", "all"]
    epochs: float
    max_steps: int | None = None
    training: Optimisation
    privacy: PrivacyOptions | None = None
    method: Method = field(metadata={"registry": methods})


def job_payload(config: RunConfig, run: Path, model: str) -> Payload:
    """The job as it is sent to a device.

    Args:
        run: the run folder, with the run's tokenizer in it.
        model: name of the architecture that the run expects of the device.

    Raises:
        DiskError: there is no room for the run's identity.
    """
    fleet = config.devices
    job = Job(
        seed=config.seed, sequence_length=config.data.sequence_length, counted=config.data.counted, epochs=fleet.epochs,
        max_steps=fleet.max_steps, training=fleet.training, privacy=fleet.privacy, method=config.method,
    )  # fmt: skip
    opened = open_tokenizer(run / "data" / "tokenizer")
    octets = bytearray(opened.backend_tokenizer.to_str().encode())
    metadata = {
        "options": json.dumps(plain(job)), "end": str(opened.eos_token), "model": model, "run": _identity(run),
    }  # fmt: skip
    return Payload(JOB, {_TOKENIZER: torch.frombuffer(octets, dtype=torch.uint8)}, metadata)


def _identity(run: Path) -> str:
    """Drawn once for a run folder: a device gives the answers of this run to no other one, whose text may have changed."""
    path = run / IDENTITY
    if not path.exists():
        write_atomic(path, secrets.token_hex(16))
    return path.read_text(encoding="utf-8")


class Workshop:
    """A device's folder for one job: its options, its tokenizer, its text as tokens, and every answer that it has given."""

    def __init__(self, own: DeviceFile, path: Path, folder: Path) -> None:
        """Open it.

        Args:
            own: the device's configuration, and `path` its file.
            folder: the workshop's.
        """
        self._own, self._path, self.folder = own, path, RunFolder(folder)
        options = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.job = allowed(parse_options(Job, options, "the server's job"), own, path)

    def device(self, request: Payload) -> Device:
        """The device for a request, with its own model, text and limits, and with the job's training."""
        own, job = self._own, self.job
        # The version too: another one could make something else of the same request, under the same noise.
        context = (self.folder.path.name, payload_digest(request), version("deepfusion-moe"), version("torch"))
        gib = own.limits.memory_gib
        return Device(
            id=own.id,
            model=replace(own.model, folder=str(below(self._path, own.model.folder)))
            if own.model.folder
            else own.model,
            corpus=load_corpus(self._text()),
            tokenizer=self.folder / "tokenizer",
            sequence_length=job.sequence_length,
            training=job.training,
            privacy=job.privacy,
            epochs=job.epochs,
            max_steps=job.max_steps,
            memory_limit_bytes=None if gib is None else int(gib * 2**30),
            seed=derive_seed(job.seed, "device", own.id),
            releases=Account(below(self._path, own.place) / "privacy", own.id, own.privacy, context),
            scratch=self._scratch,
        )

    @property
    def _scratch(self) -> Path:
        return self.folder / "training"

    def _text(self) -> Path:
        """The device's text as tokens, made once for the same files and templates."""
        source, root = self._own.text.source, self._path.parent.absolute()

        def make(out: Path) -> None:
            tokenizer, counted = self.folder / "tokenizer", self.job.counted
            write_corpus(corpus_from_source(source, "private", tokenizer, root=root, counted=counted), out)

        files = [file_digest(path) for path in find_files(source.of("private"), root)]
        return self.folder.keep("text", make, files, source, self.job.counted)

    def answer(self, request: Payload, make: Callable[[], Payload]) -> Payload:
        """The answer to a request: the kept one where it was answered before, so that nothing is trained twice.

        Where another process of the device is at work on it, its answer is waited for, or its end.
        Answers of earlier rounds go: the server asks for a round when it has done with those before. So do checkpoints.
        """
        name = f"{request.round:06d}-{payload_digest(request)}"
        with _alone(self.folder.path):
            spool = Spool(self.folder / "answers")
            kept = name in spool.have()
            answer = spool.get(name) if kept else make()
            if not kept:
                spool.put(name, answer)
            for old in spool.have():
                if old.partition("-")[0] < name.partition("-")[0]:
                    spool.path(old).unlink()
            shutil.rmtree(self._scratch / CHECKPOINTS, ignore_errors=True)
            return answer


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Be the one process at work in a workshop, however long that takes: the hours of the device end whoever waits.

    The server asks again when it has not heard of a client for a while, and the first one may be there still. One that was
    stopped is ended: nobody knows whether it will ever go on, and what it has trained so far is in its checkpoint.
    """
    lock = str((folder / LOCK).resolve())

    def end_if_stopped(note: dict[str, Any]) -> None:
        with suppress(psutil.Error, KeyError):
            other = psutil.Process(note["pid"])
            if other.status() == psutil.STATUS_STOPPED and lock in (file.path for file in other.open_files()):
                other.kill()

    with hold(folder, end_if_stopped):
        yield


@contextmanager
def discreet(own: DeviceFile) -> Generator[None]:
    """Within it, what fails on the text of a device whose owner demands privacy is told by one fixed sentence.

    Raises:
        FederationError: that sentence; the error itself is printed, and so goes to the device's log.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _OPEN) or not own.privacy.any:
            raise
        traceback.print_exc()
        raise FederationError(FAILED) from None  # or the error's own text would go along


def open_workshop(own: DeviceFile, path: Path, job: Payload | None, run: int) -> Workshop:
    """The workshop of the job that came with a request, or of the one that this run began with.

    Args:
        own: the device's configuration, and `path` its file.
        job: None where the request brought none.
        run: the number by which Flower knows the run.

    Raises:
        FederationError: the run is for another model than the device has, or its job was never received.
        ConfigError: the job's options make no sense.
    """
    place = below(path, own.place)
    note = place / "runs" / str(run)
    if job is None:
        if not note.exists():
            raise FederationError(f"{own.id} has no job of this run; its `place` was emptied: go on with --resume")
        return Workshop(own, path, place / "jobs" / note.read_text())
    expected = job.metadata.get("model")
    if expected != own.model.name:
        raise FederationError(
            f'{own.id} trains "{own.model.name}" and the run expects {expected!r:.80}; mend model in [[devices.named]]'
        )
    name = key_of(payload_digest(job), own.model)
    folder = place / "jobs" / name
    with _alone(folder):
        if not (folder / "job.json").exists():
            _unpack(job, own, path, folder)
    write_atomic(note, name)
    return Workshop(own, path, folder)


def allowed(job: Job, own: DeviceFile, path: Path) -> Job:
    """The job with the device's own encoder, where it has one of the kind.

    Raises:
        PrivacyError: the owner wants private training, and the method has devices make more of their text than that.
        FederationError: the device takes no part in such a method; or the job wants an encoder and the device names none:
            a server opens no folder here.
    """
    method = methods.name_of(type(job.method))
    if method not in own.methods:
        raise FederationError(
            f'{own.id} takes no part in "{method}", only in {", ".join(own.methods)} (methods = [...])'
        )
    if own.privacy.epsilon is not None and not job.method.trains_privately:
        raise PrivacyError(
            f'{own.id} trains with differential privacy only; with its options "{method}" gives away more than private models'
        )
    embed: Any = getattr(job.method, "embed", None)
    if not isinstance(embed, FrozenEncoder):
        return job
    if own.encoder is None:
        raise FederationError(
            f'{own.id}: the run describes text by the encoder {embed.model!r:.80}; name the device\'s copy as encoder = "..."'
        )
    mine = replace(embed, model=str(below(path, own.encoder)))
    return replace(job, method=cast(Method, replace(cast(Any, job.method), embed=mine)))


def payload_digest(payload: Payload) -> str:
    """Hash of a payload as bytes: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts(payload):
        digest.update(part)
    return digest.hexdigest()


def _unpack(job: Payload, own: DeviceFile, path: Path, folder: Path) -> None:
    """Check a job and write it down, the tokenizer first: where `job.json` is, all of it is."""
    tokens, end, options = job.arrays.get(_TOKENIZER), job.metadata.get("end"), job.metadata.get("options")
    if tokens is None or tokens.dtype != torch.uint8 or not isinstance(end, str) or not isinstance(options, str):
        raise UploadError(
            "server: its job holds no tokenizer, no end of text or no options; use one version on both sides"
        )
    try:
        tree = json.loads(options)
        text = tokens.numpy().tobytes().decode()
    except ValueError as error:
        raise UploadError(f"server: its job cannot be read ({error}); use one version on both sides") from error
    allowed(parse_options(Job, tree, "the server's job"), own, path)
    try:
        tokenizer_from_json(text, end, folder / "tokenizer")
    except DeepFusionError as error:
        raise UploadError(f"server: {error}") from error
    write_atomic(folder / "job.json", options)
