# SPDX-License-Identifier: Apache-2.0
"""Templates to pages. Apart from what the pages show, so that a market's page need not wait for the pipeline to load."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def render(template: str, **values: Any) -> str:
    """A page out of one of the templates beside this file; whatever is not marked as safe is escaped."""
    environment = Environment(
        loader=PackageLoader("deepfusion.report", "."),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
