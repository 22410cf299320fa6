# SPDX-License-Identifier: Apache-2.0
"""The configuration of a service, and its clock."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepfusion.errors import MarketError
from deepfusion.market.bids import Provider
from deepfusion.market.coco import Coco
from deepfusion.market.population import Electricity
from deepfusion.market.profiles import Mode
from deepfusion.market.service.keys import read_public
from deepfusion.schema import parse_options, read_toml

SHORTEST = 1.0
"""Seconds of a slot."""


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """A market that takes bids over HTTP.

    Attributes:
        name: begins the names of the slots; letters, digits and hyphens.
        latency: "expected" or "worst", see `deepfusion market clear --help`.
        tries: so many signed requests a user may make for a slot.
        operator: public key of who may close a slot before its time; nobody when left out.
        users: [users] who may bid: a public key for each name.
        provider: [provider] who sells; `hours` is the length of a slot.
        electricity: [electricity] the price of each hour of the day, UTC.
        coco: [coco] options of the auction.
    """

    name: str = "market"
    latency: Mode = "expected"
    tries: int = 100
    operator: str | None = None
    users: dict[str, str] = field(default_factory=dict[str, str])
    provider: Provider = field(default_factory=Provider)
    electricity: Electricity = field(default_factory=Electricity)
    coco: Coco = field(default_factory=Coco)

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not re.fullmatch(r"[A-Za-z0-9-]+", self.name):
            yield f'name = "{self.name}": stands in addresses; use letters, digits and hyphens'
        if self.tries < 1:
            yield f"tries = {self.tries}: must be at least 1; a client that was cut off tries again"
        if self.seconds < SHORTEST:
            yield f"[provider] hours = {self.provider.hours}: a slot lasts {SHORTEST:g} s at least; use 1 for an hour"
        for place, text in [
            ("operator", self.operator),
            *((f"[users] {name}", key) for name, key in self.users.items()),
        ]:
            try:
                read_public(text) if text is not None else None
            except MarketError as error:
                yield f"{place}: {error}"
        if not self.users or "" in self.users:
            yield '[users]: nobody may bid; add lines such as ann = "MCowBQYDK2VwAyEA..."'

    @property
    def seconds(self) -> float:
        """The length of a slot."""
        return 3600 * self.provider.hours

    def price_kwh(self, opens: float) -> float:
        """$ a kilowatt-hour of a slot that opens at this time, seconds since 1970."""
        return float(self.electricity.prices(24)[int(opens // 3600) % 24])

    def closes(self, opens: float) -> float:
        """When a slot that opens at this time closes: with slots of an hour, on the hour."""
        return (math.floor(opens / self.seconds) + 1) * self.seconds


def load_service(path: Path, overrides: Sequence[str] = ()) -> ServiceOptions:
    """Read a service's TOML file.

    Raises:
        ConfigError: lists every fault with section, value and cure.
    """
    return parse_options(ServiceOptions, read_toml(path, overrides), str(path))


class Clock:
    """Seconds since 1970 that go on evenly when the machine's clock is set; `adjust` takes over what it was set to."""

    def __init__(self) -> None:
        self.adjust()

    def adjust(self) -> None:
        """Read the machine's clock anew, between two slots."""
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """The time."""
        return self._offset + time.monotonic()
