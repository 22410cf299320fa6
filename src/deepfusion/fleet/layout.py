# SPDX-License-Identifier: Apache-2.0
"""`deepfusion fleet init`: the folders of a trial fleet, one for the server and one for each device, ready to be copied out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from deepfusion.artifacts import RunFolder, write_atomic
from deepfusion.config import RunConfig, parse_config, tree_of
from deepfusion.data.sources import Document, read_documents
from deepfusion.data.split import divide
from deepfusion.devices.fleet import DeviceCard, cards, shared_ids
from deepfusion.errors import ConfigError
from deepfusion.fleet import units
from deepfusion.fleet.credentials import write_certificates, write_node_key
from deepfusion.fleet.device_file import Connection, DeviceFile, DeviceText, Limits
from deepfusion.fleet.server_file import FILE, Server, ServerFile
from deepfusion.methods.base import methods
from deepfusion.run import prepare_data
from deepfusion.schema import plain_options
from deepfusion.types import ModelSpec, Progress, silent

TEXT = "text.jsonl"


@dataclass(frozen=True)
class Layout:
    """The folder of a trial fleet: `server/`, `devices/<id>/`, `units/`, `README.md`."""

    folder: Path

    @property
    def server(self) -> Path:
        """The server's folder."""
        return self.folder / "server"

    def devices(self) -> dict[str, Path]:
        """Each device's own configuration, by device id."""
        return {path.parent.name: path for path in sorted((self.folder / "devices").glob("*/device.toml"))}

    def device(self, device_id: str) -> Path:
        """A device's folder."""
        return self.folder / "devices" / device_id


def init_fleet(
    config: RunConfig, folder: Path, *, devices: int | None = None, port: int = 18443, progress: Progress = silent
) -> Layout:
    """Write a trial fleet that does what `deepfusion run` does with the same configuration, on processes of its own.

    Each device gets the text that it has in the local run, as a file of its own; the server's configuration names the
    devices and none of their text.

    Args:
        config: the run's configuration.
        devices: how many devices share the private text, instead of the configuration's.
        port: of the SuperLink; the devices' own processes take those after it.

    Raises:
        ConfigError: the folder is not empty, or there are too few ports.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError([f"{folder}: is not empty; choose a new folder"], "fleet init")
    config = config if devices is None else replace(config, devices=replace(config.devices, count=devices))
    config = parse_config(tree_of(config))  # with other numbers other combinations are impossible
    layout, fleet = Layout(folder.absolute()), cards(config.devices, config.seed)
    if not 1 <= port <= 65535 - len(fleet):
        said = f"--port {port}: no room for it and {len(fleet)} more; choose 1 to {65535 - len(fleet)}"
        raise ConfigError([said], "command line")
    texts = _texts(config, progress)
    file = ServerFile(port=port)
    server = Server(layout.server, file)
    write_certificates(server.path(file.ca).parent, file.name)
    for number, card in enumerate(fleet):
        own = layout.device(card.id)
        write_node_key(own / "key", server.path(file.keys) / f"{card.id}.pub")
        own.chmod(0o700)  # keys and text are its owner's alone
        (own / "ca.crt").write_bytes(server.path(file.ca).read_bytes())
        _write_options(own / "device.toml", _device_file(config, card, server.address, port + 1 + number))
        if card.id in texts:
            write_atomic(own / TEXT, "".join(json.dumps(row) + "\n" for row in map(_row, texts[card.id])))
    layout.server.chmod(0o700)
    _write_options(layout.server / FILE, file)
    write_atomic(server.path(file.config), tomli_w.dumps(_server_tree(config, fleet)))
    write_atomic(server.app / "pyproject.toml", units.APP)
    for name, text in units.unit_files(layout.server, layout.devices()).items():
        write_atomic(layout.folder / "units" / name, text)
    write_atomic(layout.folder / "README.md", units.readme(layout.folder, list(layout.devices())))
    return layout


def _texts(config: RunConfig, progress: Progress) -> dict[str, list[Document]]:
    """The documents of each device that shares the private text, as in the local run and in the same order."""
    if not config.devices.count:
        return {}
    root = config.data.folder if any(source.embedded is None for source in config.data.corpora) else Path()
    private = [d for source in config.data.corpora for d in read_documents(source, "private", root)]
    with tempfile.TemporaryDirectory(prefix="deepfusion-") as scratch:
        corpus = prepare_data(config, RunFolder(Path(scratch)), progress).private
        fleet = config.devices
        parts = divide(corpus, shared_ids(fleet), alpha=fleet.alpha, sigma=fleet.sigma, seed=config.seed)
        return {device_id: [private[row] for row in corpus.rows_U[rows_U]] for device_id, rows_U in parts.items()}


def _row(document: Document) -> dict[str, str]:
    return {"prompt": document.prompt or "", "answer": document.answer}


def _device_file(config: RunConfig, card: DeviceCard, superlink: str, port: int) -> DeviceFile:
    named = {device.id: device for device in config.devices.named}
    text = DeviceText(files=(TEXT,), prompt="{prompt}", answer="{answer}")
    if card.id in named:
        own = named[card.id]
        root = config.data.folder.absolute()
        files = tuple(str(root / file) for file in own.files)
        text = DeviceText(files=files, text=own.text, prompt=own.prompt, answer=own.answer)
    gib = None if card.memory_limit_bytes is None else card.memory_limit_bytes / 2**30
    return DeviceFile(
        id=card.id,
        methods=(methods.name_of(type(config.method)),),
        encoder=getattr(getattr(config.method, "embed", None), "model", None),
        model=_absolute(card.model),
        text=text,
        limits=Limits(memory_gib=gib, threads=config.devices.threads),
        connection=Connection(superlink=superlink, certificate="ca.crt", key="key", port=port),
    )


def _absolute(model: ModelSpec) -> ModelSpec:
    return replace(model, folder=os.path.abspath(model.folder)) if model.folder else model


def _server_tree(config: RunConfig, fleet: Sequence[DeviceCard]) -> dict[str, Any]:
    """The run's configuration without any device's text."""
    devices = replace(config.devices, models=tuple(_absolute(model) for model in config.devices.models))
    tree = tree_of(replace(config, devices=devices))
    for row in tree["data"]["corpora"]:
        row.pop("private", None)
    rows = tree["data"]["corpora"]
    tree["data"]["corpora"] = [row for row in rows if {"embedded", "public", "test"} & row.keys()]
    tree["data"]["root"] = os.path.abspath(os.path.expanduser(os.path.expandvars(config.data.root)))
    base = tree["target"].get("base")
    if base and os.path.exists(base):
        tree["target"]["base"] = os.path.abspath(base)
    named = [{"id": card.id, "model": card.model.name} for card in fleet]
    tree["devices"] |= {"count": 0, "named": named}
    return tree


def _write_options(path: Path, options: Any) -> None:
    write_atomic(path, tomli_w.dumps(plain_options(options)))
