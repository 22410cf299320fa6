# SPDX-License-Identifier: Apache-2.0
"""What tests of a fleet on loopback share: ports that are free, and a look at what still runs."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path


def free_port(count: int = 8) -> int:
    """The first of some ports in a row that nobody listens on; test processes of neighbouring ids look in rows of their own."""
    for turn in range(1_000):
        port = 20_000 + (os.getpid() + turn * 37) * count % 40_000
        if all(_is_free(port + i) for i in range(count)):
            return port
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name something in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found
