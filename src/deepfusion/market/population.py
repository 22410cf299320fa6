# SPDX-License-Identifier: Apache-2.0
"""Who bids in a simulated slot: users with devices and networks of their own, a day's rhythm, electricity (aeria, section 8)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepfusion.errors import ConfigError
from deepfusion.market.architectures import SIGMAS
from deepfusion.market.demand import CutTable, Demand, Edge, Users, minimum_demand
from deepfusion.market.profiles import Mode, Profile


@dataclass(frozen=True, kw_only=True)
class Electricity:
    """[electricity]: the price of each hour.

    Attributes:
        low: $ a kilowatt-hour in the cheapest hour of a synthetic day.
        high: the same of the dearest.
        csv: a file with one price a line, or a column called price; used in a circle instead of the synthetic day.
    """

    low: float = 0.03
    high: float = 0.15
    csv: str | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not 0 <= self.low <= self.high < math.inf:
            yield f"low = {self.low}, high = {self.high}: must be finite and ascend from 0 or more"

    def prices(self, slots: int) -> np.ndarray:
        """$ a kilowatt-hour of each slot.

        Raises:
            ConfigError: the file cannot be read, or holds a price that is no number or negative.
        """
        if self.csv is None:
            hour = np.arange(slots) % 24
            return self.low + (self.high - self.low) * (1 - np.cos(2 * np.pi * (hour - 5) / 24)) / 2
        try:
            with Path(self.csv).open(encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if row]
            at = rows[0].index("price") if rows and "price" in rows[0] else 0
            found = np.array([float(row[at]) for row in (rows[1:] if rows and "price" in rows[0] else rows)])
        except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
            raise ConfigError([f"[electricity] csv: {error}; give a column called price"], self.csv) from error
        if not len(found) or not (np.isfinite(found) & (found >= 0)).all():
            raise ConfigError(["[electricity] csv: needs prices that are not negative; clip or remove rows"], self.csv)
        return np.resize(found, slots)


@dataclass(frozen=True, kw_only=True)
class PopulationOptions:
    """[users]: who bids.

    Attributes:
        count: users in all.
        fewest: bids in the quietest slot of a day.
        most: bids in the busiest.
        slowest_device: FLOP/s.
        fastest_device: FLOP/s; devices lie evenly between.
        tightest: deadline of the most hurried over the time that the device alone would take.
        loosest: the same of the most patient.
        generosity: mean of an exponential: budgets are (1 + that) times what the reserve price asks for.
        rebid: chance that a user who was not served bids again.
        models: weight of each exit table; all alike where none is given.
    """

    count: int = 1500
    fewest: int = 39
    most: int = 112
    slowest_device: float = 5e9
    fastest_device: float = 5e10
    tightest: float = 0.5
    loosest: float = 3.0
    generosity: float = 1.5
    rebid: float = 0.5
    models: dict[str, float] = field(default_factory=dict[str, float])

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not 1 <= self.fewest <= self.most <= self.count:
            yield f"fewest = {self.fewest}, most = {self.most}, count = {self.count}: must ascend from 1; set them together"
        for low, high in (("slowest_device", "fastest_device"), ("tightest", "loosest")):
            if not 0 < getattr(self, low) <= getattr(self, high) < math.inf:
                yield f"{low} = {getattr(self, low)}, {high} = {getattr(self, high)}: must be finite and ascend from above 0"
        if not 0 <= self.generosity < math.inf:
            yield f"generosity = {self.generosity}: must be finite and not negative"
        if not 0 <= self.rebid <= 1:
            yield f"rebid = {self.rebid}: a chance lies in [0, 1]"
        if any(not 0 < weight < math.inf for weight in self.models.values()):
            yield f"models = {self.models}: weights must be finite and above 0"


@dataclass(frozen=True, eq=False)
class Wishes:
    """What bidders want in one slot; arrays of shape (n,).

    Attributes:
        user_n: index of each bidder among all users.
        users: what Phase I needs to know of them.
        demand: what Phase I found.
        generosity_n: budget over what the reserve price would ask for.
    """

    user_n: np.ndarray
    users: Users
    demand: Demand
    generosity_n: np.ndarray


class Population:
    """The users of a simulation. A user's model, threshold, device and network stay; deadlines and budgets are a slot's own."""

    def __init__(
        self, options: PopulationOptions, profiles: Mapping[str, Profile], mode: Mode, edge: Edge, seed: int
    ) -> None:
        self.options, self.edge, self.seed = options, edge, seed
        generator = np.random.default_rng([seed, 0])
        names = sorted(options.models or profiles)
        weights = np.array([options.models.get(name, 1.0) for name in names])
        self.pairs = [(profiles[name], profiles[name].row_of(sigma)) for name in names for sigma in SIGMAS[:-1]]
        self.table, self.whole = CutTable(self.pairs, mode), CutTable(self.pairs, "worst")
        n = options.count
        model_N = generator.choice(len(names), n, p=weights / weights.sum())
        self._pair_N = model_N * (len(SIGMAS) - 1) + generator.integers(0, len(SIGMAS) - 1, n)
        self._device_N = generator.uniform(options.slowest_device, options.fastest_device, n)
        self._rate_N = 1e6 * np.clip(generator.lognormal(math.log(25), 0.5, n), 7, 60)
        self._rtt_N = generator.uniform(0.02, 0.06, n)
        alone = np.array([profile.cuts(row, mode).device_flops_S[-1] for profile, row in self.pairs])
        self._alone_N = alone[self._pair_N] / self._device_N

    def bidders(self, slot: int) -> int:
        """How many bid in a slot: few at night, many in the evening."""
        generator = np.random.default_rng([self.seed, 1, slot])
        day = (1 - math.cos(2 * math.pi * (slot % 24 - 5) / 24)) / 2 + generator.normal(0, 0.1)
        low, high = self.options.fewest, self.options.most
        return min(max(round(low + (high - low) * day), low), high)

    def wishes(self, slot: int, before: Wishes | None, served: np.ndarray | None) -> Wishes:
        """Who bids in a slot and for what: some of those who got nothing in the one before, and others.

        Args:
            before: the slot before, if any.
            served: which of its bidders were served, bool.
        """
        generator = np.random.default_rng([self.seed, 2, slot])
        n = self.options.count
        latency_N = self._alone_N * generator.uniform(self.options.tightest, self.options.loosest, n)
        generosity_N = 1 + generator.exponential(1.0, n) * self.options.generosity
        again_N = np.zeros(n, dtype=bool)
        if before is not None and served is not None:
            missed = ~served & (generator.random(len(served)) < self.options.rebid)
            who = before.user_n[missed]
            again_N[who] = True
            latency_N[who], generosity_N[who] = before.users.latency_N[missed], before.generosity_n[missed]
        found = minimum_demand(self._users(np.arange(n), latency_N), self.table, self.edge)
        can_N = (found.speed_N > 0) & (found.speed_N <= self.edge.capacity)
        order = generator.permutation(n)
        order = order[np.argsort(~again_N[order], kind="stable")]
        user_n = np.sort(order[can_N[order]][: self.bidders(slot)])
        demand = Demand(found.speed_N[user_n], found.cut_N[user_n])
        return Wishes(user_n, self._users(user_n, latency_N[user_n]), demand, generosity_N[user_n])

    def _users(self, who: np.ndarray, latency: np.ndarray) -> Users:
        unbound = np.full(len(who), math.inf)
        return Users(self._pair_N[who], latency, self._device_N[who], self._rate_N[who], self._rtt_N[who], unbound)

    def try_out(self, slot: int, wishes: Wishes) -> tuple[np.ndarray, np.ndarray]:
        """One sample of each bidder as if served: the exit block that it leaves at over the last, and whether it is late."""
        generator = np.random.default_rng([self.seed, 3, slot])
        chance_n, rows = generator.random(len(wishes.user_n)), np.arange(len(wishes.user_n))
        pairs = [self.pairs[k] for k in wishes.users.profile_N.tolist()]
        left_n = np.array([
            profile.exit_blocks[min(int(np.searchsorted(np.cumsum(profile.exit_share[row]), u)), len(profile.exit_blocks) - 1)]
            for (profile, row), u in zip(pairs, chance_n.tolist(), strict=True)
        ], dtype=np.int64)  # fmt: skip
        last_n = np.array([profile.num_blocks for profile, _ in pairs], dtype=np.int64)
        cuts, cut_n = self.whole.of(wishes.users), wishes.demand.cut_N
        done = cuts.device_flops_S
        on_device = done[rows, np.minimum(left_n, cut_n)]
        on_edge = np.maximum(done[rows, left_n] - done[rows, cut_n], 0.0)
        crosses = left_n > cut_n
        network = 8 * cuts.sent_S[rows, cut_n] / wishes.users.rate_N + wishes.users.rtt_N * cuts.trips_S[rows, cut_n]
        took = on_device / wishes.users.device_flops_N + np.where(
            crosses, network + on_edge / wishes.demand.speed_N, 0.0
        )
        return left_n / last_n, took > wishes.users.latency_N * (1 + 1e-9)
