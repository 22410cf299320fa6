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
    letters = "[...document.querySelectorAll('svg .tick')].map(e => 12 * e.getScreenCTM().a)"
    assert page.js(f"Math.min(...{letters})") >= 11
    show(page, path, width=960, media="print")  # A4 between its margins, as far as browsers shrink a page unasked
    assert page.js("[...document.querySelectorAll('section')].every(e => getComputedStyle(e).overflowX === 'visible')")
    assert (
        page.js("Math.max(...[...document.querySelectorAll('table')].map(e => e.getBoundingClientRect().right))") <= 960
    )
