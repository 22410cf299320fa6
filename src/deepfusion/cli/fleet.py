# SPDX-License-Identifier: Apache-2.0
"""Commands for a fleet of real machines, over Flower."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from deepfusion.cli.shared import AsJson, Overrides, Seed, app, err, examples, out, say, show, show_run

fleet = typer.Typer(help="A fleet of real machines: SuperLink, SuperNodes, TLS, registered keys.", no_args_is_help=True)
app.add_typer(fleet, name="fleet")

ServerFolder = Annotated[Path, typer.Argument(help="The server's folder, with fleet.toml in it.", metavar="SERVER")]
Until = Annotated[str | None, typer.Option(help="Stop after this stage, e.g. uploads.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is there; ask only devices that are missing.")]


@fleet.command(
    epilog=examples(
        "deepfusion fleet init trial --config configs/quickstart.toml --devices 3",
        "deepfusion fleet up trial",
    )
)
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    config: Annotated[
        Path | None, typer.Option(help="The run's TOML file. Default: a small trial on built-in text.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices that share the private text.", min=1)] = None,
    port: Annotated[int, typer.Option(help="Port of the SuperLink; the devices' own take those after it.")] = 18443,
    seed: Seed = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write a trial fleet: configurations, certificates, key pairs, systemd units and a README of the exact commands."""
    from deepfusion.config import load_config
    from deepfusion.fleet.layout import init_fleet
    from deepfusion.fleet.trial import trial_config
    from deepfusion.progress import bars

    settings = load_config(config, overrides or [], seed=seed) if config else trial_config(overrides or [], seed=seed)
    with bars(err) as progress:
        layout = init_fleet(settings, folder, devices=devices, port=port, progress=progress)
    names = list(layout.devices())
    text = f"Fleet   [bold]{folder}[/bold]   ({len(names)} devices; next: deepfusion fleet up {folder})"
    show({"folder": str(folder), "devices": names}, as_json, text)


@fleet.command(epilog=examples("deepfusion fleet up trial", "deepfusion fleet up trial --resume"))
def up(
    folder: Annotated[Path, typer.Argument(help="What `fleet init` has written.", metavar="DIR")],
    until: Until = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Start SuperLink and SuperNodes on this machine, run the fleet, and end everything that was started."""
    from deepfusion.fleet.layout import Layout
    from deepfusion.fleet.running import run_here
    from deepfusion.fleet.supervise import fleet_on_this_machine

    for ended in (signal.SIGTERM, signal.SIGHUP):  # what was started is ended then, too
        signal.signal(ended, lambda number, _: sys.exit(128 + number))
    with fleet_on_this_machine(Layout(folder.absolute())) as started:
        run = started.server.path(started.server.file.run)
        with _watch(run, as_json) as tick:
            run_here(started, resume=resume, until=until, tick=tick)
    _show_run(run, as_json)


@fleet.command(epilog=examples("deepfusion fleet link trial/server"))
def link(server: ServerFolder) -> None:
    """Be the SuperLink, until ended; for systemd."""
    from deepfusion.fleet.commands import link_command
    from deepfusion.fleet.server_file import open_server

    _become(*link_command(open_server(server)))


@fleet.command(epilog=examples("deepfusion fleet register trial/server"))
def register(server: ServerFolder, as_json: AsJson = False) -> None:
    """Tell the SuperLink the devices' public keys; needed after each of its starts."""
    from deepfusion.fleet.commands import register as register_keys
    from deepfusion.fleet.server_file import open_server
    from deepfusion.fleet.supervise import wait_for

    opened = open_server(server)
    wait_for(opened, lambda: True, opened.home, note=say)
    nodes = register_keys(opened)
    show({"nodes": nodes}, as_json, f"{len(nodes)} devices may join: {', '.join(nodes)}")


@fleet.command(epilog=examples("deepfusion fleet node /etc/deepfusion/device.toml"))
def node(device: Annotated[Path, typer.Argument(help="The device's own TOML file.", metavar="DEVICE")]) -> None:
    """Be a device, until ended; for systemd."""
    from deepfusion.fleet.commands import node_command
    from deepfusion.fleet.device_file import load_device

    _become(*node_command(load_device(device), device))


@fleet.command(epilog=examples("deepfusion fleet run trial/server", "deepfusion fleet run trial/server --resume"))
def run(server: ServerFolder, until: Until = None, resume: Resume = False, as_json: AsJson = False) -> None:
    """Run the job on a SuperLink that is there, and wait for its end; also for that of a server that is at work already."""
    from deepfusion.fleet.running import run_on
    from deepfusion.fleet.server_file import open_server

    opened = open_server(server)
    folder = opened.path(opened.file.run)
    with _watch(folder, as_json) as tick:
        run_on(opened, resume=resume, until=until, tick=tick, note=say)
    _show_run(folder, as_json)


@fleet.command(epilog=examples("deepfusion fleet status trial/server/run", "deepfusion fleet status RUN --once --json"))
def status(
    run: Annotated[Path, typer.Argument(help="The server's run folder.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Print it once instead of refreshing it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Who is registered, online, training, uploaded, failed; and the bytes."""
    from deepfusion.fleet.status import fleet_status, status_table

    if as_json:
        sys.stdout.write(json.dumps(fleet_status(run).as_dict()) + "\n")
        return
    if once:
        out.print(status_table(fleet_status(run)))
        return
    with Live(status_table(fleet_status(run)), console=out, auto_refresh=False) as live:
        while True:
            time.sleep(1)
            live.update(status_table(fleet_status(run)), refresh=True)


class _watch:  # noqa: N801 (used as a function)
    """The refreshing table of a run while it is waited for; nothing for machines."""

    def __init__(self, run: Path, quiet: bool) -> None:
        self._run, self._live, self._next = run, None if quiet else Live(console=err, auto_refresh=False), 0.0
        self._began = time.time()

    def __enter__(self) -> _watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self) -> None:
        from deepfusion.federation.roll import ROLL
        from deepfusion.fleet.status import fleet_status, status_table

        path = self._run / ROLL
        if self._live and time.monotonic() > self._next and path.exists() and path.stat().st_mtime > self._began:
            self._next = time.monotonic() + 1
            self._live.update(status_table(fleet_status(self._run)), refresh=True)


def _become(arguments: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    os.execve(arguments[0], arguments, environment)


def _show_run(run: Path, as_json: bool) -> None:
    from deepfusion.record import Record

    if not (run / "record.json").exists():
        show({"run": str(run)}, as_json, f"Stopped; go on with --resume. Run folder: [bold]{run}[/bold]")
        return
    show_run(Record.load(run / "record.json"), run, as_json)
