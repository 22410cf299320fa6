# SPDX-License-Identifier: Apache-2.0
"""The rivals are what they are called: truthful where they say so, exact where they claim it, and within the same limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_world import lies, markets, random_market, slow_knapsack

from deepfusion.errors import ConfigError
from deepfusion.market import rivals
from deepfusion.market.auction import Market, best_price, candidates, make_market
from deepfusion.market.coco import Coco
from deepfusion.market.knapsack import Knapsack
from deepfusion.market.mechanisms import Draw, Past, draw, mechanisms, remember

TRUTHFUL = ("coco", "fixed-target", "market-clearing", "posted", "rsop", "vcg", "yesterday")
HISTORY = [remember(random_market(1000 + number, bids=10, tight=False)) for number in range(3)]


def run(name: str, market: Market, chance: Draw, history: list[Past]) -> tuple[np.ndarray, np.ndarray]:
    outcome = mechanisms[name]().clear(market, chance, history)
    return outcome.won_N, outcome.payment_N


@settings(max_examples=80, deadline=None)
@given(markets, st.integers(0, 99), st.sampled_from(sorted(mechanisms)), st.sampled_from([[], HISTORY]))
def test_every_mechanism_keeps_within_capacity_budgets_and_the_reserve_price(
    market: Market, seed: int, name: str, history: list[Past]
) -> None:
    outcome = mechanisms[name]().clear(market, draw(seed, len(market)), history)
    won = outcome.won_N
    assert float(market.demand_N[won].sum()) <= market.capacity * (1 + 1e-12)
    assert bool((outcome.payment_N <= market.budget_N).all())
    assert bool((outcome.price_N[won] >= market.reserve * (1 - 1e-12)).all())
    if mechanisms[name].uniform == "yes" and won.any():
        assert outcome.price is not None


@pytest.mark.parametrize("name", TRUTHFUL)
def test_mechanisms_that_say_so_are_truthful(name: str) -> None:
    generator = np.random.default_rng(3)
    for seed in range(14):
        market = random_market(seed, tight=seed % 2 == 0, ties=seed % 5 == 0)
        chance = draw(seed, len(market))
        won, paid = run(name, market, chance, HISTORY)
        for i in range(len(market)):
            true = float(market.budget_N[i])
            honest = true - paid[i] if won[i] else 0.0
            for lie in lies(market, i, generator):
                wins, pays = run(name, market.with_budget(i, lie), chance, HISTORY)
                assert (true - pays[i] if wins[i] else 0.0) <= honest + 1e-9, f"{name}, seed {seed}, bidder {i}"


@pytest.mark.parametrize("name", ["omniscient", "first-price"])
def test_the_bounds_are_no_rules_to_sell_by(name: str) -> None:
    generator, gains = np.random.default_rng(3), 0
    for seed in range(10):
        market = random_market(seed, bids=6, tight=False)
        chance = draw(seed, 6)
        won, paid = run(name, market, chance, [])
        for i in range(6):
            true = float(market.budget_N[i])
            for lie in lies(market, i, generator):
                wins, pays = run(name, market.with_budget(i, lie), chance, [])
                gains += (true - pays[i] if wins[i] else 0.0) > (true - paid[i] if won[i] else 0.0) + 1e-9
    assert gains > 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=9),
    st.integers(1, 40),
    st.booleans(),
)
def test_the_knapsack_is_exact(items: list[tuple[int, int]], capacity: int, alike: bool) -> None:
    pairs = sorted(((float(w), float(2 * w if alike else v)) for w, v in items), key=lambda p: -p[1] / p[0])
    weights, values = [w for w, _ in pairs], [v for _, v in pairs]
    value, chosen = Knapsack(np.array(weights), np.array(values), float(capacity)).best()
    assert value == pytest.approx(slow_knapsack(weights, values, capacity), abs=1e-9)
    assert float(np.array(values)[chosen].sum()) == pytest.approx(value, abs=1e-9)
    assert float(np.array(weights)[chosen].sum()) <= capacity


def test_the_knapsack_of_a_full_slot_beats_filling_by_density() -> None:
    better = 0
    for seed in range(20):
        market = random_market(seed, bids=80, tight=True)
        welfare = lambda who, m=market: float((m.budget_N - m.reserve * m.demand_N)[who].sum())  # noqa: E731
        exact = welfare(rivals.Vcg().clear(market, draw(0, 80), []).won_N)
        by_density = welfare(candidates(market).member_W)
        assert exact >= by_density - 1e-9
        better += exact > by_density + 1e-9
    assert better > 10


@settings(max_examples=100, deadline=None)
@given(markets)
def test_the_bounds_enclose_what_can_be_earned(market: Market) -> None:
    chance, found = draw(0, len(market)), candidates(market)
    best = best_price(found).revenue
    told = {name: mechanisms[name]().clear(market, chance, []).revenue for name in mechanisms}
    assert told["omniscient"] == pytest.approx(best, abs=1e-9)
    assert told["first-price"] == pytest.approx(float(market.budget_N[found.member_W].sum()), abs=1e-9)
    for name in ("coco", "market-clearing", "yesterday", "fixed-target"):
        assert told[name] <= told["first-price"] * (1 + 1e-12)
    welfare = Coco(objective="welfare").clear(market, chance)
    assert welfare.revenue == told["market-clearing"]


def test_random_sampling_earns_its_fourth_of_the_best_with_like_demands() -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        market = make_market(np.arange(30), np.ones(30), 1 + generator.exponential(2.0, 30), 60.0, 0.0)
        best = best_price(candidates(market))
        if best.winners >= 6:
            mean = np.mean([rivals.Rsop().clear(market, draw(number, 30), []).revenue for number in range(60)])
            assert mean >= best.revenue / 4


def test_those_who_learn_from_the_past_use_it_and_only_it() -> None:
    market = random_market(5, bids=40, tight=False)
    chance = draw(1, 40)
    before = remember(random_market(6, bids=40, tight=False))
    assert rivals.Yesterday().clear(market, chance, [before]).price == pytest.approx(before.best.price)
    for rule in (rivals.Posted(), rivals.FixedTarget(), rivals.Yesterday()):
        assert rule.clear(market, chance, []).price == market.reserve
    for rule in (rivals.Posted(), rivals.Yesterday()):
        assert rule.clear(market, chance, [before]).revenue > rule.clear(market, chance, []).revenue
    target = rivals.FixedTarget().clear(market, chance, HISTORY)
    assert target.revenue >= 0.3 * np.mean([past.best.revenue for past in HISTORY])


def test_a_slots_chance_follows_its_seed_alone() -> None:
    one, two, other = draw(4, 10), draw(4, 10), draw(5, 10)
    assert one.eps == two.eps != other.eps
    assert np.array_equal(one.arrival_N, two.arrival_N)
    assert np.array_equal(one.half_N, two.half_N)
    assert 0 <= one.eps < 1


def test_an_unknown_mechanism_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match='did you mean "posted"'):
        mechanisms["postd"]
