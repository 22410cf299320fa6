# SPDX-License-Identifier: Apache-2.0
"""What a method is: what a device does with a request, and what the server does with the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from transformers import PreTrainedConfig

from deepfusion.artifacts import RunFolder, key_of
from deepfusion.data.options import DataOptions
from deepfusion.data.prepare import PreparedData
from deepfusion.devices.configurations import check_reach, make_config, read_config
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard, FleetOptions
from deepfusion.devices.memory import training_memory, what_would_fit
from deepfusion.devices.presets import PRESETS
from deepfusion.errors import ModelError
from deepfusion.moe import families
from deepfusion.moe.upcycle import family_name, target_values
from deepfusion.registry import Registry, did_you_mean
from deepfusion.spread import ServerOptions
from deepfusion.stages.tune import TuneOptions
from deepfusion.training import Optimisation, mixed_precision
from deepfusion.types import Call, Payload, Progress

if TYPE_CHECKING:  # it stands on this file
    from deepfusion.methods.budget import Shapes, Traffic, Work


class StageReached(Exception):  # noqa: N818 (not an error: the user asked to stop here)
    """The stage that `--until` names is done."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """[target]: the Mixture-of-Experts model that the run ends with; either from random weights or from pretrained ones.

    Attributes:
        preset: the name of a MoE configuration, see `deepfusion list`; the base starts from random weights.
        base: a folder or hub name of pretrained weights to start from: a dense model (Llama, Mistral, Qwen2, Qwen3) whose
            FFN becomes the first expert, or a MoE of a known family, whose routed experts become their mean.
        config: Hugging Face configuration keys that override the preset's or base's, e.g. the number of experts.
    """

    preset: str | None = None
    base: str | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def model_type(self) -> str:
        """Hugging Face model type of the target, which names its family.

        Raises:
            ModelError: the base cannot be read, or grows into no family.
        """
        if self.base is not None:
            return family_name(_base_config(self.base), families)
        assert self.preset is not None, "a preset or a base"
        return str(PRESETS[self.preset].config["model_type"])

    def make(self, vocab_size: int | None, positions: int, eos_id: int | None) -> PreTrainedConfig:
        """The Hugging Face configuration. Raises ModelError when the overrides do not fit."""
        try:
            if self.base is None:
                assert self.preset is not None, "a preset or a base"
                values = {**PRESETS[self.preset].config, **self.config}
                return make_config(values, vocab_size=vocab_size, positions=positions, eos_id=eos_id)
            values = {**target_values(_base_config(self.base), families[self.model_type]), **self.config}
            config = make_config(values, vocab_size=vocab_size, positions=1, eos_id=eos_id)
            check_reach(config, positions)  # a trained model's reach is what it is
            return config
        except ModelError as error:
            raise ModelError(f"[target] {error}") from error

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if (self.preset is None) == (self.base is None):
            what = "nothing given" if self.preset is None else "they exclude each other"
            yield f"preset, base: {what}; give a preset for random weights or a base for pretrained ones"
        elif self.base is not None:
            try:
                _ = self.model_type
            except ModelError as error:
                yield f'base = "{self.base}": {error}'
        else:
            moe_presets = sorted(name for name, preset in PRESETS.items() if preset.config["model_type"] in families)
            if self.preset not in moe_presets:
                hint = did_you_mean(str(self.preset), tuple(moe_presets))
                yield f'preset = "{self.preset}": not a MoE preset{hint}; choose one of {", ".join(moe_presets)}'


@lru_cache(maxsize=8)
def _base_config(source: str) -> PreTrainedConfig:
    """Configuration of a folder or hub model; of a hub model that a preset describes it needs no network."""
    preset = next((p for p in PRESETS.values() if p.hub == source), None)
    return make_config(preset.config, vocab_size=None, positions=1) if preset else read_config(source)


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
        quorum: how many of the devices that are asked have to answer.
        server: [server] how the server's work is spread.
        note: called with a sentence for the record's notes.
        failures: why a device has no part, by device id: the door's, to which refusals of what arrived are added.
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
    quorum: int = 1
    server: ServerOptions = field(default_factory=ServerOptions)
    failures: dict[str, str] = field(default_factory=dict[str, str])

    def keep(self, name: str, make: Callable[[Path], None], *parts: Any) -> Path:
        """The stage's folder, made unless it is there with the same inputs and options (`RunFolder.keep`).

        Raises:
            StageReached: `until` names this stage.
        """
        folder = self.folder.keep(name, make, self.seed, *parts)
        self.reached(name)
        return folder

    def by_device(self, key: str) -> dict[str, str]:
        """Keys of the devices' answers, which follow from `key` and from each device's own rows of [devices].

        So a device that joins, or is shut out, changes no other one's.
        """
        named = {device.id: (device,) for device in self.fleet.named}
        own = {card.id: replace(self.fleet, models=(card.model,), named=named.get(card.id, ())) for card in self.cards}
        return {card.id: key_of(key, card.id, own[card.id]) for card in self.cards}

    def reached(self, name: str) -> None:
        """Say that a stage is done that is not made by `keep`."""
        if self.until == name:
            raise StageReached(name)


class Training(NamedTuple):
    """A device's training.

    Attributes:
        model: what is trained.
        share: of the steps that reading the device's text takes, over all rounds; below 1 where devices sit rounds out.
        public_rows: sequences of public text that it reads besides, for the FLOPs; the device's budget is of private text.
        learns, remade: see `training_memory`.
    """

    model: PreTrainedConfig
    share: float = 1.0
    public_rows: int = 0
    learns: int | None = None
    remade: int = 0

    def memory(self, optimisation: Optimisation, sequence_length: int, *, private: bool = False) -> int:
        """Bytes at its peak."""
        return training_memory(
            self.model, optimisation, sequence_length, learns=self.learns, remade=self.remade, private=private
        ).total

    def what_would_fit(
        self, optimisation: Optimisation, sequence_length: int, limit: int, own: Mapping[str, PreTrainedConfig],
        *, private: bool = False,
    ) -> str:  # fmt: skip
        """A sentence on how to stay below `limit` bytes; another architecture of `own` helps only who trains one of them."""
        others = list(own.items()) if self.model in own.values() else []
        return what_would_fit(
            self.model, optimisation, sequence_length, limit, others, learns=self.learns, remade=self.remade,
            private=private,
        )  # fmt: skip


class Method(Protocol):
    """A federated method: a frozen, registered dataclass whose fields are its TOML options and sections."""

    stages: ClassVar[tuple[str, ...]]
    """Names of its stages in order: what `--until` accepts."""

    @property
    def tune(self) -> TuneOptions:
        """[tune]: the last training of the MoE on the server, which every method ends with."""
        ...

    @property
    def trains_privately(self) -> bool:
        """Whether devices make nothing of their text but a model and an embedding, which [devices.privacy] protects."""
        ...

    def client(self, device: Device, request: Payload) -> Payload:
        """What one device does with one request. Runs where the device's text is."""
        ...

    def server(self, site: Site, call: Call) -> Path:
        """The whole method, seen from the server; returns the folder of a Hugging Face MoE model."""
        ...

    def reference(self, site: Site) -> Path:
        """The same MoE trained without the fleet: on public text alone, with the server's number of tokens."""
        ...

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """What a device of architecture `own` trains, where `target` is the run's MoE; nothing in some methods."""
        ...

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> Traffic | None:
        """What a device of architecture `own` receives and sends; None where that is its text, which nobody has read yet."""
        ...

    def server_work(self, shapes: Shapes) -> tuple[Work, ...]:
        """The server's trainings, warm starts apart."""
        ...

    def faults_with(self, devices: FleetOptions, data: DataOptions, target: TargetOptions) -> Iterator[str]:
        """Combinations with the other sections that cannot work, each with its cure."""
        ...


methods: Registry[Method] = Registry("method")


def family_faults(data: DataOptions, target: TargetOptions) -> Iterator[str]:
    """What keeps the target's family from having a base of one expert."""
    family = families[target.model_type]
    try:
        family.student_config(family.ready_target(target.make(data.tokenizer.vocab_size, data.sequence_length, None)))
    except ModelError as error:
        yield str(error)


def precision_faults(trainings: Mapping[str, Optimisation]) -> Iterator[str]:
    """The server computes in one precision: what is wrong with those of its trainings, by section."""
    if len({mixed_precision(training.precision) for training in trainings.values()}) > 1:
        said = " and ".join(sorted({training.precision for training in trainings.values()}))
        *others, last = (f"[{section}]" for section in trainings)
        yield (f"precision = {said} in {', '.join(others)} and {last}: the server computes in one; give all the same")


def plugin(registry: Registry[Any], default: str | None = None, *, optional: str | None = None) -> Any:
    """A dataclass field whose TOML section names one of `registry` by `type`; required when there is no default.

    Args:
        optional: name of a section that may be left out; the field is None then.
    """
    if optional is not None:
        return field(default=None, metadata={"registry": registry, "key": optional})
    if default is None:
        return field(metadata={"registry": registry})
    return field(default_factory=lambda: registry[default](), metadata={"registry": registry})
