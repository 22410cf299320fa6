# SPDX-License-Identifier: Apache-2.0
"""Scoring and sampling with any causal LM folder, ours or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deepfusion.data.prepare import corpus_from_files
from deepfusion.devices.models import load
from deepfusion.errors import ModelError
from deepfusion.stages.evaluate import by_domain, score_documents, total
from deepfusion.training import accelerator


def open_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, from a folder or by hub name.

    Raises:
        ModelError: there is no such model, or it cannot be opened safely.
    """
    model = load(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: the model has no usable tokenizer ({error}); save one beside it") from error
    return model, tokenizer


def evaluate_model(
    name: str,
    data: str,
    *,
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    sequence_length: int = 512,
) -> dict[str, float | int]:
    """Perplexity and token accuracy of a model on text files; with a prompt template only the answer counts."""
    model, _ = open_model(name)
    limit = getattr(model.config, "max_position_embeddings", None)
    window = min(sequence_length, int(limit)) if limit else sequence_length
    corpus = corpus_from_files(data, "test", Path(name), text=text, prompt=prompt, answer=answer)
    score = total(by_domain(score_documents(model, corpus, window), corpus))
    return {
        "documents": len(corpus),
        "tokens": score.tokens,
        "perplexity": score.perplexity,
        "log_perplexity": score.log_perplexity,
        "token_accuracy": score.token_accuracy,
    }


@torch.no_grad()
def generate_text(name: str, prompt: str, *, tokens: int = 64, temperature: float = 0.8, seed: int = 0) -> str:
    """What the model continues `prompt` with; `temperature` 0 takes the most likely token each time."""
    model, tokenizer = open_model(name)
    model.to(accelerator().device).eval()
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eos_token_id]
    start = torch.tensor([ids], device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        made = cast(Any, model).generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            **options,
        )
    return str(tokenizer.decode(made[0, start.shape[1] :], skip_special_tokens=True))
