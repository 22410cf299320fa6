# SPDX-License-Identifier: Apache-2.0
"""What a domain embedding is: a short unit vector that says what a device's private text is about."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np

from deepfusion.registry import Registry
from deepfusion.training import derive_seed
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
            noise_seed: the device's own, for what privacy noise there is; whoever knows it can take the noise off again.
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


def projection(width: int, dimension: int, seed: int) -> np.ndarray:
    """R of section 4: signs over sqrt(dimension), (width, dimension).

    Out of a hash, so that server and devices make the same one from the seed whatever their versions of NumPy.
    """
    size = width * dimension
    octets = hashlib.shake_256(f"projection {derive_seed(seed, 'projection')}".encode()).digest(-(-size // 8))
    bits = np.unpackbits(np.frombuffer(octets, np.uint8), count=size).reshape(width, dimension)
    return (2.0 * bits - 1.0) / math.sqrt(dimension)


def to_wire(vector_D: np.ndarray) -> np.ndarray:
    """The unit vector along `vector_D` (zero stays zero), as its float16 numbers arrive at the server; float32."""
    return unit_rows(vector_D).astype(np.float16).astype(np.float32)
