# SPDX-License-Identifier: Apache-2.0
"""A frozen neural sentence encoder (MiniLM class), mean-pooled, centred and projected (DeepFusion, section IV-A)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from deepfusion.devices.noise import Noise
from deepfusion.errors import ModelError
from deepfusion.stages.embed.base import embeddings, projection, published_vector, to_wire, unit_rows
from deepfusion.training import accelerator
from deepfusion.types import Corpus, State


@embeddings.register("encoder")
@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """A frozen text encoder, mean-pooled over tokens; the paper's choice.

    Attributes:
        model: folder or hub name of an encoder; every device must have it.
        dimension: numbers of the embedding, sent as float16.
        max_tokens: tokens of a document that are read.
        batch_size: documents encoded together.
    """

    epsilon: ClassVar[None] = None
    delta: ClassVar[float] = 0.0

    model: str
    dimension: int = 64
    max_tokens: int = 128
    batch_size: int = 64

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        for name in ("dimension", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: too small; choose at least 1"

    def publish(self, public: Corpus, seed: int) -> State:
        """Mean encoding of the public text, (H,)."""
        return {"mean": torch.from_numpy(_mean(self._encode(public))).float()}

    def embed(self, corpus: Corpus, published: State, seed: int, grant: Callable[[], Noise]) -> np.ndarray:
        """See `Embedding.embed`."""
        encoded_UH = self._encode(corpus)
        mean_H = published_vector(published, "mean", encoded_UH.shape[1])
        grant()  # there is no noise in it
        if not encoded_UH.any():
            return np.zeros(self.dimension, np.float32)
        centred_H = _mean(encoded_UH) - mean_H
        return to_wire(centred_H @ projection(len(centred_H), self.dimension, seed))

    def embed_documents(self, corpus: Corpus, published: State, seed: int) -> np.ndarray:
        """See `Embedding.embed_documents`."""
        encoded_UH = self._encode(corpus)
        centred_UH = np.where(encoded_UH.any(1, keepdims=True), encoded_UH - published["mean"].double().numpy(), 0.0)
        return unit_rows(centred_UH @ projection(centred_UH.shape[1], self.dimension, seed))

    @torch.no_grad()
    def _encode(self, corpus: Corpus) -> np.ndarray:
        """Mean of the last hidden states of each document's tokens, (U, H); zero for a document of blanks."""
        tokenizer, model = _open(self.model)
        device = accelerator().device
        model.to(device)
        limit = min(self.max_tokens, int(tokenizer.model_max_length))
        encoded_UH = np.zeros((len(corpus), int(model.config.hidden_size)))
        written = [index for index in range(len(corpus)) if corpus.text(index).strip()]
        for begin in range(0, len(written), self.batch_size):
            rows = written[begin : begin + self.batch_size]
            inputs = tokenizer(
                [corpus.text(row) for row in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(device)
            hidden_BTH = model(**inputs).last_hidden_state.double()
            mask_BT1 = inputs["attention_mask"][..., None]
            encoded_UH[rows] = ((hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)).cpu().numpy()
        return encoded_UH


def _mean(encoded_UH: np.ndarray) -> np.ndarray:
    """Mean of the documents that hold any text."""
    return encoded_UH.sum(0) / max(int(encoded_UH.any(1).sum()), 1)


@lru_cache(maxsize=1)
def _open(name: str) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f'[embed] model = "{name}": cannot be opened ({reason}); give a local folder, or type = "tfidf"'
        ) from error
    if tokenizer.pad_token is None:
        raise ModelError(
            f'[embed] model = "{name}": its tokenizer has no padding token; name an encoder (MiniLM class), '
            'or use type = "tfidf"'
        )
    return tokenizer, model
