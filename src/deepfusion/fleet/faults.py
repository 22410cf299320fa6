# SPDX-License-Identifier: Apache-2.0
"""Faults, brought about on purpose in a fleet on this machine while it runs: what its tests and `benchmarks/faults.py` share."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from deepfusion.artifacts import holder
from deepfusion.errors import ResumeError
from deepfusion.federation.beside import beside
from deepfusion.federation.roll import ROLL
from deepfusion.fleet import commands
from deepfusion.fleet.device_file import below, load_device
from deepfusion.fleet.layout import Layout
from deepfusion.fleet.status import fleet_status
from deepfusion.fleet.supervise import Fleet, Service

_POLL = 0.02
Condition = Callable[[], bool]


class When:
    """Does something once, `delay` seconds after a condition holds for the first time.

    Attributes:
        done: whether it has been done: not where what it was to be done to was gone by then (`act` returns False).
    """

    def __init__(self, condition: Condition, act: Callable[[], bool | None], delay: float = 0.0) -> None:
        self._condition, self._act, self._delay, self.done = condition, act, delay, False

    @contextmanager
    def watching(self) -> Generator[When]:
        """Look for the condition, many times a second, while the context lasts."""

        def watch(over: threading.Event) -> None:
            while not over.wait(_POLL):
                if self._condition():
                    if over.wait(self._delay):
                        return  # the run was faster
                    self.done = self._act() is not False
                    return

        with beside(watch, "fault"):
            yield self


class Trainings:
    """Counts the trainings that each device of a fleet has finished: a device that trains again writes its answer again."""

    def __init__(self, layout: Layout) -> None:
        self._places = {id_: below(path, load_device(path).place) for id_, path in layout.devices().items()}
        self._seen: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)

    def look(self) -> None:
        """Note the answers that are there now; to be called often enough that none comes and goes unseen."""
        for device_id, place in self._places.items():
            for path in place.glob("jobs/*/answers/*.safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    self._seen[device_id].add((found.st_ino, found.st_mtime_ns))

    @property
    def counts(self) -> dict[str, int]:
        """Finished trainings by device id."""
        self.look()
        return {device_id: len(self._seen[device_id]) for device_id in self._places}


def state_is(layout: Layout, device_id: str, *words: str) -> Condition:
    """Whether `fleet status` says one of these words of a device."""

    def condition() -> bool:
        run = layout.server / "run"
        try:
            return any(d.state in words for d in fleet_status(run).devices if d.device == device_id)
        except ResumeError:
            return False

    return lambda: (layout.server / "run" / ROLL).exists() and condition()


def clients(layout: Layout, device_id: str) -> list[int]:
    """Process ids of a device's client at work."""
    path = layout.devices()[device_id]
    script = str(below(path, load_device(path).place) / "bin/flwr-clientapp").encode()
    found: list[int] = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if script in line.read_bytes().split(b"\0"):
                found.append(int(line.parent.name))
    return found


def kill_client(layout: Layout, device_id: str, delay: float = 0.0, number: int = signal.SIGKILL) -> When:
    """Kill a device's client at work, or send it another signal."""

    def act() -> bool:
        found = clients(layout, device_id)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(found)

    return When(lambda: bool(clients(layout, device_id)), act, delay)


def kill_service(service: Service, condition: Condition, delay: float = 0.0) -> When:
    """Kill a process of the fleet as a power cut would, with its group."""

    def act() -> None:
        assert service.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(service.process.pid, signal.SIGKILL)

    return When(condition, act, delay)


def on_server(layout: Layout, condition: Condition, act: Callable[[psutil.Process], None], delay: float = 0.0) -> When:
    """Do something to the server's process."""
    run = layout.server / "run"

    def now() -> bool:
        note = holder(run)
        if note is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            act(psutil.Process(note["pid"]))
        return True

    return When(lambda: holder(run) is not None and condition(), now, delay)


def fill_disk(process: psutil.Process) -> None:
    """From now on no file that the process writes grows beyond a kilobyte: what a full disk answers, at any path."""
    process.rlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def pushes(fleet: Fleet) -> int:
    """How many answers devices have begun to send to this SuperLink, in its own words."""
    return fleet.link.log.read_bytes().count(b"[Fleet.PushMessages] Push replies")


SKEW = """
import datetime, os
import flwr.supercore.date as date
offset, now = datetime.timedelta(seconds=float(os.environ["SKEW"])), date.now
date.now = lambda: now() + offset
"""
"""A `sitecustomize` that sets the clock by which Flower signs and dates."""


def skewed(layout: Layout, device_id: str, seconds: float, folder: Path) -> Service:
    """A device whose clock is wrong by so many seconds, as Flower reads it.

    Args:
        folder: for its log.
    """
    (folder / "sitecustomize.py").write_text(SKEW)
    path = layout.devices()[device_id]
    arguments, own = commands.node_command(load_device(path), path)
    modules = os.pathsep.join(filter(None, [str(folder), own.get("PYTHONPATH", "")]))
    return Service(
        device_id, arguments, {**own, "SKEW": str(seconds), "PYTHONPATH": modules}, folder / f"{device_id}.log"
    )


def wait_until(condition: Condition, what: str, seconds: float = 300.0) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it never held.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(_POLL)
