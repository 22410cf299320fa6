# SPDX-License-Identifier: Apache-2.0
"""TOML -> RunConfig, strict: unknown keys, wrong types and impossible combinations are all reported at once.

How dataclasses are read is in `schema.py`; here stands which sections a run has, and what they must agree on.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from deepfusion.data.options import DataOptions
from deepfusion.devices.fleet import FleetOptions
from deepfusion.errors import ConfigError
from deepfusion.federation.options import FederationOptions
from deepfusion.methods import Method, TargetOptions, methods
from deepfusion.registry import did_you_mean, option_name
from deepfusion.schema import build, plain, read_toml, scalars_first
from deepfusion.spread import ServerOptions

CONFIG = "config.toml"
"""The configuration's name in a run folder."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """[evaluate]: what is measured beside the fused MoE.

    Attributes:
        public_only: train the same MoE on the public text alone, with the same tokens, to compare with.
        devices: score every device's own model.
        proxies: score every proxy (teacher).
        students: score every distilled student.
        rounds: of a method in rounds, score the model after each.
    """

    public_only: bool = True
    devices: bool = True
    proxies: bool = True
    students: bool = True
    rounds: bool = True


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run depends on.

    Attributes:
        name: what the run is called in reports.
        seed: the seed that all other seeds are derived from.
        method: the federated method with all of its options (in TOML: `method = "deepfusion"` and its sections).
        data: [data] corpora, tokenizer, sequence length.
        devices: [devices] the fleet.
        target: [target] the MoE that comes out.
        federation: [federation] how devices are reached.
        server: [server] how the server's work is spread.
        evaluate: [evaluate] what is measured.
        compare: [compare.<method>] options of DeepFusion's rivals where `deepfusion compare` should not choose them.
    """

    name: str = "run"
    seed: int = 0
    method: Method = field(metadata={"registry": methods})
    data: DataOptions
    devices: FleetOptions
    target: TargetOptions
    federation: FederationOptions = field(default_factory=FederationOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    compare: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def faults(self) -> Iterator[str]:
        """Combinations of sections that cannot work."""
        if Path(self.name).name != self.name:
            yield f'name = "{self.name}": becomes the name of a folder; leave it plain, and give --out for another place'
        if self.seed < 0:
            yield f"seed = {self.seed}: must not be negative; choose 0 or more"
        for name in self.compare.keys() - set(methods):
            yield f"[compare.{name}]: no such method{did_you_mean(name, tuple(methods))}; known: {', '.join(methods)}"
        if self.devices.count and not any(source.of("private") for source in self.data.corpora):
            cure = "add private = ... to a row, or give every device its own files ([[devices.named]]) and count = 0"
            yield f"[data] corpora: no row has private text: devices have nothing to train on; {cure}"
        if self.devices.privacy and not self.method.trains_privately:
            cure = "use a method that is one exchange of models, without [continue], or remove the section"
            yield f"[devices.privacy]: of this method devices give away more than private models; {cure}"
        if self.federation.minimum_devices > (size := self.devices.count + len(self.devices.named)):
            yield f"[federation] minimum_devices = {self.federation.minimum_devices}: the fleet has {size}; lower it"
        if self.server.workers > 1 and getattr(self.method, "recipe", None) != "paper":
            cure = 'set recipe = "paper", or workers = 1'
            yield f"[server] workers = {self.server.workers}: there are no independent students to distil at a time; {cure}"
        if (parts := self.method.tune.optimisation.accumulate) % max(1, self.server.shards):
            cure = f"set accumulate = {self.server.shards}, and batch_size to what is then left"
            yield f"[tune.optimisation] accumulate = {parts}: no multiple of [server] shards = {self.server.shards}; {cure}"
        yield from self.method.faults_with(self.devices, self.data, self.target)


def load_config(path: str | Path, overrides: Sequence[str] = (), *, seed: int | None = None) -> RunConfig:
    """Read a TOML file, or that of a run folder, apply `section.key=value` overrides, and check everything.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    path = Path(path)
    path = path / CONFIG if path.is_dir() else path
    tree = read_toml(path, overrides)
    if seed is not None:
        tree["seed"] = seed
    return parse_config(tree, source=f"{path} with --set" if overrides else str(path))


def parse_config(tree: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Build a RunConfig out of nested dictionaries, as `tomllib` gives them.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    faults: list[str] = []
    shared = {f.name for f in dataclasses.fields(RunConfig)} - {"method"}
    name = tree.get("method", "deepfusion")
    if not isinstance(name, str) or name not in methods:
        known = ", ".join(methods)
        hint = did_you_mean(str(name), tuple(methods))
        faults.append(f'method = "{name}": unknown{hint}; choose one of {known}')
        build(RunConfig, {k: v for k, v in tree.items() if k in shared}, "", faults, given={"method": None}, ask=False)
        raise ConfigError(faults, source)
    method_class = methods[name]
    method_keys = {option_name(f) for f in dataclasses.fields(typing.cast(Any, method_class))}
    unknown = [key for key in tree if key != "method" and key not in shared | method_keys]
    for key in unknown:
        what = f"[{key}]" if isinstance(tree[key], dict) else f"{key} = {tree[key]!r}"
        hint = did_you_mean(key, tuple(shared | method_keys))
        faults.append(f"{what}: unknown{hint}; {'mend the name' if hint else 'remove it'}")
    method = build(method_class, {k: v for k, v in tree.items() if k in method_keys}, "", faults)
    values = {k: v for k, v in tree.items() if k in shared}
    config = build(RunConfig, values, "", faults, given={"method": method}, ask=False)
    if config is not None and not faults:
        faults += config.faults()
    if faults or config is None:
        raise ConfigError(faults, source)
    return config


def tree_of(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as nested dictionaries, defaults included; `parse_config` reads it back as an equal value."""
    tree = plain(config)
    method = tree.pop("method")
    return {"method": method.pop("type"), **scalars_first({**tree, **method})}


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """What another configuration says otherwise, each as "section.key = value, was value"."""
    old, new = _flat(tree_of(before)), _flat(tree_of(after))
    absent = "not set"
    return [
        f"{key} = {new.get(key, absent)}, was {old.get(key, absent)}"
        for key in {**old, **new}
        if new.get(key) != old.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def to_toml(config: RunConfig) -> str:
    """`tree_of` as a TOML file."""
    return tomli_w.dumps(tree_of(config))
