# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperLink and SuperNodes on loopback, with TLS and keys: the same bytes, through kills; and no stranger comes in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepfusion.artifacts import holder
from deepfusion.errors import FederationError
from deepfusion.fleet import commands
from deepfusion.fleet.credentials import write_certificates, write_node_key
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.faults import (
    Trainings,
    When,
    clients,
    skewed,
    state_is,
    wait_until,
)
from deepfusion.fleet.layout import Layout
from deepfusion.fleet.running import run_here, run_on
from deepfusion.fleet.status import fleet_status
from deepfusion.fleet.supervise import Fleet, Service, fleet_on_this_machine
from fleet_world import IDS, result_bytes
from loopback_world import free_port, processes_of

pytestmark = pytest.mark.fleet


@pytest.fixture
def layout(loopback: Layout) -> Layout:
    return loopback


def test_one_command_runs_a_fleet_that_ends_with_the_bytes_of_the_local_run(
    layout: Layout, local: dict[str, bytes]
) -> None:
    command = [sys.executable, "-m", "deepfusion", "fleet", "up", str(layout.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["failures"] == {}
    assert result_bytes(layout.server / "run") == local
    assert processes_of(layout.folder) == []  # everything that was started has ended
    status = fleet_status(layout.server / "run")
    assert {device.device: device.state for device in status.devices} == dict.fromkeys(IDS, "uploaded")
    assert all(device.up_bytes > 100_000 for device in status.devices)


def test_a_second_command_waits_for_the_server_that_the_first_has_left_behind(
    layout: Layout, local: dict[str, bytes]
) -> None:
    command = [sys.executable, "-m", "deepfusion", "fleet", "run", str(layout.server), "--json"]
    run, trained, said = layout.server / "run", Trainings(layout), list[str]()
    with fleet_on_this_machine(layout) as fleet:
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: "token" in (holder(run) or {}), "no server")
        note = holder(run)
        first.kill()
        first.wait()
        run_on(fleet.server, resume=True, tick=trained.look, note=said.append)
    assert said == ["a server is at work on this run folder already; waiting for its end"]
    assert note is not None
    assert [path.stem for path in (layout.server / "outcomes").iterdir()] == [note["token"]]
    assert result_bytes(run) == local
    assert trained.counts == dict.fromkeys(IDS, 1)


def test_nothing_outlives_a_command_that_is_killed(layout: Layout) -> None:
    up = subprocess.Popen([sys.executable, "-m", "deepfusion", "fleet", "up", str(layout.folder), "--json"])
    wait_until(lambda: bool(clients(layout, "device-000")), "no client")
    assert len(processes_of(layout.folder)) > 5
    up.kill()
    up.wait()
    wait_until(lambda: processes_of(layout.folder) == [], "something runs on")


@pytest.fixture
def link(layout: Layout) -> Iterator[Fleet]:
    """A SuperLink that knows its devices, of which none is there."""
    with fleet_on_this_machine(layout) as fleet:
        for node in fleet.nodes.values():
            node.end()
        yield fleet


def test_registering_again_changes_nothing_and_a_key_that_is_gone_is_shut_out_until_the_superlink_starts_anew(
    layout: Layout, link: Fleet
) -> None:
    before = commands.register(link.server)
    assert commands.register(link.server) == before == link.server.nodes()
    assert sorted(before) == list(IDS)
    key = layout.server / "keys" / "device-001.pub"
    text = key.read_text()
    key.unlink()
    left = {device_id: node for device_id, node in before.items() if device_id != "device-001"}
    assert commands.register(link.server) == left == link.server.nodes()
    key.write_text(text)
    with pytest.raises(FederationError, match="device-001: the SuperLink has shut its key out; restart the SuperLink"):
        commands.register(link.server)
    assert link.server.nodes() == left
    link.link.end()
    link.start_link()
    after = link.server.nodes()
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


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


def test_a_clock_a_minute_behind_does_no_harm_and_one_a_minute_ahead_keeps_its_device_out(
    layout: Layout, local: dict[str, bytes], tmp_path: Path
) -> None:
    with fleet_on_this_machine(layout) as fleet:
        for device_id, seconds in (("device-001", -60.0), ("device-002", 60.0)):
            fleet.put_in(device_id, skewed(layout, device_id, seconds, tmp_path))
        others = [state_is(layout, device_id, "uploaded") for device_id in ("device-000", "device-001")]
        seen: list[str] = []

        def ahead_is_still_out() -> None:
            status = fleet_status(layout.server / "run")
            seen.append(next(d for d in status.devices if d.device == "device-002").state)
            fleet.put_in("device-002", skewed(layout, "device-002", 0.0, tmp_path))

        trained = Trainings(layout)
        with When(lambda: all(there() for there in others), ahead_is_still_out).watching():
            run_here(fleet, resume=False, tick=trained.look)
    assert seen == ["registered"]
    assert result_bytes(layout.server / "run") == local
    assert trained.counts == dict.fromkeys(IDS, 1)
