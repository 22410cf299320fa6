# SPDX-License-Identifier: Apache-2.0
"""Commands on configurations and run folders."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepfusion.cli.shared import (
    AsJson,
    ConfigPath,
    Overrides,
    Seed,
    app,
    err,
    escape,
    examples,
    out,
    say,
    show,
    show_run,
)

if TYPE_CHECKING:  # --help need not wait for it
    from deepfusion.config import RunConfig


@app.command(
    epilog=examples(
        "deepfusion run configs/quickstart.toml",
        "deepfusion run configs/benchmark.toml --out runs/b0 --seed 1 --set data.root=/data --set cluster.num_clusters=8",
        "deepfusion run runs/b0 --resume",
        "deepfusion run configs/quickstart.toml --until clusters",
    )
)
def run(
    config: ConfigPath,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The run folder. Default: runs/<name>-seed<seed>.")
    ] = None,
    seed: Seed = None,
    overrides: Overrides = None,
    until: Annotated[
        str | None, typer.Option(help="Stop after this stage, e.g. clusters or experts; a wrong name lists them.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in an existing run folder; finished stages are kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train the fleet, collect one upload from each device, and fuse them into one MoE checkpoint.

    CONFIG may be a run folder too: its own configuration is taken, and the run goes on there.
    """
    from deepfusion.app import launch
    from deepfusion.config import load_config
    from deepfusion.progress import bars

    if config.is_dir():
        out_dir = out_dir or config
    settings = load_config(config, overrides or [], seed=seed)
    folder = out_dir or Path("runs") / f"{settings.name}-seed{settings.seed}"
    if resume:
        _tell_changes(folder, settings)
    with bars(err) as progress:
        record = launch(settings, folder, until=until, resume=resume, progress=progress)
    if record is None:
        show(
            {"run": str(folder), "until": until},
            as_json,
            f"Stopped after [bold]{until}[/bold]; go on with: deepfusion run {folder} --resume",
        )
        return
    show_run(record, folder, as_json)


def _tell_changes(folder: Path, settings: RunConfig) -> None:
    """Say what differs from the configuration that the folder's run has had so far."""
    from deepfusion.config import CONFIG, differences, load_config
    from deepfusion.errors import ConfigError

    with suppress(ConfigError):  # there is none yet, or it is an older version's
        if changes := differences(load_config(folder / CONFIG), settings):
            say(f"Changed since {folder} was begun; what depends on it is done again:")
            for change in changes:
                say(f"  {change}")


@app.command(epilog=examples("deepfusion plan configs/benchmark.toml", "deepfusion plan configs/medical.toml --json"))
def plan(config: ConfigPath, seed: Seed = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Predict devices' memory, bytes up and down, server FLOPs and disk, before anything is trained or downloaded."""
    from deepfusion.config import load_config
    from deepfusion.plan import make_plan, plan_tables

    result = make_plan(load_config(config, overrides or [], seed=seed))
    if as_json:
        sys.stdout.write(json.dumps(result.as_dict(), indent=2) + "\n")
        return
    for table in plan_tables(result):
        out.print(table)
    for missing in result.missing_text:
        say(f"Not there yet: {missing}", "yellow")


@app.command(
    epilog=examples(
        "deepfusion compare configs/quickstart.toml --methods deepfusion,ofa,fedavg --seeds 0,1,2",
        "deepfusion compare configs/benchmark.toml --methods deepfusion,fedavg --set compare.fedavg.rounds=8 --out runs/r8",
    )
)
def compare(
    config: ConfigPath,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between them; see `deepfusion list`.", metavar="A,B,...")
    ],
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.", metavar="0,1,...")] = "0",
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of all runs. Default: runs/<name>-compare.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods with DeepFusion at equal budget: run what is missing, reuse what is there, and show what each costs."""
    from deepfusion.comparing import compare as compare_methods
    from deepfusion.config import load_config
    from deepfusion.progress import bars
    from deepfusion.report.comparison import comparison_table

    settings = load_config(config, overrides or [])
    folder = out_dir or Path("runs") / f"{settings.name}-compare"
    names = [name.strip() for name in methods.split(",") if name.strip()]

    note = partial(say, style="dim")
    with bars(err) as progress:
        found = compare_methods(settings, names, _numbers(seeds), folder, progress=progress, note=note)
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
        return
    out.print(comparison_table(found))
    out.print(f"Page    [bold]{folder / 'compare.html'}[/bold]")
    out.print(f"Data    {folder / 'compare.json'}")


@app.command(epilog=examples("deepfusion report runs/a runs/b --out compare.html"))
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders (with record.json).", metavar="RUN...")],
    out_file: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One self-contained page, and a table, out of one or several finished runs."""
    from deepfusion.record import Record
    from deepfusion.report.page import write_report
    from deepfusion.report.table import summary_table

    records = [Record.load(folder / "record.json") for folder in runs]
    write_report(records, out_file)
    if as_json:
        sys.stdout.write(json.dumps([json.loads(r.model_dump_json()) for r in records], indent=2) + "\n")
        return
    out.print(summary_table(records))
    out.print(f"Report  [bold]{out_file}[/bold]")


@app.command(
    epilog=examples(
        "deepfusion audit runs/quickstart-seed0", "deepfusion audit runs/b0 --documents 2000 --seed 1 --json"
    )
)
def audit(
    run: Annotated[
        Path, typer.Argument(help="A finished run folder, on the machine that has its text.", metavar="RUN")
    ],
    documents: Annotated[
        int, typer.Option(help="Documents of each side at most, for one model.", min=10, max=20_000)
    ] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the documents' draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Attack a run's models: can one tell from them which documents the devices trained on (membership inference)?"""
    from deepfusion.audit import audit_run, audit_table
    from deepfusion.progress import bars

    with bars(err) as progress:
        found = audit_run(run, most=documents, seed=seed, progress=progress)
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
        return
    out.print(audit_table(found))
    out.print(f"Data    {run / 'audit.json'}")


@app.command("list", epilog=examples("deepfusion list", "deepfusion list --json"))
def list_parts(as_json: AsJson = False) -> None:
    """What can be named in a configuration: methods, rules, clusterings, embeddings, families, presets."""
    from deepfusion.catalogue import catalogue

    parts = catalogue()
    if as_json:
        sys.stdout.write(json.dumps(parts, indent=2) + "\n")
        return
    for section, names in parts.items():
        table = Table(title=escape(section), title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, about in names.items():
            table.add_row(f"[cyan]{name}[/cyan]", about)
        out.print(table)
        out.print()


def _numbers(text: str) -> list[int]:
    """The seeds of a list with commas. Raises ConfigError when one is no whole number from 0 on."""
    from deepfusion.errors import ConfigError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(
            [f"--seeds {text}: not whole numbers from 0 on, with commas; for example 0,1,2"], "command line"
        )
    return [int(part) for part in parts]
