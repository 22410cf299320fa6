# SPDX-License-Identifier: Apache-2.0
"""The pages in a real browser: what a narrow screen, paper and a keyboard make of them."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import chromium
import pytest
from chromium import Page, browser
from test_report_page import sample

from deepfusion.report.page import write_report

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on this machine")

DOMAINS = tuple(f"finance_{n}_openqa" for n in range(7))


@pytest.fixture(scope="module")
def page() -> Generator[Page]:
    with browser() as tab:
        yield tab


def show(page: Page, path: Path, *, width: int = 1400, media: str = "screen") -> None:
    page.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    page.do("Emulation.setEmulatedMedia", media=media)
    page.open(path.as_uri())


def test_a_phone_shows_all_of_a_chart_in_letters_that_can_be_read_and_paper_whole_tables(
    page: Page, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report([sample(16, DOMAINS)], path)
    show(page, path, width=420)
    assert page.js("document.documentElement.scrollWidth") <= 420
    assert (
        page.js("Math.max(...[...document.querySelectorAll('section')].map(e => e.getBoundingClientRect().right))")
        <= 420
    )
    letters = (
        "[...document.querySelectorAll('svg .tick')].map(e => 12 * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b))"
    )
    assert page.js(f"Math.min(...{letters})") >= 11
    show(page, path, width=960, media="print")  # A4 between its margins, as far as browsers shrink a page unasked
    assert page.js("[...document.querySelectorAll('section')].every(e => getComputedStyle(e).overflowX === 'visible')")
    assert (
        page.js("Math.max(...[...document.querySelectorAll('table')].map(e => e.getBoundingClientRect().right))") <= 960
    )


def test_columns_sort_by_what_they_mean_and_from_the_keyboard(page: Page, tmp_path: Path) -> None:
    record = sample(3)
    traffic = {"small": 900_000_000, "large": 1_200_000_000, "2nd": 5_000}
    runs = [
        record.model_copy(update={"run_id": name, "ledger": record.ledger.model_copy(update={"total_bytes": count})})
        for name, count in traffic.items()
    ]
    write_report(runs, tmp_path / "report.html")
    show(page, tmp_path / "report.html")
    order = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0].textContent.split(' ')[0])"
    for column, want in ((4, ["large", "small", "2nd"]), (0, ["small", "large", "2nd"])):
        page.js(f"document.querySelectorAll('table th')[{column}].focus()")
        page.do("Input.dispatchKeyEvent", type="keyDown", key="Enter")
        assert page.js(order) == want
        assert page.js("document.activeElement.getAttribute('aria-sort')") == "descending"


def test_an_empty_cell_sorts_as_zero_as_the_main_method_s_gap_is(page: Page, tmp_path: Path) -> None:
    write_report([sample(3)], tmp_path / "report.html")
    show(page, tmp_path / "report.html")
    cells = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[1])"
    page.js(f"{cells}.forEach((cell, n) => {{ cell.textContent = ['-1.8 (-1.9 to -1.7)', '+0.3', ''][n] ?? '+0.5'; }})")
    page.js("document.querySelectorAll('table th')[1].click()")
    page.js("document.querySelectorAll('table th')[1].click()")
    assert page.js(f"{cells}.map(cell => cell.textContent.split(' ')[0])")[:3] == ["-1.8", "", "+0.3"]
