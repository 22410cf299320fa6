# SPDX-License-Identifier: Apache-2.0
"""What `deepfusion market audit` reads: a plain ledger, a slot that a service published, or all slots of its ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from deepfusion.errors import MarketError
from deepfusion.market.ledger import Ledger, read_ledger
from deepfusion.market.service.book import slot_names, slot_record
from deepfusion.market.service.records import Receipt, SlotRecord
from deepfusion.schema import misfits

SQLITE = b"SQLite format 3\0"


def audited(
    path: Path,
    *,
    slot: str | None = None,
    only_one: bool = False,
    receipts: Sequence[Receipt] = (),
    key: str | None = None,
) -> Iterator[tuple[Ledger, bool, list[str]]]:
    """Each slot of a file, whether bidders signed its commitment, and what is wrong with chain, signatures, receipts.

    What must be computed again is left to `ledger.audit`.

    Args:
        slot: of a service's ledger, this one alone.
        only_one: what the auditor holds belongs to one slot, so that a file of several must be told which.
        key: the service's public key, as the auditor noted it.

    Raises:
        MarketError: the file is none of the three, or what is held does not go with it.
    """
    records = _records(path, slot, only_one)
    if records is None:
        if slot or receipts or key:
            raise MarketError(f"{path}: a ledger without signatures; leave out --slot, --receipts and --key")
        yield read_ledger(path), False, []
        return
    before: SlotRecord | None = None
    held: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        held.setdefault(receipt.slot, []).append(receipt)
    for record in records:
        wrong = record.faults(held.pop(record.opening.slot, ()), key)
        yield record.ledger(), bool(record.bids), wrong + (gaps(before, record) if before else [])
        before = record
    if held:
        raise MarketError(
            f"{path}: receipts are of {', '.join(sorted(held))}, which it does not hold; give those slots"
        )


def _records(path: Path, slot: str | None, only_one: bool) -> Iterator[SlotRecord] | None:
    """A service's slots, read one after the other; None where the file is no service's."""
    try:
        with path.open("rb") as file:
            database = file.read(len(SQLITE)) == SQLITE
        text = b"" if database else path.read_bytes()
    except OSError as error:
        raise MarketError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if database:
        names = [slot] if slot else slot_names(path)
        if not names or (only_one and len(names) > 1):
            raise MarketError(
                f"{path}: holds {len(names)} closed slots; " + ("choose one with --slot" if names else "wait")
            )
        return (slot_record(path, name) for name in names)
    try:
        return iter([SlotRecord.model_validate_json(text)])
    except ValidationError:
        return None


def gaps(before: SlotRecord, after: SlotRecord) -> list[str]:
    """What does not fit between a slot and the next."""
    name, ended, wrong = after.opening.slot, before.opening.slot, list[str]()
    if after.previous != before.links[-1]:
        wrong.append(f"{name}: does not go on where {ended} ended")
    if (name, after.opening.commitment) != before.opening.following:
        wrong.append(f"{name}: its seed is not the one that was promised in {ended}")
    if after.opening.opens < before.closing.closed:
        wrong.append(f"{name}: opened before {ended} was closed")
    return wrong


def read_receipts(path: Path) -> list[Receipt]:
    """Receipts out of a file with one a line.

    Raises:
        MarketError: it cannot be read or a line is no receipt.
    """
    cure = "give what the service answered, one receipt a line"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MarketError(f"{path}: cannot be read ({error}); {cure}") from error
    receipts: list[Receipt] = []
    for number, line in enumerate(lines, 1):
        try:
            receipts += [Receipt.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            what = "; ".join(misfits(error, "receipt")[:3])
            raise MarketError(f"{path}, line {number}: no receipt ({what}); {cure}") from error
    return receipts
