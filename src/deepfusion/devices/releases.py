# SPDX-License-Identifier: Apache-2.0
"""What a device gives away of its text, what that costs in privacy, and whose noise is on it.

A release is charged in (epsilon, delta) for one document of the device's text; the number of documents is taken to be known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

from deepfusion.devices.noise import Noise
from deepfusion.types import Corpus


class Draws(NamedTuple):
    """A training by DP-SGD, as accountants see it.

    Attributes:
        multiplier: deviation of a step's noise, in units of the clipping norm.
        rate: chance of each document to be in a step.
        steps: of the training.
    """

    multiplier: float
    rate: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """Something that leaves the device and was made of its text.

    Attributes:
        what: an "embedding", or a model after "training".
        text: hash of the text.
        epsilon: what one document's privacy loses by it, at `delta`; infinite without noise.
        draws: of a training with noise.
    """

    what: Literal["embedding", "training"]
    text: str
    epsilon: float = math.inf
    delta: float = 0.0
    draws: Draws | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without what it does not have."""
        row = {key: value for key, value in asdict(self).items() if value is not None and value != math.inf}
        return row if self.draws is None else {**row, "draws": list(self.draws)}


class Releases(Protocol):
    """Who decides what a device gives away."""

    def grant(self, release: Release) -> Noise:
        """The noise for a release: the same again for the same one, and other noise for any other.

        Raises:
            PrivacyError: the device's owner does not allow it.
        """
        ...


@dataclass(frozen=True)
class Seeded(Releases):
    """A simulation: everything is allowed, and its noise can be made again by whoever knows the seed."""

    seed: int

    def grant(self, release: Release) -> Noise:
        """See `Releases.grant`."""
        said = f"{self.seed} {sorted(release.as_dict().items())}"
        return Noise(hashlib.blake2b(said.encode(), digest_size=32).digest())


def text_digest(corpus: Corpus) -> str:
    """Hash of the documents in their order, as text and as tokens with their counted flags: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for octets in _octets(corpus):
        digest.update(len(octets).to_bytes(8, "big"))
        digest.update(octets)
    return digest.hexdigest()


def _octets(corpus: Corpus) -> Iterator[bytes]:
    for index in range(len(corpus)):
        ids, counted = corpus.document(index)
        yield corpus.text(index).encode()
        yield ids.tobytes()
        yield counted.tobytes()
