# SPDX-License-Identifier: Apache-2.0
"""The [federation] section: how the server reaches its devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FederationOptions:
    """[federation]: the engine behind the door. Every engine gives the same bytes.

    Attributes:
        engine: "forkserver" runs each device in a process of its own, "inline" runs all in this one (to debug),
            "ray" fans them out over Ray (the extra `ray`; a cluster by RAY_ADDRESS and storage that its machines share).
        workers: devices that train at the same time, except "inline".
        timeout_seconds: longest time a device may take before it is given up.
        retries: how often a device that crashed is asked again.
        minimum_devices: a run goes on with the devices that have answered, if there are as many as this (of those asked).
            With 1, a method in rounds skips a round that every device drops out of; with more it stops there, to be resumed.
        deadline_seconds: how long one exchange waits for its last device, of a fleet that may be switched off for hours;
            none waits as long as `timeout_seconds` says. Who was missing is in the record; `--resume` asks them again.
    """

    engine: Literal["forkserver", "inline", "ray"] = "forkserver"
    workers: int = 2
    timeout_seconds: float = 86_400.0
    retries: int = 1
    minimum_devices: int = 1
    deadline_seconds: float | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.workers < 1:
            yield f"workers = {self.workers}: nobody would train; choose at least 1"
        if self.timeout_seconds <= 0:
            yield f"timeout_seconds = {self.timeout_seconds}: no device could answer; choose a positive number of seconds"
        if self.retries < 0:
            yield f"retries = {self.retries}: cannot be negative; 0 asks every device once"
        if self.minimum_devices < 1:
            yield f"minimum_devices = {self.minimum_devices}: nothing would be fused; choose at least 1"
        if self.deadline_seconds is not None and not self.deadline_seconds > 0:
            yield f"deadline_seconds = {self.deadline_seconds}: nobody could answer; choose a positive number, or remove it"
