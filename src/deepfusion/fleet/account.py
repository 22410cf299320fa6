# SPDX-License-Identifier: Apache-2.0
"""What a device's owner insists on, and the account of all that the device has given away (decision 17).

A release is charged before it is made. The same request on the same text is the same release: it is charged once, and gets the
same noise again, so that nothing is learnt by asking twice. Anything else is another release with noise of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfusion.artifacts import key_of
from deepfusion.devices.noise import Noise
from deepfusion.devices.privacy import epsilon_of
from deepfusion.devices.releases import Draws, Release, Releases
from deepfusion.errors import PrivacyError

SECRET_BYTES = 32
_REMOVE = "if its text is another one now, remove {}"


@dataclass(frozen=True, kw_only=True)
class Demands:
    """[privacy]: how much of its text the device gives away at most, over all jobs of all servers.

    Attributes:
        epsilon: of all trained models together, for one document; then a training without differential privacy is refused.
        embedding_epsilon: of all embeddings together, for one document; then an embedding without noise is refused.
        delta: the other half of the guarantee, once for all models and once for all embeddings.
    """

    epsilon: float | None = None
    embedding_epsilon: float | None = None
    delta: float = 1e-5

    @property
    def any(self) -> bool:
        """Whether the owner demands privacy at all."""
        return self.epsilon is not None or self.embedding_epsilon is not None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        for name, usual in (("epsilon", 8.0), ("embedding_epsilon", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name} = {value}: must be positive; {usual} is usual, remove it to demand nothing"
        if not 0 < self.delta < 1:
            yield f"delta = {self.delta}: choose a number between 0 and 1, such as 1e-5"


class Account(Releases):
    """The releases of a device, each with what it cost, in a file that only grows; and the secret that noise is made of."""

    def __init__(self, folder: Path, device_id: str, demands: Demands, context: Sequence[str]) -> None:
        """Open it for one request.

        Args:
            folder: the account's, of its owner alone; made where it is not there.
            context: all that the server has a say in: whatever differs in it is another release.
        """
        self._folder, self._id, self._demands, self._context = folder, device_id, demands, tuple(context)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._book = folder / "account.jsonl"

    def grant(self, release: Release) -> Noise:
        """See `Releases.grant`."""
        with self._alone():
            secret, rows = self._secret(), self._rows()
            # By the secret too: with a new one the same release has new noise, and is another.
            name = hmac.digest(secret, key_of(self._context, release.as_dict()).encode(), hashlib.sha256).hex()
            if all(row["name"] != name for row in rows):
                self._check(release, [_release(row) for row in rows])
                self._write({"name": name, **release.as_dict()})
            return Noise(hmac.digest(secret, f"noise {name}".encode(), hashlib.sha256))

    def _check(self, release: Release, earlier: Sequence[Release]) -> None:
        """Raise PrivacyError unless the owner allows the release after the earlier ones."""
        check = self._check_embedding if release.what == "embedding" else self._check_training
        check(release, [one for one in earlier if one.what == release.what])

    def _check_training(self, release: Release, earlier: Sequence[Release]) -> None:
        """All trainings together, by the accountant."""
        budget, delta = self._demands.epsilon, self._demands.delta
        if budget is None:
            return
        if release.draws is None:
            raise PrivacyError(
                f"{self._id} trains with differential privacy only; ask with [devices.privacy] epsilon = {budget:g} or less"
            )
        draws = [one.draws for one in earlier if one.draws]
        spent = epsilon_of(draws, delta) if len(draws) == len(earlier) else math.inf
        total = epsilon_of([*draws, release.draws], delta)
        if max(spent, total) > budget * (1 + 1e-9):
            raise PrivacyError(
                f"{self._id} has spent epsilon = {spent:.3g} of {budget:g} at delta = {delta:g} on models, with this one it "
                f"would be {max(spent, total):.3g}; ask for less, or raise its epsilon; {_REMOVE.format(self._book)}"
            )

    def _check_embedding(self, release: Release, earlier: Sequence[Release]) -> None:
        """Basic composition: epsilons add up, and so do deltas."""
        budget = self._demands.embedding_epsilon
        if budget is None:
            return
        if release.epsilon == math.inf:
            raise PrivacyError(
                f"{self._id} gives no embedding of its text away without noise; ask with [embed] epsilon = {budget:g} or less"
            )
        spent, delta = (sum(getattr(one, name) for one in earlier) for name in ("epsilon", "delta"))
        if spent + release.epsilon > budget * (1 + 1e-9):
            raise PrivacyError(
                f"{self._id} has spent epsilon = {spent:g} of {budget:g} on embeddings, this one would cost {release.epsilon:g} "
                f"more; ask for less, or raise its embedding_epsilon; {_REMOVE.format(self._book)}"
            )
        if delta + release.delta > self._demands.delta * (1 + 1e-9):
            raise PrivacyError(
                f"{self._id} allows delta = {self._demands.delta:g} for its embeddings together, {delta:g} is spent and this one "
                f"would cost {release.delta:g}; ask with a smaller [embed] delta"
            )

    @contextmanager
    def _alone(self) -> Generator[None]:
        """No other process of the device reads or writes the account meanwhile."""
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _rows(self) -> list[dict[str, Any]]:
        if not self._book.exists():
            return []
        try:
            return [json.loads(line) for line in self._book.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise PrivacyError(
                f"{self._book}: cannot be read ({error}); take its last line away if it is not whole"
            ) from error

    def _write(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on the disk when this returns."""
        descriptor = os.open(self._book, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _secret(self) -> bytes:
        """The device's secret, made once.

        Raises:
            PrivacyError: others than its owner may read it, or it is not whole.
        """
        path = self._folder / "secret"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.urandom(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        if path.stat().st_mode & 0o077:
            raise PrivacyError(f"{path}: others than its owner may read it; chmod 600, and remove it if somebody has")
        secret = path.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise PrivacyError(
                f"{path}: has {len(secret)} bytes, not {SECRET_BYTES}; remove it, so that a new one is made"
            )
        return secret


def _release(row: Mapping[str, Any]) -> Release:
    """Inverse of `Release.as_dict`."""
    values = {key: value for key, value in row.items() if key not in ("name", "draws")}
    return Release(**values, draws=Draws(*row["draws"]) if "draws" in row else None)
