# SPDX-License-Identifier: Apache-2.0
"""Hashed TF-IDF, centred on the public text and projected at random (method, section 4A). Needs no checkpoint.

Centring is what makes it work: common words would otherwise outweigh all topics.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.sparse
import torch
from sklearn.feature_extraction.text import HashingVectorizer

from deepfusion.devices.noise import Noise
from deepfusion.errors import UploadError
from deepfusion.stages.embed.base import embeddings, projection, published_vector, to_wire, unit_rows
from deepfusion.types import Corpus, State

CHUNK = 4096
"""Documents vectorised at a time: bounds the memory of the sparse matrix."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each sign counts as a word."""
LARGEST_IDF = 1 + 32 * math.log(2)
"""Of a word that none of 2^32 public documents has."""
LARGEST_TO_MEDIAN = 3.0
"""How much heavier than the median word any word may be. On four corpora of 3 to 18,000 documents, with 2^8 to 2^15 buckets, the
largest ratio was 1.5 (decision 17)."""
LARGEST_PROJECTION = 2**28
"""Numbers of the projection: 2 GiB while it is in use."""
WORD = rf"[{UNSPACED}]|[^\W{UNSPACED}]{{2,}}"


@embeddings.register("tfidf")
@dataclass(frozen=True, kw_only=True)
class HashedTfidf:
    """Hashed TF-IDF of words and word pairs, centred and projected; no checkpoint needed.

    Attributes:
        dimension: numbers of the embedding, sent as float16; cosines are exact to about 1/sqrt(dimension).
        hash_bits: words fall into 2^hash_bits buckets.
        epsilon: privacy of each document in the embedding, (epsilon, delta)-DP; left out: no noise. It protects the
            embedding only, never the uploaded weights. In a simulation the noise comes from the run's seed; on a fleet from
            each device's own secret.
        delta: the other half of the privacy guarantee.
        clip: longest projected document before noise is added.
    """

    dimension: int = 64
    hash_bits: int = 15
    epsilon: float | None = None
    delta: float = 1e-5
    clip: float = 1.5

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.dimension < 2:
            yield f"dimension = {self.dimension}: too small to tell domains apart; choose at least 2 (64 is usual)"
        if not 8 <= self.hash_bits <= 22:
            yield f"hash_bits = {self.hash_bits}: choose a number from 8 to 22"
        elif self.dimension * 2**self.hash_bits > LARGEST_PROJECTION:
            most = LARGEST_PROJECTION // 2**self.hash_bits
            yield f"dimension = {self.dimension}: too large for hash_bits = {self.hash_bits}; choose {most} at most"
        if self.epsilon is not None and not 0 < self.epsilon <= 1:
            yield f"epsilon = {self.epsilon}: the guarantee holds from 0 to 1; choose such a number or remove it"
        if not 0 < self.delta < 1:
            yield f"delta = {self.delta}: choose a number between 0 and 1, such as 1e-5"
        if self.clip <= 0:
            yield f"clip = {self.clip}: must be positive"

    def publish(self, public: Corpus, seed: int) -> State:
        """Inverse document frequencies and the mean document of the public text, (2^hash_bits,) each, float16."""
        counts, documents = np.zeros(2**self.hash_bits), 0
        for chunk in self._frequencies(public):
            counts += np.asarray((chunk != 0).sum(0)).ravel()
            documents += chunk.shape[0]
        idf = np.log((1 + documents) / (1 + counts)) + 1
        idf = torch.from_numpy(idf).half()
        return {"idf": idf, "mean": torch.from_numpy(self._mean(public, idf.double().numpy())).half()}

    def embed(self, corpus: Corpus, published: State, seed: int, grant: Callable[[], Noise]) -> np.ndarray:
        """See `Embedding.embed`."""
        (idf, mean), noise = self._checked(published), grant()
        if len(corpus) == 0:
            return np.zeros(self.dimension, np.float32)
        projection_HD = projection(2**self.hash_bits, self.dimension, seed)
        if self.epsilon is not None:
            rows_UD = np.concatenate([x @ projection_HD for x in self._weighted(corpus, idf)]) - mean @ projection_HD
            return to_wire(self._private_mean(rows_UD, self.epsilon, noise))
        found = self._mean(corpus, idf)
        return to_wire((found - mean if found.any() else found) @ projection_HD)

    def _checked(self, published: State) -> tuple[np.ndarray, np.ndarray]:
        """idf and mean as `publish` could have made them, so that no word can be asked for by itself.

        Raises:
            UploadError: no public text has these statistics.
        """
        idf, mean = (published_vector(published, name, 2**self.hash_bits) for name in ("idf", "mean"))
        low, median, high = float(idf.min()), float(np.median(idf)), float(idf.max())
        cure = "the server must send what its public text gives"
        if not 1 <= low <= high <= LARGEST_IDF:
            raise UploadError(
                f"server: published idf from {low:.4g} to {high:.4g}, possible are 1 to {LARGEST_IDF:.4g}; {cure}"
            )
        if high > LARGEST_TO_MEDIAN * median:
            said = (
                f"weighs a word {high / median:.3g} times as much as the median one, allowed are {LARGEST_TO_MEDIAN:g}"
            )
            raise UploadError(f"server: published idf {said}; {cure}")
        if (length := float(np.linalg.norm(mean))) > 1.001:  # a mean of unit vectors, rounded to float16
            raise UploadError(
                f"server: the mean of its documents has length {length:.4g}, at most 1 is possible; {cure}"
            )
        return idf, mean

    def _private_mean(self, rows_UD: np.ndarray, epsilon: float, noise: Noise) -> np.ndarray:
        """Gaussian mechanism (Dwork and Roth, theorem A.1, for epsilon up to 1): the mean of clipped rows, and noise.

        Another document in the place of one moves the mean by 2 clip / U at most. U itself is not protected.
        """
        norm_U1 = np.maximum(np.linalg.norm(rows_UD, axis=1, keepdims=True), 1e-12)
        clipped_UD = rows_UD * np.minimum(1.0, self.clip / norm_U1)
        deviation = 2 * self.clip / len(rows_UD) * math.sqrt(2 * math.log(1.25 / self.delta)) / epsilon
        return clipped_UD.mean(0) + deviation * noise.stream(0).normal(self.dimension).double().numpy()

    def embed_documents(self, corpus: Corpus, published: State, seed: int) -> np.ndarray:
        """See `Embedding.embed_documents`."""
        idf, mean = (published[name].double().numpy() for name in ("idf", "mean"))
        projection_HD = projection(2**self.hash_bits, self.dimension, seed)
        centre_D = mean @ projection_HD
        rows = [np.empty((0, self.dimension))]
        for chunk in self._weighted(corpus, idf):
            words_U1 = chunk.getnnz(axis=1)[:, None] > 0
            rows.append(unit_rows(np.where(words_U1, chunk @ projection_HD - centre_D, 0.0)))
        return np.concatenate(rows)

    def _frequencies(self, corpus: Corpus) -> Iterator[Any]:
        """Signed word counts of the documents as sparse rows, a chunk at a time. Murmur hashes: fixed for ever."""
        vectorizer = cast(Any, HashingVectorizer)(
            n_features=2**self.hash_bits, ngram_range=(1, 2), alternate_sign=True, norm=None,
            preprocessor=_normalise, token_pattern=WORD, dtype=np.float64,
        )  # fmt: skip
        for begin in range(0, len(corpus), CHUNK):
            texts = [corpus.text(index) for index in range(begin, min(begin + CHUNK, len(corpus)))]
            yield vectorizer.transform(texts)

    def _weighted(self, corpus: Corpus, idf: np.ndarray) -> Iterator[Any]:
        """Unit TF-IDF rows with sublinear term frequency."""
        for chunk in self._frequencies(corpus):
            chunk.data = np.sign(chunk.data) * (1 + np.log(np.maximum(np.abs(chunk.data), 1)))
            weighted = chunk @ scipy.sparse.diags(idf)
            norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
            yield scipy.sparse.diags(np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)) @ weighted

    def _mean(self, corpus: Corpus, idf: np.ndarray) -> np.ndarray:
        total, documents = np.zeros(2**self.hash_bits), 0
        for chunk in self._weighted(corpus, idf):
            total += np.asarray(chunk.sum(0)).ravel()
            documents += int((chunk.getnnz(axis=1) > 0).sum())
        return total / max(documents, 1)


def _normalise(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()
