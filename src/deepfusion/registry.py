# SPDX-License-Identifier: Apache-2.0
"""Named, pluggable parts: a frozen dataclass registered under a name, whose fields are its TOML options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from deepfusion.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C")


def did_you_mean(word: str, known: Iterator[str] | tuple[str, ...]) -> str:
    """A hint such as ` (did you mean "kmeans"?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(word, tuple(known), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


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
