# SPDX-License-Identifier: Apache-2.0
"""Scoring and sampling with any causal LM folder, ours or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deepfusion.data.prepare import corpus_from_files
from deepfusion.data.tokenizer import is_blank
from deepfusion.devices.configurations import reach_of
from deepfusion.devices.models import load
from deepfusion.devices.writing import write
from deepfusion.errors import ConfigError, ModelError
from deepfusion.stages.evaluate import by_domain, score_documents, total
from deepfusion.training import accelerator

USUAL_TOKENS = 64
"""Tokens to add where nobody asks for another number and the model reads as many."""


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
    if is_blank(tokenizer):
        raise ModelError(f"{name}: the model has no tokenizer; save one beside it (tokenizer.json)")
    return model, tokenizer


def evaluate_model(
    name: str,
    data: str | Sequence[str],
    *,
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    sequence_length: int = 512,
) -> dict[str, float | int]:
    """Perplexity and token accuracy of a model on text files; with a prompt template only the answer counts.

    Raises:
        ConfigError: the templates or the length cannot be meant.
        ModelError: there is no such model, or it cannot be opened safely.
        DataError: the text cannot be read.
    """
    check_length(sequence_length)
    model, _ = open_model(name)
    window = min(sequence_length, reach_of(model.config) or sequence_length)
    corpus = corpus_from_files(data, "test", Path(name), text=text, prompt=prompt, answer=answer)
    score = total(by_domain(score_documents(model, corpus, window), corpus))
    return {
        "documents": len(corpus),
        "tokens": score.tokens,
        "perplexity": score.perplexity,
        "log_perplexity": score.log_perplexity,
        "token_accuracy": score.token_accuracy,
    }


def check_length(sequence_length: int) -> None:
    """Raise ConfigError for a command's --sequence-length that leaves nothing to predict."""
    if sequence_length < 2:
        said = f"--sequence-length {sequence_length}: a token needs one before it; choose 2 or more"
        raise ConfigError([said], "command line")


def generate_text(name: str, prompt: str, *, tokens: int | None = None, temperature: float = 0.8, seed: int = 0) -> str:
    """What the model continues `prompt` with, drawn from its own distribution (`write`).

    Args:
        tokens: to add at most; 64, or as many as the model still reads, when left out.
        temperature: 0 takes the most likely token each time.

    Raises:
        ConfigError: prompt and tokens are more than the model reads, or the temperature cannot be meant.
        ModelError: there is no such model, or it cannot be opened safely.
    """
    if temperature and not 1e-3 <= temperature <= 1e3:  # neither is NaN
        said = f"--temperature {temperature:g}: not between 0.001 and 1000; 0 takes the most likely token"
        raise ConfigError([said], "command line")
    model, tokenizer = open_model(name)
    model.to(accelerator().device).eval()
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eos_token_id]
    start = torch.tensor([ids], device=model.device)
    length = _tokens(tokens, start.shape[1], reach_of(model.config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        end = cast(int, tokenizer.eos_token_id)
        made = write(model, start, tokens=length, temperature=temperature, pad_id=end)
    return str(tokenizer.decode(made[0, start.shape[1] :], skip_special_tokens=True))


def _tokens(asked: int | None, prompt: int, reach: int | None) -> int:
    """Tokens to add to a prompt of so many; raises ConfigError where the model does not read them all."""
    left = USUAL_TOKENS if reach is None else reach - prompt
    if left < 1:
        raise ConfigError([f"PROMPT: has {prompt} tokens, the model reads {reach}; shorten it"], "command line")
    if asked is None:
        return min(USUAL_TOKENS, left)
    if reach is not None and asked > left:
        said = f"the model reads {reach}, and the prompt has {prompt}"
        raise ConfigError([f"--tokens {asked}: {said}; choose {left} or less"], "command line")
    return asked
