# SPDX-License-Identifier: Apache-2.0
"""Made-up domains: text whose topical words are disjoint and whose common words are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepfusion.types import Corpus

COMMON = [f"common{index}" for index in range(60)]


def corpus_of(texts: Sequence[str]) -> Corpus:
    """A corpus that has texts only: embeddings look at nothing else."""
    blobs = [text.encode() for text in texts]
    starts = np.concatenate([[0], np.cumsum([len(blob) for blob in blobs])]).astype(np.int64)
    count = len(texts)
    return Corpus(
        np.zeros(count, np.uint16), np.ones(count, bool), np.arange(count + 1), np.frombuffer(b"".join(blobs), np.uint8),
        starts, np.zeros(count, np.int64), ("made up",), np.arange(count),
    )  # fmt: skip


def document(topic: int, rng: np.random.Generator, topical: float = 0.2, words: int = 60) -> str:
    """Words of which a share of `topical` belongs to the topic; common words follow Zipf's law."""
    zipf = 1 / np.arange(1, len(COMMON) + 1)
    common = rng.choice(COMMON, words, p=zipf / zipf.sum())
    own = [f"topic{topic}x{index}" for index in rng.integers(0, 20, words)]
    return " ".join(np.where(rng.random(words) < topical, own, common))


def documents(topic: int, count: int, seed: int, topical: float = 0.2) -> list[str]:
    rng = np.random.default_rng([topic, seed])
    return [document(topic, rng, topical) for _ in range(count)]


def public_text(topics: int, seed: int = 99) -> Corpus:
    return corpus_of([text for topic in range(topics) for text in documents(topic, 60, seed)])


def unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=-1, keepdims=True)
