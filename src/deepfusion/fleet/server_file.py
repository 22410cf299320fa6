# SPDX-License-Identifier: Apache-2.0
"""The server's side of a fleet as files: its address, its certificates, the public keys of its devices, its run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepfusion.artifacts import write_atomic
from deepfusion.errors import FederationError
from deepfusion.fleet.outcome import Outcome
from deepfusion.schema import load_options

FILE = "fleet.toml"


@dataclass(frozen=True, kw_only=True)
class ServerFile:
    """`fleet.toml`, in the server's folder. Paths are relative to it.

    Attributes:
        host: where the SuperLink listens: on loopback, because its port serves the operator without a password. Devices come by
            a reverse proxy (docs/fleet.md), which has a name and a certificate of its own.
        port: its port, for the operator's commands and the proxy.
        name: how both call the SuperLink: what its certificate is for.
        config: the run's configuration.
        run: the run folder.
        keys: folder of the devices' public keys, `<id>.pub`: who may join, and by which key.
        ca: the certificate that its own is signed by.
        certificate, key: the SuperLink's own, for `name`.
    """

    host: str = "127.0.0.1"
    port: int = 18443
    name: str = "localhost"
    config: str = "run.toml"
    run: str = "run"
    keys: str = "keys"
    ca: str = "tls/ca.crt"
    certificate: str = "tls/server.crt"
    key: str = "tls/server.key"

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not 0 < self.port < 65536:
            yield f"port = {self.port}: no port; choose one from 1 to 65535"


@dataclass(frozen=True)
class Server:
    """The server's folder and what its `fleet.toml` says."""

    folder: Path
    file: ServerFile

    def path(self, name: str) -> Path:
        """A path that `fleet.toml` names."""
        return self.folder / name

    @property
    def address(self) -> str:
        """Host and port, as devices and the operator's commands name them."""
        return f"{self.file.name}:{self.file.port}"

    @property
    def home(self) -> Path:
        """Where Flower keeps its own files."""
        return self.folder / "flower"

    @property
    def app(self) -> Path:
        """The thin Flower app that `flwr run` bundles: it names components of the installed package and has no code."""
        return self.folder / "app"

    def public_keys(self) -> dict[str, Path]:
        """The file of each device's public key, by device id."""
        return {path.stem: path for path in sorted(self.path(self.file.keys).glob("*.pub"))}

    def nodes(self) -> dict[str, int]:
        """The node id under which the SuperLink knows each device's key.

        Raises:
            FederationError: no key has been registered.
        """
        try:
            return {device_id: int(node) for device_id, node in json.loads(self._nodes.read_text()).items()}
        except FileNotFoundError:
            raise FederationError(
                f"{self._nodes}: no device is registered; run: deepfusion fleet register {self.folder}"
            ) from None

    def note_nodes(self, nodes: dict[str, int]) -> None:
        """Write down which node id the SuperLink has given to which device's key."""
        write_atomic(self._nodes, json.dumps(nodes, indent=1))

    def outcome(self, token: str) -> Outcome:
        """How the run that was asked for under this token ended."""
        return Outcome(self.folder / "outcomes" / f"{token}.json")

    @property
    def _nodes(self) -> Path:
        return self.folder / "nodes.json"


def open_server(folder: Path) -> Server:
    """Read a server's folder.

    Raises:
        ConfigError: there is no `fleet.toml` in it, or a wrong one.
    """
    return Server(folder.absolute(), load_options(ServerFile, folder / FILE))
