# SPDX-License-Identifier: Apache-2.0
"""Give a pretrained model another vocabulary: each new token starts as the mean of the old tokens that spell it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, cast

import torch
from torch.nn.functional import embedding_bag
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANCHOR = "\n"
"""Text put before a token, because many tokenizers treat the first space of a text unlike any other."""


@torch.no_grad()
def transfer_vocabulary(
    model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Replace the model's input and output embeddings, in place, by `vocab_size` rows for the tokenizer `new`.

    A new token whose text the old tokenizer spells with pieces p_1..p_n gets the mean of their embeddings; a special
    token gets that of the old end-of-text token; one without a text of its own (half a character) gets the mean of all.
    With equal vocabularies every token keeps its row. Tied embeddings stay tied.
    """
    pieces = spelling(old, new)[:vocab_size]
    pieces += [[]] * (vocab_size - len(pieces))
    carried = [_means(table_VH, pieces) for table_VH in _tables(model)]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table_VH, rows_VH in zip(_tables(model), carried, strict=True):
        table_VH.copy_(rows_VH)


def spelling(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[list[int]]:
    """For every token of `new`, the tokens of `old` that spell its text; empty where it has no text of its own."""
    if old.get_vocab() == new.get_vocab():
        return [[token] for token in range(len(new))]
    lead = list(new.encode(ANCHOR, add_special_tokens=False))
    lead_text = cast(str, new.decode(lead))
    texts = [cast(str, new.decode([*lead, token])).removeprefix(lead_text) for token in range(len(new))]
    start = list(old.encode(ANCHOR, add_special_tokens=False))
    special = [] if old.eos_token_id is None else [cast(int, old.eos_token_id)]
    pieces: list[list[int]] = []
    for token, text in enumerate(texts):
        if token in new.all_special_ids:
            pieces.append(special)
        elif not text or "\N{REPLACEMENT CHARACTER}" in text:
            pieces.append([])
        else:
            anchored = list(old.encode(ANCHOR + text, add_special_tokens=False))
            joined = anchored[: len(start)] != start  # the anchor grew together with the text
            pieces.append(list(old.encode(text, add_special_tokens=False)) if joined else anchored[len(start) :])
    return pieces


def _tables(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the input embeddings and of the output head: one tensor twice when they are tied."""
    return cast(Any, model.get_input_embeddings()).weight, cast(Any, model.get_output_embeddings()).weight


def _means(table_VH: torch.Tensor, pieces: list[list[int]]) -> torch.Tensor:
    """Mean row of each list of row numbers; the mean of all rows for an empty list."""
    flat = torch.tensor([piece for ids in pieces for piece in ids], dtype=torch.long)
    begins = torch.tensor([0, *accumulate(len(ids) for ids in pieces)][:-1], dtype=torch.long)
    means_VH = embedding_bag(flat, table_VH, begins, mode="mean")
    means_VH[torch.tensor([not ids for ids in pieces])] = table_VH.mean(0)
    return means_VH
