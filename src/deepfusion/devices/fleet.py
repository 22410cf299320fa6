# SPDX-License-Identifier: Apache-2.0
"""The [devices] section: who is in the fleet, with which architecture, limit and training."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deepfusion.devices.presets import PRESETS
from deepfusion.devices.privacy import PrivacyOptions
from deepfusion.registry import did_you_mean
from deepfusion.training import Optimisation, derive_seed
from deepfusion.types import ModelSpec

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a device or architecture may be called: file names are made of it."""
MOST_DEVICES = 1_000_000
"""Ten times what `docs/scaling.md` prices; a number beyond is a slip of the hand, and would take hours to find out."""


@dataclass(frozen=True, kw_only=True)
class NamedDevice:
    """[[devices.named]]: a device with files of its own, in addition to the `count` that share the private text.

    Attributes:
        id: its name.
        model: the name of one of [[devices.models]].
        files: its text: paths or patterns below the data root; none where the text is on a device of a real fleet, which
            names it in a configuration of its own (`deepfusion fleet`).
        domain: the domain that its text is shown under.
        text: template of a document without a prompt; "{text}" when there is no `prompt` either.
        prompt: template of what a document's answer is conditioned on.
        answer: template of what follows the prompt.
        memory_limit_gib: takes the place of the fleet's limit.
    """

    id: str
    model: str
    files: tuple[str, ...] = ()
    domain: str = "own"
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    memory_limit_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """[devices]: the fleet.

    Attributes:
        count: devices that the private text is divided over.
        alpha: Dirichlet concentration of a device's mixture of domains; small is one-sided, inf is even.
        sigma: spread of the lognormal sizes of the devices' corpora; 0 makes them equal.
        models: the architectures ([[devices.models]]), given to devices by their `share`.
        named: devices with files of their own ([[devices.named]]).
        memory_limit_gib: most memory that a device may need for its training; none when left out.
        unfit: what happens where a device's training does not fit its memory: the run stops before anything is trained, or
            it goes on without that device and counts it.
        epochs: how often a device reads its text.
        max_steps: most optimiser steps of a device.
        threads: CPU threads of one device's training; a fixed number, so that every engine gives the same bytes.
        training: [devices.training] how devices optimise.
        privacy: [devices.privacy] devices train with differential privacy; left out, they do not.
    """

    count: int
    alpha: float = 0.5
    sigma: float = 0.5
    models: tuple[ModelSpec, ...]
    named: tuple[NamedDevice, ...] = ()
    memory_limit_gib: float | None = None
    unfit: Literal["stop", "leave out"] = "stop"
    epochs: float = 1.0
    max_steps: int | None = None
    threads: int = 1
    training: Optimisation = field(default_factory=Optimisation)
    privacy: PrivacyOptions | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.count < 0 or self.count + len(self.named) < 1:
            yield f"count = {self.count}: a fleet needs at least one device; raise count or add [[devices.named]]"
        if self.count > MOST_DEVICES:
            yield f"count = {self.count}: one run does not gather so many; choose {MOST_DEVICES} at most"
            return  # their names alone would fill the memory
        if not self.alpha > 0:
            yield f"alpha = {self.alpha}: must be positive; 0.5 is one-sided, inf is even"
        if not 0 <= self.sigma < math.inf:
            yield f"sigma = {self.sigma}: must be a number from 0 on; 0 makes the devices' corpora equal in size"
        if not 0 < self.epochs < math.inf:
            yield f"epochs = {self.epochs}: devices would train for ever or never; choose a positive number"
        if self.max_steps is not None and self.max_steps < 1:
            yield f"max_steps = {self.max_steps}: no device would train; choose at least 1 or remove it"
        if self.threads < 1:
            yield f"threads = {self.threads}: a device trains on at least one thread; choose 1 or more"
        if self.memory_limit_gib is not None and not self.memory_limit_gib > 0:
            yield f"memory_limit_gib = {self.memory_limit_gib}: must be positive; remove it for no limit"
        yield from self._model_faults()
        yield from self._named_faults()

    def _model_faults(self) -> Iterator[str]:
        if not self.models:
            yield "models = []: no architecture; add a [[devices.models]] section with name and preset"
        for name, times in Counter(spec.name for spec in self.models).items():
            if times > 1:
                yield f'models: the name "{name}" is given {times} times; choose another name for each'
        for spec in self.models:
            if not SAFE_ID.fullmatch(spec.name):
                yield f'models: name = "{spec.name}": letters, digits, dot, dash and underscore only; choose another name'
            given = [key for key in ("preset", "folder", "hub") if getattr(spec, key) is not None]
            if len(given) != 1:
                what = (
                    "none of preset, folder, hub is given" if not given else f"{' and '.join(given)} exclude each other"
                )
                yield f'models: "{spec.name}": {what}; give exactly one'
            if spec.preset is not None and spec.preset not in PRESETS:
                hint = did_you_mean(spec.preset, tuple(PRESETS))
                yield f'models: "{spec.name}": preset = "{spec.preset}": unknown{hint}; see `deepfusion list`'
            if not 0 < spec.share < math.inf:
                yield f'models: "{spec.name}": share = {spec.share}: must be a positive number; remove the section for no device'

    def _named_faults(self) -> Iterator[str]:
        models, shared = {spec.name for spec in self.models}, set(shared_ids(self))
        for name, times in Counter(device.id for device in self.named).items():
            if times > 1:
                yield f'named: the id "{name}" is given {times} times; every device needs its own'
        for device in self.named:
            if not SAFE_ID.fullmatch(device.id) or device.id in shared:
                taken = " (one of the `count` has this one)" if device.id in shared else ""
                yield f'named: id = "{device.id}"{taken}: letters, digits, dot, dash and underscore; choose another id'
            if device.model not in models:
                hint = did_you_mean(device.model, tuple(models))
                yield f'named: "{device.id}": model = "{device.model}": not in [[devices.models]]{hint}; name one of them'
            if device.memory_limit_gib is not None and not device.memory_limit_gib > 0:
                limit = device.memory_limit_gib
                yield f'named: "{device.id}": memory_limit_gib = {limit}: must be positive; remove it for the fleet\'s limit'


@dataclass(frozen=True)
class DeviceCard:
    """What everyone may know of a device: nothing of its text.

    Attributes:
        id: unique in the fleet.
        model: the architecture that it trains.
        memory_limit_bytes: None without a limit.
    """

    id: str
    model: ModelSpec
    memory_limit_bytes: int | None


def shared_ids(options: FleetOptions) -> tuple[str, ...]:
    """Ids of the devices that the private text is divided over."""
    width = max(3, len(str(options.count - 1)))
    return tuple(f"device-{index:0{width}d}" for index in range(options.count))


def cards(options: FleetOptions, seed: int) -> tuple[DeviceCard, ...]:
    """The fleet: architectures by largest remainder of their shares, given out in an order drawn from `seed`."""
    shares = np.asarray([spec.share for spec in options.models]) / sum(spec.share for spec in options.models)
    exact = shares * options.count
    counts = np.floor(exact).astype(int)
    for index in np.argsort(-(exact - counts), kind="stable")[: options.count - counts.sum()]:
        counts[index] += 1
    order = np.random.default_rng(derive_seed(seed, "architectures")).permutation(
        np.repeat(np.arange(len(counts)), counts)
    )
    by_name = {spec.name: spec for spec in options.models}
    fleet = [
        DeviceCard(name, options.models[index], _bytes(options.memory_limit_gib))
        for name, index in zip(shared_ids(options), order, strict=True)
    ]
    fleet += [
        DeviceCard(d.id, by_name[d.model], _bytes(d.memory_limit_gib or options.memory_limit_gib))
        for d in options.named
    ]
    return tuple(fleet)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)
