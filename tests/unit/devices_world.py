# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of two unlike kinds, and batches, for the tests of devices."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepfusion.types import Batch

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "the dog naps"] * 4
DENSE = ("gpt2-pico", "llama-pico", "olmo2-pico", "bloom-pico")
SPARSE = ("qwen2-moe-pico", "deepseek-v2-pico", "deepseek-v3-pico")


def byte_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """Byte-level BPE, end of text = token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    return _save(tokenizer, trainer, "<|end|>", folder)


def space_tokenizer(folder: Path, vocab_size: int = 120) -> Path:
    """SentencePiece-like BPE: spaces are a sign of their own, and texts begin with one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["</s>"])
    return _save(tokenizer, trainer, "</s>", folder)


def _save(tokenizer: Tokenizer, trainer: trainers.BpeTrainer, end: str, folder: Path) -> Path:
    tokenizer.train_from_iterator([*TEXT, "\n"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)
    fast.save_pretrained(folder)
    return folder


def batch_of(rows: int, tokens: int, vocab_size: int, padded: int = 0) -> Batch:
    """Random tokens; the last row ends with `padded` places of padding."""
    generator = torch.Generator().manual_seed(1)
    input_ids_BT = torch.randint(0, vocab_size, (rows, tokens), generator=generator)
    valid_BT = torch.ones(rows, tokens, dtype=torch.bool)
    if padded:
        valid_BT[-1, -padded:] = False
        input_ids_BT[-1, -padded:] = 0
    return Batch(input_ids_BT, valid_BT, valid_BT)
