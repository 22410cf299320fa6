# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperLink and SuperNodes on loopback, with TLS and keys: the same bytes, through kills; and no stranger comes in."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.fleet import commands
from deepfusion.fleet.credentials import write_certificates, write_node_key
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.layout import Layout
from deepfusion.fleet.status import fleet_status
from deepfusion.fleet.supervise import Fleet, Service, fleet_on_this_machine, run_here
from fleet_world import IDS, fleet_tree, make_fleet, result_bytes
from small_world import write_text

pytestmark = [pytest.mark.fleet, pytest.mark.slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    return root


@pytest.fixture(scope="module")
def local(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the local run."""
    folder = tmp_path_factory.mktemp("local") / "run"
    launch(parse_config(fleet_tree(world)), folder)
    return result_bytes(folder)


def free_port(count: int = 8) -> int:
    """The first of some ports in a row that nobody listens on."""
    for port in range(20_000 + os.getpid() % 10_000, 60_000, count):
        if all(_is_free(port + i) for i in range(count)):
            return port
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture
def layout(world: Path, tmp_path: Path) -> Layout:
    return make_fleet(world, tmp_path / "trial", port=free_port())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread_and_our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name something in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def trainings(layout: Layout) -> dict[str, int]:
    """How many trainings each device has finished."""
    place = {device_id: layout.device(device_id) / "place" for device_id in IDS}
    return {device_id: len(list(path.glob("jobs/*/answers/*.safetensors"))) for device_id, path in place.items()}


def test_one_command_runs_a_fleet_that_ends_with_the_bytes_of_the_local_run(
    layout: Layout, local: dict[str, bytes]
) -> None:
    command = [sys.executable, "-m", "deepfusion", "fleet", "up", str(layout.folder), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failures"] == {}
    assert result_bytes(layout.server / "run") == local
    assert processes_of(layout.folder) == []  # everything that was started has ended
    status = fleet_status(layout.server / "run")
    assert {device.device: device.state for device in status.devices} == dict.fromkeys(IDS, "uploaded")
    assert all(device.up_bytes > 100_000 for device in status.devices)


class When:
    """Does something once, as soon as a condition holds."""

    def __init__(self, condition: Callable[[], bool], act: Callable[[], None]) -> None:
        self._condition, self._act, self.done = condition, act, False

    def __call__(self) -> None:
        if not self.done and self._condition():
            self.done = True
            self._act()


def state_is(layout: Layout, device_id: str, *words: str) -> Callable[[], bool]:
    def condition() -> bool:
        path = layout.server / "run" / "roll.json"
        if not path.exists():
            return False
        return next(d for d in fleet_status(path.parent).devices if d.device == device_id).state in words

    return condition


def client_of(layout: Layout, device_id: str) -> list[int]:
    """Process ids of a device's client at work."""
    script = str(layout.device(device_id) / "place/bin/flwr-clientapp")
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parts = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if script.encode() in parts:
            found.append(int(path.parent.name))
    return found


def kill_client(layout: Layout) -> When:
    def act() -> None:
        for pid in client_of(layout, "device-001"):
            os.kill(pid, signal.SIGKILL)

    return When(lambda: bool(client_of(layout, "device-001")), act)


def kill_node(layout: Layout, fleet: Fleet) -> When:
    def act() -> None:
        assert fleet.nodes["device-002"].process is not None
        os.killpg(fleet.nodes["device-002"].process.pid, signal.SIGKILL)

    return When(state_is(layout, "device-002", "training"), act)


def kill_link(layout: Layout, fleet: Fleet) -> When:
    def act() -> None:
        assert fleet.link.process is not None
        os.killpg(fleet.link.process.pid, signal.SIGKILL)

    return When(state_is(layout, "device-000", "uploaded"), act)


def kill_server(layout: Layout) -> When:
    def act() -> None:
        os.kill(json.loads((layout.server / "outcome.json").read_text())["pid"], signal.SIGKILL)

    return When(lambda: (layout.server / "run" / "proxies").exists(), act)


@pytest.mark.parametrize("fault", ["client", "node", "superlink", "server"])
def test_a_kill_loses_no_upload_trains_nothing_twice_and_changes_no_byte(
    fault: str, layout: Layout, local: dict[str, bytes]
) -> None:
    with fleet_on_this_machine(layout) as fleet:
        kill = {
            "client": lambda: kill_client(layout), "node": lambda: kill_node(layout, fleet),
            "superlink": lambda: kill_link(layout, fleet), "server": lambda: kill_server(layout),
        }[fault]()  # fmt: skip
        run_here(fleet, resume=False, tick=kill)
    assert kill.done
    assert result_bytes(layout.server / "run") == local
    assert trainings(layout) == dict.fromkeys(IDS, 1)
    assert processes_of(layout.folder) == []


@pytest.fixture
def link(layout: Layout) -> Iterator[Fleet]:
    """A SuperLink that knows its devices, of which none is there."""
    with fleet_on_this_machine(layout) as fleet:
        for node in fleet.nodes.values():
            node.end()
        yield fleet


def activations(fleet: Fleet) -> int:
    return fleet.link.log.read_text().count("Activated node_id")


def test_strangers_are_not_admitted(layout: Layout, link: Fleet, tmp_path: Path) -> None:
    path = layout.devices()["device-000"]
    arguments, own = commands.node_command(load_device(path), path)
    write_node_key(tmp_path / "wrong", tmp_path / "wrong.pub")
    write_certificates(tmp_path / "other", "localhost")
    key, ca = (arguments.index(flag) + 1 for flag in ("--auth-supernode-private-key", "--root-certificates"))
    strangers = {
        "no key": arguments[: key - 1] + arguments[key + 1 :],
        "wrong key": [*arguments[:key], str(tmp_path / "wrong"), *arguments[key + 1 :]],
        "wrong CA": [*arguments[:ca], str(tmp_path / "other" / "ca.crt"), *arguments[ca + 1 :]],
        "plaintext": [
            a for a in arguments[: key - 1] + arguments[key + 1 :] if a not in (arguments[ca], arguments[ca - 1])
        ]
        + ["--insecure"],
    }
    before = activations(link)
    services = {
        name: Service(name, [*a[: a.index("--port") + 1], str(free_port()), *a[a.index("--port") + 2 :], "--max-retries", "1"],
                      own, tmp_path / f"{name}.log")
        for name, a in strangers.items()
    }  # fmt: skip
    try:
        for service in services.values():
            service.start()
            deadline = time.monotonic() + 60
            while service.is_alive() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert "SuperNode ID" not in service.log.read_text(), service.name
        assert activations(link) == before
    finally:
        for service in services.values():
            service.end()
    legitimate = Service("device-000", arguments, own, tmp_path / "legitimate.log")
    legitimate.start()
    try:
        deadline = time.monotonic() + 60
        while activations(link) == before and time.monotonic() < deadline:
            time.sleep(0.2)
        assert activations(link) == before + 1  # the door that stayed shut can be opened
    finally:
        legitimate.end()


SKEW = """
import datetime, os
import flwr.supercore.date as date
offset, now = datetime.timedelta(seconds=float(os.environ["SKEW"])), date.now
date.now = lambda: now() + offset
"""
"""A `sitecustomize` that sets the clock by which Flower signs and dates."""


def skewed(layout: Layout, device_id: str, seconds: float, folder: Path) -> Service:
    """A device whose clock is wrong."""
    (folder / "sitecustomize.py").write_text(SKEW)
    path = layout.devices()[device_id]
    arguments, own = commands.node_command(load_device(path), path)
    own = {**own, "SKEW": str(seconds), "PYTHONPATH": os.pathsep.join([str(folder), own["PYTHONPATH"]])}
    return Service(device_id, arguments, own, folder / f"{device_id}.log")


def test_a_clock_a_minute_behind_does_no_harm_and_one_a_minute_ahead_keeps_its_device_out(
    layout: Layout, local: dict[str, bytes], tmp_path: Path
) -> None:
    with fleet_on_this_machine(layout) as fleet:
        for device_id, seconds in (("device-001", -60.0), ("device-002", 60.0)):
            fleet.nodes[device_id].end()
            fleet.nodes[device_id] = skewed(layout, device_id, seconds, tmp_path)
            fleet.nodes[device_id].start()

        def mend() -> None:
            fleet.nodes["device-002"].end()
            fleet.nodes["device-002"] = skewed(layout, "device-002", 0.0, tmp_path)
            fleet.nodes["device-002"].start()

        others = [state_is(layout, device_id, "uploaded") for device_id in ("device-000", "device-001")]
        seen: list[str] = []

        def ahead_is_still_out() -> None:
            status = fleet_status(layout.server / "run")
            seen.append(next(d for d in status.devices if d.device == "device-002").state)
            mend()

        when = When(lambda: all(there() for there in others), ahead_is_still_out)
        run_here(fleet, resume=False, tick=when)
    assert seen == ["registered"]
    assert result_bytes(layout.server / "run") == local
    assert trainings(layout) == dict.fromkeys(IDS, 1)
