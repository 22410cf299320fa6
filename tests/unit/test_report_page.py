# SPDX-License-Identifier: Apache-2.0
"""Records survive the disk; the page stands alone, escapes what devices call themselves, and leaves out what was not measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deepfusion.artifacts import write_atomic
from deepfusion.errors import DataError
from deepfusion.measure import MOST_PAIRED, read_clusters
from deepfusion.record import (
    Baselines,
    ClusterRecord,
    DeviceRecord,
    DomainMetrics,
    Group,
    LedgerTotals,
    Metrics,
    ModelMetrics,
    Record,
    RoundRecord,
)  # fmt: skip
from deepfusion.report.events import write_events
from deepfusion.report.page import write_report
from deepfusion.report.rows import compared, headline, size
from deepfusion.report.table import summary_table
from deepfusion.stages.cluster import describe
from deepfusion.types import Clusters

EVIL = "<script>alert('x')</script>"


def metrics(nats: float, domains: tuple[str, ...]) -> Metrics:
    part = {"log_perplexity": nats, "perplexity": 2.718281828**nats, "token_accuracy": 0.3, "tokens": 900}
    return Metrics(**part, domains={name: DomainMetrics(**part) for name in domains})


def sample(num_devices: int = 5, domains: tuple[str, ...] = ("law", EVIL), *, whole: bool = True) -> Record:
    ids = [EVIL, *(f"device-{n:03d}" for n in range(1, num_devices))][:num_devices]
    own = metrics(3.0, domains)
    group = Group(mean=own, items=[ModelMetrics(name=EVIL, cluster=0, metrics=own)])
    return Record(
        run_id="sample-1", name="sample", method="deepfusion", recipe="joint", seed=3, started="2026-01-01T00:00:00+00:00",
        metrics=own,
        baselines=Baselines(public_only=metrics(3.5, domains), proxies=group, students=group, devices=group, oracle=own)
        if whole else Baselines(),
        ledger=LedgerTotals(upload_bytes=2_500_000, download_bytes=1000, init_bytes=0, total_bytes=2_501_000),
        devices=[
            DeviceRecord(
                id=name, architecture="gpt2", parameters=1000, estimated_memory_bytes=10**6, peak_memory_bytes=2 * 10**6,
                upload_bytes=4000 + n, cluster=n % 2, documents=4, tokens=90, domains={domains[0]: 90}, seconds=1.5,
            )
            for n, name in enumerate(ids)
        ],
        clusters=ClusterRecord(
            num_clusters=min(2, num_devices), labels={name: n % 2 for n, name in enumerate(ids)},
            similarity=[[1.0] * len(ids)] * len(ids) if num_devices <= MOST_PAIRED else None,
            projection=[[float(n), 0.5] for n in range(len(ids))],
        ) if whole else None,
        seconds={"moe": 12.0}, versions={"torch": "2"}, curves={"moe": {"loss": [(0, 4.0), (1, 3.5)]}},
        expert_load={name: [0.75, 0.25] for name in domains}, expert_mutual_information=0.0, merge_check=1e-7,
        notes=["a note <b>with</b> tags"], failures={EVIL: "gone & lost"}, config={"seed": 3, "name": EVIL},
    )  # fmt: skip


class Tags(HTMLParser):
    """Counts elements, and notes every address that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[str, int] = {}
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[tag] = self.open.get(tag, 0) + 1
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]


def page_of(records: list[Record], folder: Path) -> tuple[str, Tags]:
    write_report(records, folder / "report.html")
    text = (folder / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    return text, tags


def test_names_from_devices_never_become_markup(tmp_path: Path) -> None:
    text, tags = page_of([sample()], tmp_path)
    assert tags.open["script"] == 1
    assert EVIL not in text
    assert "&lt;script&gt;" in text


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    text, tags = page_of([sample()], tmp_path)
    assert tags.addresses == []
    assert not re.search(r"url\(|@import", text)


@pytest.mark.parametrize("num_devices", [1, 2, 128])
@pytest.mark.parametrize("num_domains", [1, 12])
def test_the_page_holds_small_and_large_fleets(num_devices: int, num_domains: int, tmp_path: Path) -> None:
    domains = tuple(f"domain-{n}" for n in range(num_domains))
    text, tags = page_of([sample(num_devices, domains)], tmp_path)
    assert text.count("<td>device-") == num_devices - 1
    body = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.S)
    assert not re.search(r"nan|inf", body)
    assert tags.open["svg"] >= 4


def test_of_many_devices_there_is_a_map_and_no_table_of_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = []
    for number in (MOST_PAIRED, 10 * MOST_PAIRED):
        ids = [f"device-{n:03d}" for n in range(number)]
        clusters = Clusters(tuple(ids), np.arange(number) % 2, np.eye(2))
        write_atomic(tmp_path / "clusters.json", json.dumps(describe(clusters, rng.normal(size=(number, 8)))))
        found = read_clusters(tmp_path)
        assert found is not None
        assert len(found.projection) == number
        assert (found.similarity is None) is (number > MOST_PAIRED)
        sizes.append(len(found.model_dump_json()))
    assert sizes[1] < 10 * sizes[0]
    page, _ = page_of([sample(num_devices=10 * MOST_PAIRED)], tmp_path)
    assert "Map of the devices" in page
    assert "Cosine of the devices" not in page


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    text, _ = page_of([sample(whole=False)], tmp_path)
    assert "Map of the devices" not in text
    assert "public text only" not in text
    assert "Quality on test text" in text


def test_who_has_no_room_for_the_model_has_failed_in_every_round(tmp_path: Path) -> None:
    told = RoundRecord(asked=5, answered=4, by_budget={"2": (3, 2), "8": (2, 2)})
    record = sample().model_copy(
        update={"round_records": [told], "failures": {"device-009": "too large", "device-001": "gone"}}
    )
    page, _ = page_of([record], tmp_path)
    assert '<td>5</td><td>2</td><td class="left">2 experts: 1 of 3; too little memory to be asked: 1</td>' in page


def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    text, _ = page_of([sample(), sample(3)], tmp_path)
    assert "comparison of 2 runs" in text


def test_the_headline_says_how_far_below_the_public_text_the_moe_is() -> None:
    assert headline(sample()) == (
        "The fused MoE reaches perplexity 20.1 on the devices' domains, 39% below the same MoE trained on public text alone "
        "(33.1); 5 devices uploaded 2.5 MB, once."
    )
    assert [size(n) for n in (999, 1500, 2_500_000, 10**13)] == ["999 B", "1.5 kB", "2.5 MB", "10.0 TB"]


def test_the_terminal_table_has_a_row_for_each_model() -> None:
    console = Console(width=160, record=True)
    console.print(summary_table([sample()]))
    text = console.export_text()
    for row in ("fused MoE", "public text only", "students (mean)", "proxies (mean)", "devices (mean)"):
        assert row in text


def test_a_record_comes_back_from_the_disk_as_it_was(tmp_path: Path) -> None:
    record = sample()
    record.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == record


def test_a_file_that_is_no_record_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"schema_version": 1}')
    with pytest.raises(DataError, match="not a record of this version"):
        Record.load(tmp_path / "record.json")
    with pytest.raises(DataError, match="no record there"):
        Record.load(tmp_path / "nothing.json")


def test_tensorboard_gets_every_curve(tmp_path: Path) -> None:
    write_events(sample(), tmp_path / "events")
    assert len(list((tmp_path / "events" / "moe").glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_narrow_terminal_loses_columns_and_no_digits(width: int) -> None:
    domains = tuple(f"finance_{n}_openqa" for n in range(7))
    console = Console(width=width, record=True)
    console.print(summary_table([sample(domains=domains)]))
    text = console.export_text()
    row = next(line for line in text.splitlines() if "fused MoE" in line and "20.1" in line)
    shown = len(row.split()) - 5  # two words of its name, three numbers of the whole text
    assert row.split()[:5] == ["fused", "MoE", "20.1", "3.000", "30.0%"]
    assert row.split()[5:] == ["20.1"] * shown
    assert (shown == 7) is (width == 200)
    assert ("Left out, the terminal being too narrow" in text) is (width < 200)
    for name in domains:
        assert name in text
    assert max(map(len, text.splitlines())) <= width


def test_scoring_is_no_stage_of_the_server(tmp_path: Path) -> None:
    record = sample().model_copy(update={"seconds": {"moe": 12.0, "proxies": 3.0, "scores/student-0": 500.0}})
    text, _ = page_of([record], tmp_path)
    assert "<b>15 s</b><span>server stages</span>" in text
    console = Console(width=160, record=True)
    console.print(summary_table([record]))
    assert "server stages 15 s" in console.export_text()


def test_the_page_says_what_each_row_of_its_table_is(tmp_path: Path) -> None:
    text, _ = page_of([sample()], tmp_path)
    for row in list(compared(sample()))[1:]:
        assert f"{row}: " in text
    text, _ = page_of([sample(whole=False)], tmp_path)
    assert "proxies (mean)" not in text
