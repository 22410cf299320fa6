# SPDX-License-Identifier: Apache-2.0
"""What a service publishes can be checked by anybody: each way to cheat in a slot, a chain or a receipt is found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from service_world import GOOD, KEYS, PROFILES, text_of, world

from deepfusion import cli
from deepfusion.errors import MarketError
from deepfusion.market.ledger import audit
from deepfusion.market.service.audit import audited, gaps, read_receipts
from deepfusion.market.service.keys import public_text, sign
from deepfusion.market.service.records import Receipt, SlotRecord, bid_message, link, slot_message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ledger of a service with two closed slots, the first with three bids, and all that users kept of it."""
    path = tmp_path_factory.mktemp("service")
    with world(path) as market:
        bids = [GOOD, replace(GOOD, user="bob", budget=0.02), replace(GOOD, user="cy", budget=1e-7)]
        told = market.slot()
        receipts = [market.bid(bid).text for bid in bids]
        market.close()
        market.bid(replace(GOOD, user="bob"))
        market.close()
        for slot in ("edge-1", "edge-2"):
            (path / f"{slot}.json").write_text(market.client.get(f"/slots/{slot}").text)
    (path / "told.json").write_text(json.dumps(told))
    (path / "receipts.jsonl").write_text("\n".join(receipts))
    (path / "bids.jsonl").write_text("\n".join(text_of(bid) for bid in bids))
    return path


def published(folder: Path, slot: str = "edge-1") -> SlotRecord:
    return SlotRecord.model_validate_json((folder / f"{slot}.json").read_text())


def all_faults(record: SlotRecord, **held: Any) -> list[str]:
    return record.faults(**held) + audit(record.ledger(), PROFILES)


def forged(record: SlotRecord, change: Any, *, key: str | None = None) -> SlotRecord:
    """The record with rows changed, and signed again with a key of the forger's where one is named."""
    rows = [json.loads(row) for row in record.rows]
    change(rows)
    texts = {json.dumps(json.loads(text)): text for text in record.rows}  # what is not changed stays byte for byte
    made = record.model_copy(update={"rows": [texts.get(json.dumps(row), json.dumps(row)) for row in rows]})
    fresh = SlotRecord.model_validate(made.model_dump())
    if key is None:
        return fresh
    update = {
        "signature": sign(KEYS[key], slot_message(fresh.links[-1])),
        "service_key": public_text(KEYS[key].public_key()),
    }
    return SlotRecord.model_validate({**fresh.model_dump(), **update})


def test_an_honest_slot_has_no_faults_and_is_computed_again(folder: Path) -> None:
    record, told = published(folder), json.loads((folder / "told.json").read_text())
    receipts = read_receipts(folder / "receipts.jsonl")
    assert all_faults(record, receipts=receipts, service_key=told["service_key"]) == []
    assert record.links[0] == told["opening"], "what the bids were signed over"
    assert audit(record.ledger(), PROFILES, commitment=json.loads(told["terms"])["commitment"]) == []
    assert gaps(record, published(folder, "edge-2")) == []


def test_the_provider_cannot_change_drop_or_write_a_bid_even_if_it_signs_anew(folder: Path) -> None:
    record, receipts = published(folder), read_receipts(folder / "receipts.jsonl")

    def dearer(rows: list[Any]) -> None:
        rows[1]["body"] = rows[1]["body"].replace("0.05", "0.06")

    def drop(rows: list[Any]) -> None:
        del rows[1]

    def shill(rows: list[Any]) -> None:
        rows.insert(1, {**rows[1], "body": text_of(replace(GOOD, user="eve"))})

    def twice(rows: list[Any]) -> None:
        rows.insert(1, rows[1])

    for change, words in (
        (dearer, "not signed by its user"),
        (shill, "not signed by its user"),
        (twice, "a second bid"),
    ):
        assert any("the service signed" in w for w in forged(record, change).faults())
        assert any(words in w for w in forged(record, change, key="operator").faults()), words
    found = forged(record, drop, key="operator").faults(receipts)
    assert any("receipt of ann: its bid is missing" in w for w in found)
    assert any("signed with another key" in w for w in found)
    noted = record.service_key
    assert any("that the auditor noted" in w for w in forged(record, drop, key="operator").faults(service_key=noted))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("price_kwh", 0.2, "reserve"), ("reserve", 1e-9, "reserve"), ("opens", 1.0, "signed by its user"),
     ("commitment", "0" * 64, "drawn again"), ("closes", 1.0, "when the slot was not open"),
     ("latency", "worst", "signed by its user")],
)  # fmt: skip
def test_the_terms_cannot_be_changed_once_a_bid_is_signed(folder: Path, name: str, value: Any, words: str) -> None:
    other = forged(published(folder), lambda rows: rows[0].update({name: value}), key="operator")
    found = all_faults(other)
    assert any("not signed by its user for this slot" in w for w in found)
    assert any(words in w for w in found)


def test_another_seed_or_result_is_found(folder: Path) -> None:
    record = published(folder)
    reseeded = forged(record, lambda rows: rows[-1].update(seed="5" * 64), key="operator")
    assert any("drawn again" in w for w in all_faults(reseeded))
    cheaper = forged(record, lambda rows: rows[-1]["result"].update(revenue=0.0), key="operator")
    assert any("result.revenue" in w for w in all_faults(cheaper))
    late = forged(record, lambda rows: rows[2].update(received=rows[0]["closes"]), key="operator")
    assert any("when the slot was not open" in w for w in all_faults(late))


def test_a_slot_left_out_or_put_in_between_is_found(folder: Path) -> None:
    one, two = published(folder), published(folder, "edge-2")
    moved = two.model_copy(update={"previous": "0" * 64})
    assert any("does not go on" in w for w in gaps(one, moved))
    other = forged(two, lambda rows: rows[0].update(commitment="1" * 64))
    assert any("promised" in w for w in gaps(one, other))
    early = forged(two, lambda rows: rows[0].update(opens=1.0))
    assert any("before edge-1 was closed" in w for w in gaps(one, early))


def test_a_receipt_is_the_services_word_and_for_one_bid(folder: Path) -> None:
    record, receipts = published(folder), read_receipts(folder / "receipts.jsonl")
    ann = receipts[0]
    false = ann.model_copy(update={"link": link(ann.link, "x")})
    assert any("not signed by the service" in w for w in record.faults([false]))
    assert any("other terms" in w for w in published(folder, "edge-2").faults([ann]))
    assert [record.rows[record.links.index(r.link)].count(f'\\"user\\": \\"{r.user}\\"') for r in receipts] == [1, 1, 1]


@pytest.mark.parametrize("change", ["no rows", "no closing", "noise", "a bid of noise"])
def test_what_is_no_slot_is_refused_with_the_row(folder: Path, change: str) -> None:
    record = published(folder)
    bad = json.dumps({**json.loads(record.rows[1]), "body": "noise"})
    rows = {
        "no rows": [],
        "no closing": record.rows[:-1],
        "noise": ["x"],
        "a bid of noise": [record.rows[0], bad, record.rows[-1]],
    }
    broken = SlotRecord.model_validate({**record.model_dump(), "rows": rows[change]})
    with pytest.raises(MarketError, match=r"row \d|line 2"):
        broken.ledger()


# ------------------------------------------------------------------------------------------------ commands


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deepfusion", "market", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_audit_reads_a_published_slot_and_the_whole_ledger(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads((folder / "told.json").read_text())
    held = ("--receipts", folder / "receipts.jsonl", "--bids", folder / "bids.jsonl", "--key", told["service_key"])
    commitment = ("--commitment", json.loads(told["terms"])["commitment"])
    assert call(monkeypatch, "audit", folder / "edge-1.json", *held, *commitment) == 0
    assert "Slot edge-1 is what the rules make of its 3 bids" in capsys.readouterr().out
    assert call(monkeypatch, "audit", folder / "m.sqlite", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"slot": slot, "wrong": [], "committed": True} for slot in ("edge-1", "edge-2")]
    assert call(monkeypatch, "audit", folder / "m.sqlite", "--slot", "edge-1", *held) == 0
    assert call(monkeypatch, "audit", folder / "m.sqlite", *held) == 2
    assert "choose one with --slot" in capsys.readouterr().err
    bad = forged(published(folder), lambda rows: rows[-1]["result"].update(revenue=0.0))
    (folder / "bad.json").write_text(bad.model_dump_json())
    assert call(monkeypatch, "audit", folder / "bad.json", "--bids", folder / "bids.jsonl") == 1
    shown = capsys.readouterr().out
    assert "the service signed" in shown
    assert "result.revenue" in shown


def test_audit_says_when_what_is_held_does_not_go_with_the_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MarketError, match="receipts are of edge-1, which it does not hold"):
        list(audited(folder / "edge-2.json", receipts=read_receipts(folder / "receipts.jsonl")))
    with pytest.raises(MarketError, match="none of this name is closed"):
        list(audited(folder / "m.sqlite", slot="edge-3"))
    with pytest.raises(MarketError, match=r"bids.jsonl, line 1: no receipt .*one receipt a line"):
        read_receipts(folder / "bids.jsonl")
    with pytest.raises(MarketError, match="cannot be read"):
        list(audited(tmp_path / "none"))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(MarketError, match="not what `deepfusion market` writes"):
        list(audited(tmp_path / "x.json"))
    with world(tmp_path), pytest.raises(MarketError, match="holds 0 closed slots"):
        list(audited(tmp_path / "m.sqlite"))


def test_the_signature_of_a_bid_is_over_the_bytes_that_were_sent(folder: Path) -> None:
    record = published(folder)
    taken = record.taken[0]
    message = bid_message(record.links[0], taken.body)
    assert message.startswith(b"deepfusion market bid\n")
    assert sign(KEYS["ann"], message) == taken.signature
    assert Receipt.model_validate_json((folder / "receipts.jsonl").read_text().splitlines()[0]).user == "ann"
