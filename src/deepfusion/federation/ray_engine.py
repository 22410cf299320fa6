# SPDX-License-Identifier: Apache-2.0
"""Clients as tasks of Ray, on this machine or on a cluster that RAY_ADDRESS names (the extra `ray`)."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode

from deepfusion.federation.engines import took_too_long
from deepfusion.federation.messages import read_message, run_client, write_message
from deepfusion.federation.nursery import load_app
from deepfusion.spread import import_ray, open_ray

PLACE = '[federation] engine = "ray"'


class OnRay:
    """Fans clients out over Ray. On a cluster the run folder and the data must lie on storage that all machines share.

    Workers are used again, so what a client leaves behind in its process meets the next one; "forkserver" isolates
    better, and on one machine it is faster too.
    """

    def __init__(self, client_app: str, *, workers: int, timeout: float | None) -> None:
        """Ray starts with the first message.

        Args:
            client_app: `module:attribute`.
            timeout: seconds that a client may take, or None for no limit.

        Raises:
            DeepFusionError: Ray is not installed.
        """
        self._ray = import_ray(PLACE)
        self.workers = workers
        self._client_app, self._timeout = client_app, timeout
        self._task: Any = None
        self._opened = contextlib.ExitStack()
        self._jobs: dict[Any, tuple[Message, Context, float]] = {}

    def start(self, message: Message, context: Context) -> None:
        """Hand the message to a worker."""
        self._open()
        job = self._task.remote(self._client_app, _to_bytes(message, context))
        self._jobs[job] = message, context, time.monotonic()

    def finished(self, wait_seconds: float) -> list[tuple[Message, Context]]:
        """Replies of the clients that have ended, or have taken too long."""
        if not self._jobs:
            return []
        first = min(self._seconds_left(job) for job in self._jobs)
        ready, running = self._ray.wait(list(self._jobs), timeout=max(0.0, min(wait_seconds, first)))
        overdue = [job for job in running if self._seconds_left(job) <= 0]
        for job in overdue:
            self._ray.cancel(job, force=True)
        return [self._reply(job) for job in ready] + [
            self._failed(job, took_too_long(self._timeout)) for job in overdue
        ]

    def close(self) -> None:
        """End the clients, and Ray where it was started here."""
        for job in self._jobs:
            self._ray.cancel(job, force=True)
        self._jobs.clear()
        self._opened.close()
        self._task = None

    def _open(self) -> None:
        if self._task is not None:
            return
        self._opened.enter_context(open_ray(PLACE, self.workers))
        self._task = self._ray.remote(num_cpus=1, max_retries=0)(_answer)
        import_app = self._ray.remote(num_cpus=1)(_import)  # seconds that are not the first clients' own
        self._ray.get([import_app.remote(self._client_app) for _ in range(self.workers)])

    def _seconds_left(self, job: Any) -> float:
        return float("inf") if self._timeout is None else self._jobs[job][2] + self._timeout - time.monotonic()

    def _reply(self, job: Any) -> tuple[Message, Context]:
        try:
            octets: bytes = self._ray.get(job)
        except self._ray.exceptions.RayError as error:
            return self._failed(job, f"its process ended before it answered: {str(error).splitlines()[0]}")
        del self._jobs[job]
        return _from_bytes(octets)

    def _failed(self, job: Any, reason: str) -> tuple[Message, Context]:
        message, context, _ = self._jobs.pop(job)
        return Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=message), context


def _import(client_app: str) -> None:
    load_app(client_app)


def _answer(client_app: str, octets: bytes) -> bytes:
    """In a worker: answer one request."""
    message, context = _from_bytes(octets)
    return _to_bytes(run_client(load_app(client_app), message, context), context)


def _to_bytes(message: Message, context: Context) -> bytes:
    with _file() as path:
        write_message(path, message, context)
        return path.read_bytes()


def _from_bytes(octets: bytes) -> tuple[Message, Context]:
    with _file() as path:
        path.write_bytes(octets)
        return read_message(path)  # mapped: the file may go


@contextlib.contextmanager
def _file() -> Any:
    with tempfile.TemporaryDirectory(prefix="deepfusion-") as folder:
        yield Path(folder) / "message"
