# SPDX-License-Identifier: Apache-2.0
"""How a run on a fleet ended: a file for each that was asked for, which the server's process writes and commands wait for."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfusion import errors
from deepfusion.artifacts import write_atomic
from deepfusion.errors import ConfigError, DeepFusionError, FederationError

_SIZE = 16_384
"""Bytes of the file, whatever is in it: the end can be told on a disk that has become full."""
_LONGEST = 2000
_KEPT = 50


@dataclass(frozen=True)
class Outcome:
    """One run's.

    Attributes:
        path: its file, named after the token under which the run was asked for.
    """

    path: Path

    def reserve(self) -> None:
        """Make room for what will be told, before the run is asked for. The oldest of many others go.

        Raises:
            DiskError: the disk is full.
        """
        write_atomic(self.path, b"{}".ljust(_SIZE))
        others = sorted(self.path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in others[:-_KEPT]:
            old.unlink(missing_ok=True)

    @contextmanager
    def noted(self) -> Generator[None]:
        """In the server's process: note that it is at work, and with what it has ended; nothing where it is told to stop."""
        self._write(pid=os.getpid())
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            self._write(pid=os.getpid(), ended=True, kind=kind, error=str(error)[:_LONGEST])
            raise
        self._write(pid=os.getpid(), ended=True)

    @property
    def pid(self) -> int | None:
        """The server's process; None before it has begun."""
        return self._read().get("pid")

    @property
    def is_good(self) -> bool:
        """Whether the run has come to its end, without an error."""
        told = self._read()
        return bool(told.get("ended")) and "error" not in told

    def check(self) -> None:
        """Raise the error that has ended the run, of the class that it had in the server's process; nothing otherwise."""
        told = self._read()
        if "error" in told:
            raise _as_it_was(str(told["kind"]), str(told["error"]))

    def _write(self, **told: Any) -> None:
        with open(self.path, "r+b", buffering=0) as file:
            file.write(json.dumps(told).encode().ljust(_SIZE))

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):  # it is being written
            return {}


def _as_it_was(kind: str, said: str) -> DeepFusionError:
    cls = getattr(errors, kind, None)
    if cls is ConfigError:
        return ConfigError([said], "the run")
    if isinstance(cls, type) and issubclass(cls, DeepFusionError):
        return cls(said)
    return FederationError(f"{kind}: {said}")
