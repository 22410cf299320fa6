# SPDX-License-Identifier: Apache-2.0
"""Every fault that a user can mend: a message names the place, the value and the cure."""

from __future__ import annotations

from collections.abc import Sequence


def printable(said: str) -> str:
    """Somebody else's words without what would steer a terminal; lines stay lines."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in said)


def few(names: Sequence[str]) -> str:
    """The first three of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class DeepFusionError(Exception):
    """Base of all errors that deepfusion raises on purpose. Catch this one to catch them all."""


class ConfigError(DeepFusionError):
    """One or more faults in a configuration, all reported at once.

    Each fault reads `[section] key = value: what is wrong; what to do`.
    """

    def __init__(self, faults: Sequence[str], source: str = "configuration") -> None:
        self.faults = tuple(faults)
        self.source = source
        plural = "fault" if len(self.faults) == 1 else "faults"
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{source}: {len(self.faults)} {plural}\n{lines}")


class DataError(DeepFusionError):
    """Text, a data set or a tokenizer that cannot be read or used."""


class ModelError(DeepFusionError):
    """A model folder, preset or architecture that cannot be built, loaded or merged."""


class MemoryLimitError(DeepFusionError):
    """A device cannot train its model within its stated memory limit."""


class UploadError(DeepFusionError):
    """An upload that is malformed, hostile or does not match what was asked for. Names the device."""


class FederationError(DeepFusionError):
    """The exchange between server and devices failed beyond what retries can mend."""


class DropoutError(FederationError):
    """Every device that was asked dropped out: none is known to be at fault, so another time they may answer.

    Attributes:
        asked: ids of the devices.
    """

    def __init__(self, message: str, asked: Sequence[str] = ()) -> None:
        self.asked = tuple(asked)
        super().__init__(message)


class DiskError(DeepFusionError):
    """What has arrived, or was trained, cannot be written. Not a device's fault: the run stops, and goes on from there."""


class BusyError(DeepFusionError):
    """Another process is at work on a run folder. Names the process."""


class ResumeError(DeepFusionError):
    """A run folder does not match the configuration that wants to continue it."""


class MarketError(DeepFusionError):
    """A market, a table of exits, a file of bids or a ledger that cannot be used."""


class PrivacyError(DeepFusionError):
    """A device was asked for more of its text than its owner gives away."""
