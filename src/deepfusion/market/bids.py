# SPDX-License-Identifier: Apache-2.0
"""Bids as users send them, what is refused and why, and the reserve price of a slot (aeria, sections 4, 5 and 12)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from deepfusion.errors import MarketError
from deepfusion.market.demand import Edge
from deepfusion.market.profiles import Profile
from deepfusion.registry import did_you_mean
from deepfusion.schema import misfits

WRONG_LINES = 8
"""So many faulty lines of a file are told at once."""
DEAREST, LARGEST = 1e12, 1e21
"""Bounds of a budget in $ and of all else: within them nothing overflows, so that no bid can stop a slot's clearing."""


@dataclass(frozen=True, kw_only=True)
class Bid:
    """One user's wish for one slot. Only the budget is private; all else can be checked.

    Attributes:
        user: who bids, once a slot.
        model: name of an exit table.
        budget: beta, $ for the slot.
        latency: t, seconds that an answer may take.
        device_flops: speed of the device, FLOP/s.
        rate: of the network, bit/s.
        rtt: a round trip, seconds.
        sigma: exit threshold; or
        accuracy: the lowest change of accuracy against the whole model, a fraction such as -0.01.
        demand: a, the edge speed that the user expects, FLOP/s; refused where it is not what the tables say.
        device_bandwidth: of the device's memory, bytes/s; left out where it does not bind.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {
        "extra": "forbid",
        "ser_json_inf_nan": "constants",
    }  # what is refused is booked too

    user: str
    model: str
    budget: float
    latency: float
    device_flops: float
    rate: float
    rtt: float = 0.0
    sigma: float | None = None
    accuracy: float | None = None
    demand: float | None = None
    device_bandwidth: float | None = None

    def faults(self, profiles: Mapping[str, Profile]) -> Iterator[str]:
        """Why the bid cannot be taken."""
        if not self.user:
            yield 'user = "": give a name'
        if self.model not in profiles:
            known = ", ".join(sorted(profiles))
            yield f'model = "{self.model}": unknown{did_you_mean(self.model, tuple(profiles))}; choose one of {known}'
        if not 0 <= self.budget <= DEAREST:
            yield f"budget = {self.budget}: must lie in [0, {DEAREST:g}]"
        for name in ("latency", "device_flops", "rate"):
            value = getattr(self, name)
            if not 1 / LARGEST <= value <= LARGEST:
                yield f"{name} = {value}: must lie in [{1 / LARGEST:g}, {LARGEST:g}]"
        if not 0 <= self.rtt <= LARGEST:
            yield f"rtt = {self.rtt}: must lie in [0, {LARGEST:g}]"
        if self.device_bandwidth is not None and not self.device_bandwidth >= 1 / LARGEST:
            yield f"device_bandwidth = {self.device_bandwidth}: must be above 0; leave it out where memory does not bind"
        yield from self._threshold_faults(profiles)

    def _threshold_faults(self, profiles: Mapping[str, Profile]) -> Iterator[str]:
        if (self.sigma is None) == (self.accuracy is None):
            yield "sigma, accuracy: give one of the two"
        elif self.sigma is not None and not 0 <= self.sigma <= 1:
            yield f"sigma = {self.sigma}: must lie in [0, 1]"
        elif self.accuracy is not None and self.model in profiles:
            try:
                profiles[self.model].row_for_accuracy(self.accuracy)
            except MarketError as error:
                yield str(error)

    def row(self, profile: Profile) -> int:
        """The row of the exit table that the bid asks for."""
        if self.sigma is not None:
            return profile.row_of(self.sigma)
        assert self.accuracy is not None
        return profile.row_for_accuracy(self.accuracy)


def read_bids(path: Path) -> list[Bid]:
    """Bids out of a file of JSON lines. What a bid says is not checked here, only that it can be read.

    Raises:
        MarketError: the file cannot be read, or lines are no bids; names the lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MarketError(f"{path}: cannot be read ({error}); give a UTF-8 file with one bid a line in JSON") from error
    return parse_bids([(number, line) for number, line in enumerate(lines, start=1) if line.strip()], str(path))


@cache
def _reader() -> TypeAdapter[Bid]:
    return TypeAdapter(Bid)  # takes a thousand times as long to make as a bid to read


def parse_bids(lines: Sequence[tuple[int, str]], source: str) -> list[Bid]:
    """Bids out of numbered lines of JSON; see `read_bids`."""
    reader, bids, wrong = _reader(), list[Bid](), list[str]()
    for number, line in lines:
        try:
            bids.append(reader.validate_json(line, strict=True))
        except ValidationError as error:
            wrong.append(f"line {number}: {'; '.join(misfits(error, 'bid')).lower()}")
    if wrong:
        more = f"\n  and {len(wrong) - WRONG_LINES} more" if len(wrong) > WRONG_LINES else ""
        raise MarketError(f"{source}: {len(wrong)} line(s) are no bids\n  " + "\n  ".join(wrong[:WRONG_LINES]) + more)
    return bids


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Who sells, and what a slot costs.

    Attributes:
        capacity: f_e, FLOP/s of the cluster.
        bandwidth: of the cluster's memory, bytes/s; left out where it does not bind.
        gamma: least profit as a share of the rent.
        power_kw: what the cluster draws.
        pue: power of the whole site over that of the cluster.
        hours: length of a slot.
        fixed: $ a slot beside electricity.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    capacity: float = 3.93e12
    bandwidth: float | None = None
    gamma: float = 0.2
    power_kw: float = 0.45
    pue: float = 1.5
    hours: float = 1.0
    fixed: float = 0.0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        for name in ("capacity", "hours"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                yield f"{name} = {value}: must be finite and above 0; see `deepfusion market clear --help`"
        if self.bandwidth is not None and not self.bandwidth > 0:
            yield f"bandwidth = {self.bandwidth}: must be above 0; leave it out where memory does not bind"
        for name in ("gamma", "power_kw", "fixed"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                yield f"{name} = {value}: must be finite and not negative; use 0 for none"
        if not 1 <= self.pue < math.inf:
            yield f"pue = {self.pue}: a site draws at least what its cluster does; give 1 or more"

    @property
    def edge(self) -> Edge:
        """The cluster as Phase I sees it."""
        return Edge(self.capacity, self.bandwidth or math.inf)

    def rent(self, price_kwh: float) -> float:
        """p^r: $ that the whole cluster costs for a slot at this price of a kilowatt-hour.

        Raises:
            MarketError: the price is negative or not finite, which is a slot that must not be sold by this rule.
        """
        if not 0 <= price_kwh < math.inf:
            raise MarketError(f"price_kwh = {price_kwh}: must be finite and not negative; give $ for a kilowatt-hour")
        return self.power_kw * self.pue * self.hours * price_kwh + self.fixed

    def reserve_price(self, price_kwh: float) -> float:
        """p_res: $ for a FLOP/s below which nothing is sold."""
        return (1 + self.gamma) * self.rent(price_kwh) / self.capacity
