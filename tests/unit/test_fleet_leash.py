# SPDX-License-Identifier: Apache-2.0
"""What a command has started ends with it, in whatever way it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from deepfusion.fleet.leash import MARK, bearers

COMMAND = """
import os, subprocess, sys, time
from deepfusion.fleet.leash import leash
CHILD = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
with leash() as mark:
    subprocess.Popen([sys.executable, "-c", CHILD], env={**os.environ, **mark}, start_new_session=True)
    print(*mark.values(), flush=True)
    sys.stdin.read()
"""


def wait_for_bearers(mark: str, count: int) -> list[psutil.Process]:
    for _ in range(600):
        found = list(bearers(mark))
        if len(found) == count:
            break
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("end", ["killed", "done"])
def test_children_and_those_in_sessions_of_their_own_end_with_the_command(end: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    bystander = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: "another"})
    assert command.stdin is not None
    assert command.stdout is not None
    mark = command.stdout.readline().strip()
    assert len(wait_for_bearers(mark, 2)) == 2
    if end == "killed":
        command.send_signal(signal.SIGKILL)
    command.stdin.close()
    command.wait()
    assert wait_for_bearers(mark, 0) == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    command.stdout.close()
