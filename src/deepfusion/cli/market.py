# SPDX-License-Identifier: Apache-2.0
"""`deepfusion market`: open, clear and audit a slot; simulate many."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from deepfusion.cli.shared import AsJson, MarketPath, Overrides, Seed, app, err, escape, examples, out, say

if TYPE_CHECKING:  # --help need not wait for it
    from deepfusion.market.ledger import Ledger

market = typer.Typer(
    name="market",
    help="Sell an edge's capacity to users of multi-exit models (AERIA).",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(market)

Profiles = Annotated[
    Path | None,
    typer.Option("--profiles", help="Folder of exit tables (*.json) beside the shipped ones.", metavar="DIR"),
]


def tables(folder: Path | None) -> dict[str, Any]:
    """The exit tables that ship, and those of a folder."""
    from deepfusion.market.architectures import shipped_profiles
    from deepfusion.market.profiles import load_profiles

    return load_profiles(folder, shipped_profiles())


@market.command("open", epilog=examples("deepfusion market open 2026-01-31T14 --out slots/14"))
def open_slot(
    slot: Annotated[str, typer.Argument(help="What the slot is called.", metavar="SLOT")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for commitment.json (public) and seed.json (secret).")],
) -> None:
    """Before bids are taken: draw a slot's secret seed, and the hash that commits the provider to it."""
    from deepfusion.artifacts import write_atomic
    from deepfusion.errors import MarketError
    from deepfusion.market import ledger

    secret, public = out_dir / "seed.json", out_dir / "commitment.json"
    if secret.exists():
        raise MarketError(f"{secret}: this slot is open already; choose another --out")
    opened = ledger.open_slot(slot)
    write_atomic(secret, opened.model_dump_json())
    secret.chmod(0o600)
    write_atomic(public, json.dumps({"slot": slot, "commitment": opened.commitment}) + "\n")
    out.print(f"Publish [bold]{public}[/bold]   ({opened.commitment})")
    out.print(f"Keep secret until the bids are closed: {secret}")


@market.command(
    epilog=examples(
        "deepfusion market clear bids.jsonl --capacity 3.93e12 --price-kwh 0.08 --seed-file slots/14/seed.json",
        "deepfusion market clear bids.jsonl --mode global --latency worst --json",
    )
)
def clear(
    bids: Annotated[Path, typer.Argument(help="One bid a line in JSON; see docs/market.md.", metavar="BIDS.jsonl")],
    capacity: Annotated[float, typer.Option(help="The edge's speed, FLOP/s.")] = 3.93e12,
    mode: Annotated[
        Literal["per_bidder", "global"], typer.Option(help="Truthful always, or one price always.")
    ] = "per_bidder",
    objective: Annotated[
        Literal["revenue", "welfare"], typer.Option(help="What the auction aims at; welfare sells all there is.")
    ] = "revenue",
    latency: Annotated[
        Literal["expected", "worst"], typer.Option(help="Deadlines hold in the mean, or for every sample.")
    ] = "expected",
    price_kwh: Annotated[float, typer.Option(help="Electricity in this slot, $ a kilowatt-hour.")] = 0.1,
    gamma: Annotated[float, typer.Option(help="Least profit, as a share of the slot's cost.")] = 0.2,
    power_kw: Annotated[float, typer.Option(help="What the cluster draws.")] = 0.45,
    seed_file: Annotated[
        Path | None, typer.Option(help="What `market open` wrote; without it a seed is drawn now.")
    ] = None,
    profiles: Profiles = None,
    ledger_file: Annotated[Path | None, typer.Option("--out", help="The ledger. Default: <BIDS>.ledger.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Clear one slot: winners, the price, why each loser lost; and write a ledger that anybody can audit."""
    from deepfusion.market import ledger
    from deepfusion.market.bids import Provider, read_bids
    from deepfusion.market.coco import Coco

    opened = ledger.read_opened(seed_file) if seed_file else ledger.open_slot(bids.stem)
    written = ledger.clear_to_ledger(
        opened, read_bids(bids), tables(profiles), Provider(capacity=capacity, gamma=gamma, power_kw=power_kw),
        price_kwh=price_kwh, coco=Coco(agreement=mode, objective=objective), latency=latency,
        committed=seed_file is not None,
    )  # fmt: skip
    path = ledger_file or bids.with_suffix(".ledger.json")
    written.save(path)
    if as_json:
        sys.stdout.write(json.dumps({"ledger": str(path), **written.result}) + "\n")
        return
    _show_slot(written.result, mode)
    out.print(f"Ledger  [bold]{path}[/bold]   (deepfusion market audit {path})")
    if seed_file is None:
        say("The seed was drawn just now: an audit cannot tell whether it was chosen to suit the bids. "
            "Begin with `deepfusion market open`.", "dim")  # fmt: skip


def _show_slot(result: dict[str, Any], mode: str) -> None:
    from deepfusion.market.slot import per_gigaflop

    table = Table("user", "verdict", "speed", "cut", "pays", "why")
    for user, won in result["winners"].items():
        cells = (
            f"{won['speed'] / 1e9:.2f} GFLOP/s",
            str(won["cut"]),
            f"${won['payment']:.6f}",
            per_gigaflop(won["price"]),
        )
        table.add_row(escape(user), "[bold]wins[/bold]", *cells)
    for user, reason in result["losers"].items():
        table.add_row(escape(user), "loses", "", "", "", escape(reason))
    for user in result["local"]:
        table.add_row(escape(user), "local", "0", "", "", "the device meets the deadline alone")
    for user, reason in result["refused"].items():
        table.add_row(escape(user), "[red]refused[/red]", "", "", "", escape(reason))
    out.print(table)
    price = per_gigaflop(result["price"]) if result["price"] is not None else "no single price"
    out.print(
        f"Price   [bold]{price}[/bold]   (mode {mode}; reserve {per_gigaflop(result['reserve'])}; "
        f"consensus {'yes' if result.get('consensus') else 'no'})"
    )
    out.print(
        f"Revenue ${result['revenue']:.6f}, profit ${result['profit']:+.6f}, {result['utilisation']:.1%} of the edge sold"
    )


@market.command(
    epilog=examples(
        "deepfusion market audit bids.ledger.json",
        "deepfusion market audit bids.ledger.json --commitment slots/14/commitment.json --bids my-bid.jsonl",
        "deepfusion market audit market.sqlite --slot edge-17 --receipts receipts.jsonl",
    )
)
def audit(
    ledger_file: Annotated[
        Path,
        typer.Argument(
            help="What `market clear` wrote, a slot that a service gave out, or its ledger.", metavar="LEDGER"
        ),
    ],
    commitment: Annotated[
        str | None, typer.Option(help="What was published before the bids closed: the hash, or the file with it.")
    ] = None,
    bids: Annotated[
        Path | None, typer.Option(help="Bids that you know were sent; each must stand in the ledger.")
    ] = None,
    receipts: Annotated[Path | None, typer.Option(help="A service's receipts; their bids must stand in it.")] = None,
    key: Annotated[str | None, typer.Option(help="The service's public key, as you noted it.")] = None,
    slot: Annotated[str | None, typer.Option(help="Of a service's ledger: this slot alone.")] = None,
    profiles: Profiles = None,
    as_json: AsJson = False,
) -> None:
    """Compute a slot again from its seed and bids, and say whether the provider cheated. Exit code 1 if so."""
    from deepfusion.market.bids import read_bids
    from deepfusion.market.ledger import audit as find_faults
    from deepfusion.market.ledger import read_commitment
    from deepfusion.market.service.audit import audited, read_receipts

    commitment = read_commitment(commitment) if commitment else None
    given, known, cheated = read_receipts(receipts) if receipts else [], read_bids(bids) if bids else [], False
    one = commitment is not None or bids is not None
    for written, signed, wrong in audited(ledger_file, slot=slot, only_one=one, receipts=given, key=key):
        wrong += find_faults(written, tables(profiles), commitment=commitment, known=known)
        _show_audit(written, wrong, noted=signed or commitment is not None, as_json=as_json)
        cheated |= bool(wrong)
    if cheated:
        raise typer.Exit(1)


def _show_audit(written: Ledger, wrong: list[str], *, noted: bool, as_json: bool) -> None:
    committed = noted or written.commitment_published is not None
    if as_json:
        sys.stdout.write(json.dumps({"slot": written.slot, "wrong": wrong, "committed": committed}) + "\n")
    elif wrong:
        out.print(f"[red]Slot {escape(written.slot)} is not what the rules make of its bids and seed:[/red]")
        for sentence in wrong:
            out.print(f"  {escape(sentence)}")
    else:
        out.print(f"Slot {escape(written.slot)} is what the rules make of its {len(written.bids)} bids and its seed.")
        if not committed:
            out.print("No commitment was published: whether the seed was chosen to suit the bids cannot be told.")
        elif not noted:
            out.print("The commitment is the ledger's own word; give --commitment with the one that you noted.")


@market.command(
    epilog=examples(
        "deepfusion market simulate configs/market.toml --out runs/market",
        "deepfusion market simulate configs/market.toml --out runs/month --set slots=720 --set provider.capacity=8e11",
    )
)
def simulate(
    config: MarketPath,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for record.json and market.html.")],
    seed: Seed = None,
    overrides: Overrides = None,
    profiles: Profiles = None,
    as_json: AsJson = False,
) -> None:
    """Run every mechanism on the same slots: revenue, what is sold, surplus, envy, time; a record and a page."""
    from deepfusion.market.page import simulation_table, write_page
    from deepfusion.market.simulation import load_simulation
    from deepfusion.market.simulation import simulate as run_slots
    from deepfusion.progress import bars

    options = load_simulation(config, overrides or [], seed=seed)
    with bars(err) as progress:
        found = run_slots(options, tables(profiles), progress)
    found.save(out_dir / "record.json")
    write_page(found, out_dir / "market.html")
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=2) + "\n")
        return
    out.print(simulation_table(found))
    out.print(f"Page    [bold]{out_dir / 'market.html'}[/bold]")
    out.print(f"Record  {out_dir / 'record.json'}")
