# SPDX-License-Identifier: Apache-2.0
"""Many slots, and all mechanisms on identical markets: what each earns, serves and costs (aeria, section 8)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from deepfusion.artifacts import write_atomic
from deepfusion.errors import ConfigError
from deepfusion.market.auction import Market, Outcome, envy_count, make_market, surplus
from deepfusion.market.bids import Provider
from deepfusion.market.coco import Coco
from deepfusion.market.mechanisms import Mechanism, Past, draw, mechanisms, remember
from deepfusion.market.population import Electricity, Population, PopulationOptions
from deepfusion.market.profiles import Mode, Profile
from deepfusion.registry import did_you_mean
from deepfusion.schema import parse_options, plain, read_toml
from deepfusion.types import Progress, silent

HISTORY = 24
"""So many past slots are open to mechanisms that learn from them."""


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """A simulation of a market.

    Attributes:
        name: what reports call it.
        seed: of users, budgets and chance.
        slots: 24 are a day, 720 a month.
        latency: "expected" or "worst", see `deepfusion market clear --help`.
        rivals: what COCO is compared with; all of them when left out.
        provider: [provider] who sells.
        users: [users] who bids.
        electricity: [electricity] the price of each hour.
        coco: [coco] options of COCO; both agreements are run.
    """

    name: str = "market"
    seed: int = 0
    slots: int = 24
    latency: Literal["expected", "worst"] = "expected"
    rivals: tuple[str, ...] = tuple(name for name in mechanisms if name != "coco")
    provider: Provider = field(default_factory=Provider)
    users: PopulationOptions = field(default_factory=PopulationOptions)
    electricity: Electricity = field(default_factory=Electricity)
    coco: Coco = field(default_factory=Coco)

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.seed < 0:
            yield f"seed = {self.seed}: must not be negative; choose 0 or more"
        if self.slots < 1:
            yield f"slots = {self.slots}: must be at least 1; 24 are a day"
        for name in self.rivals:
            if name not in mechanisms or name == "coco":
                known = tuple(n for n in mechanisms if n != "coco")
                yield f'rivals = "{name}": unknown{did_you_mean(name, known)}; choose of {", ".join(known)}'


def load_simulation(path: Path, overrides: Sequence[str] = (), *, seed: int | None = None) -> SimulationOptions:
    """Read a simulation's TOML file.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    tree = read_toml(path, overrides)
    if seed is not None:
        tree["seed"] = seed
    return parse_options(SimulationOptions, tree, str(path))


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class SlotRow(_Part):
    """One mechanism in one slot.

    Attributes:
        ratio: revenue over that of the best single price for known budgets; None where that is 0.
        price: $ for a FLOP/s; None where winners pay different prices or nobody wins.
        surplus: $ by which winners' budgets exceed their payments.
        envious: bidders who would rather have another's deal.
        seconds: that the mechanism took.
        early: share of the served users' samples that left before the last exit.
        late: the same that missed their deadline.
    """

    revenue: float
    profit: float
    ratio: float | None
    price: float | None
    served: int
    utilisation: float
    surplus: float
    envious: int
    seconds: float
    early: float
    late: float


class MechanismResult(_Part):
    """One mechanism over all slots; `truthful` and `uniform` say what it promises."""

    name: str
    truthful: str
    uniform: str
    revenue: float
    profit: float
    mean_ratio: float
    served: int
    utilisation: float
    surplus: float
    envious: int
    median_milliseconds: float
    slots: list[SlotRow]


class Simulated(_Part):
    """What a simulation leaves: `record.json`.

    Attributes:
        config: the options, defaults included.
        bids: of each slot.
        reserve: $ for a FLOP/s, of each slot.
        rent: $ that each slot cost.
    """

    name: str
    config: dict[str, Any]
    bids: list[int]
    reserve: list[float]
    rent: list[float]
    mechanisms: list[MechanismResult]

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        write_atomic(path, self.model_dump_json(indent=1))


def line_up(options: SimulationOptions) -> dict[str, Mechanism]:
    """The mechanisms of a simulation by the name that reports show; COCO first, with both agreements."""
    own = {key: getattr(options.coco, key) for key in ("y", "objective", "fit")}
    found: dict[str, Mechanism] = {
        "coco (per bidder)": Coco(agreement="per_bidder", **own),
        "coco (global)": Coco(agreement="global", **own),
    }
    return found | {name: mechanisms[name]() for name in options.rivals}


def simulate(options: SimulationOptions, profiles: Mapping[str, Profile], progress: Progress = silent) -> Simulated:
    """Run all slots. Who bids again follows what the first mechanism, COCO, served, so that all see the same markets.

    Raises:
        ConfigError: a model is named that has no table, or the file of prices is faulty.
    """
    unknown = [name for name in options.users.models if name not in profiles]
    if unknown:
        raise ConfigError([f"[users] models: no exit table for {', '.join(unknown)}; known: {', '.join(profiles)}"])
    mode: Mode = options.latency
    edge = options.provider.edge
    population = Population(options.users, profiles, mode, edge, options.seed)
    players = line_up(options)
    rows: dict[str, list[SlotRow]] = {name: [] for name in players}
    bids, reserves, rents = list[int](), list[float](), list[float]()
    history: list[Past] = []
    wishes, served = None, None
    for slot, price_kwh in enumerate(options.electricity.prices(options.slots).tolist()):
        reserve, rent = options.provider.reserve_price(price_kwh), options.provider.rent(price_kwh)
        wishes = population.wishes(slot, wishes, served)
        demand_n = wishes.demand.speed_N
        market = make_market(wishes.user_n, demand_n, wishes.generosity_n * reserve * demand_n, edge.capacity, reserve)
        past = remember(market)
        tried = population.try_out(slot, wishes)
        for number, (name, mechanism) in enumerate(players.items()):
            outcome, seconds = _timed(mechanism, market, options.seed * 1_000_003 + slot, history)
            rows[name].append(_row(market, outcome, past, rent, seconds, tried))
            if number == 0:
                served = outcome.won_N
        bids.append(len(market))
        reserves.append(reserve)
        rents.append(rent)
        history = [*history, past][-HISTORY:]
        progress("slots", slot + 1, options.slots, "")
    found = [_total(name, players[name], rows[name]) for name in players]
    config = plain(options)
    return Simulated(name=options.name, config=config, bids=bids, reserve=reserves, rent=rents, mechanisms=found)


def _timed(mechanism: Mechanism, market: Market, seed: int, history: Sequence[Past]) -> tuple[Outcome, float]:
    chance = draw(seed, len(market))
    fresh = Market(
        market.ids_N, market.demand_N, market.budget_N, market.capacity, market.reserve
    )  # nothing computed yet
    began = time.perf_counter()
    return mechanism.clear(fresh, chance, history), time.perf_counter() - began


def _row(
    market: Market, outcome: Outcome, past: Past, rent: float, seconds: float, tried: tuple[np.ndarray, np.ndarray]
) -> SlotRow:
    won, revenue, best = outcome.won_N, outcome.revenue, past.best.revenue
    left_n, late_n = tried
    return SlotRow(
        revenue=revenue, profit=revenue - rent, ratio=revenue / best if best else None, price=outcome.price,
        served=int(won.sum()), utilisation=float(market.demand_N[won].sum()) / market.capacity,
        surplus=surplus(market, outcome), envious=envy_count(market, outcome), seconds=seconds,
        early=float((left_n[won] < 1).mean()) if won.any() else 0.0,
        late=float(late_n[won].mean()) if won.any() else 0.0,
    )  # fmt: skip


def _total(name: str, mechanism: Mechanism, rows: list[SlotRow]) -> MechanismResult:
    ratios = [row.ratio for row in rows if row.ratio is not None]
    return MechanismResult(
        name=name, truthful=mechanism.truthful, uniform=mechanism.uniform,
        revenue=sum(row.revenue for row in rows), profit=sum(row.profit for row in rows),
        mean_ratio=float(np.mean(ratios)) if ratios else 0.0, served=sum(row.served for row in rows),
        utilisation=float(np.mean([row.utilisation for row in rows])), surplus=sum(row.surplus for row in rows),
        envious=sum(row.envious for row in rows),
        median_milliseconds=1e3 * float(np.median([row.seconds for row in rows])), slots=rows,
    )  # fmt: skip
