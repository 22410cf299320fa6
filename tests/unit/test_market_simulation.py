# SPDX-License-Identifier: Apache-2.0
"""A simulation shows all mechanisms the same slots, adds up, and leaves a record and a page that stand alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from deepfusion.errors import ConfigError
from deepfusion.market.architectures import shipped_profiles
from deepfusion.market.demand import Edge
from deepfusion.market.page import headline, simulation_table, write_page
from deepfusion.market.population import Electricity, Population, PopulationOptions
from deepfusion.market.simulation import Simulated, load_simulation, simulate

PROFILES = shipped_profiles()
SHIPPED = Path(__file__).parents[2] / "configs/market.toml"
SMALL = ("slots=5", "users.count=300")


@pytest.fixture(scope="module")
def found() -> Simulated:
    return simulate(load_simulation(SHIPPED, SMALL), PROFILES)


def test_the_same_seed_makes_the_same_slots_and_another_one_others(found: Simulated) -> None:
    again = simulate(load_simulation(SHIPPED, SMALL), PROFILES)
    other = simulate(load_simulation(SHIPPED, SMALL, seed=1), PROFILES)
    revenues = [[[row.revenue for row in m.slots] for m in run.mechanisms] for run in (found, again, other)]
    assert revenues[0] == revenues[1] != revenues[2]


def test_bounds_hold_in_every_slot_and_totals_are_sums(found: Simulated) -> None:
    by_name = {m.name: m for m in found.mechanisms}
    assert len(by_name) == 10
    for m in found.mechanisms:
        assert m.revenue == pytest.approx(sum(row.revenue for row in m.slots))
        assert m.profit == pytest.approx(m.revenue - sum(found.rent))
        for row in m.slots:
            assert 0 <= row.utilisation <= 1 + 1e-12
            assert row.surplus >= -1e-12
            assert 0 <= row.late <= 1
    for slot, best in enumerate(by_name["omniscient"].slots):
        assert by_name["coco (global)"].slots[slot].revenue <= best.revenue * (1 + 1e-9)
        assert by_name["first-price"].slots[slot].revenue >= best.revenue * (1 - 1e-9)
        assert by_name["coco (global)"].slots[slot].envious == 0
        assert by_name["first-price"].slots[slot].surplus == pytest.approx(0, abs=1e-9)
    assert all(39 <= count <= 112 for count in found.bids)


def test_nobody_is_late_where_the_deadline_is_guaranteed() -> None:
    worst = simulate(load_simulation(SHIPPED, (*SMALL, 'latency="worst"', 'rivals=["omniscient"]')), PROFILES)
    assert all(row.late == 0 for m in worst.mechanisms for row in m.slots)
    expected = simulate(load_simulation(SHIPPED, (*SMALL, 'rivals=["omniscient"]')), PROFILES)
    assert any(row.late > 0 for row in expected.mechanisms[0].slots)


def test_users_who_got_nothing_come_again_with_what_they_wanted() -> None:
    options = PopulationOptions(count=300, rebid=1.0)
    population = Population(options, PROFILES, "expected", Edge(3.93e12), 0)
    first = population.wishes(0, None, None)
    served = np.zeros(len(first.user_n), dtype=bool)
    second = population.wishes(12, first, served)
    assert set(first.user_n) <= set(second.user_n)
    place = {user: k for k, user in enumerate(second.user_n.tolist())}
    again = [place[user] for user in first.user_n.tolist()]
    assert np.array_equal(second.users.latency_N[again], first.users.latency_N)
    assert np.array_equal(second.generosity_n[again], first.generosity_n)


def test_the_page_stands_alone_and_the_record_survives_the_disk(found: Simulated, tmp_path: Path) -> None:
    evil = found.model_copy(update={"name": "<script>alert(1)</script>"})
    write_page(evil, tmp_path / "market.html")
    page = (tmp_path / "market.html").read_text()
    assert "<script>alert" not in page
    assert not re.search(r'(src|href)="(?!#)', page)
    for words in ("coco (per bidder)", "omniscient", "reserve price", headline(found).split(",")[0]):
        assert words in page
    found.save(tmp_path / "record.json")
    assert Simulated.model_validate_json((tmp_path / "record.json").read_text()) == found
    assert simulation_table(found).row_count == 10


def test_faults_of_a_configuration_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "top.toml").write_text('slots = 0\nseed = -1\nrivals = ["vgc"]\n')
    with pytest.raises(ConfigError) as error:
        load_simulation(tmp_path / "top.toml")
    for words in ("slots = 0", 'did you mean "vcg"', "seed = -1"):
        assert words in str(error.value), words
    text = "[provider]\ncapacity = -1.0\n[users]\nfewest = 9\nmost = 3\n[electricity]\nlow = -1.0\n"
    (tmp_path / "c.toml").write_text(text + "[nonsense]\n")
    with pytest.raises(ConfigError) as error:
        load_simulation(tmp_path / "c.toml")
    for words in ("capacity = -1.0", "fewest = 9", "low = -1.0", "nonsense"):
        assert words in str(error.value), words
    with pytest.raises(ConfigError, match="no exit table for x"):
        simulate(load_simulation(SHIPPED, (*SMALL, "users.models={x=1.0}")), PROFILES)


def test_prices_come_out_of_a_file_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("hour,price\n0,0.1\n1,0.2\n")
    assert Electricity(csv=str(tmp_path / "p.csv")).prices(5).tolist() == [0.1, 0.2, 0.1, 0.2, 0.1]
    (tmp_path / "q.csv").write_text("0.3\n")
    assert Electricity(csv=str(tmp_path / "q.csv")).prices(2).tolist() == [0.3, 0.3]
    for number, bad in enumerate(("price\n", "price\n-1\n", "price\nx\n")):
        path = tmp_path / f"bad-{number}.csv"
        path.write_text(bad)
        with pytest.raises(ConfigError, match="csv"):
            Electricity(csv=str(path)).prices(3)
    synthetic = Electricity().prices(48)
    assert (synthetic.min(), synthetic.max()) == pytest.approx((0.03, 0.15))
    assert json.dumps(synthetic[:24].tolist()) == json.dumps(synthetic[24:].tolist())
