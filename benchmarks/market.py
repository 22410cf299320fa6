# SPDX-License-Identifier: Apache-2.0
"""What the market promises, counted: lies that pay, envy, violated limits, revenue bounds, revenue against rivals, time.

python benchmarks/market.py [--part truth|bounds|revenue|grids|time] [--deviations 1000000] [--slots 240] [--seed 0]

Times stand beside a plain sort of an array of the same length in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np

from deepfusion.market import consensus
from deepfusion.market.architectures import shipped_profiles
from deepfusion.market.auction import Market, Outcome, best_price, candidates, envy_count, make_market
from deepfusion.market.bids import Provider
from deepfusion.market.coco import Agreement, Base, Coco
from deepfusion.market.consensus import TOLERANCE, Grid
from deepfusion.market.mechanisms import Draw, Past, draw, mechanisms, remember
from deepfusion.market.population import Population, PopulationOptions
from deepfusion.market.rivals import Vcg

MODES = {"per_bidder": Coco(), "global": Coco(agreement="global")}


def random_market(
    generator: np.random.Generator, bids: int, *, capacity: float, spread: float = 0.8, wealth: float = 1.5
) -> Market:
    """Log-normal demands, budgets of 0.7 + Exp(wealth) times the reserve price; capacity as a share of all demand."""
    demand = generator.lognormal(0, spread, bids)
    density = 0.7 + generator.exponential(wealth, bids)
    if generator.random() < 0.1:
        density = np.round(density * 2) / 2  # ties
    return make_market(np.arange(bids), demand, demand * density, max(capacity * demand.sum(), demand.max()), 1.0)


def chance(eps: float, bids: int) -> Draw:
    """A chosen offset of the grid."""
    return Draw(eps, np.arange(bids), np.zeros(bids, dtype=bool))


def lies(market: Market, i: int, generator: np.random.Generator) -> np.ndarray:
    """Multiples of the true budget, just above and below every other density, and random ones."""
    true, demand = float(market.budget_N[i]), float(market.demand_N[i])
    others = np.delete(market.density_N, i) * demand
    if len(others) > 24:
        others = generator.choice(others, 24, replace=False)
    multiples = true * np.array([0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01, 1.05, 1.1, 1.3, 1.6, 2, 3, 5])
    top = 2 * demand * float(max(market.density_N.max(), market.reserve))
    return np.concatenate([multiples, others * (1 - 1e-7), others * (1 + 1e-7), generator.uniform(0, top, 10)])


def gains(market: Market, i: int, budgets: np.ndarray, grid: Grid, mode: str) -> np.ndarray:
    """What bidder i, whose true budget is in the market, has of each of K budgets that it could say; shape (K,).

    The auction once more, for all lies at once and straight from its definition, in arrays of K lies by n bids. `truth`
    compares a sample with the auction itself.
    """
    said = np.tile(market.budget_N, (len(budgets), 1))
    said[:, i] = budgets
    density = said / market.demand_N
    order = np.argsort(-density, axis=1, kind="stable")
    density, demand = np.take_along_axis(density, order, 1), market.demand_N[order]
    served = (density >= market.reserve * (1 - TOLERANCE)) & (density > 0)
    sold = np.cumsum(np.where(served, demand, 0.0), axis=1)
    member = served & np.logical_and.accumulate(sold <= market.capacity * (1 + TOLERANCE), axis=1)
    blocker = np.where(served & ~member, density, 0.0).max(axis=1)
    floor = np.maximum(market.reserve, blocker)
    own = order == i
    after = np.cumsum(own, axis=1) > 0
    revenue = np.where(member, density * sold, 0.0)
    without = np.where(member & ~own, density * (sold - np.where(after, market.demand_N[i], 0.0)), 0.0)
    best = (without if mode == "per_bidder" else revenue).max(axis=1)
    target = np.array([grid.below(value) for value in best.tolist()])
    enough = member & (revenue >= target[:, None] * (1 - TOLERANCE))
    place = np.arange(density.shape[1])
    last = np.where(enough, place, -1).max(axis=1)
    price = np.maximum(floor, target / np.take_along_axis(sold, np.maximum(last, 0)[:, None], 1)[:, 0].clip(1e-300))
    wins = ((place <= last[:, None]) & member & own).any(axis=1)
    return np.where(wins, market.budget_N[i] - np.minimum(price * market.demand_N[i], budgets), 0.0)


def utility(market: Market, outcome: Outcome, i: int) -> float:
    """What bidder i, whose true budget is in the market, has of an outcome."""
    return float(market.budget_N[i] - outcome.payment_N[i]) if outcome.won_N[i] else 0.0


def violations(market: Market, outcome: Outcome) -> int:
    """Of individual rationality, capacity and reserve price."""
    won = outcome.won_N
    return (
        int((outcome.payment_N > market.budget_N).any())
        + int(float(market.demand_N[won].sum()) > market.capacity * (1 + 1e-12))
        + int(won.any() and float(outcome.price_N[won].min()) < market.reserve)
    )


def truth(options: argparse.Namespace) -> Iterator[str]:
    """Lies that pay, envy and violations on random markets, tight and ample, up to the asked number of lies.

    Allowed: per_bidder none; global the sum of log_y delta over the markets, the chance that there is no consensus.
    """
    generator = np.random.default_rng(options.seed)
    yield "| mode | markets | lies tried | of them checked | lies that pay | markets with one | allowed | envy | violations |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, coco in MODES.items():
        tried = checked = paying = markets = lied = envious = broken = 0
        allowed = 0.0
        while tried < options.deviations:
            bids = int(generator.integers(39, 113)) if markets % 10 == 0 else int(generator.integers(2, 13))
            share = float(generator.uniform(0.2, 0.95)) if markets % 2 else 1.5
            market, luck = random_market(generator, bids, capacity=share), chance(float(generator.random()), bids)
            honest = coco.clear(market, luck)
            envious += envy_count(market, honest) > 0
            broken += violations(market, honest)
            probability = honest.told["consensus_probability"]
            allowed += 1 - float(probability) if probability is not None else 0.0
            before, grid = paying, Grid(float(honest.told["y"] or 0), luck.eps)
            for i in range(bids) if bids < 13 else generator.choice(bids, 12, replace=False).tolist():
                budgets = lies(market, i, generator)
                found = gains(market, i, budgets, grid, name)
                tried += len(found)
                paying += int((found > utility(market, honest, i) + 1e-9).sum())
                if i % 4 == 0:
                    k = int(generator.integers(len(found)))
                    again = coco.clear(market.with_budget(i, float(budgets[k])), luck)
                    assert abs(utility(market, again, i) - found[k]) <= 1e-9, (market, i, budgets[k])
                    checked += 1
            lied += paying > before
            markets += 1
        most = f"{allowed:.0f}" if name == "global" else "0"
        numbers = (markets, tried, checked, paying, lied)
        yield f"| {name} | " + " | ".join(f"{n:,}" for n in numbers) + f" | {most} | {envious:,} | {broken} |"


def bounds(options: argparse.Namespace) -> Iterator[str]:
    """Mean revenue over 400 mid-points of eps against the bound, on every instance."""
    generator = np.random.default_rng(options.seed + 1)
    yield "| mode | instances | below bound - 0.005 | least margin over the bound | mean revenue / Pi | mean bound |"
    yield "|---|---|---|---|---|---|"
    cases = [
        random_market(generator, int(n), capacity=float(c))
        for n, c in zip(generator.integers(1, 113, 120), generator.uniform(0.2, 1.5, 120), strict=True)
    ]
    for name, coco in MODES.items():
        margins, ratios, promised = list[float](), list[float](), list[float]()
        for market in cases:
            best = best_price(candidates(market))
            if not best.winners:
                continue
            outcomes = [coco.clear(market, chance((k + 0.5) / 400, len(market))) for k in range(400)]
            y = float(outcomes[0].told["y"] or 0)
            bound = (
                consensus.guaranteed_global(y) if name == "global" else consensus.guaranteed_per_bidder(y, best.slack)
            )
            ratios.append(statistics.mean(o.revenue for o in outcomes) / best.revenue)
            promised.append(bound)
            margins.append(ratios[-1] - bound)
        wrong = sum(margin < -5e-3 for margin in margins)
        mean, least = statistics.mean(ratios), min(margins)
        yield f"| {name} | {len(margins)} | {wrong} | {least:+.4f} | {mean:.3f} | {statistics.mean(promised):.3f} |"


def streams(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[int], Market]]]:
    """Kinds of slots with 39 to 112 bids each, as functions of the slot."""
    kinds = {
        "like demands, ample": (0.5, 2.0, 1.5, 0.0), "like demands, half of demand": (0.5, 0.5, 1.5, 0.0),
        "mixed demands, ample": (0.8, 2.0, 1.5, 0.0), "mixed demands, half of demand": (0.8, 0.5, 1.5, 0.0),
        "like demands, ample, budgets 0.7 + Exp(8)": (0.5, 2.0, 8.0, 0.0),
        "the same, budgets changing fourfold from slot to slot": (0.5, 2.0, 8.0, 1.4),
    }  # fmt: skip
    for kind, (spread, capacity, wealth, moods) in kinds.items():

        def make(
            slot: int, spread: float = spread, capacity: float = capacity, wealth: float = wealth, moods: float = moods
        ) -> Market:
            generator = np.random.default_rng([options.seed, 7, slot])
            mood = math.exp(moods * float(generator.normal()))
            bids = int(generator.integers(39, 113))
            return random_market(generator, bids, capacity=capacity, spread=spread, wealth=wealth * mood)

        yield kind, make
    for capacity in (3.93e12, 1.6e13):
        provider = Provider(capacity=capacity)
        population = Population(PopulationOptions(), shipped_profiles(), "expected", provider.edge, options.seed)

        def simulated(slot: int, provider: Provider = provider, population: Population = population) -> Market:
            wishes, reserve = population.wishes(slot, None, None), provider.reserve_price(0.09)
            demand = wishes.demand.speed_N
            return make_market(
                wishes.user_n, demand, wishes.generosity_n * reserve * demand, provider.capacity, reserve
            )

        yield f"simulated users, {capacity / 1e12:g} TFLOP/s", simulated


def revenue(options: argparse.Namespace) -> Iterator[str]:
    """Total revenue over that of the omniscient price, of all mechanisms on identical slots; mean ratio of COCO."""
    players = {"coco per_bidder": Coco(), "coco global": Coco(agreement="global")}
    players |= {name: mechanisms[name]() for name in mechanisms if name != "coco"}
    names = [name for name in players if name != "omniscient"]
    yield (
        "| slots of 39 to 112 bids | "
        + " | ".join(names)
        + " | mean ratio per_bidder, global | COCO over mean of rivals |"
    )
    yield "|---" * (len(names) + 3) + "|"
    sellers = [name for name in mechanisms if name != "coco" and mechanisms[name].truthful != "no"]
    for kind, make in streams(options):
        total, history = dict.fromkeys(players, 0.0), list[Past]()
        ratios: dict[str, list[float]] = {"coco per_bidder": [], "coco global": []}
        for slot in range(options.slots):
            market = make(slot)
            past, luck = remember(market), draw(slot, len(market))
            for name, mechanism in players.items():
                if isinstance(mechanism, Vcg) and slot >= 48:
                    continue  # exact knapsacks: on the first slots only
                earned = mechanism.clear(market, luck, history).revenue
                total[name] += earned
                if name in ratios:
                    ratios[name].append(earned / past.best.revenue)
            if slot == 47:
                first = total["omniscient"]
            history = [*history, past][-24:]
        whole = {name: first if name == "vcg" else total["omniscient"] for name in players}
        over = {name: total[name] / whole[name] for name in players}
        gain = over["coco per_bidder"] / statistics.mean(over[name] for name in sellers) - 1
        means = ", ".join(f"{statistics.mean(values):.3f}" for values in ratios.values())
        yield f"| {kind} | " + " | ".join(f"{over[name]:.3f}" for name in names) + f" | {means} | {gain:+.1%} |"


def grids(options: argparse.Namespace) -> Iterator[str]:
    """Mean revenue over the omniscient price's by the grid's base: the default out of the slot's demands, and fixed ones."""
    bases: tuple[Base, ...] = ("demands", 1.03, 1.06, 1.1, 1.2, 1.3, 1.45)
    yield "| slots of 39 to 112 bids | mode | " + " | ".join(f"y = {y}" for y in bases) + " |"
    yield "|---" * (len(bases) + 2) + "|"
    for kind, make in streams(options):
        players = {(mode, y): Coco(agreement=mode, y=y) for mode in get_args(Agreement) for y in bases}
        ratios: dict[tuple[Agreement, Base], list[float]] = {key: [] for key in players}
        for slot in range(options.slots):
            market = make(slot)
            best, luck = remember(market).best.revenue, draw(slot, len(market))
            for key, coco in players.items():
                ratios[key].append(coco.clear(market, luck).revenue / best)
        for mode in get_args(Agreement):
            yield f"| {kind} | {mode} | " + " | ".join(f"{statistics.mean(ratios[mode, y]):.3f}" for y in bases) + " |"


def clearing(options: argparse.Namespace) -> Iterator[str]:
    """Milliseconds to clear a slot from unsorted arrays, and to sort one array of as many numbers."""
    generator = np.random.default_rng(options.seed)
    yield "| bids | per_bidder: median ms | slowest ms | global: median ms | plain sort: median ms | per_bidder over sort |"
    yield "|---|---|---|---|---|---|"
    for bids in (39, 112, 1_000, 10_000, 100_000):
        market = random_market(generator, bids, capacity=0.7)
        shuffled = generator.permutation(bids)
        arrays = market.ids_N[shuffled], market.demand_N[shuffled], market.budget_N[shuffled]
        taken: dict[str, list[float]] = {"per_bidder": [], "global": [], "sort": []}
        for repeat in range(15 if bids > 10_000 else 101):
            luck = draw(repeat, bids)
            for name, coco in MODES.items():
                began = time.perf_counter()
                coco.clear(make_market(*arrays, market.capacity, market.reserve), luck)
                taken[name].append(1e3 * (time.perf_counter() - began))
            numbers = arrays[2].copy()
            began = time.perf_counter()
            numbers.sort()
            taken["sort"].append(1e3 * (time.perf_counter() - began))
        own, common, plain = (statistics.median(values) for values in taken.values())
        yield f"| {bids:,} | {own:.3f} | {max(taken['per_bidder']):.3f} | {common:.3f} | {plain:.4f} | {own / plain:.0f} |"


PARTS = {
    "truth": ("Truthfulness, envy, limits", truth), "bounds": ("Revenue bounds", bounds),
    "revenue": ("Revenue over the omniscient price's", revenue), "grids": ("Revenue by the grid's base", grids),
    "time": ("Time to clear", clearing),
}  # fmt: skip


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    for name, value in (("deviations", 1_000_000), ("slots", 240), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{datetime.date.today()}, {platform.machine()}, {versions}, seed {options.seed}")
    for name in options.part or PARTS:
        title, part = PARTS[name]
        began = time.perf_counter()
        print(f"\n## {title}\n")
        for line in part(options):
            print(line, flush=True)
        print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
