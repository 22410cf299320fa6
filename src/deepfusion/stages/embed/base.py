# SPDX-License-Identifier: Apache-2.0
"""What a domain embedding is: a short unit vector that says what a device's private text is about."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from deepfusion.registry import Registry
from deepfusion.types import Corpus, State


class Embedding(Protocol):
    """Made on the device from its text, in one space for all devices (method, section 4A and 4B)."""

    dimension: int

    def publish(self, public: Corpus, seed: int) -> State:
        """What the server sends to every device, once: statistics of the public text."""
        ...

    def embed(self, corpus: Corpus, published: State, seed: int, noise_seed: int) -> np.ndarray:
        """The unit vector (D,) of a device's text, rounded to float16; all zero for a corpus without a word.

        Args:
            seed: the run's seed, the same for all devices.
            noise_seed: the device's own, for what privacy noise there is.
        """
        ...

    def embed_documents(self, corpus: Corpus, published: State, seed: int) -> np.ndarray:
        """A unit vector for each document, (U, D); all zero for one without a word."""
        ...


embeddings: Registry[Embedding] = Registry("embed")


def unit_rows(rows_UD: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zero rows stay zero."""
    norm_U1 = np.linalg.norm(rows_UD, axis=-1, keepdims=True)
    return np.divide(rows_UD, norm_U1, out=np.zeros_like(rows_UD), where=norm_U1 > 0)
