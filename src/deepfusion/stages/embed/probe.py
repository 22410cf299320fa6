# SPDX-License-Identifier: Apache-2.0
"""Domain embeddings that the server finds out by itself: on which public documents did training help a device's model?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deepfusion.devices.noise import Noise
from deepfusion.stages.embed.base import embeddings, to_wire
from deepfusion.stages.embed.tfidf import HashedTfidf
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, State


@embeddings.register("probe")
@dataclass(frozen=True, kw_only=True)
class ServerProbe:
    """Devices send nothing but their model: the server scores it on public text (method, section 4C).

    z_n(u) = bits per byte of the architecture's first weights on probe document u, less those of device n's model, centred
    over documents and over devices. A device's embedding is the sum of the documents' hashed TF-IDF vectors, each times
    z_n(u): so devices and all public documents, probed or not, live in one space.

    Attributes:
        documents: public documents that every upload is scored on; the cost is one forward pass each.
        width: numbers of an embedding.
    """

    dimension: ClassVar[int] = 0
    epsilon: ClassVar[None] = None
    delta: ClassVar[float] = 0.0

    documents: int = 512
    width: int = 64

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.documents < 2:
            yield f"documents = {self.documents}: too few to tell domains apart; choose some hundreds"
        if not 8 <= self.width <= 4096:
            yield f"width = {self.width}: outside 8 to 4096; 64 is usual"

    def publish(self, public: Corpus, seed: int) -> State:
        """Nothing."""
        return {}

    def embed(self, corpus: Corpus, published: State, seed: int, grant: Callable[[], Noise]) -> np.ndarray:
        """No number at all."""
        return np.zeros(0, np.float32)

    def embed_documents(self, corpus: Corpus, published: State, seed: int) -> np.ndarray:
        """Unit vectors of the public documents, (U, width), centred by their own mean."""
        text = HashedTfidf(dimension=self.width)
        return text.embed_documents(corpus, text.publish(corpus, seed), seed)

    def probes(self, public: Corpus, seed: int) -> np.ndarray:
        """Indices of the documents to score, drawn without replacement, in order."""
        count = min(self.documents, len(public))
        return np.sort(np.random.default_rng(derive_seed(seed, "probes")).choice(len(public), count, replace=False))

    def embeddings_of(self, gain_NQ: np.ndarray, document_QD: np.ndarray) -> np.ndarray:
        """Unit embeddings (N, width) of devices out of what training gained them on each probe document.

        A device whose gains are not all finite gets zeros, and has no part in the mean over devices.
        """
        sound_N = np.isfinite(gain_NQ).all(1)
        centred_NQ = gain_NQ[sound_N] - gain_NQ[sound_N].mean(1, keepdims=True)
        if len(centred_NQ) > 1:
            centred_NQ -= centred_NQ.mean(0)
        found_ND = np.zeros((len(gain_NQ), document_QD.shape[1]), np.result_type(gain_NQ, document_QD))
        found_ND[sound_N] = centred_NQ @ document_QD
        return np.stack([to_wire(row) for row in found_ND])
