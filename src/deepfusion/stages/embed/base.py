# SPDX-License-Identifier: Apache-2.0
"""What a domain embedding is: a short unit vector that says what a device's private text is about."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from deepfusion.devices.noise import Noise
from deepfusion.errors import UploadError
from deepfusion.registry import Registry
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, State


class Embedding(Protocol):
    """Made on the device from its text, in one space for all devices (method, section 4A and 4B)."""

    dimension: int
    epsilon: float | None
    """Privacy of each document in the embedding; None without noise."""
    delta: float

    def publish(self, public: Corpus, seed: int) -> State:
        """What the server sends to every device, once: statistics of the public text."""
        ...

    def embed(self, corpus: Corpus, published: State, seed: int, grant: Callable[[], Noise]) -> np.ndarray:
        """The unit vector (D,) of a device's text, rounded to float16; all zero for a corpus without a word.

        Args:
            published: what the server sent; a device trusts none of it.
            seed: the run's seed, the same for all devices.
            grant: the owner's leave, with the device's own noise; asked for once `published` has been checked, as it may cost.

        Raises:
            UploadError: `published` is nothing that `publish` makes.
            PrivacyError: out of `grant`.
        """
        ...

    def embed_documents(self, corpus: Corpus, published: State, seed: int) -> np.ndarray:
        """A unit vector for each document, (U, D); all zero for one without a word."""
        ...


embeddings: Registry[Embedding] = Registry("embed")


def published_vector(published: State, name: str, size: int) -> np.ndarray:
    """A vector out of what the server publishes, (size,), float64.

    Raises:
        UploadError: it is missing, of another shape, or not of finite numbers.
    """
    vector = published.get(name)
    if vector is None or tuple(vector.shape) != (size,) or not vector.is_floating_point():
        found = "none" if vector is None else f"{vector.dtype} {list(vector.shape)}"
        raise UploadError(
            f'server: published "{name}" is {found}, not {size} floating numbers; use one version on both sides'
        )
    if not bool(torch.isfinite(vector).all()):
        raise UploadError(f'server: published "{name}" is not finite; use one version on both sides')
    return vector.double().numpy()


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
