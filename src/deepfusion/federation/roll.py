# SPDX-License-Identifier: Apache-2.0
"""The roll of a fleet: what the server last saw of each device, in a file that `deepfusion fleet status` reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from deepfusion.artifacts import write_atomic
from deepfusion.errors import DiskError, ResumeError
from deepfusion.federation.beside import beside

ROLL = "roll.json"
"""Its name in a run folder."""
STATES = ("registered", "asked", "waiting", "answered", "failed")
"""Of a device: its key is known; it works on a request; it is to be asked again once it is back; its answer is here; or not."""
_EVERY = 3.0


@dataclass(frozen=True)
class Entry:
    """One device.

    Attributes:
        state: one of `STATES`.
        reason: why it waits or has failed, as it was told.
        since: when the state began, seconds since 1970.
        online: whether its node was connected when the server last looked.
    """

    state: str = "registered"
    reason: str = ""
    since: float = field(default_factory=time.time)
    online: bool = False


class Sight(NamedTuple):
    """What the server last wrote.

    Attributes:
        seen: when it wrote, seconds since 1970.
        answered: when the SuperLink last told it who is online.
        entries: of each device.
    """

    seen: float
    answered: float
    entries: dict[str, Entry]


class Roll:
    """Written by the server whenever something has changed; never read by it."""

    def __init__(self, path: Path, nodes: Callable[[], Mapping[str, int]]) -> None:
        """Begin with devices of which nothing is known but their node ids.

        Args:
            nodes: looks these up; they may change.
        """
        self._path, self._nodes = path, nodes
        self._entries = {device_id: Entry() for device_id in nodes()}
        self._answered = time.time()
        self._lock = threading.Lock()
        self._write()

    @contextmanager
    def watching(self, look: Callable[[], Iterable[int]]) -> Generator[Self]:
        """Note every few seconds who is online, for as long as the context lasts.

        Args:
            look: asks for the ids of the nodes that are.
        """

        def watch(over: threading.Event) -> None:
            while not over.wait(_EVERY):
                with suppress(Exception):  # a SuperLink that is gone may raise, or let it wait
                    self.look(look())

        def write(over: threading.Event) -> None:
            while not over.wait(_EVERY):
                with suppress(DiskError, OSError), self._lock:  # there may be room again
                    self._write()

        with beside(watch, "roll", patience=_EVERY), beside(write, "roll's writer"):
            yield self

    def tell(self, device_id: str, state: str, reason: str) -> None:
        """Note what has become of a device."""
        line = reason.splitlines()[0] if reason else ""
        with self._lock:
            entry = self._entries.get(device_id, Entry())
            self._entries[device_id] = replace(entry, state=state, reason=line, since=time.time())
            self._write()

    def look(self, online: Iterable[int]) -> None:
        """Note who is online."""
        present, nodes = set(online), self._nodes()
        with self._lock:
            for device_id in nodes.keys() | self._entries.keys():
                entry = self._entries.get(device_id, Entry())
                self._entries[device_id] = replace(entry, online=nodes.get(device_id) in present)
            self._answered = time.time()
            self._write()

    def _write(self) -> None:
        devices = {device_id: asdict(entry) for device_id, entry in self._entries.items()}
        told = {"seen": time.time(), "answered": self._answered, "devices": devices}
        write_atomic(self._path, json.dumps(told, indent=1))


def read_roll(path: Path) -> Sight:
    """What the server last wrote.

    Raises:
        ResumeError: there is no roll, or it is none.
    """
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = {device_id: Entry(**entry) for device_id, entry in told["devices"].items()}
        return Sight(float(told["seen"]), float(told["answered"]), entries)
    except FileNotFoundError:
        raise ResumeError(f"{path}: no fleet has run here; give the folder of a `deepfusion fleet run`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ResumeError(
            f"{path}: not the roll of a fleet ({error}); the next `deepfusion fleet run` writes it anew"
        ) from error
