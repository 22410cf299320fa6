# SPDX-License-Identifier: Apache-2.0
"""A run on a fleet, seen by the command that asked for it: it is begun, or found at work, and waited for through deaths."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepfusion.artifacts import busy, holder
from deepfusion.config import load_config
from deepfusion.errors import BusyError, FederationError
from deepfusion.fleet import commands
from deepfusion.fleet.server_file import Server
from deepfusion.fleet.supervise import Fleet, wait_for
from deepfusion.run import check_memory, check_until

ATTEMPTS = 5
"""How often a run is taken up again after its process, or the SuperLink, was killed."""
_TICK, _ASK_FLOWER = 0.5, 20.0
Tick = Callable[[], None]
"""Called a few times a second while something is waited for."""


def run_here(fleet: Fleet, *, resume: bool, until: str | None = None, tick: Tick = lambda: None) -> None:
    """Run the fleet's job to its end, through deaths of any of its processes.

    Raises:
        DeepFusionError: the run ended with an error, or was killed more than `ATTEMPTS` times.
        BusyError: another process is at work on the run folder.
    """
    for _ in range(ATTEMPTS):
        _let_it_end(fleet.server)
        try:
            asked = _Asked(*commands.submit(fleet.server, resume=resume, until=until))
            if _wait(fleet.server, asked, lambda: (tick(), fleet.tend())[1]):
                return
        except FederationError:
            if fleet.link.is_alive():
                raise
            fleet.tend()
        resume = True
    raise FederationError(f"the run was killed {ATTEMPTS} times; see {fleet.link.log}")


def run_on(
    server: Server, *, resume: bool, until: str | None = None, tick: Tick = lambda: None,
    note: Callable[[str], None] = lambda sentence: None,
) -> None:  # fmt: skip
    """Run a job on a SuperLink that is there, and wait for its end.

    Where a server is at work on the run folder already, because the command that began it was killed, its end is waited for.

    Args:
        note: told of such a server, and of a SuperLink that does not listen yet.

    Raises:
        DeepFusionError: what ended the run.
        FederationError: its process was killed.
        BusyError: a `deepfusion run` is at work on the run folder.
    """
    check(server, until)
    wait_for(server, lambda: True, server.home, note=note)
    for _ in range(ATTEMPTS):
        asked = _ask_or_attach(server, resume=resume, until=until)
        if asked.number is None:
            note("a server is at work on this run folder already; waiting for its end")
        try:
            if _wait(server, asked, lambda: bool(tick())):
                return
        except BusyError:  # another command was faster by a moment
            continue
        if asked.number is not None or not resume:
            break
        _let_it_end(server)  # the last of its threads may hold the folder for a moment
    raise FederationError("the run's process was killed; what has arrived is kept: go on with --resume")


def check(server: Server, until: str | None) -> None:
    """Raise ConfigError or MemoryLimitError where the run that the server's folder describes cannot begin."""
    config = load_config(server.path(server.file.config))
    check_until(config, until)
    check_memory(config)


@dataclass(frozen=True)
class _Asked:
    """A run that is waited for: its token, and Flower's number of it where this process has asked for it."""

    token: str
    number: str | None = None


def _ask_or_attach(server: Server, *, resume: bool, until: str | None) -> _Asked:
    """The run of the server that is at work on the run folder, or else a new one."""
    run = server.path(server.file.run)
    note = holder(run)
    if note is None:
        commands.register(server)  # a SuperLink that has been started anew gives devices other numbers
        return _Asked(*commands.submit(server, resume=resume, until=until))
    if "token" not in note:
        raise BusyError(busy(run, note))
    return _Asked(note["token"])


def _let_it_end(server: Server) -> None:
    """Give a process that is about to end, and holds the run folder still, the time to do so."""
    run, deadline = server.path(server.file.run), time.monotonic() + _ASK_FLOWER
    while note := holder(run):
        if time.monotonic() > deadline:
            raise BusyError(busy(run, note))
        time.sleep(_TICK)


def _wait(server: Server, asked: _Asked, lost: Callable[[], bool]) -> bool:
    """Wait for the end of a run; False where it was killed, or what it ran on was `lost`.

    Raises:
        DeepFusionError: what ended it.
    """
    outcome, looked = server.outcome(asked.token), time.monotonic()
    while True:
        outcome.check()
        if outcome.is_good:
            return True
        pid = outcome.pid
        if lost():  # what the server says of it is of no interest, unless it had come to its end just before
            return outcome.is_good
        if pid is not None and not _is_running(pid):
            outcome.check()
            return outcome.is_good
        if pid is None and asked.number is not None and time.monotonic() - looked > _ASK_FLOWER:
            looked = time.monotonic()
            status = commands.ended(server, asked.number)
            if status is not None and outcome.pid is None:
                raise FederationError(f"the run never began ({status}); see the SuperLink's log")
        time.sleep(_TICK)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
