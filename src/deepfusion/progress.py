# SPDX-License-Identifier: Apache-2.0
"""Progress bars for long work, drawn only on a terminal; elsewhere one line when something ends."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deepfusion import types


@contextmanager
def bars(console: Console) -> Generator[types.Progress]:
    """A `types.Progress` that draws one bar for each label on `console`, or prints finished labels without a terminal."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as display:
        tasks: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int, note: str = "") -> None:
            if label not in tasks:
                tasks[label] = display.add_task(label, total=total, note=note)
            display.update(tasks[label], completed=done, total=total, note=note)
            if done >= total:
                tasks.pop(label)

        yield show


def _lines(console: Console) -> types.Progress:
    began: dict[str, float] = {}

    def show(label: str, done: int, total: int, note: str = "") -> None:
        began.setdefault(label, time.monotonic())
        if done >= total:
            seconds = time.monotonic() - began.pop(label)
            console.print(f"{label}: {total:,} in {seconds:.1f} s {note}".rstrip(), highlight=False, markup=False)

    return show
