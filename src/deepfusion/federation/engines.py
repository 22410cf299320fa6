# SPDX-License-Identifier: Apache-2.0
"""Where a local grid's clients run: in this process, one after the other, or each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from deepfusion.errors import FederationError
from deepfusion.federation.messages import read_message, run_client, write_message
from deepfusion.federation.nursery import REPLY, REQUEST, load_app

_START = (
    "import json, sys; arguments = json.loads(sys.argv[1]); sys.path[:] = arguments.pop('path'); "
    "from deepfusion.federation.nursery import serve; serve(**arguments)"
)


class Engine(Protocol):
    """Runs clients. A reply is a message, and what the client left in its context."""

    workers: int
    """How many clients run at the same time."""

    def start(self, message: Message, context: Context) -> None:
        """Begin to run the client with a message; at most `workers` may have begun and not be finished."""
        ...

    def finished(self, wait_seconds: float) -> list[tuple[Message, Context]]:
        """Replies of the clients that have finished; waits for the first one, but not longer than told."""
        ...

    def close(self) -> None:
        """End all clients."""
        ...


class Inline:
    """Runs clients here, when their reply is wanted. Time limits do not apply: to debug, and to test."""

    workers = 1

    def __init__(self, client_app: str) -> None:
        self._client_app = load_app(client_app)
        self._next: tuple[Message, Context] | None = None

    def start(self, message: Message, context: Context) -> None:
        """Keep the message until its reply is wanted."""
        self._next = message, context

    def finished(self, wait_seconds: float) -> list[tuple[Message, Context]]:
        """Run the client, however long it takes."""
        if self._next is None:
            return []
        message, context = self._next
        self._next = None
        return [(run_client(self._client_app, message, context), context)]

    def close(self) -> None:
        """Forget what has not begun."""
        self._next = None


@dataclass(frozen=True)
class _Job:
    message: Message
    context: Context
    began: float


class ForkServer:
    """Runs each client in a process of its own, forked from one that has imported everything (see `nursery`).

    What a client does to its process, be it a crash, a leak or an endless loop, costs that client only.
    """

    def __init__(self, client_app: str, *, workers: int, timeout: float | None, preload: Sequence[str]) -> None:
        """Nothing starts before the first message.

        Args:
            client_app: `module:attribute`; importable in another process, so not in `__main__`.
            timeout: seconds that a client may take, or None for no limit.
            preload: modules to import once instead of in each client, such as those of the models' classes.
        """
        self.workers = workers
        self._client_app, self._timeout, self._preload = client_app, timeout, tuple(preload)
        self._nursery: subprocess.Popen[bytes] | None = None
        self._pipes = (-1, -1)
        self._heard = b""
        self._scratch = Path()
        self._jobs: dict[str, _Job] = {}
        self._killed: set[str] = set()
        self._number = 0

    def start(self, message: Message, context: Context) -> None:
        """Fork a client and give it the message."""
        self._open()
        self._number += 1
        folder = self._scratch / str(self._number)
        folder.mkdir()
        write_message(folder / REQUEST, message, context)
        self._jobs[str(folder)] = _Job(message, context, time.monotonic())
        self._order("start", str(folder))

    def finished(self, wait_seconds: float) -> list[tuple[Message, Context]]:
        """Replies of the clients that have ended, whatever ended them."""
        if not self._jobs:
            return []
        overdue = [folder for folder in self._jobs if self._seconds_left(folder) <= 0 and folder not in self._killed]
        for folder in overdue:
            self._killed.add(folder)
            self._order("kill", folder)
        left = [self._seconds_left(folder) for folder in self._jobs if folder not in self._killed]
        replies: list[tuple[Message, Context]] = []
        for event in self._listen(max(0.0, min([wait_seconds, *left]))):
            if event["event"] == "ended":
                replies.append(self._reply(event["folder"], event["status"]))
        if not self._is_open():  # it was killed; its children have gone with it
            replies += [self._reply(folder, -signal.SIGKILL) for folder in list(self._jobs)]
        return replies

    def close(self) -> None:
        """End the nursery and with it all clients, and wait until they have ended."""
        self._end_nursery()
        self._jobs.clear()
        self._killed.clear()

    def _end_nursery(self) -> None:
        if self._nursery is None:
            return
        reading, writing = self._pipes
        os.close(writing)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._nursery.wait(10)
        self._nursery.kill()  # does nothing to a process that has been waited for
        self._nursery.wait()
        os.close(reading)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._nursery = None
        self._heard = b""

    def _is_open(self) -> bool:
        return self._nursery is not None

    def _open(self) -> None:
        if self._is_open():
            return
        self._scratch = Path(tempfile.mkdtemp(prefix="deepfusion-"))
        from_us, to_nursery = os.pipe()
        from_nursery, to_us = os.pipe()
        arguments = {
            "path": sys.path, "reading": from_us, "writing": to_us, "client_app": self._client_app,
            "preload": self._preload, "scratch": str(self._scratch),
        }  # fmt: skip
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(arguments)], pass_fds=(from_us, to_us), stdin=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(to_us)
        self._pipes = from_nursery, to_nursery
        events: list[dict[str, Any]] = []
        while not events and self._is_open():
            events = self._listen(None)
        heard = events[0] if events else {"event": "failed", "text": "it ended at once"}
        if heard["event"] == "failed":
            self._end_nursery()
            raise FederationError(
                f'[federation] engine = "forkserver": the processes of the devices cannot start; try engine = "inline"\n'
                f"{heard['text']}"
            )

    def _order(self, order: str, folder: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead nursery is found out by `_listen`
            os.write(self._pipes[1], f"{order} {folder}\n".encode())

    def _listen(self, wait_seconds: float | None) -> list[dict[str, Any]]:
        """The nursery's next lines, or nothing when none came in time; closes a nursery that has died."""
        ready, _, _ = select.select([self._pipes[0]], [], [], wait_seconds)
        if not ready:
            return []
        octets = os.read(self._pipes[0], 65536)
        if not octets:
            self._end_nursery()
            return []
        *lines, self._heard = (self._heard + octets).split(b"\n")
        return [json.loads(line) for line in lines]

    def _seconds_left(self, folder: str) -> float:
        return float("inf") if self._timeout is None else self._jobs[folder].began + self._timeout - time.monotonic()

    def _reply(self, folder: str, status: int) -> tuple[Message, Context]:
        """The reply of a client that has ended: its own, or one that says how it ended."""
        job = self._jobs.pop(folder)
        killed = folder in self._killed
        self._killed.discard(folder)
        path = Path(folder) / REPLY
        if path.exists():
            reply = read_message(path)
        elif killed:
            reply = Message(Error(ErrorCode.UNKNOWN, took_too_long(self._timeout)), reply_to=job.message), job.context
        else:
            reply = (
                Message(Error(ErrorCode.CLIENT_APP_CRASHED, _how_it_ended(status)), reply_to=job.message),
                job.context,
            )
        shutil.rmtree(folder, ignore_errors=True)  # the reply's data stays memory-mapped
        return reply


def took_too_long(timeout: float | None) -> str:
    """Why a client was ended that had not answered within `timeout` seconds."""
    return f"gave no answer within {timeout:g} s; raise [federation] timeout_seconds, or give it less to do"


_HINTS = {
    "SIGKILL": "; perhaps the machine ran out of memory: lower [federation] workers",
    "SIGALRM": "; it had taken all of the [limits] hours that its own file grants a request",
}


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"its process ended with exit code {status} before it answered; its output says why"
    name = signal.Signals(-status).name
    hint = _HINTS.get(name, "")
    return f"its process was ended by {name} before it answered{hint}"
