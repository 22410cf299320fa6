# SPDX-License-Identifier: Apache-2.0
"""The ledger counts each crossing once, whatever was sent again."""

import resource
from pathlib import Path

import pytest

from deepfusion.errors import DiskError, ResumeError
from deepfusion.federation.ledger import Ledger, Row

ROWS = [
    Row(0, "d0", "down", "init", 100),
    Row(0, "d0", "up", "model", 30),
    Row(0, "d1", "up", "model", 40),
    Row(1, "d0", "down", "logits", 5),
]


def test_totals_are_the_sums_by_direction_and_starting_checkpoints_are_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for row in ROWS:
        ledger.book(row)
    assert ledger.totals() == {"upload_bytes": 70, "download_bytes": 5, "init_bytes": 100, "total_bytes": 175}
    assert ledger.by_device("up") == {"d0": 30, "d1": 40}


def test_a_row_that_finds_the_disk_full_leaves_no_part_of_itself_and_is_booked_later(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.book(ROWS[0])
    whole, before = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 7):  # of the next row nothing fits, or its beginning
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, before[1]))
        try:
            with pytest.raises(DiskError, match=r"ledger.jsonl: a row cannot be written .*; make room .*--resume"):
                ledger.book(ROWS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == whole
        assert list(ledger.rows()) == ROWS[:1]
    ledger.book(ROWS[1])
    assert list(Ledger(path).rows()) == ROWS[:2]


def test_what_is_sent_again_counts_once_and_a_reopened_ledger_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for row in [*ROWS, Row(0, "d1", "up", "model", 44)]:
        ledger.book(row)
    assert ledger.totals()["upload_bytes"] == 74
    assert list(Ledger(path).rows()) == list(ledger.rows())


def test_a_row_that_a_crash_cut_off_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for row in ROWS:
        Ledger(path).book(row)
    path.write_bytes(path.read_bytes()[:-9])
    reopened = Ledger(path)
    assert list(reopened.rows()) == sorted(ROWS[:-1], key=lambda row: (row.round, row.device, row.direction))
    reopened.book(ROWS[-1])
    assert len(list(Ledger(path).rows())) == len(ROWS)


def test_a_file_that_is_no_ledger_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"round": 0}\n')
    with pytest.raises(ResumeError, match=r"ledger.jsonl, line 1: .*delete the file"):
        Ledger(tmp_path / "ledger.jsonl")
