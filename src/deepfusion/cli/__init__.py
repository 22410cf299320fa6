# SPDX-License-Identifier: Apache-2.0
"""The command line: reads arguments, shows progress, prints results. All work is done by what it calls."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.panel import Panel

from deepfusion.cli import fleet, market, models, runs
from deepfusion.cli.shared import app, err, escape
from deepfusion.errors import DeepFusionError

__all__ = ["app", "fleet", "main", "market", "models", "runs"]


@contextmanager
def _errors_with_a_cure() -> Generator[None]:
    try:
        yield
    except DeepFusionError as error:
        err.print(
            Panel(
                escape(str(error)), title=f"[red]{type(error).__name__}[/red]", title_align="left", border_style="red"
            )
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        err.print("Interrupted. Finished stages are kept; go on with --resume.")
        raise SystemExit(130) from None


def main() -> None:
    """Entry point of the `deepfusion` command."""
    with _errors_with_a_cure():
        app()
