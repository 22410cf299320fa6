# SPDX-License-Identifier: Apache-2.0
"""Everything that a configuration can name: plug-in parts, sections and options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from deepfusion.config import RunConfig
from deepfusion.data.embedded import EMBEDDED
from deepfusion.devices.presets import PRESETS
from deepfusion.fleet.device_file import DeviceFile
from deepfusion.fleet.server_file import ServerFile
from deepfusion.methods import methods
from deepfusion.methods.selective import continuations
from deepfusion.moe import families
from deepfusion.registry import describe_type, option_name
from deepfusion.stages.cluster import clusterings
from deepfusion.stages.distill import rules
from deepfusion.stages.embed import embeddings


def catalogue() -> dict[str, dict[str, str]]:
    """What can be plugged in, by kind: names and one line on each."""
    registries = {
        "method": methods, "[embed] type": embeddings, "[cluster] type": clusterings, "[distill] type": rules,
        "[continue] type": continuations,
    }  # fmt: skip
    parts = {kind: registry.describe() for kind, registry in registries.items()}
    moe = {name: p.about for name, p in PRESETS.items() if p.config["model_type"] in families}
    kinds = {"single": "its students have one expert", "dense": "its students are dense"}
    return {
        **parts,
        "family of MoE": {name: f"model_type of the target; {kinds[f.student]}" for name, f in families.items()},
        "[target] preset": moe,
        "[[devices.models]] preset": {name: p.about for name, p in PRESETS.items() if name not in moe},
        "[[data.corpora]] embedded": dict.fromkeys(EMBEDDED, "real text out of Python packages"),
    }


HEAD = "| option | value | default | meaning |\n|---|---|---|---|"
INTRODUCTION = """# Configuration

One TOML file a run; in a fleet of real machines ([fleet.md](fleet.md)) the server and each device have one of their own (at the
end). Unknown keys, wrong types and impossible combinations are refused, all at once; `--set section.key=value` overrides one
value of a run. A section without a required key may be left out."""


def reference() -> str:
    """Every section and option with its type, default and meaning, as Markdown; read off the dataclasses themselves."""
    reader = _Reader()
    shared, below = reader.rows(RunConfig, "")
    top = [
        HEAD,
        '| `method` | a text in quotes | `"deepfusion"` | the federated method; see its own sections |',
        *shared,
    ]
    parts = [INTRODUCTION, "## Top level", "\n".join(top), *below]
    own = {f'With `method = "{name}"`': methods[name] for name in methods}
    files: dict[str, type] = {"A fleet's `device.toml`": DeviceFile, "A fleet's `fleet.toml`": ServerFile}
    for title, cls in (own | files).items():
        rows, below = reader.rows(cls, "")
        parts += [f"## {title}", _about(cls), "\n".join([HEAD, *rows]), *below]
    return "\n\n".join(parts) + "\n"


class _Reader:
    """Walks dataclasses; one that it meets again is described by a reference to the first place."""

    def __init__(self) -> None:
        self.seen: dict[type, str] = {}

    def rows(self, cls: type, section: str) -> tuple[list[str], list[str]]:
        """Table rows of a dataclass's own options, and the sections below it."""
        meaning, hints = _meanings(cls), typing.get_type_hints(cls)
        rows: list[str] = []
        below: list[str] = []
        for field in dataclasses.fields(cls):
            inner = f"{section}.{option_name(field)}" if section else option_name(field)
            hint, registry = hints[field.name], field.metadata.get("registry")
            nested = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
            if registry is not None and registry is not methods:
                made = field.default_factory is not dataclasses.MISSING
                usual = registry.name_of(type(typing.cast(Any, field.default_factory)())) if made else ""
                for name in registry:
                    about = f' with `type = "{name}"`' + (", the default" if name == usual else "")
                    below += self.section(registry[name], inner, f"`[{inner}]`{about}")
            elif nested:
                brackets = f"[[{inner}]]" if typing.get_origin(hint) is tuple else f"[{inner}]"
                below += self.section(typing.cast(type, nested[0]), inner, f"`{brackets}`")
            elif registry is None:
                default = _default(field)
                rows.append(f"| `{field.name}` | {describe_type(hint)} | {default} | {meaning.get(field.name, '')} |")
        return rows, below

    def section(self, cls: type, section: str, title: str) -> list[str]:
        """A section's heading, table and the sections below it."""
        if cls in self.seen:
            return [f"### {title}", f"The options of `[{self.seen[cls]}]`."]
        self.seen[cls] = section
        rows, below = self.rows(cls, section)
        return [f"### {title}", _about(cls), *(["\n".join([HEAD, *rows])] if rows else []), *below]


def _about(cls: type) -> str:
    """What a docstring says before its attributes."""
    text = (inspect.getdoc(cls) or "").partition("\n\nAttributes:")[0]
    text = re.sub(r"^\[.*?\]+: ", "", text).strip()
    return text[:1].upper() + text[1:]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return "none"
    text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
    return f"`{text}`" if not isinstance(value, tuple) else f"`{list(typing.cast(tuple[object, ...], value))}`"


def _meanings(cls: type) -> dict[str, str]:
    """The `Attributes` of a docstring, each on one line."""
    attributes = [
        ((base.__doc__ and inspect.getdoc(base)) or "").partition("Attributes:\n")[2] for base in cls.__mro__[::-1]
    ]
    found = [
        row
        for text in attributes
        for row in re.findall(r"^    ((?:\w+, )*\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE)
    ]
    return {name: " ".join(text.split()).replace("|", "\\|") for names, text in found for name in names.split(", ")}
