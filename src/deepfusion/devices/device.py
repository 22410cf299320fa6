# SPDX-License-Identifier: Apache-2.0
"""One edge device as its own code sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepfusion.devices.privacy import PrivacyOptions
from deepfusion.devices.releases import Releases
from deepfusion.training import Optimisation
from deepfusion.types import Corpus, ModelSpec


@dataclass(frozen=True, eq=False)
class Device:
    """A device's own model, text and limits. It never leaves `Method.client`.

    Attributes:
        id: unique in the fleet; file names may be made of it.
        model: the architecture that it trains.
        corpus: its private text.
        tokenizer: folder of the run's tokenizer.
        sequence_length: tokens of a training sequence.
        training: how it optimises.
        privacy: how much a document's privacy loses by its training; None for a plain training.
        epochs: how often it reads its text.
        max_steps: most optimiser steps, None for no limit.
        memory_limit_bytes: None when it stated no limit.
        seed: its own seed, derived from the run's seed and its id: the server knows it.
        releases: decides what of its text may leave it, and has the noise for that.
        scratch: a folder of its own for checkpoints, or None to keep none.
    """

    id: str
    model: ModelSpec
    corpus: Corpus
    tokenizer: Path
    sequence_length: int
    training: Optimisation
    privacy: PrivacyOptions | None
    epochs: float
    max_steps: int | None
    memory_limit_bytes: int | None
    seed: int
    releases: Releases
    scratch: Path | None = None
