# SPDX-License-Identifier: Apache-2.0
"""The ledger: how many bytes crossed the door, by round, device, direction and kind (method, section 13)."""

from __future__ import annotations

import errno
import json
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepfusion.artifacts import write_atomic, writing
from deepfusion.errors import ResumeError

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Row:
    """One crossing.

    Attributes:
        round: 0 in one-shot methods.
        device: the device's id.
        direction: "up" to the server, "down" to the device.
        what: `Payload.what`.
        bytes: length of the encoded blob.
        seconds: how long the device worked on its answer, as it says itself; 0 where that is not known.
        peak_memory_bytes: the most memory that it used in that time, likewise.
    """

    round: int
    device: str
    direction: Direction
    what: str
    bytes: int
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class Ledger:
    """Rows in a file of JSON lines.

    A row replaces an earlier one of the same round, device, direction and kind. So whatever is sent again after a
    crash or a failed attempt counts once, and a resumed run has the totals of an undisturbed one.
    """

    def __init__(self, path: Path) -> None:
        """Open the ledger, with the rows that are in the file.

        Raises:
            ResumeError: the file is not a ledger.
        """
        self._path = path
        self._rows: dict[tuple[int, str, str, str], Row] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_text(encoding="utf-8")
            for row in _parse(text, path):
                self._add(row)
            if text and not text.endswith(
                "\n"
            ):  # a crash in the middle of a row: what it booked is asked, and booked, again
                write_atomic(path, text[: text.rfind("\n") + 1])
        # One write a row, at the end of the file, without a buffer: nothing to flush, and no row is mixed with another.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        weakref.finalize(self, os.close, self._descriptor)

    def book(self, row: Row) -> None:
        """Write a row down; it is in the file when this returns.

        Raises:
            DiskError: the disk is full. Nothing of the row is in the file then.
        """
        line = json.dumps(vars(row)).encode() + b"\n"
        with self._lock, writing(self._path, "a row"):
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, line) < len(line):  # a part may have fitted
                os.ftruncate(self._descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._add(row)

    def rows(self) -> Iterator[Row]:
        """All rows, without those that were replaced, ordered by round, device, direction and kind."""
        return iter([row for _, row in sorted(self._rows.items())])

    def totals(self) -> dict[str, int]:
        """Bytes: `upload_bytes`, `download_bytes` (without starting checkpoints), `init_bytes`, `total_bytes`."""
        up = sum(row.bytes for row in self.rows() if row.direction == "up")
        init = sum(row.bytes for row in self.rows() if row.direction == "down" and row.what == "init")
        down = sum(row.bytes for row in self.rows() if row.direction == "down" and row.what != "init")
        return {"upload_bytes": up, "download_bytes": down, "init_bytes": init, "total_bytes": up + down + init}

    def by_kind(self) -> dict[str, int]:
        """Bytes of each direction and kind, e.g. "up model"."""
        totals: dict[str, int] = {}
        for row in self.rows():
            kind = f"{row.direction} {row.what}"
            totals[kind] = totals.get(kind, 0) + row.bytes
        return totals

    def by_device(self, direction: Direction) -> dict[str, int]:
        """Bytes of each device that has a row in this direction."""
        totals: dict[str, int] = {}
        for row in self.rows():
            if row.direction == direction:
                totals[row.device] = totals.get(row.device, 0) + row.bytes
        return totals

    def telemetry(self) -> dict[str, tuple[float, int]]:
        """Seconds of work and highest memory (bytes) of each device that told them."""
        told: dict[str, tuple[float, int]] = {}
        for row in self.rows():
            if row.direction == "up" and row.seconds > 0:
                seconds, peak = told.get(row.device, (0.0, 0))
                told[row.device] = (seconds + row.seconds, max(peak, row.peak_memory_bytes))
        return told

    def _add(self, row: Row) -> None:
        self._rows[_key(row)] = row


def read_rows(path: Path) -> list[Row]:
    """The rows of a ledger that somebody else may be writing, without those that were replaced.

    Raises:
        ResumeError: the file is not a ledger.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return list({_key(row): row for row in _parse(text, path)}.values())


def _key(row: Row) -> tuple[int, str, str, str]:
    return row.round, row.device, row.direction, row.what


def _parse(text: str, path: Path) -> Iterator[Row]:
    """The rows of a ledger's whole lines; what a crash has left of a last one is left out."""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            yield Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ResumeError(
                f"{path}, line {number}: not a row of a ledger ({error}); delete the file to count anew"
            ) from error
