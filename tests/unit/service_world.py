# SPDX-License-Identifier: Apache-2.0
"""A market's service with users who have keys, and a clock that tests set."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient

from deepfusion.market.architectures import shipped_profiles
from deepfusion.market.bids import Bid, Provider
from deepfusion.market.service.book import Book
from deepfusion.market.service.desk import Desk
from deepfusion.market.service.keys import own_key, public_text, sign
from deepfusion.market.service.options import Clock, ServiceOptions
from deepfusion.market.service.records import SlotRecord, bid_message, close_message
from deepfusion.market.service.web import make_app

PROFILES = shipped_profiles()
NOON = 1_769_860_800.0
"""2026-01-31 12:00 UTC."""
GOOD = Bid(user="ann", model="vgg16", budget=0.05, latency=1.0, device_flops=1e10, rate=3e7, rtt=0.03, sigma=0.8)
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32)) for name in ("operator", "ann", "bob", "cy")
}
OPTIONS = ServiceOptions(
    name="edge",
    operator=public_text(KEYS["operator"].public_key()),
    users={name: public_text(KEYS[name].public_key()) for name in ("ann", "bob", "cy")},
    provider=Provider(capacity=6e10),
)


class SetClock(Clock):
    """A clock that stands until it is set."""

    def __init__(self, time: float = NOON + 60) -> None:
        self.time = time

    def adjust(self) -> None:
        """The machine's clock is this one."""

    def now(self) -> float:
        """The time that was set."""
        return self.time


def text_of(bid: Bid) -> str:
    """A bid as clients send it."""
    return json.dumps({name: value for name, value in asdict(bid).items() if value is not None})


class World:
    """A client of a running service."""

    def __init__(self, client: httpx.Client, desk: Desk, clock: SetClock) -> None:
        self.client, self.desk, self.clock = client, desk, clock

    def slot(self) -> dict[str, Any]:
        """What is told of the open slot."""
        return self.client.get("/slot").json()

    def bid(self, bid: Bid | str = GOOD, *, slot: dict[str, Any] | None = None, key: str | None = None) -> Any:
        """The answer to a signed bid."""
        told = slot or self.slot()
        body = bid if isinstance(bid, str) else text_of(bid)
        signer = KEYS[key or (bid.user if isinstance(bid, Bid) else "ann")]
        signature = sign(signer, bid_message(told["opening"], body))
        headers = {"x-bid-signature": signature}
        return self.client.post(f"/slots/{told['slot']}/bids", content=body.encode(), headers=headers)

    def close(self, slot: dict[str, Any] | None = None, key: str = "operator") -> Any:
        """The answer to a wish to close the slot."""
        told = slot or self.slot()
        headers = {"x-bid-signature": sign(KEYS[key], close_message(told["opening"]))}
        return self.client.post(f"/slots/{told['slot']}/close", headers=headers)

    def record(self, slot: str) -> SlotRecord:
        """A closed slot as it is published."""
        return SlotRecord.model_validate_json(self.client.get(f"/slots/{slot}").content)


@contextmanager
def world(folder: Path, clock: SetClock | None = None, **changes: Any) -> Generator[World]:
    """A service on `folder/m.sqlite`, without a network between."""
    key, _ = own_key(folder / "m.key")
    clock = clock or SetClock()
    desk = Desk(replace(OPTIONS, **changes), PROFILES, Book(folder / "m.sqlite"), key, clock)
    with TestClient(make_app(desk, folder / "m.sqlite")) as client:
        yield World(client, desk, clock)
