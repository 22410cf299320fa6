# SPDX-License-Identifier: Apache-2.0
"""TOML to frozen dataclasses, strict: unknown keys, wrong types and missing values are all reported at once.

A schema is not written down: a section is a frozen dataclass that lives beside the code it configures, and this file walks
it. `type = "<name>"` in a section picks a registered dataclass.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deepfusion.errors import ConfigError
from deepfusion.registry import Registry, describe_type, did_you_mean, option_name

Options = TypeVar("Options")


def load_options(cls: type[Options], path: Path) -> Options:
    """Read a TOML file of another kind than a run's, as strictly.

    Args:
        cls: a frozen dataclass of options.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    return parse_options(cls, read_toml(path), str(path))


def parse_options(cls: type[Options], tree: Mapping[str, Any], source: str) -> Options:
    """Build a dataclass of options out of nested dictionaries.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    faults: list[str] = []
    options = build(cls, tree, "", faults)
    if faults:
        raise ConfigError(faults, source)
    return options


def plain_options(options: Any) -> dict[str, Any]:
    """A dataclass of options as nested dictionaries, defaults included, scalars first; `parse_options` reads it back."""
    return scalars_first(plain(options))


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A TOML file as nested dictionaries, with `section.key=value` overrides applied.

    Raises:
        ConfigError: there is no such file, it is not valid TOML, or an override is not of that form.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        shipped = ", ".join(str(p) for p in sorted(Path("configs").glob("*.toml")))
        raise ConfigError(
            [f"no such file; {f'there are {shipped}' if shipped else 'check the path'}"], str(path)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read: {error}; give the path of a UTF-8 TOML file"], str(path)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not valid TOML: {error}; strings need quotes, sections read [name]"], str(path)) from error
    for text in overrides:
        override(tree, text)
    return tree


def override(tree: dict[str, Any], text: str) -> None:
    """Apply one `a.b.c=value`; list items are named by their index. The value is TOML, or else a plain string.

    Raises:
        ConfigError: it is not of that form, or leads nowhere.
    """
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(["not of the form section.key=value; for example: --set devices.count=8"], f"--set {text}")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    node: Any = tree
    for depth, key in enumerate(keys):
        place = _place(node, key, ".".join(keys[:depth]), text)
        if depth == len(keys) - 1:
            node[place] = value
        else:
            node = node.setdefault(place, {}) if isinstance(node, dict) else node[place]


def _place(node: Any, key: str, where: str, text: str) -> Any:
    """The key or list index that `key` names in `node`."""
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ConfigError([f"{where} is a value, not a section; shorten the path"], f"--set {text}")
    last = len(typing.cast(list[Any], node)) - 1
    if not key.isdigit() or int(key) > last:
        raise ConfigError([f"{where} has items 0 to {last}, not {key!r}; name one of them"], f"--set {text}")
    return int(key)


def build(
    cls: type,
    tree: Any,
    section: str,
    faults: list[str],
    given: Mapping[str, Any] | None = None,
    *,
    ask: bool = True,
) -> Any:
    """An instance of the dataclass `cls` out of `tree`, or None after adding what is wrong to `faults`.

    Args:
        section: how messages call it; empty for the top level.
        given: fields that are made already.
        ask: whether to ask the instance itself for `faults()` too.
    """
    given = given or {}
    if not isinstance(tree, dict):
        faults.append(f"[{section}] = {tree!r}: must be a section with keys; write [{section}] and key = value lines")
        return None
    hints = typing.get_type_hints(cls)
    fields = {option_name(f): f for f in dataclasses.fields(cls) if f.init}
    before = len(faults)
    for key in tree:
        if key not in fields:
            hint = did_you_mean(key, tuple(fields))
            faults.append(f"{_at(section)}{key} = {_short(tree[key])}: unknown key{hint}; known: {', '.join(fields)}")
    values: dict[str, Any] = dict(given)
    for name, spec in fields.items():
        if name in given:
            continue
        inner = f"{section}.{name}" if section else name
        hint, registry = hints[spec.name], spec.metadata.get("registry")
        if name in tree:
            values[spec.name] = _value(hint, registry, tree[name], inner, section, name, faults)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            faults.append(_missing(hint, registry, inner, section, name))
    if len(faults) > before:
        return None
    instance = cls(**values)
    if ask and hasattr(cls, "faults"):
        faults += [f"{_at(section)}{fault}" for fault in instance.faults()]
    return instance


def _value(
    hint: Any, registry: Registry[Any] | None, raw: Any, inner: str, section: str, name: str, faults: list[str]
) -> Any:
    if registry is not None:
        return _plugin(registry, raw, inner, faults)
    options = (
        [a for a in get_args(hint) if a is not type(None)] if get_origin(hint) in (Union, types.UnionType) else [hint]
    )
    nested = next((o for o in options if dataclasses.is_dataclass(o)), None)
    if nested is not None:
        return build(typing.cast(type, nested), raw, inner, faults)
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        if not isinstance(raw, list):
            faults.append(f"[{inner}] = {_short(raw)}: must be a list of sections; write [[{inner}]] before each")
            return None
        row_type = typing.cast(type, get_args(hint)[0])
        return tuple(build(row_type, row, f"{inner}.{i}", faults) for i, row in enumerate(typing.cast(list[Any], raw)))
    return _leaf(hint, raw, section, name, faults)


def _plugin(registry: Registry[Any], raw: Any, section: str, faults: list[str]) -> Any:
    known = ", ".join(registry)
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        faults.append(f'[{section}]: needs type = "..."; choose one of {known}')
        return None
    name = raw["type"]
    if name not in registry:
        faults.append(
            f'[{section}] type = "{name}": unknown{did_you_mean(name, tuple(registry))}; choose one of {known}'
        )
        return None
    return build(registry[name], {k: v for k, v in raw.items() if k != "type"}, section, faults)


def misfits(error: ValidationError, whole: str = "file") -> list[str]:
    """What does not fit where, in pydantic's words: "place.within: message"; a fault of all of it is one of `whole`."""
    return [f"{'.'.join(map(str, one['loc'])) or whole}: {one['msg']}" for one in error.errors()]


def _leaf(hint: Any, raw: Any, section: str, name: str, faults: list[str]) -> Any:
    value = tuple(raw) if isinstance(raw, list) and "tuple" in str(hint) else raw
    try:
        checked = TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        reasons = {e["msg"][0].lower() + e["msg"][1:] for e in error.errors()}
        faults.append(
            f"{_at(section)}{name} = {_short(raw)}: {' or '.join(sorted(reasons))}; give {describe_type(hint)}"
        )
        return None
    if isinstance(checked, float) and math.isnan(checked):
        faults.append(f"{_at(section)}{name} = nan: not a number; give {describe_type(hint)}")
        return None
    return checked


def _missing(hint: Any, registry: Registry[Any] | None, inner: str, section: str, name: str) -> str:
    if registry is not None:
        return f"[{inner}] is missing; add it with type = one of {', '.join(registry)}"
    if dataclasses.is_dataclass(hint):
        return f"[{inner}] is missing; add the section ({(hint.__doc__ or '').strip().splitlines()[0]})"
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        return f"[[{inner}]] is missing; add at least one such section"
    return f"{_at(section)}{name} is missing; give {describe_type(hint)}"


def _at(section: str) -> str:
    return f"[{section}] " if section else ""


def _short(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: Any, registry: Registry[Any] | None = None) -> Any:
    """Inverse of `build`: nested dictionaries, lists and scalars; what is None is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree = {} if registry is None else {"type": registry.name_of(type(value))}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if item is not None:
                tree[option_name(f)] = plain(item, f.metadata.get("registry"))
        return tree
    if isinstance(value, tuple | list):
        return [plain(v) for v in typing.cast(Sequence[Any], value)]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in typing.cast(dict[str, Any], value).items() if v is not None}
    return os.fspath(value) if isinstance(value, Path) else value


def scalars_first(tree: dict[str, Any]) -> dict[str, Any]:
    """TOML wants a table's own keys before its sections."""
    return dict(sorted(tree.items(), key=lambda item: isinstance(item[1], dict | list)))
