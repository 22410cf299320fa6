# SPDX-License-Identifier: Apache-2.0
"""A whole fleet on this machine: its processes are started, brought back when they die, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deepfusion.errors import FederationError
from deepfusion.fleet import commands
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.layout import Layout
from deepfusion.fleet.leash import leash
from deepfusion.fleet.server_file import Server, open_server

RESTART_SECONDS = 2.0
"""How long a process stays dead before it is started again."""
_TICK = 0.5


@dataclass
class Service:
    """One process of a fleet and its children, with a log.

    Attributes:
        name: for people.
        arguments, environment: see `commands`.
        log: what it prints goes to the end of this file.
    """

    name: str
    arguments: Sequence[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _died: float = field(default=0.0, init=False)
    _children: set[psutil.Process] = field(default_factory=set[psutil.Process], init=False)

    def start(self) -> None:
        """Start it, in a process group of its own."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        self._died = 0.0

    def is_alive(self) -> bool:
        """Whether the process runs."""
        if self.process is None or self.process.poll() is not None:
            return False
        with contextlib.suppress(psutil.Error):  # some children begin a session of their own: no group holds them all
            self._children |= set(psutil.Process(self.process.pid).children(recursive=True))
        return True

    def revive(self) -> bool:
        """Start it again where it has been dead for a while; whether it was."""
        if self.is_alive():
            return False
        self._died = self._died or time.monotonic()
        if time.monotonic() - self._died < RESTART_SECONDS:
            return False
        self.end()  # what it left behind holds its port
        self.start()
        return True

    def end(self) -> None:
        """End it and all its children, and wait until it has ended."""
        if self.process is None:
            return
        self.is_alive()  # to know all of its children
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        for child in self._children:
            with contextlib.suppress(
                psutil.Error
            ):  # it has ended; a psutil.Process is never another one with its number
                child.kill()
        psutil.wait_procs(list(self._children), timeout=10)
        self._children.clear()


@dataclass
class Fleet:
    """The services of a fleet on this machine: `link`, and the devices' `nodes` by device id."""

    server: Server
    link: Service
    nodes: dict[str, Service]
    _changing: threading.Lock = field(default_factory=threading.Lock, init=False)

    def start(self) -> None:
        """Start all; the SuperLink knows all devices when this returns."""
        self.start_link()
        for node in self.nodes.values():
            node.start()

    def start_link(self) -> None:
        """Start the SuperLink and tell it who may join."""
        self.link.start()
        wait_for(self.server, self.link.is_alive, self.link.log)
        commands.register(self.server)

    def tend(self) -> bool:
        """Bring back what has died; whether the SuperLink was among it, with all that it knew."""
        with self._changing:
            for node in self.nodes.values():
                node.revive()
        if self.link.is_alive():
            return False
        time.sleep(RESTART_SECONDS)
        self.link.end()
        self.start_link()
        return True

    def put_in(self, device_id: str, service: Service) -> None:
        """Have another process be a device."""
        with self._changing:  # or the one before might be brought back once it has ended
            self.nodes[device_id].end()
            service.start()
            self.nodes[device_id] = service


@contextmanager
def fleet_on_this_machine(layout: Layout) -> Generator[Fleet]:
    """Start the SuperLink and every device's SuperNode; ends them all afterwards, whatever happens, a kill of this process too.

    Raises:
        ConfigError: a configuration is wrong.
        FederationError: the SuperLink does not start.
    """
    server, logs = open_server(layout.server), layout.folder / "logs"
    with leash() as mark:
        nodes: dict[str, Service] = {}
        for device_id, path in layout.devices().items():
            arguments, environment = commands.node_command(load_device(path), path)
            nodes[device_id] = Service(device_id, arguments, environment | mark, logs / f"{device_id}.log")
        arguments, environment = commands.link_command(server)
        fleet = Fleet(server, Service("superlink", arguments, environment | mark, logs / "superlink.log"), nodes)
        try:
            fleet.start()
            yield fleet
        finally:
            for node in fleet.nodes.values():
                if node.is_alive() and node.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(node.process.pid, signal.SIGTERM)  # all at once; `end` waits for each
            for service in (*fleet.nodes.values(), fleet.link):
                service.end()


def wait_for(
    server: Server,
    is_alive: Callable[[], bool],
    log: Path,
    seconds: float = 120.0,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Wait until the SuperLink listens.

    Args:
        is_alive: whether there is still something to wait for.
        log: where a reader finds out more.
        note: told once that there is something to wait for.

    Raises:
        FederationError: it does not.
    """
    deadline, told = time.monotonic() + seconds, False
    while is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((server.file.name, server.file.port), timeout=5):
            return
        if not told:
            note(f"No SuperLink listens at {server.address} yet; waiting for it, {seconds:.0f} s at most.")
            told = True
        time.sleep(_TICK)
    raise FederationError(f"{server.address}: no SuperLink listens there; see {log}")
