# SPDX-License-Identifier: Apache-2.0
"""The Flower apps, and `launch`, which runs them on one machine. Over a fleet of machines they are the same.

A node finds its configuration by two keys of its node configuration: `run`, the run folder with `config.toml` and the
prepared data in it, and `device-id`, who it is.
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from transformers.utils.logging import disable_progress_bar

from deepfusion.artifacts import RunFolder
from deepfusion.config import RunConfig, load_config
from deepfusion.devices.fleet import cards
from deepfusion.federation.door import Door, answer
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.local_grid import LocalGrid
from deepfusion.measure import measure
from deepfusion.methods.base import StageReached
from deepfusion.record import Record
from deepfusion.report.events import write_events
from deepfusion.report.page import write_report
from deepfusion.run import (
    CONFIG,
    Notes,
    check_memory,
    check_until,
    make_device,
    make_site,
    open_folder,
    prepare_data,
    too_large,
)
from deepfusion.training import accelerator
from deepfusion.types import Progress, silent

PRELOAD = (
    "torch", "torch.optim", "torch._dynamo", "sklearn.feature_extraction.text", "accelerate", "deepfusion.app",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
    "transformers.models.olmo2.modeling_olmo2", "transformers.models.bloom.modeling_bloom",
)  # fmt: skip
"""Modules that are imported once for all devices' processes; importing `transformers` alone is lazy and buys nothing."""

disable_progress_bar()  # transformers' own, one a file, would drown ours
client_app = ClientApp()
__all__ = ["client_app", "launch"]


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    """A device's answer to one request."""
    device_id, path = str(context.node_config["device-id"]), Path(str(context.node_config["run"]))
    config = _config(path / CONFIG, (path / CONFIG).stat().st_mtime_ns)
    card = next(card for card in cards(config.devices, config.seed) if card.id == device_id)
    device = make_device(config, RunFolder(path), card)
    accelerator(config.devices.training.precision)  # the process's one, before anything takes it as it comes
    threads = torch.get_num_threads()
    torch.set_num_threads(config.devices.threads)
    try:
        return answer(message, device_id, lambda request: config.method.client(device, request))
    finally:
        torch.set_num_threads(threads)


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
    check_memory(config)
    folder = open_folder(config, Path(out), resume=resume)
    results: list[Record] = []

    def main(grid: Grid, _context: Context) -> None:
        assert isinstance(grid, LocalGrid)
        record = serve(config, folder, grid, grid.nodes, in_flight=grid.in_flight, until=until, progress=progress)
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
    grid: Grid,
    nodes: dict[str, int],
    *,
    in_flight: int | None = None,
    timeout: float | None = None,
    until: str | None = None,
    progress: Progress = silent,
) -> Record | None:
    """The server's whole work over any Flower grid; returns the record, or None when stopped by `until`.

    Args:
        nodes: node id of each device.
        in_flight, timeout: see `Door`; a local grid has a timeout of its own.
    """
    accelerator(config.method.tune.optimisation.precision)
    notes, ledger = Notes(), Ledger(folder / "ledger.jsonl")
    options = config.federation
    door = Door(
        grid, nodes, ledger, retries=options.retries, timeout=timeout, in_flight=in_flight, progress=progress,
    )  # fmt: skip
    try:
        data = prepare_data(config, folder, progress)
        site = make_site(config, folder, data, progress=progress, note=notes, until=until)
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
