# SPDX-License-Identifier: Apache-2.0
"""A slot's ledger: everything that is needed to compute it again, and the audit that does so (aeria, section 12).

The grid's offset must be secret until bids close and fixed before: the provider draws a seed, publishes its hash, closes
the bids, clears, and publishes the seed in the ledger. Who kept the hash can tell whether the seed was changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepfusion.artifacts import write_atomic
from deepfusion.errors import MarketError
from deepfusion.market.bids import Bid, Provider
from deepfusion.market.coco import Coco
from deepfusion.market.profiles import Mode, Profile
from deepfusion.market.slot import clear_slot
from deepfusion.schema import misfits

HEX = r"^[0-9a-f]{64}$"
SAME = 1e-9
"""Relative: amounts that differ by less were rounded otherwise on another machine."""


class Strict(BaseModel):
    """What is written down: no unknown keys, unchangeable, infinities as JSON's extended constants."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, ser_json_inf_nan="constants", allow_inf_nan=True
    )


class Opened(Strict):
    """A slot's secret before the bids are closed.

    Attributes:
        slot: what the slot is called.
        seed: 64 hex digits; secret.
    """

    slot: str
    seed: str = Field(pattern=HEX)

    @property
    def commitment(self) -> str:
        """What is published: it fixes the seed and does not tell it."""
        return hashlib.sha256(f"{self.slot}\n{self.seed}".encode()).hexdigest()


class Ledger(Opened):
    """A cleared slot.

    Attributes:
        commitment_published: the hash that bidders were given before they bid; None where there was none.
        profiles: digest of each exit table by name.
        result: of `clear_slot`.
    """

    schema_version: Literal[1] = 1
    commitment_published: str | None
    price_kwh: float
    latency: Mode
    provider: Provider
    coco: Coco
    profiles: dict[str, str]
    bids: list[Bid]
    result: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the ledger as JSON.

        Raises:
            MarketError: another ledger is there; the audit of a slot that was cleared would be lost.
        """
        text = self.model_dump_json(indent=1)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise MarketError(
                f"{path}: another ledger is there already; give another path by --out, or put it away first"
            )
        write_atomic(path, text)


def open_slot(slot: str) -> Opened:
    """Draw the seed of a slot. Raises MarketError where it has no name."""
    if not slot.strip():
        raise MarketError(f"SLOT {slot!r}: a slot needs a name; for example 2026-01-31T14")
    return Opened(slot=slot, seed=secrets.token_hex(32))


def read_opened(path: Path) -> Opened:
    """The secret that `deepfusion market open` wrote. Raises MarketError where it is none."""
    return _read(Opened, path)


def read_commitment(given: str) -> str:
    """The hash that was published: itself, or out of the `commitment.json` that holds it.

    Raises:
        MarketError: it is neither.
    """
    digest: object = given
    with suppress(OSError, ValueError, KeyError, TypeError):
        digest = json.loads(Path(given).read_text())["commitment"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise MarketError(f"--commitment {given}: neither a hash of 64 hexadecimal digits nor a file with one")
    return digest


def read_ledger(path: Path) -> Ledger:
    """A ledger. Raises MarketError where it is none."""
    return _read(Ledger, path)


M = TypeVar("M", bound=Opened)


def _read(model: type[M], path: Path) -> M:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise MarketError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValidationError as error:
        wrong = "; ".join(misfits(error)[:4])
        raise MarketError(
            f"{path}: not what `deepfusion market` writes ({wrong}); give its ledger or seed file"
        ) from error


def clear_to_ledger(
    opened: Opened,
    bids: Sequence[Bid],
    profiles: Mapping[str, Profile],
    provider: Provider,
    *,
    price_kwh: float,
    coco: Coco,
    latency: Mode = "expected",
    committed: bool = True,
) -> Ledger:
    """Clear a slot and write down all that it depended on.

    Args:
        committed: whether the commitment was published before the bids closed.

    Raises:
        MarketError: see `clear_slot`.
    """
    result = clear_slot(bids, profiles, provider, price_kwh=price_kwh, seed=opened.seed, coco=coco, mode=latency)
    used = sorted({bid.model for bid in bids} & set(profiles))
    return Ledger(
        slot=opened.slot, seed=opened.seed, commitment_published=opened.commitment if committed else None,
        price_kwh=price_kwh, latency=latency, provider=provider, coco=coco,
        profiles={name: profiles[name].digest for name in used}, bids=list(bids), result=result,
    )  # fmt: skip


def audit(
    ledger: Ledger, profiles: Mapping[str, Profile], *, commitment: str | None = None, known: Sequence[Bid] = ()
) -> list[str]:
    """What in a ledger is not as it must be; empty where the provider kept to the rules.

    Args:
        profiles: the exit tables as the auditor has them.
        commitment: the hash that was published before the bids closed, as the auditor noted it.
        known: bids that the auditor knows were sent.
    """
    wrong: list[str] = []
    promised = commitment or ledger.commitment_published
    if promised is not None and promised != ledger.commitment:
        wrong.append(f"seed: its hash is {ledger.commitment}, not the {promised} that was published: drawn again")
    if commitment is not None and ledger.commitment_published not in (None, commitment):
        wrong.append("commitment_published: not the one that the auditor noted")
    for name, digest in ledger.profiles.items():
        if name not in profiles:
            wrong.append(f"profiles.{name}: no such table here; audit with --profiles")
        elif profiles[name].digest != digest:
            wrong.append(f"profiles.{name}: another table than the one here ({profiles[name].digest})")
    booked = {bid.user: bid for bid in ledger.bids}
    for bid in known:
        if bid.user not in booked:
            wrong.append(f"bids: that of {bid.user} is missing")
        elif asdict(booked[bid.user]) != asdict(bid):
            wrong.append(f"bids: that of {bid.user} was changed")
    again = clear_slot(
        ledger.bids, profiles, ledger.provider,
        price_kwh=ledger.price_kwh, seed=ledger.seed, coco=ledger.coco, mode=ledger.latency,
    )  # fmt: skip
    return wrong + list(_differences("result", ledger.result, json.loads(json.dumps(again))))


def _differences(place: str, told: Any, found: Any) -> Iterator[str]:
    if isinstance(told, dict) and isinstance(found, dict):
        one, two = cast(dict[str, Any], told), cast(dict[str, Any], found)
        for key in sorted(one.keys() | two.keys()):
            if key not in one:
                yield f"{place}.{key}: missing; it is {two[key]}"
            elif key not in two:
                yield f"{place}.{key}: {one[key]}, where there must be nothing"
            else:
                yield from _differences(f"{place}.{key}", one[key], two[key])
    elif isinstance(told, float | int) and isinstance(found, float | int) and not isinstance(told, bool):
        if not math.isclose(told, found, rel_tol=SAME, abs_tol=0.0):
            yield f"{place}: {told}, where it must be {found}"
    elif told != found:
        yield f"{place}: {told}, where it must be {found}"
