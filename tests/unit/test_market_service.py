# SPDX-License-Identifier: Apache-2.0
"""The market as a service: who may bid and when, what is refused and why, what stays secret, what survives a crash."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from service_world import GOOD, KEYS, NOON, OPTIONS, PROFILES, SetClock, World, text_of, world

from deepfusion.errors import ConfigError, MarketError
from deepfusion.market.service.audit import gaps
from deepfusion.market.service.book import Book
from deepfusion.market.service.desk import Desk
from deepfusion.market.service.keys import own_key, public_text, sign
from deepfusion.market.service.options import Clock, load_service
from deepfusion.market.service.page import policy
from deepfusion.market.service.records import START, Receipt, bid_message, link

HOUR = 3600.0


@pytest.fixture
def market(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as found:
        yield found


def reason(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


# ------------------------------------------------------------------------------------------------ bids


def test_a_bid_gets_a_receipt_that_its_user_can_check_and_the_slot_then_holds(market: World) -> None:
    answer = market.bid()
    assert answer.status_code == 201
    receipt = Receipt.model_validate_json(answer.content)
    assert receipt.faults() == []
    assert receipt.model_copy(update={"link": "0" * 64}).faults() != []
    market.close()
    record = market.record("edge-1")
    assert record.faults([receipt], market.desk.public) == []
    assert record.bids == [GOOD]
    verdict = market.client.get("/slots/edge-1/verdicts/ann").json()
    assert verdict["verdict"] == "won"
    assert 0 < verdict["payment"] <= GOOD.budget


def test_the_same_bid_again_gets_the_same_receipt_and_counts_once(market: World) -> None:
    slot = market.slot()
    first, again = market.bid(slot=slot), market.bid(slot=slot)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    market.close()
    assert market.bid(slot=slot).json() == first.json(), "also of who asks after the slot is closed"
    assert len(market.record("edge-1").bids) == 1


def test_a_second_bid_of_a_user_is_refused_and_the_first_stands(market: World) -> None:
    market.bid()
    assert "it stands" in reason(market.bid(replace(GOOD, budget=9.0)), 409)
    market.close()
    assert market.record("edge-1").bids == [GOOD]


def test_many_at_once_of_one_user_are_one_bid(market: World) -> None:
    slot, answers = market.slot(), list[Any]()
    threads = [
        threading.Thread(target=lambda n=n: answers.append(market.bid(replace(GOOD, budget=1.0 + n % 2), slot=slot)))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(201) == 1
    assert set(statuses) == {200, 201, 409}
    assert len({answer.json()["link"] for answer in answers if answer.status_code != 409}) == 1


def test_a_late_bid_is_refused_even_before_the_slot_has_been_cleared(market: World) -> None:
    slot = market.slot()
    market.clock.time = NOON + HOUR
    assert "edge-1 is closed; now open is edge-2" in reason(market.bid(slot=slot), 410)
    assert market.bid().status_code == 201, "signed for the next"
    assert market.record("edge-1").bids == []


def test_the_last_moment_counts_and_the_closing_time_does_not(market: World) -> None:
    slot = market.slot()
    market.clock.time = NOON + HOUR - 1e-3
    assert market.bid(slot=slot).status_code == 201
    market.clock.time = NOON + HOUR
    assert market.bid(replace(GOOD, user="bob"), slot=slot).status_code == 410


@pytest.mark.parametrize("how", ["another's key", "another slot", "another text", "nothing", "noise"])
def test_a_forged_bid_is_refused(market: World, how: str) -> None:
    slot = market.slot()
    opening = link(START, "") if how == "another slot" else slot["opening"]
    signed = text_of(replace(GOOD, budget=1.0)) if how == "another text" else text_of(GOOD)
    signature = sign(KEYS["bob" if how == "another's key" else "ann"], bid_message(opening, signed))
    headers = {"x-bid-signature": {"nothing": "", "noise": "no base64!"}.get(how, signature)}
    answer = market.client.post(f"/slots/{slot['slot']}/bids", content=text_of(GOOD), headers=headers)
    assert "not signed by ann for this slot" in reason(answer, 401)
    market.close()
    assert market.record("edge-1").bids == []


def test_a_signature_fits_one_slot_only(market: World) -> None:
    first = market.slot()
    market.close()
    second = market.slot()
    answer = market.bid(slot={"slot": second["slot"], "opening": first["opening"]})
    assert "not signed" in reason(answer, 401)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "no bids"), ("", 400, "no bids"), ("[]", 400, "no bids"), ("\x00", 400, "no bids"),
        (json.dumps({**json.loads(text_of(GOOD)), "colour": 1}), 400, "colour"),
        (json.dumps({**json.loads(text_of(GOOD)), "budget": "1"}), 400, "budget"),
        (text_of(GOOD) + "\n" + text_of(GOOD), 400, "no bids"),
        (text_of(replace(GOOD, user="eve")), 403, "not registered"),
        (text_of(GOOD).replace("0.05", "NaN"), 422, "budget = nan"),
        (text_of(replace(GOOD, budget=-1.0, rate=0.0)), 422, "rate = 0.0"),
        (text_of(replace(GOOD, model="vgg61")), 422, 'did you mean "vgg16"'),
        (text_of(replace(GOOD, latency=0.001)), 422, "no cut leaves the edge any time"),
        (text_of(GOOD).ljust(4097), 413, "longer than 4096 bytes"),
    ],
)  # fmt: skip
def test_what_is_no_bid_is_refused_with_its_reason(market: World, body: str, status: int, words: str) -> None:
    assert words in reason(market.bid(body), status)
    assert market.bid().status_code == 201, "the user may still bid"


def test_a_body_without_a_length_is_cut_off_too(market: World) -> None:
    answer = market.client.post("/slots/edge-1/bids", content=(b" " * 1000 for _ in range(100)))
    assert "longer than" in reason(answer, 413)
    assert "no bids" in reason(market.client.post("/slots/edge-1/bids", content=b"\xff\xfe"), 400).replace(
        "utf-8", "no bids"
    )


def test_a_user_who_tries_too_often_waits_for_the_next_slot_and_others_do_not(tmp_path: Path) -> None:
    with world(tmp_path, tries=2) as market:
        assert [market.bid().status_code for _ in range(3)] == [201, 200, 429]
        assert market.bid(replace(GOOD, user="bob")).status_code == 201
        market.close()
        assert market.bid().status_code == 201


@pytest.mark.parametrize("slot", ["edge-2", "edge-99", "other", "edge-1' OR '1'='1"])
def test_a_slot_that_was_never_open_takes_no_bid_and_tells_nothing(market: World, slot: str) -> None:
    answer = market.bid(slot={**market.slot(), "slot": slot})
    assert "never open" in reason(answer, 404)
    assert market.client.get(f"/slots/{slot}").status_code == 404


# ------------------------------------------------------------------------------------------------ slots


def test_slots_close_on_the_hour_and_each_is_promised_in_the_one_before(market: World) -> None:
    opened, links = list[dict[str, Any]](), list[str]()
    for number in range(3):
        told = market.slot()
        terms = json.loads(told["terms"])
        assert told["slot"] == f"edge-{number + 1}"
        assert told["closes"] == NOON + HOUR * (number + 1)
        assert told["opening"] == link(told["previous"], told["terms"])
        opened.append(terms)
        links.append(told["opening"])
        market.clock.time = told["closes"] + 5
    assert [(t["slot"], t["commitment"]) for t in opened[1:]] == [tuple(t["following"]) for t in opened[:-1]]
    assert [t["price_kwh"] for t in opened] == [OPTIONS.price_kwh(t["opens"]) for t in opened]
    market.slot()
    one, two = market.record("edge-1"), market.record("edge-2")
    assert gaps(one, two) == []
    assert one.opening.commitment == one.ledger().commitment


def test_hours_in_which_nobody_asks_leave_one_slot_and_no_gap_in_the_chain(market: World) -> None:
    market.bid()
    market.clock.time = NOON + 50 * HOUR + 7
    assert market.slot()["slot"] == "edge-2"
    assert market.slot()["closes"] == NOON + 51 * HOUR
    assert market.record("edge-1").faults() == []


def test_only_the_operator_closes_a_slot_before_its_time(market: World, tmp_path: Path) -> None:
    slot = market.slot()
    assert "not signed by the operator" in reason(market.close(key="ann"), 401)
    assert market.close().json() == {"open": "edge-2"}
    assert "edge-1 is not open" in reason(market.close(slot), 410)
    (tmp_path / "other").mkdir()
    with world(tmp_path / "other", operator=None) as without:
        assert "nobody may close" in reason(without.close(), 403)


def test_a_clock_that_is_set_back_opens_no_slot_again(market: World) -> None:
    slot = market.slot()
    market.clock.time = NOON + HOUR
    assert market.slot()["slot"] == "edge-2"
    market.clock.time = NOON
    assert market.slot()["now"] == NOON + HOUR
    assert market.bid(slot=slot).status_code == 410


def test_the_clock_goes_on_evenly_when_the_machines_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    clock, before = Clock(), time.time()
    monkeypatch.setattr(time, "time", lambda: before + 1e6)
    assert clock.now() < before + 1e5
    clock.adjust()
    assert clock.now() >= before + 1e6


def test_a_hostile_budget_does_not_stop_a_slot_from_being_cleared(market: World) -> None:
    assert "budget = 1e+308" in reason(market.bid(replace(GOOD, budget=1e308)), 422)
    market.bid(replace(GOOD, budget=1e12))
    market.bid(replace(GOOD, user="bob", budget=1e12))
    market.bid(replace(GOOD, user="cy", budget=5e-324))
    market.clock.time = NOON + HOUR
    assert market.slot()["slot"] == "edge-2"
    assert market.record("edge-1").faults() == []


# ------------------------------------------------------------------------------------------------ secrets


def test_while_a_slot_is_open_nothing_that_is_told_depends_on_the_bids_in_it(market: World) -> None:
    def all_that_is_told() -> list[str]:
        paths = ("/slot", "/slots", "/slots/edge-1", "/slots/edge-1/verdicts/ann", "/slots/edge-1/verdicts/bob", "/")
        return [market.client.get(path).text for path in paths]

    empty = all_that_is_told()
    assert '"now": ' in empty[0]
    market.bid(replace(GOOD, budget=0.123456))
    market.bid(replace(GOOD, user="bob"))
    assert all_that_is_told() == empty, "the clock stands, so that even the time is the same"


def test_the_seed_is_not_told_before_the_slot_is_closed_and_fits_its_promise_after(
    market: World, tmp_path: Path
) -> None:
    with sqlite3.connect(tmp_path / "m.sqlite") as db:
        seeds = [seed for (seed,) in db.execute("SELECT seed FROM slots")]
    db.close()
    assert len(seeds) == 2, "that of the next slot lies ready too"
    told = "".join(market.client.get(path).text for path in ("/slot", "/slots", "/slots/edge-1", "/"))
    receipt = market.bid().text
    assert not any(seed in told + receipt for seed in seeds)
    market.close()
    assert market.record("edge-1").closing.seed == seeds[0]
    told = "".join(market.client.get(path).text for path in ("/slot", "/slots", "/slots/edge-1", "/slots/edge-2", "/"))
    assert seeds[0] in told
    assert seeds[1] not in told


def test_what_is_secret_is_for_its_owner_alone(market: World, tmp_path: Path) -> None:
    for name in ("m.sqlite", "m.sqlite-wal", "m.key"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name
    (tmp_path / "m.key").chmod(0o640)
    with pytest.raises(MarketError, match="others may read"):
        own_key(tmp_path / "m.key")


# ------------------------------------------------------------------------------------------------ crashes


def test_after_a_crash_all_receipts_are_good_and_a_retry_counts_once(tmp_path: Path) -> None:
    clock = SetClock()
    with world(tmp_path, clock) as market:
        slot, receipt = market.slot(), market.bid().json()
        with world(tmp_path, clock) as other:  # as if the first had vanished
            assert other.slot() == slot
            assert other.bid(slot=slot).json() == receipt
            assert other.bid(replace(GOOD, user="bob"), slot=slot).status_code == 201
            other.close()
            record = other.record("edge-1")
            assert [bid.user for bid in record.bids] == ["ann", "bob"]
            assert record.faults([Receipt.model_validate(receipt)]) == []


def test_an_overdue_slot_is_cleared_at_the_start(tmp_path: Path) -> None:
    with world(tmp_path) as market:
        market.bid()
    with world(tmp_path, SetClock(NOON + 5 * HOUR + 1)) as again:
        assert again.slot()["slot"] == "edge-2"
        assert again.client.get("/slots/edge-1/verdicts/ann").json()["verdict"] == "won"
        assert again.slot()["closes"] == NOON + 6 * HOUR


def test_a_slot_keeps_its_terms_when_the_configuration_changes_in_between(tmp_path: Path) -> None:
    with world(tmp_path) as market:
        market.bid()
        promised = market.slot()["terms"]
    with world(tmp_path, provider=replace(OPTIONS.provider, capacity=1e9)) as again:
        assert again.slot()["terms"] == promised
        again.close()
        assert again.record("edge-1").ledger().provider.capacity == 6e10
        assert json.loads(again.slot()["terms"])["provider"]["capacity"] == 1e9
    key, _ = own_key(tmp_path / "m.key")
    book = Book(tmp_path / "m.sqlite")
    with pytest.raises(MarketError, match="opened with another table"):
        Desk(OPTIONS, {"vgg16": PROFILES["alexnet"]}, book, key, SetClock())
    book.close()


def test_a_ledger_that_cannot_be_written_gives_no_receipt_and_loses_nothing(
    market: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(market.desk._book, "add", full)
        assert "disk full" in reason(market.bid(), 503)
    assert market.bid().status_code == 201
    market.close()
    assert market.record("edge-1").faults() == []


def test_bids_that_come_together_share_a_write_to_the_disk(market: World, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, book = list[int](), market.desk._book
    add, first = book.add, threading.Event()

    def slow(slot: int, rows: Any) -> list[str]:
        batches.append(len(rows))
        first.wait(5)
        return add(slot, rows)

    monkeypatch.setattr(book, "add", slow)
    slot = market.slot()
    threads = [
        threading.Thread(target=market.bid, args=(replace(GOOD, user=user),), kwargs={"slot": slot})
        for user in ("ann", "bob", "cy")
    ]
    threads[0].start()
    while not batches:
        pass
    for thread in threads[1:]:
        thread.start()
    while len(market.desk._waiting) < 3:
        pass
    first.set()
    for thread in threads:
        thread.join()
    assert batches == [1, 2]


# ------------------------------------------------------------------------------------------------ page, options


def test_the_page_allows_its_own_script_and_nothing_from_elsewhere(market: World) -> None:
    market.bid()
    market.close()
    answer = market.client.get("/")
    rules = answer.headers["content-security-policy"]
    assert rules == policy(answer.text)
    assert "default-src 'none'" in rules
    assert "unsafe" not in rules
    assert not re.search(r'(src|href)="(?![/#])', answer.text)
    assert " style=" not in answer.text
    assert "<svg" in answer.text
    assert 'href="/slots/edge-1"' in answer.text


def test_names_of_models_and_services_are_escaped_on_the_page(tmp_path: Path) -> None:
    from deepfusion.market.service.page import page

    with world(tmp_path) as market:
        evil = market.desk.opening.model_copy(update={"service": "<script>alert(1)</script>"})
        text, _ = page(evil, [])
    assert "<script>alert" not in text


def test_all_faults_of_a_configuration_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'name = "a b"\ntries = 0\noperator = "x"\n[users]\nann = "MCow"\n[provider]\nhours = 1e-9\n'
    )
    with pytest.raises(ConfigError) as error:
        load_service(tmp_path / "s.toml")
    for words in ('name = "a b"', "tries = 0", "operator", "[users] ann", "hours = 1e-09"):
        assert words in str(error.value), words
    (tmp_path / "s.toml").write_text("")
    with pytest.raises(ConfigError, match="nobody may bid"):
        load_service(tmp_path / "s.toml")


def test_the_shipped_configuration_is_one() -> None:
    options = load_service(Path(__file__).parents[2] / "configs/market-service.toml")
    assert list(options.users) == ["ann"]
    assert options.seconds == HOUR


def test_a_key_of_another_kind_and_a_file_that_is_no_ledger_are_refused(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("hello")
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(MarketError, match="no private key in PEM"):
        own_key(tmp_path / "k")
    (tmp_path / "l.sqlite").write_text("hello " * 1000)
    with pytest.raises(MarketError, match="not a ledger"):
        Book(tmp_path / "l.sqlite")
    key, _ = own_key(tmp_path / "new.key")
    assert isinstance(key, Ed25519PrivateKey)
    assert public_text(own_key(tmp_path / "new.key")[0].public_key()) == public_text(key.public_key())
