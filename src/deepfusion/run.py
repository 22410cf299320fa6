# SPDX-License-Identifier: Apache-2.0
"""One run: prepare the data, check the fleet, let the method work, and measure what came out.

Evaluation happens here and not in the methods, so that no method can measure itself differently from another.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from deepfusion.artifacts import LOCK, MANIFEST, RunFolder, SharedFolder, hold, key_of, write_atomic
from deepfusion.config import CONFIG, RunConfig, to_toml
from deepfusion.data.options import CorpusSource, TokenizerOptions
from deepfusion.data.prepare import PreparedData, corpus_from_source, load_prepared, prepare
from deepfusion.data.sources import fingerprint
from deepfusion.data.split import divide
from deepfusion.devices import configurations, memory
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard, cards, shared_ids
from deepfusion.devices.releases import Seeded
from deepfusion.errors import ConfigError, DataError, MemoryLimitError, ResumeError, few
from deepfusion.federation.header import LARGEST_HEADER
from deepfusion.methods.base import Site, Training
from deepfusion.methods.budget import Shapes
from deepfusion.moe import families
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, Progress, silent


@dataclass
class Notes:
    """Sentences for the record, each once, in the order in which they were said."""

    sentences: list[str] = field(default_factory=list[str])

    def __call__(self, sentence: str) -> None:
        """Add a sentence."""
        if sentence not in self.sentences:
            self.sentences.append(sentence)


@contextmanager
def open_folder(config: RunConfig, path: Path, *, resume: bool, **note: str) -> Generator[RunFolder]:
    """The run folder, with the resolved configuration in it, for this process alone while the context lasts.

    Args:
        note: what others are told of this process; see `hold`.

    Raises:
        ResumeError: there is a run in it already and `resume` was not asked for, or there are other things than a run.
        BusyError: another process is at work on it.
    """
    if path.exists() and not path.is_dir():
        raise ResumeError(f"{path}: is a file; choose another --out")
    if others := _not_ours(path):
        raise ResumeError(
            f"{path}: holds {few(others)}, but no run, which would replace what has its stages' names; choose another --out"
        )
    with hold(path, **note):
        if (path / CONFIG).exists() and (path / "data").exists() and not resume:  # else it ended before its first stage
            raise ResumeError(f"{path}: holds a run already; add --resume to go on with it, or choose another --out")
        write_atomic(path / CONFIG, to_toml(config))
        yield RunFolder(path)


def _not_ours(path: Path) -> list[str]:
    """What a folder in which no run has ever begun holds already; hidden files are left out."""
    if not path.exists() or (path / LOCK).exists() or any(path.glob(f"*/{MANIFEST}")):
        return []
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def check_until(config: RunConfig, until: str | None) -> None:
    """Raise ConfigError unless `until` is None or one of the method's stages."""
    if until is not None and until not in config.method.stages:
        raise ConfigError(
            [f"--until {until}: no such stage; choose one of {', '.join(config.method.stages)}"], "command line"
        )


def check_memory(config: RunConfig) -> None:
    """Refuse, before any training, a fleet whose devices cannot hold what they would train in their stated memory.

    Raises:
        MemoryLimitError: names every such device and says what would fit; with `unfit = "leave out"` only when none is left.
    """
    faults = too_large(config)
    left = len(cards(config.devices, config.seed)) - len(faults)
    if faults and (config.devices.unfit == "stop" or not left):
        lines = [f"{device_id} {reason}" for device_id, reason in faults.items()]
        raise MemoryLimitError("devices whose training does not fit their memory:\n  " + "\n  ".join(lines))


def too_large(config: RunConfig) -> dict[str, str]:
    """The devices that cannot hold what they would train in their stated memory, and what would fit."""
    length, training = config.data.sequence_length, config.devices.training
    own, largest = own_configs(config), largest_trainings(config)
    private = config.devices.privacy is not None
    needs = {name: found.memory(training, length, private=private) for name, found in largest.items() if found}
    found: dict[str, str] = {}
    for card in cards(config.devices, config.seed):
        hosted, limit = largest[card.model.name], card.memory_limit_bytes
        if hosted and limit is not None and (need := needs[card.model.name]) > limit:
            what = card.model.name if hosted.model == own[card.model.name] else hosted.model.model_type
            cure = hosted.what_would_fit(training, length, limit, own, private=private)
            found[card.id] = f"({what}) needs {memory.gib(need)} of {memory.gib(limit)}: {cure}"
    return found


def own_configs(config: RunConfig) -> dict[str, PreTrainedConfig]:
    """Configuration of each architecture of the fleet, by its name."""
    vocabulary, length = config.data.tokenizer.vocab_size, config.data.sequence_length
    return {s.name: configurations.config_of(s, vocab_size=vocabulary, positions=length) for s in config.devices.models}


def trainings(config: RunConfig) -> dict[str, tuple[Training, ...]]:
    """What a device of each architecture trains."""
    target = shapes_of(config).target
    return {name: config.method.trainings(own, target) for name, own in own_configs(config).items()}


def largest_trainings(config: RunConfig) -> dict[str, Training | None]:
    """The training of a device of each architecture that takes most memory; None where it trains nothing."""
    training, length = config.devices.training, config.data.sequence_length
    return {
        name: max(found, key=lambda one: one.memory(training, length), default=None)
        for name, found in trainings(config).items()
    }


def shapes_of(config: RunConfig) -> Shapes:
    """The models and sizes that the method's costs depend on; with a number of domains yet to be found, one an expert."""
    own, carried = own_configs(config), {card.model.name for card in cards(config.devices, config.seed)}
    target = config.target.make(config.data.tokenizer.vocab_size, config.data.sequence_length, None)
    family = families[config.target.model_type]
    target = family.ready_target(target)
    wanted = getattr(getattr(config.method, "cluster", None), "num_clusters", "auto")
    size = config.devices.count + len(config.devices.named)
    domains = min(size, wanted if isinstance(wanted, int) else family.num_experts(target))
    shapes = tuple(shape for name, shape in own.items() if name in carried)
    return Shapes(config.data.sequence_length, domains, shapes, family.student_config(target), target)


def largest_reply(config: RunConfig, data: PreparedData) -> int | None:
    """Bytes that no single answer of a device comes near: twice what the plan says that one sends in the whole run, and a header.

    None where devices send their text, whose size nobody knows beforehand.
    """
    known = replace(config, data=replace(config.data, tokenizer=TokenizerOptions(vocab_size=data.vocab_size)))
    shapes = shapes_of(known)
    sent = [config.method.traffic(own, shapes) for own in own_configs(known).values()]
    found = [traffic.up for traffic in sent if traffic is not None]
    return 2 * max(found) + LARGEST_HEADER if len(found) == len(sent) else None


def prepare_data(config: RunConfig, folder: RunFolder, progress: Progress = silent) -> PreparedData:
    """The run's text, tokenised; done once for the same text and options."""
    options = config.data
    path = folder.keep("data", lambda out: prepare(options, out, progress=progress), options, fingerprint(options))
    return load_prepared(path)


def has_this_text(config: RunConfig, folder: RunFolder) -> bool:
    """Whether a finished run's text is what is behind its [data] now; also where either is not there to be looked at."""
    key = folder.key("data")
    try:
        return key is None or key == key_of("data", config.data, fingerprint(config.data))
    except DataError:
        return True


def make_site(
    config: RunConfig,
    folder: RunFolder,
    data: PreparedData,
    *,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda sentence: None,
    until: str | None = None,
    failures: dict[str, str] | None = None,
) -> Site:
    """The server's side of the run. Devices that are too small for the method have no part in it.

    Args:
        failures: the door's.
    """
    unfit = too_large(config)
    if unfit:
        note(f"{len(unfit)} devices are left out: what they would train does not fit their memory")
    site = Site(
        folder=folder,
        fleet=config.devices,
        cards=tuple(card for card in cards(config.devices, config.seed) if card.id not in unfit),
        data=data,
        data_key=folder.key("data") or "",
        sequence_length=config.data.sequence_length,
        target=config.target,
        seed=config.seed,
        cache=SharedFolder(cache_folder(), note),
        progress=progress,
        note=note,
        until=until,
        quorum=config.federation.minimum_devices,
        server=config.server,
        failures={} if failures is None else failures,
    )
    site.reached("data")
    return site


def cache_folder() -> Path:
    """Where warm-start checkpoints are shared between runs: $DEEPFUSION_CACHE, or ~/.cache/deepfusion."""
    return Path(os.environ.get("DEEPFUSION_CACHE", "~/.cache/deepfusion")).expanduser()


def make_device(config: RunConfig, folder: RunFolder, card: DeviceCard) -> Device:
    """A device of a run on one machine, with its part of the private text or files of its own."""
    data = load_prepared(folder / "data")
    training = config.devices.training
    key = key_of(card.model, config.devices, folder.key("data"), config.seed, config.data.sequence_length)
    return Device(
        id=card.id,
        model=card.model,
        corpus=private_corpus(config, data, card.id),
        tokenizer=data.tokenizer,
        sequence_length=config.data.sequence_length,
        training=training,
        privacy=config.devices.privacy,
        epochs=config.devices.epochs,
        max_steps=config.devices.max_steps,
        memory_limit_bytes=card.memory_limit_bytes,
        seed=(seed := derive_seed(config.seed, "device", card.id)),
        releases=Seeded(seed),
        scratch=folder.path / ".partial" / f"device-{card.id}-{key[:12]}",
    )


def text_is_here(config: RunConfig, device_id: str) -> bool:
    """Whether this machine has the device's text; on a real fleet no one but the device has it."""
    return all(device.files or device.id != device_id for device in config.devices.named)


def check_text(config: RunConfig) -> None:
    """Raise ConfigError where `deepfusion run` is asked to be a device whose text is elsewhere."""
    away = [device.id for device in config.devices.named if not device.files]
    if away:
        raise ConfigError(
            [
                f"[[devices.named]] {', '.join(away)}: no files; add them, or reach the devices by `deepfusion fleet run`"
            ],
            "run",
        )


def private_corpus(config: RunConfig, data: PreparedData, device_id: str) -> Corpus:
    """The text of one device."""
    fleet = config.devices
    named = {device.id: device for device in fleet.named}
    if device_id in named:
        own = named[device_id]
        source = CorpusSource(domain=own.domain, private=own.files, text=own.text, prompt=own.prompt, answer=own.answer)
        return corpus_from_source(
            source, "private", data.tokenizer, root=config.data.folder, counted=config.data.counted
        )
    parts = divide(data.private, shared_ids(fleet), alpha=fleet.alpha, sigma=fleet.sigma, seed=config.seed)
    return data.private.select(parts[device_id])


def versions() -> dict[str, str]:
    """Versions of what the results depend on."""
    names = ("deepfusion-moe", "torch", "transformers", "flwr", "scikit-learn", "safetensors")
    found = {name: version(name) for name in names}
    return {
        **found,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }
