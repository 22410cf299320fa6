# SPDX-License-Identifier: Apache-2.0
"""Text of a domain sampled from that domain's own teachers, where public text is thin or absent (method, section 10b)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer

from deepfusion.data.prepare import corpus_from_texts
from deepfusion.devices.models import load
from deepfusion.devices.writing import write
from deepfusion.training import accelerator, derive_seed
from deepfusion.types import Corpus, Progress, Proxy, silent


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """[generate]: text that the teachers write.

    Attributes:
        share: share of generated text in distillation and tuning; 0 generates nothing, 1 needs no public text there.
        sequences: sequences sampled for each domain, divided over its teachers by their weight.
        temperature: of the sampling.
        batch_size: sequences sampled together.
    """

    share: float = 0.0
    sequences: int = 512
    temperature: float = 1.0
    batch_size: int = 64

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not 0 <= self.share <= 1:
            yield f"share = {self.share}: not a share; choose a number from 0 to 1"
        for name in ("sequences", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: too few; choose at least 1"
        if self.temperature <= 0:
            yield f"temperature = {self.temperature}: must be positive; 1.0 samples from the model as it is"


@torch.no_grad()
def sample(
    teachers: Sequence[Proxy],
    *,
    domain: str,
    options: GenerateOptions,
    sequence_length: int,
    seed: int,
    tokenizer_folder: Path,
    progress: Progress = silent,
) -> Corpus:
    """A corpus of sequences sampled from `teachers`, each in proportion to its weight. Deterministic in `seed`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    device = accelerator().device
    texts: list[str] = []
    for index, teacher in enumerate(teachers):
        model = cast(Any, load(teacher.folder)).to(device)
        wanted = round(options.sequences * teacher.weight)
        for begin in range(0, wanted, options.batch_size):
            rows = min(options.batch_size, wanted - begin)
            prompt_B1 = torch.full((rows, 1), tokenizer.eos_token_id, device=device)
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(seed, "generate", domain, index, begin))
                tokens_BT = write(
                    model,
                    prompt_B1,
                    tokens=sequence_length - 1,
                    temperature=options.temperature,
                    pad_id=tokenizer.pad_token_id,
                )
            texts += [
                text for text in tokenizer.batch_decode(tokens_BT[:, 1:], skip_special_tokens=True) if text.strip()
            ]
            progress(f"generate {domain}", len(texts), options.sequences, "")
    return corpus_from_texts(texts, domain, tokenizer_folder)
