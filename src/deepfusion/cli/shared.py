# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the app, the consoles, options of several commands, and how things are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import markup
from rich.console import Console
from rich.text import Text

from deepfusion import __version__
from deepfusion.errors import printable

if TYPE_CHECKING:  # --help need not wait for it
    from deepfusion.record import Record

app = typer.Typer(
    name="deepfusion",
    help="Fuse a fleet of unlike small language models into one Mixture-of-Experts checkpoint.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console(width=None if sys.stdout.isatty() else 200)  # a file or a pipe has no width of its own
err = Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"deepfusion {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def _readable(path: Path) -> Path:
    """Say at once what is wrong with a file: the libraries that commands need take seconds to load."""
    from deepfusion.schema import read_toml

    if not path.is_dir():
        read_toml(path)
    return path


ConfigPath = Annotated[
    Path,
    typer.Argument(
        help="A TOML file, e.g. configs/quickstart.toml, or a run folder.", metavar="CONFIG", callback=_readable
    ),
]
MarketPath = Annotated[
    Path,
    typer.Argument(help="A TOML file: see the examples.", metavar="CONFIG", callback=_readable),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override one value: section.key=value. May be repeated.", metavar="K=V"),
]
Seed = Annotated[int | None, typer.Option(help="Override the run's seed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def examples(*lines: str) -> str:
    """The examples at the foot of a command's `--help`."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  [cyan]{line}[/cyan]" for line in lines)


def escape(text: str) -> str:
    """Text as it stands, where rich would read markup and the terminal would be steered."""
    return markup.escape(printable(text))


def say(sentence: str, style: str = "") -> None:
    """Tell people something beside the result. It is shown as it stands: it may be in the words of a device."""
    err.print(Text(printable(sentence), style), soft_wrap=True)


def show(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result, for machines or for people."""
    if as_json:
        sys.stdout.write(json.dumps(value) + "\n")
    else:
        out.print(text)


def show_run(record: Record, folder: Path, as_json: bool) -> None:
    """Print a finished run, for machines or for people."""
    from deepfusion.report.table import summary_table

    if as_json:
        sys.stdout.write(record.model_dump_json(indent=2) + "\n")
        return
    out.print(summary_table([record]))
    out.print(f"Model   [bold]{folder / 'moe'}[/bold]   (opens with AutoModelForCausalLM.from_pretrained)")
    out.print(f"Report  [bold]{folder / 'report.html'}[/bold]")
    out.print(f"Record  {folder / 'record.json'}")
