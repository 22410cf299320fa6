# SPDX-License-Identifier: Apache-2.0
"""A frozen neural sentence encoder (MiniLM class), mean-pooled, centred and projected (DeepFusion, section IV-A)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from deepfusion.errors import ModelError
from deepfusion.stages.embed.base import embeddings, unit_rows
from deepfusion.training import accelerator, derive_seed
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
        """Mean encoding of the public text, (H,), float16."""
        return {"mean": torch.from_numpy(self._encode(public).mean(0)).half()}

    def embed(self, corpus: Corpus, published: State, seed: int, noise_seed: int) -> np.ndarray:
        """See `Embedding.embed`."""
        if len(corpus) == 0:
            return np.zeros(self.dimension, np.float32)
        centred_H = self._encode(corpus).mean(0) - published["mean"].double().numpy()
        return unit_rows(centred_H @ self._projection(len(centred_H), seed)).astype(np.float16).astype(np.float32)

    def embed_documents(self, corpus: Corpus, published: State, seed: int) -> np.ndarray:
        """See `Embedding.embed_documents`."""
        centred_UH = self._encode(corpus) - published["mean"].double().numpy()
        return unit_rows(centred_UH @ self._projection(centred_UH.shape[1], seed))

    @torch.no_grad()
    def _encode(self, corpus: Corpus) -> np.ndarray:
        tokenizer, model = _open(self.model)
        device = accelerator().device
        model.to(device)
        rows: list[np.ndarray] = []
        for begin in range(0, len(corpus), self.batch_size):
            texts = [corpus.text(i) for i in range(begin, min(begin + self.batch_size, len(corpus)))]
            inputs = tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(device)
            hidden_BTH = model(**inputs).last_hidden_state.double()
            mask_BT1 = inputs["attention_mask"][..., None]
            rows.append(((hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)).cpu().numpy())
        return np.concatenate(rows)

    def _projection(self, width: int, seed: int) -> np.ndarray:
        signs = np.random.default_rng(derive_seed(seed, "projection")).integers(0, 2, (width, self.dimension))
        return (2.0 * signs - 1.0) / math.sqrt(self.dimension)


@lru_cache(maxsize=1)
def _open(name: str) -> tuple[Any, Any]:
    try:
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f'[embed] model = "{name}": cannot be opened ({reason}); give a local folder, or type = "tfidf"'
        ) from error
