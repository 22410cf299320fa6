# SPDX-License-Identifier: Apache-2.0
"""COCO keeps what it promises: truthful, free of envy, individually rational, within capacity, never poorer than its bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_world import lies, markets, random_market, slow_best, slow_candidates, slow_share, slow_targets

from deepfusion.errors import MarketError
from deepfusion.market import consensus
from deepfusion.market.auction import Market, best_price, candidates, envy_count, make_market, share
from deepfusion.market.coco import Coco, targets
from deepfusion.market.consensus import Grid, best_base
from deepfusion.market.mechanisms import Draw, draw, mechanisms

BASES = st.floats(1.02, 6.0)
EPS = st.floats(0, 1, exclude_max=True)
MID_POINTS = (np.arange(400) + 0.5) / 400


def chance(eps: float, bids: int) -> Draw:
    return Draw(eps, np.arange(bids), np.zeros(bids, dtype=bool))


def utility(coco: Coco, market_said: Market, true_budget: float, index: int, eps: float) -> float:
    outcome = coco.clear(market_said, chance(eps, len(market_said)))
    return true_budget - float(outcome.payment_N[index]) if outcome.won_N[index] else 0.0


# ------------------------------------------------------------------------------------------------ against the slow way


@settings(max_examples=300, deadline=None)
@given(markets)
def test_candidates_floor_and_the_best_price_are_those_of_the_definition(market: Market) -> None:
    found, best = candidates(market), best_price(candidates(market))
    members, floor = slow_candidates(market)
    assert found.member_W.tolist() == members
    assert found.floor == floor
    assert best.revenue == pytest.approx(slow_best(list(zip(found.density_W, found.demand_W, strict=True))), rel=1e-12)
    assert best.revenue == pytest.approx(best.price * best.sold, rel=1e-12)
    assert best.largest == max(found.demand_W[: best.winners], default=0.0)


@settings(max_examples=300, deadline=None)
@given(markets, BASES, EPS)
def test_each_bidders_target_is_the_rounded_best_revenue_without_it(market: Market, y: float, eps: float) -> None:
    found = candidates(market)
    if len(found):
        assert targets(found, Grid(y, eps)) == pytest.approx(slow_targets(found, Grid(y, eps)), rel=1e-9)


def test_targets_agree_in_a_large_market_with_giants_in_it() -> None:
    market = random_market(3, 400, tight=False)
    demand = market.demand_N.copy()
    demand[[5, 77]] = [3000.0, 200_000.0]
    giant = make_market(market.ids_N, demand, demand * market.density_N, 1e9, 1.0)
    found = candidates(giant)
    assert targets(found, Grid(1.3, 0.4)) == pytest.approx(slow_targets(found, Grid(1.3, 0.4)), rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(markets, st.floats(0, 1.5))
def test_cost_sharing_finds_the_largest_self_supporting_group(market: Market, part: float) -> None:
    found = candidates(market)
    pi = best_price(found).revenue
    target = pi * part
    winners, price = share(found, target)
    kept, slow_price = slow_share(found, target)
    assert list(range(winners)) == kept
    assert price == pytest.approx(slow_price, rel=1e-12)
    if len(found) and part <= 1:
        assert winners > 0
        assert price * found.sold_W[winners - 1] >= target * (1 - 1e-12)
    fewer, dearer = share(found, target * 1.3)
    assert fewer <= winners
    assert not fewer or dearer >= price


@settings(max_examples=200, deadline=None)
@given(markets, st.floats(0.05, 1.0), st.integers(0, 10))
def test_another_member_never_raises_the_shared_price(market: Market, part: float, leaver: int) -> None:
    found = candidates(market)
    if len(found) < 2:
        return
    keep = np.arange(len(found)) != leaver % len(found)
    demand = found.demand_W[keep]
    fewer = type(found)(found.member_W[keep], found.density_W[keep], demand, np.cumsum(demand), found.floor, None)
    target = part * best_price(fewer).revenue
    assert share(found, target)[1] <= share(fewer, target)[1] * (1 + 1e-12)


# ------------------------------------------------------------------------------------------------ truth and envy


@pytest.mark.parametrize("tight", [True, False])
def test_no_lie_about_the_budget_pays_with_a_target_for_each_bidder(tight: bool) -> None:
    generator, coco = np.random.default_rng(7), Coco()
    tried = 0
    for seed in range(20):
        market, eps = random_market(seed, tight=tight, ties=seed % 4 == 0), float(generator.random())
        for index in range(len(market)):
            true = float(market.budget_N[index])
            honest = utility(coco, market, true, index, eps)
            for lie in lies(market, index, generator):
                tried += 1
                gain = utility(coco, market.with_budget(index, lie), true, index, eps) - honest
                assert gain <= 1e-9, f"seed {seed}, bidder {index}, {true} said as {lie}"
    assert tried > 3_000, "the benchmark tries a million"


def test_with_one_target_lies_pay_no_more_often_than_consensus_fails() -> None:
    generator, coco = np.random.default_rng(8), Coco(agreement="global")
    paid, allowed = 0, 0.0
    for seed in range(40):
        market, eps = random_market(seed), float(generator.random())
        told = coco.clear(market, chance(eps, len(market))).told
        probability = told["consensus_probability"]
        allowed += 1 - float(probability) if probability is not None else 0.0
        paid += any(
            utility(coco, market.with_budget(i, lie), float(market.budget_N[i]), i, eps)
            > utility(coco, market, float(market.budget_N[i]), i, eps) + 1e-9
            for i in range(len(market))
            for lie in lies(market, i, generator)
        )
    assert paid <= allowed + 3 * math.sqrt(allowed)
    assert paid > 0, "or the search finds nothing"


def test_filling_by_skipping_is_not_truthful_and_is_marked_so() -> None:
    """The counter-example that the prefix rule is for: dropping below a small bid that fits lowers no price and loses nothing."""
    generator, coco = np.random.default_rng(9), Coco(fit="skip")
    gains = 0
    for seed in range(12):
        market, eps = random_market(seed, tight=True), float(generator.random())
        for index in range(len(market)):
            true = float(market.budget_N[index])
            honest = utility(coco, market, true, index, eps)
            gains += any(
                utility(coco, market.with_budget(index, lie), true, index, eps) > honest + 1e-9
                for lie in lies(market, index, generator)
            )
    assert gains > 0


@settings(max_examples=300, deadline=None)
@given(markets, EPS, st.sampled_from(["per_bidder", "global"]), st.sampled_from(["revenue", "welfare"]))
def test_nobody_pays_more_than_the_budget_and_no_more_is_sold_than_there_is(
    market: Market, eps: float, agreement: Any, objective: Any
) -> None:
    outcome = Coco(agreement=agreement, objective=objective).clear(market, chance(eps, len(market)))
    won = outcome.won_N
    assert bool((outcome.payment_N <= market.budget_N).all())
    assert not outcome.payment_N[~won].any()
    assert float(market.demand_N[won].sum()) <= market.capacity * (1 + 1e-12)
    assert not won.any() or outcome.price_N[won].min() >= market.reserve
    assert outcome.revenue >= market.reserve * float(market.demand_N[won].sum()) * (1 - 1e-11)


@settings(max_examples=300, deadline=None)
@given(markets, EPS)
def test_one_price_leaves_no_envy(market: Market, eps: float) -> None:
    outcome, found = Coco(agreement="global").clear(market, chance(eps, len(market))), candidates(market)
    outside = np.delete(market.density_N, found.member_W)
    assert bool((outside <= found.floor * (1 + 1e-12)).all())
    assert envy_count(market, outcome) == 0
    if outcome.won_N.any():
        price = outcome.price
        assert price is not None
        assert bool((market.density_N[outcome.won_N] >= price * (1 - 1e-12)).all())
        assert bool((market.density_N[~outcome.won_N] <= price * (1 + 1e-12)).all())


@settings(max_examples=200, deadline=None)
@given(markets, EPS)
def test_where_all_agree_a_target_for_each_is_one_target_for_all(market: Market, eps: float) -> None:
    each = Coco().clear(market, chance(eps, len(market)))
    if each.told["consensus"]:
        one = Coco(agreement="global").clear(market, chance(eps, len(market)))
        assert np.array_equal(each.payment_N, one.payment_N)
        assert envy_count(market, each) == 0


# ------------------------------------------------------------------------------------------------ revenue


@pytest.mark.parametrize("agreement", ["per_bidder", "global"])
@pytest.mark.parametrize("y", ["demands", "paper", 1.7])
def test_mean_revenue_keeps_its_bound_in_every_market(agreement: Any, y: Any) -> None:
    coco = Coco(agreement=agreement, y=y)
    for seed in range(9):
        market = random_market(seed, bids=12 + seed % 20 if seed % 2 else None, tight=seed % 3 == 0)
        best = best_price(candidates(market))
        outcomes = [coco.clear(market, chance(eps, len(market))) for eps in MID_POINTS]
        base = float(outcomes[0].told["y"] or 0)
        bound = consensus.guaranteed_global(base)
        if agreement == "per_bidder":
            bound = consensus.guaranteed_per_bidder(base, best.slack) if best.winners else 0.0
        revenues = [outcome.revenue for outcome in outcomes]
        assert np.mean(revenues) >= (bound - 5e-3) * best.revenue, f"seed {seed}"
        assert max(revenues) <= float(market.budget_N.sum())
        if agreement == "global":
            assert all(o.revenue >= float(o.told["target"] or 0) * (1 - 1e-12) for o in outcomes)
            assert max(revenues) <= best.revenue * (1 + 1e-9)


def test_a_single_bidder_pays_the_floor() -> None:
    market = random_market(0, bids=1, tight=False).with_budget(0, 50.0)
    outcome = Coco().clear(market, chance(0.3, 1))
    assert outcome.price == market.reserve
    assert outcome.told["delta"] == math.inf


# ------------------------------------------------------------------------------------------------ the grid and its base


@settings(max_examples=500, deadline=None)
@given(st.floats(1e-12, 1e12), BASES, EPS)
def test_a_point_of_the_grid_lies_just_below(x: float, y: float, eps: float) -> None:
    grid = Grid(y, eps)
    below = grid.below(x)
    assert x / y * (1 - 1e-11) < below <= x * (1 + 1e-11)
    assert grid.below(below) == below, "a point maps to itself, rounded or not"
    assert grid.below(x * y) == pytest.approx(y * below, rel=1e-9) or math.isclose(x, below * y, rel_tol=1e-9)
    assert grid.below(0.0) == 0.0


def test_powers_of_the_base_map_to_themselves_without_an_offset() -> None:
    for y in (1.1, 1.427, 2.0, 3.283):
        for m in range(-40, 41):
            assert Grid(y, 0.0).below(y**m) == pytest.approx(y**m, rel=1e-12)


@pytest.mark.parametrize(("x", "y"), [(3.7, 1.2), (1e-6, 2.0), (12345.6, 4.0)])
def test_the_rounding_is_uniform_on_a_logarithmic_scale(x: float, y: float) -> None:
    below = np.array([Grid(y, (k + 0.5) / 20_000).below(x) for k in range(20_000)])
    assert below.mean() / x == pytest.approx(consensus.guaranteed_global(y), abs=1e-4)
    places = np.sort(np.log(x / below) / math.log(y))
    assert np.abs(places - (np.arange(20_000) + 0.5) / 20_000).max() < 1e-4


@pytest.mark.parametrize(
    ("winners", "y", "g", "probability", "one"),
    [
        (2, 5.357, 0.187, 0.587, 0.485), (3, 3.283, 0.305, 0.659, 0.585), (5, 2.281, 0.439, 0.729, 0.681),
        (10, 1.702, 0.588, 0.802, 0.776), (20, 1.427, 0.701, 0.856, 0.842), (50, 1.240, 0.807, 0.906, 0.900),
    ],
)  # fmt: skip
def test_the_table_of_the_specification(winners: int, y: float, g: float, probability: float, one: float) -> None:
    delta = winners / (winners - 1)
    found = best_base(delta)
    assert found == pytest.approx(y, abs=1e-3)
    assert consensus.guaranteed_per_bidder(found, delta) == pytest.approx(g, abs=1e-3)
    assert consensus.consensus_probability(found, delta) == pytest.approx(probability, abs=1e-3)
    assert consensus.guaranteed_global(found) == pytest.approx(one, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.floats(1.02, 4.0))
def test_the_base_is_the_best_one_and_rises_with_the_slack(delta: float) -> None:
    y = best_base(delta)
    g = consensus.guaranteed_per_bidder(y, delta)
    assert y == pytest.approx(delta * (1 + math.log(y)), rel=1e-9)
    assert g == pytest.approx(1 / y, rel=1e-9)
    assert all(consensus.guaranteed_per_bidder(y * c, delta) < g for c in (0.95, 1.05))
    assert best_base(delta * 1.001) > y or delta * 1.001 > 4
    point = 2 * delta  # the fixed-point iteration of the specification
    for _ in range(2000):
        point = delta * (1 + math.log(point))
    assert point == pytest.approx(y, rel=1e-6)


# ------------------------------------------------------------------------------------------------ scaling and order


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), EPS, st.sampled_from(["per_bidder", "global"]))
def test_a_change_of_currency_changes_nothing_but_the_numbers(seed: int, c: float, eps: float, agreement: Any) -> None:
    market, coco = random_market(seed), Coco(agreement=agreement, y=1.7)
    other = make_market(market.ids_N, market.demand_N, market.budget_N * c, market.capacity, market.reserve * c)
    shifted = (eps + math.log(c) / math.log(1.7)) % 1.0
    here, there = coco.clear(market, chance(eps, len(market))), coco.clear(other, chance(shifted, len(market)))
    assert np.array_equal(here.won_N, there.won_N)
    assert there.payment_N == pytest.approx(here.payment_N * c, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(markets, st.randoms(use_true_random=False), st.sampled_from(sorted(mechanisms)))
def test_the_order_in_which_bids_come_is_of_no_account(market: Market, random: Any, name: str) -> None:
    order = list(range(len(market)))
    random.shuffle(order)
    again = make_market(
        market.ids_N[order], market.demand_N[order], market.budget_N[order], market.capacity, market.reserve
    )
    chances = draw(5, len(market))
    one, two = (mechanisms[name]().clear(m, chances, []) for m in (market, again))
    assert np.array_equal(one.price_N, two.price_N, equal_nan=True)
    assert np.array_equal(one.payment_N, two.payment_N)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("demands", "budgets", "capacity", "reserve", "words"),
    [
        ([1.0, -1.0], [1.0, 1.0], 5.0, 0.1, "demands"), ([1.0, 9.0], [1.0, 1.0], 5.0, 0.1, "demands"),
        ([1.0, math.nan], [1.0, 1.0], 5.0, 0.1, "demands"), ([1.0, 1.0], [1.0, -1.0], 5.0, 0.1, "budgets"),
        ([1.0, 1.0], [1.0, math.nan], 5.0, 0.1, "budgets"), ([1.0, 1.0], [1.0, 1.0], 0.0, 0.1, "capacity"),
        ([1.0, 1.0], [1.0, 1.0], math.inf, 0.1, "capacity"), ([1.0, 1.0], [1.0, 1.0], 5.0, -0.1, "reserve"),
        ([1.0], [1.0, 1.0], 5.0, 0.1, "one of each"),
    ],
)  # fmt: skip
def test_a_market_that_cannot_be_says_what_is_wrong(
    demands: Any, budgets: Any, capacity: float, reserve: float, words: str
) -> None:
    with pytest.raises(MarketError, match=words):
        make_market(["a", "b"], np.array(demands), np.array(budgets), capacity, reserve)


def test_one_bid_a_user() -> None:
    with pytest.raises(MarketError, match='"a" bids twice'):
        make_market(["a", "b", "a"], np.ones(3), np.ones(3), 5.0, 0.1)


@pytest.mark.parametrize("name", sorted(mechanisms))
def test_an_empty_slot_and_one_where_nobody_reaches_the_reserve_price_sell_nothing(name: str) -> None:
    empty = make_market([], np.zeros(0), np.zeros(0), 5.0, 0.1)
    poor = make_market(["a", "b"], np.ones(2), np.array([0.0, 0.05]), 5.0, 0.1)
    for market in (empty, poor):
        outcome = mechanisms[name]().clear(market, draw(0, len(market)), [])
        assert outcome.revenue == 0
        assert outcome.price is None
        assert not outcome.won_N.any()


def test_a_bid_of_nothing_loses_even_where_nothing_is_asked() -> None:
    market = make_market(["a", "b"], np.ones(2), np.array([0.0, 0.05]), 5.0, 0.0)
    assert Coco().clear(market, draw(0, 2)).won_N.tolist() == [False, True]
