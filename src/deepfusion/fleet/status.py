# SPDX-License-Identifier: Apache-2.0
"""`deepfusion fleet status`: who is registered, online, training, done or failed, and the bytes, read off a run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from deepfusion.errors import printable
from deepfusion.federation.ledger import read_rows
from deepfusion.federation.roll import ROLL, read_roll
from deepfusion.report.rows import size

WORDS = {
    "registered": "registered", "asked": "training", "waiting": "waiting", "answered": "uploaded", "failed": "failed",
}  # fmt: skip
"""What people call the states of `Roll`."""
STALE_SECONDS = 30.0
"""A roll that was last written longer ago is of a run that is over, or was killed."""


@dataclass(frozen=True)
class DeviceStatus:
    """One device.

    Attributes:
        state: a value of `WORDS`.
        online: whether its node is connected; None where no run looks, or the SuperLink does not answer it.
        seconds: since the state began.
        reason: why it waits or has failed.
        down_bytes, up_bytes: what it was sent, and has sent.
    """

    device: str
    state: str
    online: bool | None
    seconds: float
    reason: str
    down_bytes: int
    up_bytes: int


@dataclass(frozen=True)
class FleetStatus:
    """A fleet as the server last saw it.

    Attributes:
        running: whether a run is looking at it now.
        silent_seconds: how long the SuperLink has told that run nothing; None while it answers, and without a run.
    """

    running: bool
    silent_seconds: float | None
    devices: list[DeviceStatus]

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def fleet_status(run: Path) -> FleetStatus:
    """Read the status off a run folder; writes nothing.

    Raises:
        ResumeError: no fleet has run there.
    """
    sight = read_roll(run / ROLL)
    now, rows = time.time(), read_rows(run / "ledger.jsonl")
    running = now - sight.seen < STALE_SECONDS
    silent = sight.seen - sight.answered if running and sight.seen - sight.answered >= STALE_SECONDS else None
    known = running and silent is None

    def state(device_id: str, told: str) -> str:
        kept = told == "registered" and (run / "uploads" / f"{device_id}.safetensors").exists()
        return WORDS["answered" if kept else told]  # a resumed run does not ask for what it has

    def total(device_id: str, direction: str) -> int:
        return sum(row.bytes for row in rows if row.device == device_id and row.direction == direction)

    return FleetStatus(running, None if silent is None else round(silent, 1), [
        DeviceStatus(
            device_id, state(device_id, entry.state), entry.online if known else None, round(max(0.0, now - entry.since), 1),
            entry.reason, total(device_id, "down"), total(device_id, "up"),
        )
        for device_id, entry in sorted(sight.entries.items())
    ])  # fmt: skip


def status_table(status: FleetStatus) -> Table:
    """The status for people."""
    counts = ", ".join(
        f"{count} {word}" for word in WORDS.values()
        if (count := sum(device.state == word for device in status.devices))
    )  # fmt: skip
    online = sum(bool(device.online) for device in status.devices)
    title = f"{len(status.devices)} registered, {online} online; {counts}"
    if not status.running:
        title = f"no run now; {counts}"
    elif status.silent_seconds is not None:
        title = f"the SuperLink has not answered for {status.silent_seconds:,.0f} s, start it again; {counts}"
    table = Table("device", "online", "state", "since", "down", "up", "why", title=title, title_justify="left")
    for device in status.devices:
        there = "-" if device.online is None else "yes" if device.online else "no"
        table.add_row(
            device.device, there, device.state, f"{device.seconds:,.0f} s", size(device.down_bytes),
            size(device.up_bytes), Text(printable(device.reason)[:120]),
        )  # fmt: skip
    return table
