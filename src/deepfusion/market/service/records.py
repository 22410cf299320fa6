# SPDX-License-Identifier: Apache-2.0
"""What the service writes down and signs, and how anybody checks it: a chain of rows from opening to closing.

A row is a text; its link is the hash of the link before it and the text. A bid is signed by its user over the opening's
link, which fixes the slot's terms, the hash of its seed and all that was booked before: a bid fits no other slot, and the
provider can neither write one nor change the terms once there is one. A receipt signs the bid's own link, the slot the last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from deepfusion.errors import MarketError
from deepfusion.market.bids import Bid, Provider, parse_bids
from deepfusion.market.coco import Coco
from deepfusion.market.ledger import HEX, Ledger, Strict
from deepfusion.market.profiles import Mode
from deepfusion.market.service.keys import read_public, signed_by

START = "0" * 64
"""The link before the first row."""


def link(previous: str, text: str) -> str:
    """SHA-256 over the link before and a row's text, in hex."""
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def bid_message(opening: str, body: str) -> bytes:
    """What a user signs: the opening's link and the bid, byte for byte as it is sent."""
    return f"deepfusion market bid\n{opening}\n{body}".encode()


def close_message(opening: str) -> bytes:
    """What the operator signs to close a slot before its time."""
    return f"deepfusion market close\n{opening}\n".encode()


class Opening(Strict):
    """A slot's first row: all that bidders may know, fixed before the first bid.

    Attributes:
        service: what the service is called.
        slot: what the slot is called.
        commitment: hash of the slot's secret seed, see `ledger.Opened`.
        following: name and commitment of the next slot, so that each is public before its slot opens.
        opens: seconds since 1970, by the service's clock.
        closes: bids that arrive at this time or later are late.
        reserve: $ for a FLOP/s below which nothing is sold.
        profiles: digest of each exit table by name.
    """

    row: Literal["opening"] = "opening"
    service: str
    slot: str
    commitment: str
    following: tuple[str, str]
    opens: float
    closes: float
    price_kwh: float
    reserve: float
    latency: Mode
    provider: Provider
    coco: Coco
    profiles: dict[str, str]


class Taken(Strict):
    """A bid's row.

    Attributes:
        received: seconds since 1970, by the service's clock.
        key: the user's public key.
        signature: the user's, see `bid_message`.
        body: the bid as it came.
    """

    row: Literal["bid"] = "bid"
    received: float
    key: str
    signature: str
    body: str


class Closing(Strict):
    """A slot's last row: the seed, and what `clear_slot` made of it."""

    row: Literal["closing"] = "closing"
    closed: float
    seed: str
    result: dict[str, Any]


class Receipt(Strict):
    """The service's word that a bid is booked.

    Attributes:
        link: of the bid's row, which must stand in the slot when it is published.
        signature: the service's, over opening and link.
    """

    slot: str
    user: str
    opening: str
    link: str
    service_key: str
    signature: str

    def faults(self) -> list[str]:
        """What is wrong with the receipt by itself."""
        message = receipt_message(self.opening, self.link)
        good = signed_by(read_public(self.service_key), self.signature, message)
        return [] if good else [f"receipt of {self.user}: not signed by the service"]


def receipt_message(opening: str, row_link: str) -> bytes:
    """What the service signs in a receipt."""
    return f"deepfusion market receipt\n{opening}\n{row_link}\n".encode()


def slot_message(last: str) -> bytes:
    """What the service signs when a slot is closed: the closing's link."""
    return f"deepfusion market slot\n{last}\n".encode()


class SlotRecord(Strict):
    """A closed slot as the service publishes it.

    Attributes:
        service_key: the service's public key.
        previous: the link before the slot's first row.
        rows: the texts of opening, bids and closing, in order.
        signature: the service's, over the last link.
    """

    schema_version: Literal[1] = 1
    service_key: str
    previous: str = Field(pattern=HEX)
    rows: list[str]
    signature: str

    @cached_property
    def links(self) -> list[str]:
        """The link of each row."""
        return list(accumulate(self.rows, link, initial=self.previous))[1:]

    @cached_property
    def opening(self) -> Opening:
        """The first row."""
        return _row(Opening, self.rows, 0)

    @cached_property
    def closing(self) -> Closing:
        """The last row."""
        return _row(Closing, self.rows, -1)

    @cached_property
    def taken(self) -> list[Taken]:
        """The rows between."""
        return [_row(Taken, self.rows, at) for at in range(1, len(self.rows) - 1)]

    @cached_property
    def bids(self) -> list[Bid]:
        """The bids in the order of their rows."""
        return parse_bids([(at, bid.body) for at, bid in enumerate(self.taken, start=2)], self.opening.slot)

    def ledger(self) -> Ledger:
        """The slot as `audit` computes it again."""
        o = self.opening
        return Ledger(
            slot=o.slot, seed=self.closing.seed, commitment_published=o.commitment, price_kwh=o.price_kwh,
            latency=o.latency, provider=o.provider, coco=o.coco, profiles=o.profiles, bids=self.bids,
            result=self.closing.result,
        )  # fmt: skip

    def faults(self, receipts: Sequence[Receipt] = (), service_key: str | None = None) -> list[str]:
        """What in the chain, its times and its signatures is not as it must be; empty where all is well.

        Args:
            receipts: that the auditor holds for this slot.
            service_key: the service's public key as the auditor noted it.
        """
        wrong: list[str] = []
        if service_key is not None and service_key != self.service_key:
            wrong.append(f"service_key: {self.service_key}, not the one that the auditor noted")
        if not signed_by(read_public(self.service_key), self.signature, slot_message(self.links[-1])):
            wrong.append("signature: the rows are not those that the service signed")
        o, closed = self.opening, self.closing.closed
        if o.reserve != o.provider.reserve_price(o.price_kwh):
            wrong.append(f"reserve: {o.reserve}, where it must be {o.provider.reserve_price(o.price_kwh)}")
        if not o.opens <= closed:
            wrong.append(f"closed: {closed}, before the slot was open")
        booked: set[str] = set()
        for number, (row, bid) in enumerate(zip(self.taken, self.bids, strict=True), start=2):
            place = f"row {number}, {bid.user}"
            if not signed_by(read_public(row.key), row.signature, bid_message(self.links[0], row.body)):
                wrong.append(f"{place}: the bid is not signed by its user for this slot")
            if not (o.opens <= row.received < o.closes and row.received <= closed):
                wrong.append(f"{place}: received at {row.received}, when the slot was not open")
            if bid.user in booked:
                wrong.append(f"{place}: a second bid")
            booked.add(bid.user)
        known = set(self.links[1:-1])
        for receipt in receipts:
            wrong += receipt.faults()
            if receipt.service_key != self.service_key:
                wrong.append(f"receipt of {receipt.user}: signed with another key than the slot")
            if receipt.opening != self.links[0]:
                wrong.append(f"receipt of {receipt.user}: given under other terms than these")
            elif receipt.link not in known:
                wrong.append(f"receipt of {receipt.user}: its bid is missing")
        return wrong


R = TypeVar("R", bound=Strict)


def _row(kind: type[R], rows: Sequence[str], at: int) -> R:
    try:
        return kind.model_validate_json(rows[at])
    except (ValidationError, IndexError) as error:
        name = kind.__name__.lower()
        raise MarketError(
            f"row {at % max(len(rows), 1) + 1}: not a slot's {name}; give a slot as it was published"
        ) from error
