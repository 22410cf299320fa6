# SPDX-License-Identifier: Apache-2.0
"""The run folder: each stage's result is written once, whole or not at all, and found again by its inputs and options.

A stage's *key* is a hash of its name, its options and the keys of what it was made from. As every stage is a pure
function of those, equal keys mean equal bytes, and a stage whose key has not changed is not done again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from deepfusion.errors import BusyError, DeepFusionError, DiskError

MANIFEST = ".stage.json"
LOCK = ".lock"
"""In a run folder: the file that the process at work on it has locked, with its number in it."""
_TRIES, _PAUSE = 10, 0.1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__, **asdict(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot make a key of {type(value).__name__}")


def key_of(*parts: Any) -> str:
    """Hash of JSON-able parts and (nested) dataclasses: 32 hex digits."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=_plain).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Hash of a file's content: 32 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def writing(path: Path, what: str = "it") -> Generator[None]:
    """Say in our own words that a file cannot be written, whatever it was that tried.

    Args:
        what: what was to be written.

    Raises:
        DiskError: names the file, what the system said, and the cure.
    """
    try:
        yield
    except DeepFusionError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        said = str(error.strerror if isinstance(error, OSError) else error)
        if full or any(f"(os error {number})" in said for number in _FULL):  # as the safetensors library tells it
            raise DiskError(
                f"{path}: {what} cannot be written ({said}); make room there and go on with --resume"
            ) from error
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` so that a crash leaves either the old content or the new, and the new is on the disk.

    Raises:
        DiskError: the disk is full; the old content is there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            error.filename, error.filename2 = str(path), None  # the name that the user knows
            raise


@contextmanager
def hold(folder: Path, wait: Callable[[dict[str, Any]], None] | None = None, /, **note: str) -> Generator[None]:
    """Be the one process at work on a run folder; ends with the context, and with the process in whatever way that ends.

    Args:
        wait: called again and again with what `holder` tells while another one is at work on it; None is for not waiting.
        note: what `holder` tells others besides the process.

    Raises:
        BusyError: another one is at work on it; names it.
        DiskError: the disk is full.
    """
    with writing(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        tries = 0
        while not _lock(descriptor, fcntl.LOCK_EX):
            tries += 1
            if wait is not None:
                wait(_read_note(descriptor))
            elif tries == _TRIES:  # the one before may be about to end, and a look of `holder` takes a moment
                raise BusyError(busy(folder, _read_note(descriptor)))
            time.sleep(_PAUSE)
        with writing(folder / LOCK):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node(), **note}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(folder: Path) -> dict[str, Any] | None:
    """What the process at work on a run folder has noted: `pid`, `host` and more; None where nobody is at work."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        for _ in range(_TRIES):
            if _lock(descriptor, fcntl.LOCK_SH):
                return None
            if note := _read_note(descriptor):
                return note
            time.sleep(_PAUSE)  # it is about to write it
        return {}
    finally:
        os.close(descriptor)


def busy(folder: Path, note: dict[str, Any]) -> str:
    """What to tell who wants to work on a run folder that is held, and the cure."""
    pid, host = note.get("pid", "of unknown number"), note.get("host", "an unknown host")
    return (
        f"{folder}: process {pid} on {host} is at work on this run; wait until it has ended, or end it there "
        f"(kill {pid}) and go on with --resume"
    )


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_note(descriptor: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it has the lock and is about to write
        return {}


class RunFolder:
    """A folder of stage results. Only this class decides whether a stage has to be done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._scratch = path / ".partial"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def key(self, name: str) -> str | None:
        """Key under which the stage's result was kept, or None when there is none."""
        manifest = self.path / name / MANIFEST
        return json.loads(manifest.read_text())["key"] if manifest.exists() else None

    def seconds(self, name: str) -> float:
        """How long the stage took when it was done."""
        return float(json.loads((self.path / name / MANIFEST).read_text())["seconds"])

    def scratch(self, name: str) -> Path:
        """A folder for what the unfinished stage needs to go on after a crash; gone once it is kept."""
        folder = self._scratch / f"{name.replace('/', '-')}.scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, name: str, make: Callable[[Path], None], *parts: Any) -> Path:
        """The folder `<run>/<name>`, made by `make(empty folder)` unless it is there with the same key.

        Args:
            parts: options and keys of the inputs; whatever the result depends on.
        """
        key = key_of(name, *parts)
        final = self.path / name
        if self.key(name) == key:
            return final
        scratch = self.scratch(name)
        owner = scratch / "key"
        if not owner.exists() or owner.read_text() != key:  # the scratch of other inputs is of no use
            shutil.rmtree(scratch)
            self.scratch(name)
            write_atomic(owner, key)
        partial = self._scratch / name.replace("/", "-")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        began = time.monotonic()
        with writing(final, "this stage"):
            make(partial)
            manifest = {"stage": name, "key": key, "seconds": round(time.monotonic() - began, 3)}
            (partial / MANIFEST).write_text(json.dumps(manifest))
            _sync_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, final)
        shutil.rmtree(scratch, ignore_errors=True)
        return final


class SharedFolder(RunFolder):
    """Stage results for several runs at a time: one of them makes what is missing, and the others wait for it.

    Args:
        note: told, once, whom a stage waits for.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        super().__init__(path)
        self._note = note

    def keep(self, name: str, make: Callable[[Path], None], *parts: Any) -> Path:
        """See `RunFolder.keep`; names must tell keys apart, for a result that another run reads is never replaced."""
        if self.key(name) == key_of(name, *parts):
            return self.path / name
        waits_for = set[int]()

        def wait(other: dict[str, Any]) -> None:
            if (pid := other.get("pid")) and pid not in waits_for:
                waits_for.add(pid)
                self._note(f"{name}: process {pid} is making it; waiting")

        with hold(self._scratch / f"{name.replace('/', '-')}.held", wait):
            return super().keep(name, make, *parts)


def start_from(source: Path, folder: Path, only: Sequence[str] = ()) -> None:
    """Begin a run folder with a copy of another run's stages: those whose keys are equal are not made again.

    Large files are shared between the two, which is safe because a stage replaces its files and never writes into them.
    Does nothing where the folder is there already, or the source is not.

    Args:
        only: names of the stages to take; all, and the ledger of their bytes, when left out.
    """
    if folder.exists() or not source.exists():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    results = shutil.ignore_patterns("record.json", "report.html", "events", ".partial", LOCK)
    for origin, target in [(source / name, partial / name) for name in only] or [(source, partial)]:
        if origin.exists():
            shutil.copytree(origin, target, copy_function=_link, ignore=results)
    if partial.exists():
        os.replace(partial, folder)


def _link(source: str, target: str) -> str:
    if source.endswith((".safetensors", ".npy")):
        os.link(source, target)
        return target
    return shutil.copy2(source, target)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
