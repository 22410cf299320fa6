# SPDX-License-Identifier: Apache-2.0
"""The command line: reads arguments, shows progress, prints results. All work is done by what it calls."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager

from rich.panel import Panel
from rich.text import Text

from deepfusion.cli import fleet, market, market_service, models, profiles, runs
from deepfusion.cli.shared import app, err, say
from deepfusion.errors import BusyError, ConfigError, DeepFusionError, DiskError, FederationError, printable

__all__ = ["app", "fleet", "main", "market", "market_service", "models", "profiles", "runs"]

INTERRUPTED = 130


def _exit_code(error: DeepFusionError) -> int:
    """As in sysexits.h: 78 where a file has to be mended, 75 where the same command may succeed later; 2 for the rest."""
    if isinstance(error, ConfigError):
        return os.EX_CONFIG
    return os.EX_TEMPFAIL if isinstance(error, FederationError | DiskError | BusyError) else 2


def _show(kind: str, said: str) -> None:
    err.print(Panel(Text(printable(said)), title=f"[red]{kind}[/red]", title_align="left", border_style="red"))


@contextmanager
def _errors_with_a_cure() -> Generator[None]:
    try:
        yield
    except DeepFusionError as error:
        _show(type(error).__name__, str(error))
        raise SystemExit(_exit_code(error)) from None
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:  # no path of the user's
            raise
        cure = "make room" if error.errno == errno.ENOSPC else "check the path, and who may read and write there"
        said = f"{error.filename or 'standard output'}: {error.strerror}; {cure}"
        _show(type(error).__name__, said)
        raise SystemExit(os.EX_IOERR) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt and says nothing
            say("Interrupted. Finished stages are kept; where the command has --resume, go on with --resume.")
        raise


def main() -> None:
    """Entry point of the `deepfusion` command."""
    with _errors_with_a_cure():
        app()
