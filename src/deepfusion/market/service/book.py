# SPDX-License-Identifier: Apache-2.0
"""The service's ledger on disk: a chain of rows in SQLite. What a call has returned from is on the disk, whole."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfusion.errors import MarketError
from deepfusion.market.service.keys import sync_folder
from deepfusion.market.service.records import START, SlotRecord, link

FORMAT = 1
SCHEMA = """
CREATE TABLE slots (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, seed TEXT NOT NULL,
                    service_key TEXT, signature TEXT, summary TEXT);
CREATE TABLE rows (position INTEGER PRIMARY KEY, slot INTEGER NOT NULL REFERENCES slots, user TEXT,
                   text TEXT NOT NULL, link TEXT NOT NULL, UNIQUE (slot, user));
CREATE INDEX first_row ON rows (slot, position);
"""
"""A slot has a row in `slots` before it opens, so that its seed is there when its hash is published."""
ROWS = "SELECT position, text, link FROM rows WHERE slot = ? ORDER BY position"


@dataclass(frozen=True)
class End:
    """What closes a slot.

    Attributes:
        closing: text of the last row.
        service_key: who signs.
        last: the link that the last row will have.
        signature: over that.
        summary: what the history shows.
    """

    closing: str
    service_key: str
    last: str
    signature: str
    summary: dict[str, Any]


class Book:
    """The ledger, for one writing thread and any reading ones.

    Attributes:
        last: the chain's last link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # it holds the open slot's seed and bids
        sync_folder(path.parent)
        try:
            self._write = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._write.execute("PRAGMA journal_mode = WAL")
            self._write.execute("PRAGMA synchronous = FULL")
            self._write.execute("PRAGMA foreign_keys = ON")
            self._prepare()
            self._find = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise MarketError(f"{path}: not a ledger ({error}); choose another --ledger") from error
        found = self._write.execute("SELECT link FROM rows ORDER BY position DESC LIMIT 1").fetchone()
        self.last: str = found[0] if found else START

    def _prepare(self) -> None:
        version = self._write.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not self._write.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._write.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
        elif version != FORMAT:
            raise MarketError(f"{self.path}: not a ledger of this version ({version}); choose another --ledger")

    def close(self) -> None:
        """Close the file."""
        self._find.close()
        self._write.close()

    @contextmanager
    def _transaction(self) -> Generator[None]:
        before = self.last
        self._write.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._write.execute("COMMIT")
        except BaseException:
            self.last = before
            if self._write.in_transaction:
                self._write.execute("ROLLBACK")
            raise

    def _add(self, slot: int, rows: Sequence[tuple[str | None, str]]) -> list[str]:
        links: list[str] = []
        for _, text in rows:
            self.last = link(self.last, text)
            links.append(self.last)
        self._write.executemany(
            "INSERT INTO rows (slot, user, text, link) VALUES (?, ?, ?, ?)",
            [(slot, user, text, one) for (user, text), one in zip(rows, links, strict=True)],
        )
        return links

    def add(self, slot: int, rows: Sequence[tuple[str | None, str]]) -> list[str]:
        """Book (user, text) of several bids with one write to the disk; their links."""
        with self._transaction():
            return self._add(slot, rows)

    def start(self, first: tuple[str, str], opening: str, following: tuple[str, str]) -> str:
        """Open the first slot, of this (name, seed), and promise the one after it; the opening's link."""
        with self._transaction():
            self._promise(1, *first)
            return self._open(1, opening, following)

    def _promise(self, number: int, name: str, seed: str) -> None:
        self._write.execute("INSERT INTO slots (number, name, seed) VALUES (?, ?, ?)", (number, name, seed))

    def _open(self, number: int, opening: str, following: tuple[str, str]) -> str:
        self._promise(number + 1, *following)
        return self._add(number, [(None, opening)])[0]

    def turn(self, number: int, end: End, opening: str, following: tuple[str, str]) -> str:
        """Close a slot and open the next in one step, so that no crash falls between; the new opening's link."""
        with self._transaction():
            self._add(number, [(None, end.closing)])
            self._write.execute(
                "UPDATE slots SET service_key = ?, signature = ?, summary = ? WHERE number = ?",
                (end.service_key, end.signature, json.dumps(end.summary), number),
            )
            return self._open(number + 1, opening, following)

    def seed(self, number: int) -> tuple[str, str]:
        """Name and seed of a slot that is open or promised."""
        return self._write.execute("SELECT name, seed FROM slots WHERE number = ?", (number,)).fetchone()

    def current(self) -> tuple[int, str, list[str], list[str]] | None:
        """The open slot's number, the link before it, its rows' texts and links; None in a new ledger."""
        found = self._write.execute(
            "SELECT number FROM slots WHERE summary IS NULL AND number IN (SELECT slot FROM rows)"
        ).fetchone()
        if found is None:
            return None
        rows = self._write.execute(ROWS, found).fetchall()
        return found[0], _before(self._write, rows), [row[1] for row in rows], [row[2] for row in rows]

    def opening(self, slot: str) -> str | None:
        """The link of a slot's opening; None where it was never open. For one thread, beside the writing one."""
        found = self._find.execute(
            "SELECT link FROM rows WHERE slot = (SELECT number FROM slots WHERE name = ?) ORDER BY position LIMIT 1",
            (slot,),
        ).fetchone()
        return found[0] if found else None

    def booked(self, slot: str, user: str) -> tuple[str, str] | None:
        """Text and link of a user's bid for a slot, where there is one. For one thread, beside the writing one."""
        return self._find.execute(
            "SELECT text, link FROM rows WHERE user = ? AND slot = (SELECT number FROM slots WHERE name = ?)",
            (user, slot),
        ).fetchone()


def _before(db: sqlite3.Connection, rows: list[tuple[int, str, str]]) -> str:
    found = db.execute("SELECT link FROM rows WHERE position = ?", (rows[0][0] - 1,)).fetchone()
    return found[0] if found else START


@contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
            db.execute("BEGIN")  # all that is read is of one moment, whatever is written meanwhile
            yield db
    except sqlite3.Error as error:
        raise MarketError(f"{path}: not a service's ledger ({error}); give its --ledger") from error


def history(path: Path, count: int) -> list[dict[str, Any]]:
    """Summaries of the last closed slots, oldest first."""
    with _reading(path) as db:
        found = db.execute("SELECT summary FROM slots WHERE summary NOT NULL ORDER BY number DESC LIMIT ?", (count,))
        return [json.loads(text) for (text,) in found][::-1]


def slot_names(path: Path) -> list[str]:
    """Names of all closed slots, oldest first."""
    with _reading(path) as db:
        return [name for (name,) in db.execute("SELECT name FROM slots WHERE summary NOT NULL ORDER BY number")]


def slot_record(path: Path, name: str) -> SlotRecord:
    """A closed slot as it is published.

    Raises:
        MarketError: there is none of this name, or it is not closed.
    """
    with _reading(path) as db:
        found = db.execute(
            "SELECT number, service_key, signature FROM slots WHERE name = ? AND summary NOT NULL", (name,)
        ).fetchone()
        if found is None:
            raise MarketError(f'slot = "{name}": none of this name is closed; see the history for names')
        number, service_key, signature = found
        rows = db.execute("SELECT position, text FROM rows WHERE slot = ? ORDER BY position", (number,)).fetchall()
        before = db.execute("SELECT link FROM rows WHERE position = ?", (rows[0][0] - 1,)).fetchone()
    texts = [text for _, text in rows]
    return SlotRecord(service_key=service_key, previous=before[0] if before else START, rows=texts, signature=signature)
