# SPDX-License-Identifier: Apache-2.0
"""A pico world for the tests of distillation and tuning: a tokenizer, text, teachers, a base and a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config, save
from deepfusion.devices.presets import PRESETS
from deepfusion.moe import Family, families
from deepfusion.types import Batch, Proxy, concatenate

V, T = 48, 16


@dataclass(frozen=True)
class Rows:
    """A stream of random rows that depend on (seed, row) alone; every second row is padded when asked for."""

    seed: int
    padded: bool = False
    sequence_length: int = T

    def batch(self, step: int, batch_size: int) -> Batch:
        return concatenate([self.row(row) for row in range(step * batch_size, (step + 1) * batch_size)])

    def row(self, row: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + row)
        # a skewed, learnable text: tokens of one domain lie in one half of the vocabulary
        token_BT = torch.randint(0, V // 2, (1, T), generator=generator) + (self.seed % 2) * (V // 2)
        valid_BT = torch.ones(1, T, dtype=torch.bool)
        if self.padded and row % 2:
            valid_BT[:, T // 2 + 1 :] = False
        counted_BT = torch.rand(1, T, generator=generator) < 0.8
        return Batch(token_BT * valid_BT, counted_BT, valid_BT)


@dataclass(frozen=True)
class World:
    """Where the pieces lie."""

    tokenizer: Path
    base: Path
    target: PreTrainedConfig
    family: Family
    teachers: list[list[Proxy]]

    @property
    def arguments(self) -> dict[str, object]:
        """What `distill` wants beside teachers, texts and options."""
        return {"family": self.family, "target": self.target, "tokenizer_folder": self.tokenizer}


def write_tokenizer(folder: Path, size: int = V) -> Path:
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)
    return folder


def config(preset: str, **changes: object) -> PreTrainedConfig:
    return make_config({**PRESETS[preset].config, **changes}, vocab_size=V, positions=T, eos_id=0)


def make_world(folder: Path, model_type: str = "qwen2_moe", domains: int = 2) -> World:
    tokenizer = write_tokenizer(folder / "tokenizer")
    family = families[model_type]
    target = family.ready_target(config(f"{model_type.replace('_', '-')}-pico", num_hidden_layers=2))
    save(from_config(family.student_config(target), seed=1), folder / "base", tokenizer)
    teachers: list[list[Proxy]] = []
    for k in range(domains):
        rows: list[Proxy] = []
        for preset, weight in (("gpt2-pico", 0.25), ("llama-pico", 0.75)):
            path = folder / f"teacher-{k}-{preset}"
            save(from_config(config(preset), seed=10 + k), path, tokenizer)
            rows.append(Proxy(k, preset, path, 100, (f"device-{k}",), weight))
        teachers.append(rows)
    return World(tokenizer, folder / "base", target, family, teachers)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
