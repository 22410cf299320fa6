# SPDX-License-Identifier: Apache-2.0
"""`deepfusion market serve`: the market as an HTTP service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepfusion.cli.market import Profiles, market, tables
from deepfusion.cli.shared import MarketPath, Overrides, examples, out


@market.command(
    epilog=examples(
        "deepfusion market serve configs/market-service.toml --ledger market.sqlite",
        "deepfusion market serve configs/market-service.toml --port 9000 --set provider.hours=0.25",
    )
)
def serve(
    config: MarketPath,
    host: Annotated[
        str, typer.Option(help="Where to listen. For others, put a proxy with TLS before it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    ledger: Annotated[Path, typer.Option(help="The ledger; the service's private key lies beside it.")] = Path(
        "market.sqlite"
    ),
    overrides: Overrides = None,
    profiles: Profiles = None,
) -> None:
    """Take signed bids over HTTP, clear each slot when its time is over, keep a ledger that anybody can audit."""
    from deepfusion.market.service.options import load_service
    from deepfusion.market.service.web import serve as run

    def started(address: str, key: str) -> None:
        out.print(f"Market  [bold]{address}[/bold]")
        out.print(f"Ledger  {ledger}   (deepfusion market audit {ledger})")
        out.print(f"Key     {key}")

    run(load_service(config, overrides or []), tables(profiles), ledger, host, port, started)
