# SPDX-License-Identifier: Apache-2.0
"""Random numbers that nobody can foresee or recompute without a key: AES-256 in counter mode (NIST SP 800-38A, section 6.5).

The same key and stream give the same numbers, so that a release that is asked for again gets the same noise, and a training
that was cut off goes on to the same bytes. On a device of a fleet the key comes out of a secret of its own; in a simulation out
of the run's seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PIECE = 1 << 20
"""Normal numbers made at a time: bounds the memory of their making, 32 bytes each."""


class Stream:
    """One sequence of numbers; what has been taken is not given again."""

    def __init__(self, key: bytes, number: int) -> None:
        """Open it at its beginning.

        Args:
            key: 32 bytes.
            number: of the stream, 0..2^64-1; streams of a key have no block in common.
        """
        counter = number.to_bytes(8, "big") + bytes(8)
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next `count` numbers, uniform on 0..2^32-1."""
        return np.frombuffer(self._cipher.update(bytes(4 * count)), np.uint32)

    def uniform(self, count: int) -> np.ndarray:
        """The next `count` numbers, uniform on (0, 1), float64 with 32 random bits."""
        return (self.words(count) + 0.5) / 2.0**32

    def normal(self, count: int) -> torch.Tensor:
        """The next `count` standard normal numbers, float32 (Box and Muller); none is beyond 6.8."""
        made = torch.empty(count)
        for begin in range(0, count, PIECE):
            piece = made[begin : begin + PIECE]
            half = -(-len(piece) // 2)
            radius = torch.from_numpy(self.uniform(half)).log_().mul_(-2).sqrt_()
            angle = torch.from_numpy(self.uniform(half)).mul_(2 * math.pi)
            piece[:half] = radius * angle.cos()
            piece[half:] = (radius * angle.sin())[: len(piece) - half]
        return made


class Noise:
    """Streams out of one key."""

    def __init__(self, key: bytes) -> None:
        """Take the key, 32 bytes."""
        self._key = key

    def stream(self, number: int) -> Stream:
        """The stream of this number, from its beginning."""
        return Stream(self._key, number)
