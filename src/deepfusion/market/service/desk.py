# SPDX-License-Identifier: Apache-2.0
"""The desk: takes or refuses bids, books many with one write to the disk, closes slots when their time is over.

All decisions are made in the event loop, one after the other; one thread writes. A bid is in a slot if it passes the desk
before the closing time, and its user gets a receipt only after its row is on the disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deepfusion.errors import MarketError
from deepfusion.market.bids import Bid, parse_bids
from deepfusion.market.ledger import Opened, clear_to_ledger, open_slot
from deepfusion.market.profiles import Profile
from deepfusion.market.service.book import Book, End
from deepfusion.market.service.keys import public_text, read_public, sign, signed_by
from deepfusion.market.service.options import Clock, ServiceOptions
from deepfusion.market.service.records import (
    START,
    Closing,
    Opening,
    Receipt,
    Taken,
    bid_message,
    close_message,
    link,
    receipt_message,
    slot_message,
)
from deepfusion.market.slot import prepare

LOG = logging.getLogger(__name__)


class RefusedError(MarketError):
    """What the desk does not take.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(eq=False)
class _Waiting:
    """A bid between the desk and the disk."""

    bid: Bid
    body: str
    text: str
    answer: asyncio.Future[Receipt | RefusedError]


class Desk:
    """A market that is open.

    Attributes:
        public: the service's public key.
        terms: text of the open slot's opening; `opening` the same, read.
        previous: the link before that row, `link` its own: what bids are signed over.
    """

    def __init__(
        self, options: ServiceOptions, profiles: Mapping[str, Profile], book: Book, key: Ed25519PrivateKey, clock: Clock
    ) -> None:
        self.options, self.public = options, public_text(key.public_key())
        self._profiles, self._book, self._key, self._clock = profiles, book, key, clock
        self._users = {name: read_public(text) for name, text in options.users.items()}
        self._writer = ThreadPoolExecutor(1, "ledger")
        self._turning = asyncio.Lock()
        self._waiting: dict[str, _Waiting] = {}
        self._flush: asyncio.Task[None] | None = None
        self._tries: Counter[str] = Counter()
        self._latest = 0.0
        found = book.current()
        if found is None:
            first, following = open_slot(f"{options.name}-1"), open_slot(f"{options.name}-2")
            terms = self._terms(first, following)
            link_of = book.start((first.slot, first.seed), terms, (following.slot, following.seed))
            self._begin(1, START, terms, link_of)
        else:
            number, previous, texts, links = found
            self._begin(number, previous, texts[0], links[0])
            if len(texts) > 1:
                self._latest = max(self._latest, Taken.model_validate_json(texts[-1]).received)
            self._check_tables()

    def _begin(self, number: int, previous: str, terms: str, opening_link: str) -> None:
        self._number, self.previous, self.terms, self.link = number, previous, terms, opening_link
        self.opening = Opening.model_validate_json(terms)
        self._latest = max(self._latest, self.opening.opens)
        self._tries.clear()

    def _check_tables(self) -> None:
        for name, digest in self.opening.profiles.items():
            if name not in self._profiles or self._profiles[name].digest != digest:
                raise MarketError(
                    f"profiles.{name}: {self.opening.slot} was opened with another table; start with --profiles as before"
                )

    def now(self) -> float:
        """The service's time, which never goes back, not even from one start to the next."""
        self._latest = max(self._latest, self._clock.now())
        return self._latest

    def _terms(self, opened: Opened, following: Opened) -> str:
        self._clock.adjust()
        opens, o = self.now(), self.options
        price = o.price_kwh(opens)
        return Opening(
            service=o.name, slot=opened.slot, commitment=opened.commitment,
            following=(following.slot, following.commitment), opens=opens, closes=o.closes(opens), price_kwh=price,
            reserve=o.provider.reserve_price(price), latency=o.latency, provider=o.provider, coco=o.coco,
            profiles={name: profile.digest for name, profile in sorted(self._profiles.items())},
        ).model_dump_json()  # fmt: skip

    # ------------------------------------------------------------------------------------------------ bids

    async def bid(self, slot: str, body: bytes, signature: str) -> tuple[Receipt, bool]:
        """Take a bid; its receipt, and whether it is new. The same bid again gets the same receipt.

        Raises:
            RefusedError: with the reason.
        """
        arrived = self.now()
        await self.tick()  # from here nothing is awaited before the bid waits for the disk
        opening = self.link if slot == self.opening.slot else self._book.opening(slot)
        if opening is None:
            raise RefusedError(404, f"{slot}: was never open; now open is {self.opening.slot}")
        bid, text = self._read(opening, body, signature)
        waiting = self._waiting.get(bid.user) if slot == self.opening.slot else None
        booked = None if waiting else self._book.booked(slot, bid.user)
        known = waiting.body if waiting else Taken.model_validate_json(booked[0]).body if booked else None
        if known is not None and known != text:
            raise RefusedError(409, f"another bid of {bid.user} for {slot} is booked; it stands, one a user and slot")
        if booked is not None:
            return self._receipt(slot, bid.user, opening, booked[1]), False
        if waiting is not None:
            return await self._answer(waiting), False
        if slot != self.opening.slot or arrived >= self.opening.closes:
            raise RefusedError(410, f"{slot} is closed; now open is {self.opening.slot}: sign the bid for it")
        row = Taken(received=arrived, key=self.options.users[bid.user], signature=signature, body=text)
        waiting = _Waiting(bid, text, row.model_dump_json(), asyncio.get_running_loop().create_future())
        self._waiting[bid.user] = waiting
        if self._flush is None:
            self._flush = asyncio.create_task(self._write())
        return await self._answer(waiting), True

    def _read(self, opening: str, body: bytes, signature: str) -> tuple[Bid, str]:
        """The bid in a body that its user has signed, and the body as text."""
        try:
            text = body.decode()
            [bid] = parse_bids([(1, text)], "body")
        except (UnicodeDecodeError, MarketError) as error:
            raise RefusedError(400, str(error)) from error
        key = self._users.get(bid.user)
        if key is None:
            raise RefusedError(403, f'user = "{bid.user}": not registered; give the provider your public key')
        if not signed_by(key, signature, bid_message(opening, text)):
            raise RefusedError(
                401, f"not signed by {bid.user} for this slot; sign its opening and the body as it is sent"
            )
        self._tries[bid.user] += 1
        if self._tries[bid.user] > self.options.tries:
            raise RefusedError(429, f"{bid.user} has tried {self.options.tries} times in this slot; wait for the next")
        return bid, text

    @staticmethod
    async def _answer(waiting: _Waiting) -> Receipt:
        answer = await asyncio.shield(waiting.answer)  # who hangs up does not take the bid back
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    def _receipt(self, slot: str, user: str, opening: str, row_link: str) -> Receipt:
        """For a row that is on the disk."""
        signature = sign(self._key, receipt_message(opening, row_link))
        return Receipt(
            slot=slot, user=user, opening=opening, link=row_link, service_key=self.public, signature=signature
        )

    async def _write(self) -> None:
        """Book what waits; what comes in meanwhile is the next batch, so that a slow disk makes batches larger."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = list(self._waiting.values())
            try:
                answers = await loop.run_in_executor(self._writer, self._store, batch)
            except Exception as error:  # of whatever kind: nobody may wait for ever
                LOG.exception("%d bids could not be booked", len(batch))
                answers = [RefusedError(503, f"the ledger cannot be written ({error}); try again")] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                del self._waiting[waiting.bid.user]
                waiting.answer.set_result(answer)
        self._flush = None

    def _store(self, batch: list[_Waiting]) -> list[Receipt | RefusedError]:
        o = self.opening
        refused = prepare([w.bid for w in batch], self._profiles, o.provider, o.price_kwh, o.latency).refused
        good = [w for w in batch if w.bid.user not in refused]
        rows = [(w.bid.user, w.text) for w in good]
        links = dict(zip((user for user, _ in rows), self._book.add(self._number, rows) if rows else [], strict=True))
        return [
            self._receipt(o.slot, w.bid.user, self.link, links[w.bid.user])
            if w.bid.user in links else RefusedError(422, refused[w.bid.user])
            for w in batch
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------------------ slots

    async def tick(self) -> None:
        """Close the slot if its time is over; waits where that is being done."""
        if self._turning.locked() or self.now() >= self.opening.closes:
            async with self._turning:
                if self.now() >= self.opening.closes:
                    await self._turn()

    async def close(self, slot: str, signature: str) -> str:
        """Close the open slot before its time; the next one's name.

        Raises:
            RefusedError: it is not signed by the operator, or the slot is not open.
        """
        await self.tick()
        if self.options.operator is None:
            raise RefusedError(
                403, "nobody may close a slot before its time; set operator in the service's configuration"
            )
        if slot != self.opening.slot:
            raise RefusedError(410, f"{slot} is not open; now open is {self.opening.slot}")
        if not signed_by(read_public(self.options.operator), signature, close_message(self.link)):
            raise RefusedError(401, "not signed by the operator for this slot; sign its opening")
        async with self._turning:
            if slot == self.opening.slot:
                await self._turn()
        return self.opening.slot

    async def _turn(self) -> None:
        """Clear the slot, book and sign its result, open the next; whoever comes meanwhile waits in `tick`."""
        while self._flush is not None:
            await self._flush
        loop = asyncio.get_running_loop()
        end = await loop.run_in_executor(self._writer, self._clear, self.now())
        name, seed = self._book.seed(self._number + 1)
        following = open_slot(f"{self.options.name}-{self._number + 2}")
        terms = self._terms(Opened(slot=name, seed=seed), following)
        turned = loop.run_in_executor(
            self._writer, self._book.turn, self._number, end, terms, (following.slot, following.seed)
        )
        self._begin(self._number + 1, end.last, terms, await turned)

    def _clear(self, closed: float) -> End:
        """What the open slot comes to; a pure function of its rows and its seed, so that it may be done again."""
        found = self._book.current()
        assert found is not None
        number, _, texts, _ = found
        bids = parse_bids(
            [(at, Taken.model_validate_json(text).body) for at, text in enumerate(texts[1:], 2)], self.opening.slot
        )
        name, seed = self._book.seed(number)
        o = self.opening
        result = clear_to_ledger(
            Opened(slot=name, seed=seed), bids, self._profiles, o.provider,
            price_kwh=o.price_kwh, coco=o.coco, latency=o.latency,
        ).result  # fmt: skip
        closing = Closing(closed=closed, seed=seed, result=result).model_dump_json()
        last = link(self._book.last, closing)
        sold = result["utilisation"] * o.provider.capacity
        summary = {
            "slot": o.slot, "number": number, "opened": o.opens, "closed": closed, "bids": len(bids),
            "winners": len(result["winners"]), "price": result["revenue"] / sold if sold else None,
            "reserve": o.reserve, "revenue": result["revenue"], "utilisation": result["utilisation"],
        }  # fmt: skip
        return End(closing, self.public, last, sign(self._key, slot_message(last)), summary)

    async def stop(self) -> None:
        """Book what waits, and let go of the ledger."""
        async with self._turning:
            while self._flush is not None:
                await self._flush
        self._writer.shutdown()
        self._book.close()
