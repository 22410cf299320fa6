# SPDX-License-Identifier: Apache-2.0
"""The nursery: a process that has imported everything once, and forks one short-lived child for each message.

It is ours instead of `multiprocessing`'s fork server because that one imports the main program again in every child,
pickles what passes, and leaves children running when the program is killed. The parent writes lines to the nursery
(`start <folder>`, `kill <folder>`) and reads lines of JSON from it (`ready`, `failed`, `ended`). A child reads
`<folder>/request` and leaves `<folder>/reply`. When the parent is gone, however it went, the nursery ends its children.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

REQUEST, REPLY = "request", "reply"


def load_app(reference: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def serve(reading: int, writing: int, client_app: str, preload: list[str], scratch: str) -> None:
    """Run a nursery until the parent closes its end of `reading`.

    Args:
        reading, writing: file descriptors of the pipes from and to the parent.
        client_app: `module:attribute` of the ClientApp that children run.
        preload: modules to import before the first child is forked.
        scratch: the folder of all requests and replies; removed in the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        for name in [*preload, "deepfusion.federation.messages"]:
            importlib.import_module(name)
        load_app(client_app)
    except Exception:
        _say(writing, "failed", text=traceback.format_exc())
        return
    gc.collect()
    gc.freeze()  # children then share the pages of all that was imported
    wake_up, woken = os.pipe()
    for descriptor in (wake_up, woken):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    life, lifeline = os.pipe()  # children see its end when the nursery is gone
    inherited = (reading, writing, wake_up, woken, lifeline)
    children: dict[str, int] = {}
    _say(writing, "ready")
    try:
        _loop(reading, writing, wake_up, children, lambda folder: _fork(folder, client_app, life, inherited))
    except BrokenPipeError:
        pass  # the parent went while we told it something
    finally:
        for pid in children.values():
            _kill(pid)
        shutil.rmtree(scratch, ignore_errors=True)


def _loop(reading: int, writing: int, wake_up: int, children: dict[str, int], fork: Any) -> None:
    """Obey the parent's lines and report children's ends, until the parent has gone."""
    heard = b""
    while True:
        ready, _, _ = select.select([reading, wake_up], [], [])
        if wake_up in ready:
            os.read(wake_up, 4096)
            _reap(children, writing)
        if reading in ready:
            octets = os.read(reading, 65536)
            if not octets:
                return
            *lines, heard = (heard + octets).split(b"\n")
            for line in lines:
                order, _, folder = line.decode().partition(" ")
                if order == "start":
                    children[folder] = fork(folder)
                elif folder in children:  # "kill"; a child that has ended meanwhile is no longer there
                    _kill(children[folder])


def _fork(folder: str, client_app: str, life: int, inherited: tuple[int, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()  # a group of its own, so that a kill reaches its own children too
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in inherited:
            os.close(descriptor)
        threading.Thread(target=_die_with_the_nursery, args=(life,), daemon=True).start()
        _run(Path(folder), client_app)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _run(folder: Path, client_app: str) -> None:
    """In the child: answer one request."""
    from deepfusion.federation.messages import read_message, run_client, write_message

    request, context = read_message(folder / REQUEST)
    (folder / REQUEST).unlink()  # the memory map keeps it for as long as it is needed
    partial = folder / "reply.partial"
    write_message(partial, run_client(load_app(client_app), request, context), context)
    os.replace(partial, folder / REPLY)


def _die_with_the_nursery(life: int) -> NoReturn:
    os.read(life, 1)
    os._exit(1)


def _reap(children: dict[str, int], writing: int) -> None:
    for folder, pid in list(children.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del children[folder]
            _say(writing, "ended", folder=folder, status=os.waitstatus_to_exitcode(status))


def _kill(pid: int) -> None:
    """Kill a child that has not been waited for, and so still owns its number, and whatever it started."""
    for kill in (os.killpg, os.kill):  # by group, and by process if it has not made its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _say(writing: int, event: str, **details: str | int) -> None:
    os.write(writing, json.dumps({"event": event, **details}).encode() + b"\n")
