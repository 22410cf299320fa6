# SPDX-License-Identifier: Apache-2.0
"""The service's page: the open slot, a form for one user's bid, what slots cost before. It needs nothing but this service."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from deepfusion.market.service.records import Opening
from deepfusion.market.slot import MICRO
from deepfusion.report import charts
from deepfusion.report.render import render

SHOWN = 24
"""So many slots stand in the table; the chart has all that it is given."""


def page(opening: Opening, closed: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The page, and the Content-Security-Policy under which it works: its own script and style, its own service.

    Args:
        closed: summaries of closed slots, oldest first.
    """
    prices = {
        "price paid": [(float(s["number"]), s["price"] * MICRO) for s in closed if s["price"] is not None],
        "reserve price": [(float(s["number"]), s["reserve"] * MICRO) for s in closed],
    }
    text = render(
        "market_service.html",
        title=opening.service,
        opening=opening,
        micro=MICRO,
        models=sorted(opening.profiles),
        chart=charts.named(
            charts.lines({k: v for k, v in prices.items() if v}, "slot", "millionths of $ a GFLOP/s"), "Price by slot"
        ),
        rows=list(reversed(closed[-SHOWN:])),
    )
    return text, policy(text)


def policy(text: str) -> str:
    """A policy that allows just the scripts and styles that stand in a page, by their hashes."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
