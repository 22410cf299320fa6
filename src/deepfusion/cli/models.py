# SPDX-License-Identifier: Apache-2.0
"""Commands on model folders, with no run around them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deepfusion.cli.shared import AsJson, app, err, escape, examples, out, show


@app.command(
    epilog=examples(
        "deepfusion evaluate runs/quickstart-seed0/moe --data notes.jsonl --text '{text}'",
        "deepfusion evaluate MODEL --data 'qa/*.jsonl' --prompt 'Question: {question} Answer:' --answer ' {answer}'",
    )
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Any causal LM: a folder or a hub name.", metavar="MODEL")],
    data: Annotated[
        list[str], typer.Option(help="Text to score: .jsonl, .csv, .parquet or .txt file(s). May be repeated.")
    ],
    text: Annotated[str | None, typer.Option(help='Template of a document, e.g. "{title} {text}".')] = None,
    prompt: Annotated[str | None, typer.Option(help="Template of what is given; not counted.")] = None,
    answer: Annotated[str | None, typer.Option(help="Template of what is scored after the prompt.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Longest window of tokens; 2 or more.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Perplexity and token accuracy of any causal LM folder on any text files."""
    from deepfusion.inference import evaluate_model

    scores = evaluate_model(model, data, text=text, prompt=prompt, answer=answer, sequence_length=sequence_length)
    if as_json:
        sys.stdout.write(json.dumps(scores) + "\n")
        return
    table = Table("documents", "tokens", "perplexity", "log-perplexity", "token accuracy")
    table.add_row(
        f"{scores['documents']:,}", f"{scores['tokens']:,}", f"{scores['perplexity']:.3f}",
        f"{scores['log_perplexity']:.4f}", f"{scores['token_accuracy']:.2%}",
    )  # fmt: skip
    out.print(table)


@app.command(
    epilog=examples(
        "deepfusion distill --teacher big --student small --data 'text/*.jsonl' --text '{text}' --out taught",
        "deepfusion distill --teacher a --teacher b --student s --data qa.jsonl --prompt 'Q: {q} A:' --answer ' {a}' --out t",
    )
)
def distill(
    student: Annotated[Path, typer.Option(help="The model to start from; it is not changed.")],
    data: Annotated[
        list[str], typer.Option(help="Text to read: .jsonl, .csv, .parquet or .txt file(s). May be repeated.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the trained student; must not exist.")],
    teachers: Annotated[
        list[Path] | None, typer.Option("--teacher", help="A teacher's folder. May be repeated.")
    ] = None,
    text: Annotated[str | None, typer.Option(help='Template of a document, e.g. "{title} {text}".')] = None,
    prompt: Annotated[str | None, typer.Option(help="Template of what is given; not counted.")] = None,
    answer: Annotated[str | None, typer.Option(help="Template of what is learnt after the prompt.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="The highest rate.")] = 3e-4,
    alpha: Annotated[float, typer.Option(help="Weight of feature matching by view-aligned attention; 0: none.")] = 1.0,
    beta: Annotated[float, typer.Option(help="Weight of the KL to the teachers.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of that KL.")] = 1.0,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. Default: what all models read, 512 at most.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the text's order and of the adapters.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what a crash left.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil teachers into a student of any architecture with the same tokenizer, by KL and view-aligned attention."""
    from deepfusion.distilling import DistillOptions, distill_folders
    from deepfusion.progress import bars
    from deepfusion.training import Optimisation

    options = DistillOptions(
        steps=steps, alpha=alpha, beta=beta, temperature=temperature,
        optimisation=Optimisation(batch_size=batch_size, learning_rate=learning_rate),
    )  # fmt: skip
    with bars(err) as progress:
        history = distill_folders(
            teachers or [], student, data, out_dir, text=text, prompt=prompt, answer=answer,
            sequence_length=sequence_length, options=options, seed=seed, resume=resume, progress=progress,
        )  # fmt: skip
    last = {key: round(history[-1][key], 4) for key in ("loss", "ce", "kl", "features") if key in history[-1]}
    shown = ", ".join(f"{key} {value}" for key, value in last.items())
    show({"model": str(out_dir), **last}, as_json, f"Model   [bold]{out_dir}[/bold]   (last step: {shown})")


@app.command(
    epilog=examples(
        "deepfusion merge runs/b0/experts/0 runs/b0/experts/1 --family qwen2_moe --out merged",
        "deepfusion merge a b c d --family mixtral --experts 8 --top-k 2 --out merged",
        "deepfusion merge a b --family deepseek_v3 --target configs/my-moe --out merged",
    )
)
def merge(
    students: Annotated[
        list[Path], typer.Argument(help="Single-expert folders of one base model.", metavar="EXPERT...")
    ],
    family: Annotated[str, typer.Option(help="Model type of the MoE, e.g. qwen2_moe; see `deepfusion list`.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The MoE's folder; must not exist.")],
    experts: Annotated[
        int | None, typer.Option(help="Experts of the MoE. Default: one a student.", min=1, max=4096)
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts for each token.", min=1)] = 2,
    target: Annotated[Path | None, typer.Option(help="Folder with the MoE's own configuration.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the router.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Merge single-expert models into one MoE, from disk to disk: each FFN becomes an expert, the rest is averaged."""
    from deepfusion.merging import merge_folders
    from deepfusion.progress import bars

    with bars(err) as progress:
        made = merge_folders(
            students, family, out_dir, experts=experts, top_k=top_k, target=target, seed=seed, progress=progress
        )
    show(
        {
            "moe": str(made.folder), "experts": made.experts, "bytes": made.nbytes,
            "largest_logit_difference": made.largest_logit_difference,
        },
        as_json,
        f"Model   [bold]{made.folder}[/bold]   ({made.experts} experts, {made.nbytes / 2**20:,.0f} MiB; forced to each expert "
        f"it is that student to {made.largest_logit_difference:.1e})",
    )  # fmt: skip


@app.command(epilog=examples("deepfusion generate runs/quickstart-seed0/moe 'The net profit margin' --tokens 60"))
def generate(
    model: Annotated[str, typer.Argument(help="Any causal LM: a folder or a hub name.", metavar="MODEL")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.", metavar="PROMPT")],
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to add at most. Default: 64, if the model reads so many.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**63 - 1)] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with any causal LM folder."""
    from deepfusion.inference import generate_text

    text = generate_text(model, prompt, tokens=tokens, temperature=temperature, seed=seed)
    show({"prompt": prompt, "text": text}, as_json, f"[dim]{escape(prompt)}[/dim]{escape(text)}")
