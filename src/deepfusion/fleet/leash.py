# SPDX-License-Identifier: Apache-2.0
"""A leash for a command's processes: they and all their descendants end when the command does, also when it is killed.

A process group would not hold them, because some of Flower's begin sessions of their own. So each bears a mark in its
environment, which its children inherit, and one process that does nothing else waits for the command to be gone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import psutil

MARK = "DEEPFUSION_LEASH"
"""The variable in the environment of every process on a leash."""
_ROUNDS = 20


@contextmanager
def leash() -> Generator[dict[str, str]]:
    """What to add to the environment of processes that must not outlive this one, nor the context."""
    mark = uuid.uuid4().hex
    # -I: a file alone, which imports nothing of ours. In a session of its own, so that nothing sent to ours ends it.
    watcher = subprocess.Popen([sys.executable, "-I", __file__, mark], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield {MARK: mark}
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        watcher.wait()


def bearers(mark: str) -> Iterator[psutil.Process]:
    """The processes of this user that bear the mark."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                yield process


def _watch(mark: str) -> None:
    sys.stdin.buffer.read()  # ends when the last end of the pipe is closed, in whatever way its process has ended
    for _ in range(_ROUNDS):  # one may be starting another just now
        found = list(bearers(mark))
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)
        if not found:
            break


if __name__ == "__main__":
    _watch(sys.argv[1])
