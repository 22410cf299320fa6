# SPDX-License-Identifier: Apache-2.0
"""The Flower apps, and `launch`, which runs them on one machine. Over a fleet of machines they are the same.

A node on this machine finds what it is by two keys of its node configuration: `run`, the run folder with `config.toml` and
the prepared data in it, and `device-id`. A node of a fleet finds `device` there: the path of its own file.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from deepfusion.artifacts import RunFolder
from deepfusion.config import CONFIG, RunConfig, load_config
from deepfusion.data.prepare import PreparedData
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard, cards
from deepfusion.federation.apart import PulledApart
from deepfusion.federation.door import Door, Tell, Wire, answer, job_of
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.local_grid import LocalGrid
from deepfusion.federation.replies import Replies
from deepfusion.federation.roll import ROLL, Roll
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.job import discreet, job_payload, open_workshop
from deepfusion.fleet.server_file import open_server
from deepfusion.measure import measure
from deepfusion.methods.base import Method, StageReached
from deepfusion.record import Record
from deepfusion.report.events import write_events
from deepfusion.report.page import write_report
from deepfusion.run import (
    Notes,
    check_memory,
    check_text,
    check_until,
    largest_reply,
    make_device,
    make_site,
    open_folder,
    prepare_data,
    too_large,
)
from deepfusion.training import accelerator
from deepfusion.types import Payload, Progress, silent

PRELOAD = (
    "torch", "torch.optim", "torch._dynamo", "sklearn.feature_extraction.text", "accelerate", "deepfusion.app",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
    "transformers.models.olmo2.modeling_olmo2", "transformers.models.bloom.modeling_bloom",
)  # fmt: skip
"""Modules that are imported once for all devices' processes; importing `transformers` alone is lazy and buys nothing."""

client_app = ClientApp()
server_app = ServerApp()
__all__ = ["client_app", "launch", "server_app"]


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    """A device's answer to one request."""
    if "device" in context.node_config:
        return _answer_on_a_fleet(message, Path(str(context.node_config["device"])))
    device_id, path = str(context.node_config["device-id"]), Path(str(context.node_config["run"]))
    config = _config(path / CONFIG, (path / CONFIG).stat().st_mtime_ns)
    card = next(card for card in cards(config.devices, config.seed) if card.id == device_id)
    device = make_device(config, RunFolder(path), card)
    with _threads(config.devices.threads):
        return answer(message, device_id, lambda request: _work(config.method, device, request))


def _answer_on_a_fleet(message: Message, path: Path) -> Message:
    """The same by a device that has a machine, a file and a workshop of its own."""
    own = load_device(path)
    # The kernel ends this process then, whatever hangs in it: a hang would block the node for ever.
    signal.setitimer(signal.ITIMER_REAL, own.limits.hours * 3600)

    def handle(request: Payload) -> Payload:
        shop = open_workshop(own, path, job_of(message), message.metadata.run_id)
        with discreet(own):
            return shop.answer(request, lambda: _work(shop.job.method, shop.device(request), request))

    try:
        with _threads(own.limits.threads):
            return answer(message, own.id, handle)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _work(method: Method, device: Device, request: Payload) -> Payload:
    accelerator(device.training.precision)  # the process's one, before anything takes it as it comes
    return method.client(device, request)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@server_app.main()
def _serve_a_fleet(grid: Grid, context: Context) -> None:
    """The server of a fleet, in the process that the SuperLink starts for a run; how it ended is noted for `fleet run`."""
    values = context.run_config
    server, until = open_server(Path(str(values["server"]))), str(values["until"]) or None
    token, resume, run = str(values["token"]), bool(values["resume"]), server.path(server.file.run)
    with server.outcome(token).noted():
        config = load_config(server.path(server.file.config))
        check_until(config, until)
        check_memory(config)
        with (
            open_folder(config, run, resume=resume, token=token) as folder,
            Roll(folder / ROLL, server.nodes).watching(grid.get_node_ids) as roll,
        ):
            data = prepare_data(config, folder)
            with closing(PulledApart(grid, Replies(grid, largest_reply(config, data)).pull)) as apart:
                serve(
                    config, folder, data, apart, server.nodes(), look_up=server.nodes, until=until, tell=roll.tell,
                    timeout=config.federation.timeout_seconds,
                    job=lambda card: job_payload(config, folder.path, card.model.name),
                )  # fmt: skip


@lru_cache(maxsize=4)
def _config(path: Path, _modified: int) -> RunConfig:
    return load_config(path)


def launch(
    config: RunConfig,
    out: str | Path,
    *,
    until: str | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Record | None:
    """Run a whole federation on this machine: the devices, the server, the evaluation and the report.

    Args:
        out: the run folder.
        until: stop after this stage of the method.
        resume: go on in a folder that holds a run already.

    Returns:
        The record, or None when stopped by `until`.

    Raises:
        DeepFusionError: whatever the user can mend, with its cure.
    """
    check_until(config, until)
    check_text(config)
    check_memory(config)
    with open_folder(config, Path(out), resume=resume) as folder:
        return _serve_here(config, folder, until, progress)


def _serve_here(config: RunConfig, folder: RunFolder, until: str | None, progress: Progress) -> Record | None:
    """Be the server, and have the engine be the devices."""
    results: list[Record] = []

    def main(grid: Grid, _context: Context) -> None:
        assert isinstance(grid, LocalGrid)
        data = prepare_data(config, folder, progress)
        record = serve(config, folder, data, grid, grid.nodes, in_flight=grid.in_flight, until=until, progress=progress)
        results.extend([record] if record else [])

    options = config.federation
    app = ServerApp()
    app.main()(main)
    with LocalGrid(
        "deepfusion.app:client_app",
        [card.id for card in cards(config.devices, config.seed)],
        engine=options.engine,
        workers=options.workers,
        timeout=options.timeout_seconds,
        node_config={"run": str(folder.path.absolute())},
        preload=PRELOAD,
    ) as grid:
        grid.serve(app)
    return results[0] if results else None


def serve(
    config: RunConfig,
    folder: RunFolder,
    data: PreparedData,
    grid: Wire,
    nodes: dict[str, int],
    *,
    in_flight: int | None = None,
    timeout: float | None = None,
    look_up: Callable[[], Mapping[str, int]] | None = None,
    until: str | None = None,
    job: Callable[[DeviceCard], Payload] | None = None,
    tell: Tell = lambda device_id, state, reason: None,
    progress: Progress = silent,
) -> Record | None:
    """The server's whole work over any Flower grid; returns the record, or None when stopped by `until`.

    Args:
        data: the run's text, as `prepare_data` has put it into the folder.
        nodes: node id of each device.
        in_flight, timeout, look_up, tell: see `Door`; a local grid has a timeout of its own.
        job: what each device is told of the run, where it has no part of the server's folder.
    """
    accelerator(config.method.tune.optimisation.precision)
    notes, ledger = Notes(), Ledger(folder / "ledger.jsonl")
    options = config.federation
    fleet = {card.id: card for card in cards(config.devices, config.seed)}
    door = Door(
        grid, nodes, ledger, retries=options.retries, timeout=timeout, deadline=options.deadline_seconds,
        in_flight=in_flight, look_up=look_up, job=job and (lambda device_id: job(fleet[device_id])), tell=tell,
        progress=progress,
    )  # fmt: skip
    try:
        site = make_site(config, folder, data, progress=progress, note=notes, until=until, failures=door.failures)
        moe = config.method.server(site, door)
    except StageReached:
        return None
    reference = config.method.reference(site) if config.evaluate.public_only else None
    record = measure(
        config,
        site,
        moe,
        ledger=ledger,
        failures={**too_large(config), **door.failures},
        notes=notes,
        reference=reference,
    )
    record.save(folder / "record.json")
    write_report([record], folder / "report.html")
    write_events(record, folder / "events")
    shutil.rmtree(folder / ".partial", ignore_errors=True)
    return record
