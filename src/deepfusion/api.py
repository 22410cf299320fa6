# SPDX-License-Identifier: Apache-2.0
"""The command line's commonest verbs as Python functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepfusion.app import launch
from deepfusion.catalogue import catalogue as parts
from deepfusion.config import RunConfig, load_config
from deepfusion.inference import evaluate_model as evaluate
from deepfusion.inference import generate_text as generate
from deepfusion.plan import Plan, make_plan
from deepfusion.record import Record
from deepfusion.report.page import write_report
from deepfusion.types import Progress, silent

__all__ = ["evaluate", "generate", "load_config", "parts", "plan", "report", "run"]


def run(
    config: RunConfig | str | Path,
    out: str | Path,
    *,
    until: str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Record | None:
    """Run a federation on this machine; see `deepfusion.app.launch`.

    With `[server] shards` above 1 the calling script needs the usual `if __name__ == "__main__":` guard.
    """
    settings = config if isinstance(config, RunConfig) else load_config(config)
    return launch(settings, out, until=until, resume=resume, progress=progress)


def plan(config: RunConfig | str | Path) -> Plan:
    """Price a run before anything is trained or downloaded."""
    return make_plan(config if isinstance(config, RunConfig) else load_config(config))


def report(runs: Sequence[str | Path], out: str | Path) -> list[Record]:
    """Write one page out of finished run folders; returns their records."""
    records = [Record.load(Path(folder) / "record.json") for folder in runs]
    write_report(records, Path(out))
    return records
