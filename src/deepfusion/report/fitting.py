# SPDX-License-Identifier: Apache-2.0
"""Tables of numbers on terminals that are too narrow for them."""

from __future__ import annotations

from copy import copy

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table


class FittingTable(Table):
    """A table that breaks no number: what has no room at the right is left out, and named below.

    Headers of several words may stand in several lines; title and caption may be wider than the table.
    """

    def __init__(self, title: str) -> None:
        super().__init__(title=title, title_justify="left", box=SIMPLE_HEAD)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = copy(self)
        shown.title = shown.caption = None
        shown.columns = [copy(column) for column in self.columns]
        for column in shown.columns:
            column.no_wrap = True
            if console.measure(Group(*column.cells)).maximum < console.measure(column.header).maximum:
                column.header = "\n".join(str(column.header).split(" "))
        left_out: list[str] = []
        while len(shown.columns) > 1 and _width(shown, console, options) > options.max_width:
            left_out.insert(0, str(shown.columns.pop().header).replace("\n", " "))
        yield console.render_str(str(self.title), style="table.title")
        yield from Table.__rich_console__(shown, console, options)
        if left_out:
            yield console.render_str(f"Left out, the terminal being too narrow: {', '.join(left_out)}.", style="dim")
        if self.caption:
            yield console.render_str(str(self.caption), style="table.caption")


def _width(table: Table, console: Console, options: ConsoleOptions) -> int:
    roomy = options.update(max_width=10_000)
    return console.measure(table, options=roomy).maximum
