# SPDX-License-Identifier: Apache-2.0
"""Flower's own programs, as a fleet calls them: SuperLink, SuperNode and `flwr`; quiet, with TLS and keys, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from deepfusion.artifacts import write_atomic
from deepfusion.errors import FederationError
from deepfusion.federation.admission import admit
from deepfusion.fleet.device_file import DeviceFile, below
from deepfusion.fleet.server_file import Server

CONNECTION = "fleet"
"""The name under which `flwr` knows the SuperLink."""
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
}  # fmt: skip
_CLIENT = 'from deepfusion.federation.node_process import run_client_app\nrun_client_app("deepfusion.app:client_app")\n'
_PATIENCE = 120.0


def link_command(server: Server) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the SuperLink.

    It keeps its state in memory: uploads are large, and what must not be lost lies in the run folder.
    """
    file = server.file
    arguments = [
        _program("flower-superlink"), "--host", file.host, "--port", str(file.port),
        "--ssl-ca-certfile", str(server.path(file.ca)), "--ssl-certfile", str(server.path(file.certificate)),
        "--ssl-keyfile", str(server.path(file.key)), "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    return arguments, {**os.environ, **_QUIET, "FLWR_HOME": str(server.home), "PATH": _path()}


def node_command(own: DeviceFile, path: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a device's SuperNode.

    Its PATH holds two programs only: Flower's launcher, and in the place of Flower's client ours, which runs the installed
    package whatever app the server sends. No model is looked for on the hub.

    Args:
        path: the device's configuration.
    """
    place, connection = below(path, own.place), own.connection
    programs = place / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    _script(programs / "flwr-clientapp", _CLIENT)
    launcher = programs / "flower-superexec"
    launcher.unlink(missing_ok=True)
    launcher.symlink_to(_program("flower-superexec"))
    arguments = [
        _program("flower-supernode"), "--superlink", connection.superlink,
        "--root-certificates", str(below(path, connection.certificate)),
        "--auth-supernode-private-key", str(below(path, connection.key)),
        "--port", str(connection.port), "--node-config", f'device="{path.absolute()}"',
    ]  # fmt: skip
    own_environment = {"FLWR_HOME": str(place / "flower"), "PATH": str(programs), "HF_HUB_OFFLINE": "1"}
    return arguments, {**os.environ, **_QUIET, **own_environment}


def register(server: Server) -> dict[str, int]:
    """Have the SuperLink admit the devices whose public key is here and no others; returns and notes their node ids.

    A SuperLink that has been started anew knows nobody, so this is done after each start and before each run; and when a key
    has come or gone, also while a run goes on.

    Raises:
        ConfigError: a key is none.
        FederationError: there is none, the SuperLink cannot be reached, or has shut one out; the others are in, and noted.
    """
    keys = server.public_keys()
    if not keys:
        raise FederationError(f"{server.path(server.file.keys)}: no public key of a device; put <id>.pub there")
    nodes, shut_out = admit(server.address, server.path(server.file.ca), keys)
    server.note_nodes(nodes)
    if shut_out:
        raise FederationError(
            f"device {', '.join(shut_out)}: the SuperLink has shut its key out; restart the SuperLink to take it back"
        )
    return nodes


def submit(server: Server, *, resume: bool, until: str | None) -> tuple[str, str]:
    """Start the run; returns the token that its outcome will bear, and Flower's number of it.

    Raises:
        FederationError: the SuperLink cannot be reached, or does not take the run.
        DiskError: there is no room to note how it ends.
    """
    token = uuid.uuid4().hex
    server.outcome(token).reserve()
    values: Mapping[str, str | bool] = {
        "server": str(server.folder), "token": token, "resume": resume, "until": until or "",
    }  # fmt: skip
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    told = _flwr(server, "run", str(server.app), CONNECTION, "--run-config", text)
    if "run-id" not in told:
        raise FederationError(f"the SuperLink did not take the run: {told.get('error-message', told)}")
    return token, str(told["run-id"])


def ended(server: Server, run: str) -> str | None:
    """What the SuperLink says of a run that is over; None while it goes on."""
    runs = _flwr(server, "list", CONNECTION, "--run-id", run).get("runs")
    status = str(runs[0].get("status", "")) if isinstance(runs, list) and runs else "unknown to the SuperLink"
    return None if status.startswith(("pending", "starting", "running")) else status


def _flwr(server: Server, *arguments: str) -> dict[str, object]:
    """Call `flwr` and return the JSON that it prints; its exit status tells nothing."""
    home = server.home
    connection = {"address": server.address, "root-certificates": str(server.path(server.file.ca))}
    table = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_atomic(home / "config.toml", tomli_w.dumps(table))
    environment = {**os.environ, **_QUIET, "FLWR_HOME": str(home)}
    try:
        done = subprocess.run(
            [_program("flwr"), *arguments, "--format", "json"], env=environment, capture_output=True, text=True,
            timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FederationError(
            f"{server.address}: no answer within {_PATIENCE:g} s; is the SuperLink running? (deepfusion fleet link)"
        ) from error
    start = done.stdout.find("{")
    try:
        return json.loads(done.stdout[start:])
    except ValueError:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise FederationError(
            f"{server.address}: flwr {arguments[0]} said: {said[-1] if said else 'nothing'}; is the SuperLink running?"
        ) from None


def _program(name: str) -> str:
    """A program of this virtual environment, which need not be on the PATH."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise FederationError(f"{path}: not there; install flwr into this environment: pip install 'flwr>=1.41,<1.42'")
    return str(path)


def _path() -> str:
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _script(path: Path, code: str) -> None:
    path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    path.chmod(0o755)
