# SPDX-License-Identifier: Apache-2.0
"""Exits on real models and real text: split execution at every cut, exit tables, generation with early exit.

DEEPFUSION_DATA=/path/to/data python benchmarks/profiles.py OUT MODEL [MODEL ...] [--documents 150] [--steps 400] [--rows 256]

Text is that of configs/benchmark.toml: exits are trained on its public splits and measured on its test splits. What is
compared stands beside each other in one run: the split model with the whole one, early exit with transformers' own
generation, and the FLOPs of both. OUT gets the tables that the market reads.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from deepfusion.config import load_config
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import tokenise
from deepfusion.data.sources import first_by_hash, read_documents
from deepfusion.devices.features import forward
from deepfusion.devices.models import load
from deepfusion.market.exits.backbone import Backbone
from deepfusion.market.exits.generation import generate
from deepfusion.market.exits.heads import load_heads
from deepfusion.market.exits.making import Made, ProfileOptions, make_profile
from deepfusion.market.exits.page import block_rows, headline, threshold_rows
from deepfusion.market.exits.split import run_split
from deepfusion.training import Optimisation
from deepfusion.types import Corpus, Progress, silent

CONFIG = Path(__file__).parents[1] / "configs/benchmark.toml"


def texts_for(model: Path, documents: int) -> tuple[Corpus, Corpus]:
    """Public and test text of the benchmark, `documents` of each set, as the model's tokenizer reads it."""
    data = load_config(CONFIG).data
    domains = tuple(source.domain for source in data.corpora)
    parts = [
        [d for source in data.corpora for d in first_by_hash(read_documents(source, split, data.folder), documents)]
        for split in ("public", "test")
    ]
    train, test = (tokenise(part, domains, model, counted="all") for part in parts)
    return train, test


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows]) + "\n"


def split_rows(backbone: Backbone, text: PackedText) -> list[list[str]]:
    """At every cut: the largest difference of a logit from the whole model's, and the bytes that crossed."""
    batch = text.batch(0, 4).to(backbone.head.weight.device)
    with torch.no_grad():
        whole_BTV = forward(backbone.model, batch).logits_BTV
    rows: list[list[str]] = []
    for cut in range(backbone.num_blocks + 1):
        scores, sent = run_split(backbone, batch, cut)
        gap = float((scores.logits(slice(None)) - whole_BTV).abs().max())
        rows.append([str(cut), f"{gap:.1e}", f"{sent:,}", f"{sent / batch.input_ids_BT.numel():,.0f}"])
    return rows


def generation_rows(made: Made, backbone: Backbone, text: PackedText, options: ProfileOptions) -> list[list[str]]:
    """Prompts continued at each of a few thresholds, beside transformers' own greedy continuation."""
    heads, model = load_heads(made.folder, backbone), cast(Any, backbone.model)
    prompts = text.batch(1, 12).input_ids_BT[:, : options.prompt]
    whole = [
        model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=options.made, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )[0, options.prompt :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    rows: list[list[str]] = []
    for sigma in (1.0, 0.9, 0.7, 0.5, 0.0):
        found = [generate(heads, p.tolist(), options.made, sigma, kind=options.confidence) for p in prompts]
        exits = [x for one in found for x in one.exits]
        same = sum(
            a == b for one, other in zip(found, whole, strict=True) for a, b in zip(one.tokens, other, strict=True)
        )
        own, plain = (
            sum(each) for each in zip(*(made.costs.spent(one.exits, options.prompt) for one in found), strict=True)
        )
        shares = [f"{exits.count(x) / len(exits):.1%}" for x in heads.exit_blocks]
        rows.append([f"{sigma:g}", *shares, f"{same} of {len(exits)}", f"{own / plain:.3f}" if sigma < 1 else "1"])
    return rows


def profiles_of(model: Path, out: Path, options: ProfileOptions, documents: int, progress: Progress) -> None:
    """All tables of one model, printed."""
    texts, backbone = texts_for(model, documents), Backbone(load(model))
    held = PackedText(texts[1], options.prompt + options.made, seed=1)
    name = f"{backbone.model.config.model_type}-{backbone.num_blocks}"
    print(f"## {name}: {sum(p.numel() for p in backbone.model.parameters()):,} parameters\n")
    print(table(["cut", "largest difference of a logit", "bytes", "bytes a token"], split_rows(backbone, held)))
    sure = replace(options, confidence="entropy")
    half = replace(sure, exits=(-(-backbone.num_blocks // 2),))
    made = make_profile(str(model), texts, out, name, options, progress=progress)
    for variant in (
        made,
        make_profile(
            str(model), texts, out, f"{name}-entropy", sure, heads_from=made.folder, progress=progress
        ),
        make_profile(str(model), texts, out, f"{name}-one-exit", half, progress=progress),
    ):  # fmt: skip
        print(
            f"### {headline(variant)}\n\n{variant.measured.tokens} tokens, shares moved by {variant.measured.moved:.1e}\n"
        )
        print(table(*threshold_rows(variant)))
        print(table(*block_rows(variant)))
    columns = ["sigma", *(f"leaves at {x}" for x in made.costs.exit_blocks), "as transformers generates", "FLOPs"]
    print(f"### Generation, confidence by entropy\n\n{table(columns, generation_rows(made, backbone, held, sure))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()
    optimisation = Optimisation(batch_size=given.batch_size, learning_rate=1e-3)
    options = ProfileOptions(steps=given.steps, rows=given.rows, optimisation=optimisation)
    for model in given.models:
        profiles_of(model, given.out, options, given.documents, silent)


if __name__ == "__main__":
    main()
