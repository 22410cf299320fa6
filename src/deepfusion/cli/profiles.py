# SPDX-License-Identifier: Apache-2.0
"""`deepfusion market profile`: exits for a real model, and the table that the market sells it by."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deepfusion.cli.market import market
from deepfusion.cli.shared import AsJson, err, examples, out

if TYPE_CHECKING:  # --help need not wait for it
    from deepfusion.market.exits.making import Plan, ProfileOptions


@market.command(
    epilog=examples(
        "deepfusion market profile runs/quickstart-seed0/moe --out profiles",
        "deepfusion market profile MODEL --data 'qa/*.jsonl' --text '{question} {answer}' --exits 2,4 --steps 800 --out profiles",
        "deepfusion market profile MODEL --heads profiles/moe --confidence entropy --name moe-entropy --out profiles",
        "deepfusion market simulate configs/market.toml --profiles profiles --set 'users.models={moe=1}' --out runs/market",
    )
)
def profile(
    model: Annotated[str, typer.Argument(help="Any causal LM: a folder or a hub name.", metavar="MODEL")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of profiles, for --profiles elsewhere.")] = Path(
        "profiles"
    ),
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text file(s), .jsonl, .csv, .parquet or .txt. May be repeated. Default: the embedded set."),
    ] = None,
    text: Annotated[str | None, typer.Option(help='Template of a document, e.g. "{title} {text}".')] = None,
    prompt: Annotated[str | None, typer.Option(help="Template of what is given; its tokens never leave early.")] = None,
    answer: Annotated[str | None, typer.Option(help="Template of what follows the prompt.")] = None,
    exits: Annotated[
        str | None, typer.Option(help="Blocks after which exits stand, e.g. 2,4. Default: each quarter.", metavar="X,X")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the exits; the model is not trained.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="The highest rate.")] = 1e-3,
    width: Annotated[int | None, typer.Option(help="Of an exit's adapter. Default: the model's width.")] = None,
    heads: Annotated[
        Path | None, typer.Option(help="Exits trained before for this model; measures them and trains nothing.")
    ] = None,
    confidence: Annotated[
        Literal["probability", "entropy"],
        typer.Option(help="What sigma is compared with: the largest, or 1 - H/log V."),
    ] = "probability",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a sample's prompt.")] = 64,
    made_tokens: Annotated[int, typer.Option(help="Tokens that are generated after it.")] = 32,
    rows: Annotated[int, typer.Option(help="Samples of held-out text to measure on.")] = 256,
    name: Annotated[str | None, typer.Option(help="What bids call it. Default: the folder's name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the adapters and of the text's order.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train exits on a frozen model, measure who leaves where on held-out text, and write the table for the market."""
    from deepfusion.market.exits.making import ProfileOptions, make_profile, plan_profile, read_text
    from deepfusion.market.exits.page import profile_tables, write_page
    from deepfusion.progress import bars
    from deepfusion.training import Optimisation

    options = ProfileOptions(
        exits=_numbers(exits), width=width, steps=steps, prompt=prompt_tokens, made=made_tokens, rows=rows,
        confidence=confidence, seed=seed, optimisation=Optimisation(batch_size=batch_size, learning_rate=learning_rate),
    )  # fmt: skip
    called = name or Path(model).resolve().name
    plan = plan_profile(model, out_dir, called, options, heads)
    if dry_run:
        _show_plan(plan, options, as_json)
        return
    texts = read_text(model, data or [], text=text, prompt=prompt, answer=answer)
    with bars(err) as progress:
        made = make_profile(model, texts, out_dir, called, options, heads_from=heads, progress=progress)
    page = write_page(made)
    if as_json:
        sys.stdout.write(json.dumps({"profile": str(made.path), **asdict(made.measured)}) + "\n")
        return
    for table in profile_tables(made):
        out.print(table)
    out.print(f"Table   [bold]{made.path}[/bold]   (deepfusion market clear BIDS.jsonl --profiles {out_dir})")
    out.print(f"Exits   {made.folder}")
    out.print(f"Page    {page}")


def _show_plan(plan: Plan, options: ProfileOptions, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(plan), default=str) + "\n")
        return
    sample = f"{options.prompt} + {options.made} tokens"
    out.print(f"Exits after blocks {', '.join(map(str, plan.exit_blocks))}; the last is the model's own")
    out.print(
        f"Trains  {plan.head_numbers:,} numbers beside norms; all exits share {plan.shared_numbers:,} of the model"
    )
    out.print(f"Reads   {plan.trained_tokens:,} tokens, then up to {options.rows} samples of {sample}")
    out.print(f"Writes  {', '.join(map(str, plan.files))}")


def _numbers(text: str | None) -> tuple[int, ...]:
    """2,4 as numbers.

    Raises:
        ConfigError: something else stands there.
    """
    from deepfusion.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ConfigError([f"--exits {text}: not numbers of blocks; write --exits 2,4"], "command line") from error
