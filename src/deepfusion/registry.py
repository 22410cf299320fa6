# SPDX-License-Identifier: Apache-2.0
"""Named, pluggable parts: a frozen dataclass registered under a name, whose fields are its TOML options."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin

from deepfusion.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C")


def did_you_mean(word: str, known: Iterator[str] | tuple[str, ...]) -> str:
    """A hint such as ` (did you mean "kmeans"?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(word, tuple(known), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def option_name(field: dataclasses.Field[Any]) -> str:
    """What a dataclass's field is called in TOML: its name, unless that would be a word of Python."""
    return str(field.metadata.get("key", field.name))


def describe_type(hint: Any) -> str:
    """What to write for an option of this type, in words."""
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text in quotes",
        bool: "true or false",
        type(None): "nothing",
    }
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in get_args(hint) if a is not type(None))
    if get_origin(hint) in (tuple, list):
        return "a list, each item " + describe_type(get_args(hint)[0])
    if get_origin(hint) is dict:
        return "a table { key = value }"
    return names.get(hint, str(hint))


class Registry(Generic[T]):
    """The classes that `[section] type = "<name>"` can name. `T` is the protocol that they satisfy."""

    def __init__(self, section: str) -> None:
        self.section = section
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Class decorator: make the class available as `type = name`."""

        def add(cls: type[C]) -> type[C]:
            assert name not in self._classes, f"{self.section}: {name} is registered twice"
            self._classes[name] = cast("type[T]", cls)
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            ConfigError: no such name; says which names there are.
        """
        if name not in self._classes:
            hint = did_you_mean(name, tuple(self._classes))
            known = ", ".join(self)
            raise ConfigError([f'[{self.section}] type = "{name}": unknown{hint}; choose one of {known}'])
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def name_of(self, cls: type) -> str:
        """The name under which `cls` is registered."""
        return next(name for name, known in self._classes.items() if known is cls)

    def describe(self) -> dict[str, str]:
        """First line of each class's docstring by name, for `deepfusion list`."""
        return {name: (self._classes[name].__doc__ or "").strip().splitlines()[0] for name in self}
