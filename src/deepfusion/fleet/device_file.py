# SPDX-License-Identifier: Apache-2.0
"""A device's own configuration, which its owner writes: its model, its text, its limits. No server can change a word of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deepfusion.data.options import CorpusSource
from deepfusion.devices.fleet import SAFE_ID
from deepfusion.devices.presets import PRESETS
from deepfusion.fleet.account import Demands
from deepfusion.methods import methods
from deepfusion.registry import did_you_mean
from deepfusion.schema import load_options
from deepfusion.types import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Limits:
    """[limits]: what the device gives at most.

    Attributes:
        memory_gib: a training that would need more is refused before it begins.
        threads: CPU threads of a training.
        hours: a request that takes longer is ended.
    """

    memory_gib: float | None = None
    threads: int = 1
    hours: float = 24.0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.memory_gib is not None and not self.memory_gib > 0:
            yield f"memory_gib = {self.memory_gib}: must be positive; remove it for no limit"
        if self.threads < 1:
            yield f"threads = {self.threads}: a training runs on at least one; choose 1 or more"
        if not 0 < self.hours < 1e6:
            yield f"hours = {self.hours}: no request could be answered, or none would end; choose a positive number"


@dataclass(frozen=True, kw_only=True)
class DeviceText:
    """[text]: the device's private text. It is read here and leaves the device only as the method says (docs/fleet.md).

    Attributes:
        files: paths or patterns.
        text: template of a document without a prompt; "{text}" when there is no `prompt` either.
        prompt: template of what a document's answer is conditioned on.
        answer: template of what follows the prompt.
    """

    files: tuple[str, ...]
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None

    @property
    def source(self) -> CorpusSource:
        """As a row of [[data.corpora]]."""
        return CorpusSource(domain="own", private=self.files, text=self.text, prompt=self.prompt, answer=self.answer)

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not self.files:
            yield "files = []: no text to train on; give at least one path"
        yield from (fault.replace("private = ", "files: ", 1) for fault in self.source.faults())


@dataclass(frozen=True, kw_only=True)
class Connection:
    """[connection]: how the device reaches its server. It calls; nobody can call it.

    Attributes:
        superlink: host and port of the server.
        certificate: the CA certificate (PEM) that the server's certificate must be signed by.
        key: the device's private key; the server knows its public half.
        port: a free port on this machine's loopback, for the SuperNode's own processes; another one for each device on it.
    """

    superlink: str
    certificate: str
    key: str
    port: int = 9094


@dataclass(frozen=True, kw_only=True)
class DeviceFile:
    """A device's own configuration. Paths are relative to the folder of the file.

    Attributes:
        id: its name in the fleet.
        place: a folder for what it has trained, kept so that nothing is trained twice, and for its log.
        methods: the federated methods that it takes part in; "centralised" would hand over its text as it is.
        encoder: its own copy of the encoder where a job describes text by one ([embed] type = "encoder").
        model: [model] the one architecture that it trains; its name must be one of the run's.
        text: [text] its private text.
        limits: [limits] what it gives at most.
        privacy: [privacy] how much of its text it gives away at most.
        connection: [connection] how it reaches its server.
    """

    id: str
    place: str = "place"
    methods: tuple[str, ...] = ("deepfusion",)
    encoder: str | None = None
    model: ModelSpec
    text: DeviceText
    limits: Limits = field(default_factory=Limits)
    privacy: Demands = field(default_factory=Demands)
    connection: Connection

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not SAFE_ID.fullmatch(self.id):
            yield f'id = "{self.id}": letters, digits, dot, dash and underscore only; choose the name that the server knows'
        for name in set(self.methods) - set(methods):
            yield f'methods: "{name}": no such method{did_you_mean(name, tuple(methods))}; known: {", ".join(methods)}'
        given = [key for key in ("preset", "folder", "hub") if getattr(self.model, key) is not None]
        if len(given) != 1:
            yield f"[model] {' and '.join(given) or 'none of preset, folder, hub'} given; give exactly one of the three"
        if self.model.preset is not None and self.model.preset not in PRESETS:
            hint = did_you_mean(self.model.preset, tuple(PRESETS))
            yield f'[model] preset = "{self.model.preset}": unknown{hint}; see `deepfusion list`'


def load_device(path: Path) -> DeviceFile:
    """Read a device's configuration.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    return load_options(DeviceFile, path)


def below(path: Path, name: str) -> Path:
    """A path that a configuration file names: `~` filled in, relative to the file's folder."""
    return path.parent.absolute() / os.path.expanduser(name)
