# SPDX-License-Identifier: Apache-2.0
"""A slot from bids to ledger: what is refused and why, what an audit finds, and the commands around them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deepfusion import cli
from deepfusion.errors import MarketError
from deepfusion.market.architectures import shipped_profiles
from deepfusion.market.bids import Bid, Provider, parse_bids, read_bids
from deepfusion.market.coco import Coco
from deepfusion.market.ledger import Ledger, audit, clear_to_ledger, open_slot, read_commitment, read_ledger
from deepfusion.market.slot import clear_slot, prepare

PROFILES = shipped_profiles()
GOOD = Bid(user="ann", model="vgg16", budget=1.0, latency=1.0, device_flops=1e10, rate=3e7, rtt=0.03, sigma=0.8)
SEED = "5" * 64


def some_bids(count: int = 12) -> list[Bid]:
    return [
        replace(GOOD, user=f"user-{n:02d}", budget=0.04 * (1 + n % 7), latency=0.6 + 0.05 * n, model=model)
        for n, model in zip(range(count), ["vgg16", "resnet34", "bart"] * count, strict=False)
    ]


def cleared(bids: list[Bid], **changes: Any) -> dict[str, Any]:
    provider = Provider(capacity=changes.pop("capacity", 3.93e12))
    return clear_slot(bids, PROFILES, provider, price_kwh=0.1, seed=SEED, coco=Coco(**changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": -1.0}, "budget = -1.0"), ({"budget": math.nan}, "budget = nan"), ({"latency": 0.0}, "latency = 0.0"),
        ({"latency": math.inf}, "latency = inf"), ({"sigma": 1.5}, r"sigma = 1.5: must lie in \[0, 1\]"),
        ({"sigma": math.nan}, "sigma = nan"), ({"model": "vgg61"}, 'did you mean "vgg16"'), ({"rate": 0.0}, "rate = 0.0"),
        ({"device_flops": -5.0}, "device_flops"), ({"rtt": -0.1}, "rtt = -0.1"), ({"sigma": None}, "give one of the two"),
        ({"accuracy": -0.01}, "give one of the two"), ({"sigma": None, "accuracy": 0.5}, "at best"), ({"user": ""}, "name"),
        ({"latency": 0.001}, "no cut leaves the edge any time"), ({"demand": 1.0}, "by the public tables it is"),
        ({"demand": math.nan}, "by the public tables"), ({"device_bandwidth": 0.0}, "device_bandwidth"),
        ({"budget": 1e308}, r"budget = 1e\+308"), ({"rate": 1e-300}, "rate = 1e-300"), ({"rtt": 1e300}, r"rtt = 1e\+300"),
    ],
)  # fmt: skip
def test_a_bid_that_cannot_be_is_refused_with_its_reason_and_blocks_nobody(change: dict[str, Any], words: str) -> None:
    other = replace(GOOD, user="bob")
    result = cleared([replace(GOOD, **change), other])
    assert list(result["winners"]) == ["bob"]
    assert list(result["refused"]) == [change.get("user", "ann")]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(next(iter(result["refused"].values())))


@pytest.mark.parametrize("mode", ["per_bidder", "global"])
def test_no_bids_within_the_bounds_stop_a_clearing(mode: Any) -> None:
    ends = [1e-21, 1e21]
    extreme = [
        replace(GOOD, user=f"{k}-{v}", **{k: v}) for k in ("latency", "device_flops", "rate", "rtt") for v in ends
    ]
    for budgets in ([1e12, 1e12, 5e-324], [1e12, 1.0, 0.0], [5e-324] * 3):
        rich = [replace(GOOD, user=str(n), budget=budget) for n, budget in enumerate(budgets)]
        result = cleared([*rich, *extreme], agreement=mode)
        assert len(result["winners"]) >= 1
        assert json.dumps(result, allow_nan=False)


def test_all_faults_of_a_bid_are_told_at_once() -> None:
    reason = cleared([replace(GOOD, budget=-1.0, rate=0.0, model="x")])["refused"]["ann"]
    assert all(word in reason for word in ("budget", "rate", "model"))


def test_a_user_who_bids_twice_is_refused_in_either_order() -> None:
    twice = [GOOD, replace(GOOD, budget=9.5), replace(GOOD, user="bob"), replace(GOOD, budget=1.5)]
    for bids in (twice, twice[::-1]):
        result = cleared(bids)
        assert list(result["winners"]) == ["bob"]
        assert "more than once" in result["refused"]["ann"]


def test_a_bid_that_alone_exceeds_the_edge_is_refused_and_cannot_block() -> None:
    hungry = replace(GOOD, user="hungry", budget=1e6, latency=0.12)
    result = cleared([GOOD, hungry], capacity=8e10)
    assert list(result["winners"]) == ["ann"]
    assert "more than the whole edge" in result["refused"]["hungry"]


def test_who_needs_no_edge_is_served_locally_and_a_stated_demand_is_checked() -> None:
    prepared = prepare([GOOD, replace(GOOD, user="slow", latency=60.0)], PROFILES, Provider(), 0.1, "expected")
    assert prepared.local == ["slow"]
    speed = float(prepared.market.demand_N[0])
    assert list(cleared([replace(GOOD, demand=speed)])["winners"]) == ["ann"]
    worst = prepare([GOOD], PROFILES, Provider(), 0.1, "worst")
    assert float(worst.market.demand_N[0]) > speed


@pytest.mark.parametrize(
    ("provider", "words"),
    [
        (Provider(capacity=0.0), "capacity = 0.0"), (Provider(gamma=-0.1), "gamma = -0.1"), (Provider(pue=0.5), "pue = 0.5"),
        (Provider(capacity=math.nan, hours=0.0), "hours"), (Provider(bandwidth=0.0), "bandwidth"),
    ],
)  # fmt: skip
def test_a_provider_that_cannot_be_is_refused(provider: Provider, words: str) -> None:
    with pytest.raises(MarketError, match=words):
        clear_slot([GOOD], PROFILES, provider, price_kwh=0.1, seed=SEED, coco=Coco())


def test_a_negative_price_of_electricity_and_a_base_near_one_are_refused() -> None:
    with pytest.raises(MarketError, match=r"price_kwh = -0\.1"):
        clear_slot([GOOD], PROFILES, Provider(), price_kwh=-0.1, seed=SEED, coco=Coco())
    with pytest.raises(MarketError, match=r"y = 1\.0"):
        clear_slot([GOOD], PROFILES, Provider(), price_kwh=0.1, seed=SEED, coco=Coco(y=1.0))


def test_the_reserve_price_pays_the_rent_and_the_margin_when_all_is_sold() -> None:
    provider = Provider(power_kw=0.45, pue=1.5, fixed=0.01, gamma=0.2)
    assert provider.rent(0.1) == pytest.approx(0.0775)
    assert provider.reserve_price(0.1) * provider.capacity == pytest.approx(1.2 * 0.0775)


def test_an_empty_slot_has_no_price_and_logs_its_reserve() -> None:
    result = cleared([])
    assert (result["price"], result["revenue"], result["winners"]) == (None, 0.0, {})
    assert result["reserve"] == Provider().reserve_price(0.1)


@pytest.mark.parametrize("mode", ["per_bidder", "global"])
def test_every_bid_has_one_verdict(mode: Any) -> None:
    bids = [*some_bids(), replace(GOOD, user="poor", budget=1e-9), replace(GOOD, user="bad", rate=0.0)]
    result = cleared(bids, agreement=mode, capacity=6e10)
    told = [*result["winners"], *result["losers"], *result["local"], *result["refused"]]
    assert sorted(told) == sorted(bid.user for bid in bids)
    assert "below the reserve price" in result["losers"]["poor"]
    assert any("denser bids" in reason for reason in result["losers"].values())
    assert result["revenue"] == pytest.approx(sum(won["payment"] for won in result["winners"].values()))


# ------------------------------------------------------------------------------------------------ the ledger


def ledger(committed: bool = True) -> Ledger:
    return clear_to_ledger(
        open_slot("14h"),
        some_bids(),
        PROFILES,
        Provider(capacity=6e10),
        price_kwh=0.1,
        coco=Coco(),
        committed=committed,
    )


def test_an_honest_ledger_survives_the_disk_and_the_audit(tmp_path: Path) -> None:
    written = ledger()
    written.save(tmp_path / "l.json")
    again = read_ledger(tmp_path / "l.json")
    assert again == written
    assert audit(again, PROFILES, commitment=written.commitment, known=some_bids()) == []
    strange = clear_to_ledger(
        open_slot("x"), [replace(GOOD, budget=math.nan), replace(GOOD, user="b")], PROFILES, Provider(),
        price_kwh=0.1, coco=Coco(y=1.5), committed=False,
    )  # fmt: skip
    strange.save(tmp_path / "s.json")
    assert audit(read_ledger(tmp_path / "s.json"), PROFILES) == []


def test_each_way_to_cheat_is_found() -> None:
    written = ledger()
    winner = next(iter(written.result["winners"]))
    loser = next(iter(written.result["losers"]))

    def tampered(**changes: Any) -> list[str]:
        return audit(written.model_copy(update=changes), PROFILES, commitment=written.commitment, known=some_bids())

    def with_result(change: Any) -> list[str]:
        result = json.loads(json.dumps(written.result))
        change(result)
        return tampered(result=result)

    assert any("payment" in w for w in with_result(lambda r: r["winners"][winner].update(payment=1.0)))
    assert any(winner in w for w in with_result(lambda r: r["winners"].pop(winner)))
    assert any(loser in w for w in with_result(lambda r: r["losers"].update({loser: "we do not like it"})))
    assert any("revenue" in w for w in with_result(lambda r: r.update(revenue=0.0)))
    assert any("extra" in w for w in with_result(lambda r: r.update(extra=1)))
    assert any("drawn again" in w for w in tampered(seed="a" * 64)), "another seed, to move the grid"
    fewer = [bid for bid in written.bids if bid.user != winner]
    assert any("missing" in w for w in tampered(bids=fewer))
    raised = [replace(bid, budget=bid.budget * 2) for bid in written.bids]
    assert any("was changed" in w for w in tampered(bids=raised))
    assert any("another table" in w for w in tampered(profiles={"vgg16": "0" * 32}))
    assert any("no such table" in w for w in tampered(profiles={"mine": "0" * 32}))
    assert any("published" in w for w in audit(written, PROFILES, commitment="0" * 64))


def test_a_commitment_is_a_hash_or_the_file_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "commitment.json").write_text(json.dumps({"slot": "s", "commitment": "ab" * 32}))
    assert read_commitment("ab" * 32) == read_commitment(str(tmp_path / "commitment.json")) == "ab" * 32
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "itself.json").write_text(json.dumps({"commitment": str(tmp_path / "itself.json")}))
    for given in ("5f2c", *(str(tmp_path / f"{name}.json") for name in ("none", "other", "itself"))):
        with pytest.raises(MarketError, match=r"--commitment .*: neither a hash of 64 hexadecimal digits nor a file"):
            read_commitment(given)


def test_a_commitment_fixes_the_seed_and_the_slot() -> None:
    with pytest.raises(MarketError, match="a slot needs a name"):
        open_slot(" ")
    one, two = open_slot("a"), open_slot("a")
    assert one.seed != two.seed
    assert len({one.commitment, two.commitment, one.model_copy(update={"slot": "b"}).commitment}) == 3


def test_files_that_are_no_bids_or_ledgers_name_their_lines(tmp_path: Path) -> None:
    lines = [json.dumps(asdict(GOOD)), "{", '{"user": "x"}', json.dumps({**asdict(GOOD), "latency": "soon"})]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, json.dumps({**asdict(GOOD), "colour": 1})]))
    with pytest.raises(MarketError) as error:
        read_bids(tmp_path / "b.jsonl")
    assert all(f"line {n}" in str(error.value) for n in (2, 3, 4, 5))
    assert "line 1:" not in str(error.value)
    assert parse_bids([(1, lines[0])], "here") == [GOOD]
    for path in (tmp_path / "none", tmp_path / "b.jsonl"):
        with pytest.raises(MarketError, match=path.name):
            read_ledger(path)


# ------------------------------------------------------------------------------------------------ commands


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deepfusion", "market", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_open_clear_and_audit_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bids.jsonl"
    path.write_text("".join(json.dumps(asdict(bid)) + "\n" for bid in some_bids()))
    assert call(monkeypatch, "open", "14h", "--out", tmp_path / "slot") == 0
    assert (tmp_path / "slot/seed.json").stat().st_mode & 0o077 == 0
    promised = json.loads((tmp_path / "slot/commitment.json").read_text())["commitment"]
    assert call(monkeypatch, "open", "14h", "--out", tmp_path / "slot") == 2
    seed = ("--seed-file", tmp_path / "slot/seed.json")
    assert call(monkeypatch, "clear", path, "--capacity", 6e10, *seed, "--mode", "global") == 0
    told = capsys.readouterr().out
    assert "wins" in told
    assert "loses" in told
    assert "Price" in told
    book = tmp_path / "bids.ledger.json"
    assert call(monkeypatch, "clear", path, "--capacity", 6e10, *seed, "--mode", "global") == 0, "the same once more"
    assert call(monkeypatch, "audit", book, "--commitment", promised, "--bids", path) == 0
    assert "is what the rules make" in capsys.readouterr().out
    book.write_text(book.read_text().replace(read_ledger(book).seed, "b" * 64))
    assert call(monkeypatch, "audit", book, "--commitment", promised) == 1
    assert "drawn again" in capsys.readouterr().out
    capsys.readouterr()
    assert call(monkeypatch, "clear", path) == 2
    assert "another ledger is there already" in capsys.readouterr().err
    book.unlink()
    assert call(monkeypatch, "clear", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["winners"]


def test_simulate_from_the_command_line_leaves_a_record_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "configs/market.toml"
    small = ("--set", "slots=2", "--set", "users.count=200", "--set", 'rivals=["omniscient"]')
    assert call(monkeypatch, "simulate", config, "--out", tmp_path, *small) == 0
    assert "coco (per bidder)" in capsys.readouterr().out
    assert (tmp_path / "market.html").exists()
    assert len(json.loads((tmp_path / "record.json").read_text())["bids"]) == 2
    assert call(monkeypatch, "simulate", config, "--out", tmp_path, "--set", "slots=0") == 78
    assert "slots = 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["open", "clear", "audit", "serve", "simulate", "profile"])
def test_every_command_has_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert "Examples" in capsys.readouterr().out


def test_the_command_line_does_not_load_the_market_before_it_is_used() -> None:
    import subprocess

    script = (
        "import sys, deepfusion.cli; print([m for m in sys.modules if m.startswith(('deepfusion.market', 'scipy'))])"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
