# SPDX-License-Identifier: Apache-2.0
"""What a method is: what a device does with a request, and what the server does with the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedConfig

from deepfusion.artifacts import RunFolder
from deepfusion.data.options import DataOptions
from deepfusion.data.prepare import PreparedData
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard, FleetOptions
from deepfusion.devices.models import make_config
from deepfusion.devices.presets import PRESETS
from deepfusion.errors import ModelError
from deepfusion.moe import families
from deepfusion.registry import Registry, did_you_mean
from deepfusion.types import Call, Payload, Progress


class StageReached(Exception):  # noqa: N818 (not an error: the user asked to stop here)
    """The stage that `--until` names is done."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """[target]: the Mixture-of-Experts model that the run ends with.

    Attributes:
        preset: the name of a MoE configuration, see `deepfusion list`.
        config: Hugging Face configuration keys that override the preset's, e.g. the number of experts.
    """

    preset: str
    config: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def model_type(self) -> str:
        """Hugging Face model type of the target, which names its family."""
        return str(PRESETS[self.preset].config["model_type"])

    def make(self, vocab_size: int | None, positions: int, eos_id: int | None) -> PreTrainedConfig:
        """The Hugging Face configuration. Raises ModelError when the overrides do not fit."""
        try:
            values = {**PRESETS[self.preset].config, **self.config}
            return make_config(values, vocab_size=vocab_size, positions=positions, eos_id=eos_id)
        except ModelError as error:
            raise ModelError(f"[target] {error}") from error

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        moe_presets = sorted(name for name, preset in PRESETS.items() if preset.config["model_type"] in families)
        if self.preset not in moe_presets:
            hint = did_you_mean(self.preset, tuple(moe_presets))
            yield f'preset = "{self.preset}": not a MoE preset{hint}; choose one of {", ".join(moe_presets)}'


@dataclass(frozen=True, eq=False)
class Site:
    """The server's side of a run: what it knows, and where it keeps what it makes.

    Attributes:
        folder: the run folder.
        fleet: [devices], which every device's training follows.
        cards: each device's id, architecture and memory limit, nothing of its text.
        data: tokenizer, public and validation text. Methods must not touch its private and test parts.
        data_key: key of the prepared data, part of every stage's key.
        sequence_length: tokens of a training sequence.
        target: the MoE that the run ends with.
        seed: the run's seed.
        cache: a folder shared by runs, for warm-start checkpoints.
        until: name of the stage to stop after, or None.
        note: called with a sentence for the record's notes.
    """

    folder: RunFolder
    fleet: FleetOptions
    cards: tuple[DeviceCard, ...]
    data: PreparedData
    data_key: str
    sequence_length: int
    target: TargetOptions
    seed: int
    cache: RunFolder
    progress: Progress
    note: Callable[[str], None]
    until: str | None = None

    def keep(self, name: str, make: Callable[[Path], None], *parts: Any) -> Path:
        """The stage's folder, made unless it is there with the same inputs and options (`RunFolder.keep`).

        Raises:
            StageReached: `until` names this stage.
        """
        folder = self.folder.keep(name, make, self.seed, *parts)
        self.reached(name)
        return folder

    def reached(self, name: str) -> None:
        """Say that a stage is done that is not made by `keep`."""
        if self.until == name:
            raise StageReached(name)


class Method(Protocol):
    """A federated method: a frozen, registered dataclass whose fields are its TOML options and sections."""

    stages: ClassVar[tuple[str, ...]]
    """Names of its stages in order: what `--until` accepts."""

    def client(self, device: Device, request: Payload) -> Payload:
        """What one device does with one request. Runs where the device's text is."""
        ...

    def server(self, site: Site, call: Call) -> Path:
        """The whole method, seen from the server; returns the folder of a Hugging Face MoE model."""
        ...

    def reference(self, site: Site) -> Path:
        """The same MoE trained without the fleet: on public text alone, with the server's number of tokens."""
        ...

    def faults_with(self, devices: FleetOptions, data: DataOptions, target: TargetOptions) -> Iterator[str]:
        """Combinations with the other sections that cannot work, each with its cure."""
        ...


methods: Registry[Method] = Registry("method")


def plugin(registry: Registry[Any], default: str | None = None) -> Any:
    """A dataclass field whose TOML section names one of `registry` by `type`; required when there is no default."""
    if default is None:
        return field(metadata={"registry": registry})
    return field(default_factory=lambda: registry[default](), metadata={"registry": registry})
