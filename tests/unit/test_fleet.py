# SPDX-License-Identifier: Apache-2.0
"""The parts of a fleet by themselves: files with faults, programs that may be started, pulls that do not wait for each other."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from rich.console import Console

from deepfusion.config import parse_config
from deepfusion.errors import ConfigError, DiskError, FederationError, ResumeError
from deepfusion.federation import admission, roll
from deepfusion.federation.admission import admit
from deepfusion.federation.apart import PulledApart
from deepfusion.federation.roll import ROLL, Roll
from deepfusion.fleet import commands
from deepfusion.fleet.credentials import write_certificates, write_node_key
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.faults import When
from deepfusion.fleet.layout import init_fleet
from deepfusion.fleet.running import run_on
from deepfusion.fleet.server_file import open_server
from deepfusion.fleet.status import DeviceStatus, FleetStatus, fleet_status, status_table
from deepfusion.fleet.supervise import Fleet
from deepfusion.fleet.trial import trial_config
from deepfusion.run import check_text
from fleet_world import make_fleet
from small_world import small_tree, write_text

DEVICE = """id = "a"
{}
[model]
name = "gpt2"
preset = "gpt2-pico"
[text]
files = ["a.txt"]
[connection]
superlink = "localhost:1"
certificate = "ca.crt"
key = "key"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('id = "a"', 'id = "../a"', r'id = "\.\./a": letters'),
        ('preset = "gpt2-pico"', 'preset = "gpt3-pico"', 'preset = "gpt3-pico": unknown .did you mean "gpt2-pico"'),
        ('preset = "gpt2-pico"', "", "none of preset, folder, hub given; give exactly one"),
        ('["a.txt"]', "[]", r"files = \[\]: no text to train on"),
        ('["a.txt"]', '["a.doc"]', r'files: "a.doc": unknown kind of file'),
        ("[text]", "[limits]\nhours = 0.0\n[text]", "hours = 0.0: no request could be answered"),
        ("[text]", "[limits]\nthreads = 0\n[text]", "threads = 0: a training runs on at least one"),
        ('key = "key"', 'key = "key"\nserver = "x"', r'\[connection\] server = "x": unknown key'),
        ("{}", 'methods = ["fedavgg"]', '"fedavgg": no such method .did you mean "fedavg"'),
    ],
)
def test_a_fault_in_a_devices_file_is_named_with_its_cure(old: str, new: str, said: str, tmp_path: Path) -> None:
    (path := tmp_path / "device.toml").write_text(DEVICE.replace(old, new, 1).replace("{}", ""))
    with pytest.raises(ConfigError, match=said) as caught:
        load_device(path)
    assert len(caught.value.faults) == 1


def test_a_device_takes_part_in_one_shot_fusion_alone_unless_it_says_otherwise(tmp_path: Path) -> None:
    (path := tmp_path / "device.toml").write_text(DEVICE.replace("{}", ""))
    own = load_device(path)
    assert own.methods == ("deepfusion",)
    assert (own.limits.threads, own.limits.hours, own.limits.memory_gib) == (1, 24.0, None)


def test_a_node_can_start_two_programs_and_no_other(tmp_path: Path) -> None:
    (path := tmp_path / "device.toml").write_text(DEVICE.replace("{}", ""))
    arguments, environment = commands.node_command(load_device(path), path)
    assert sorted(os.listdir(environment["PATH"])) == ["flower-superexec", "flwr-clientapp"]
    assert "deepfusion.app:client_app" in (Path(environment["PATH"]) / "flwr-clientapp").read_text()
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "--insecure" not in arguments


def test_what_init_writes_is_a_fleet_with_secrets_for_their_owners_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    layout = make_fleet(tmp_path / "text", tmp_path / "trial")
    server = open_server(layout.server)
    assert list(server.public_keys()) == list(layout.devices()) == ["device-000", "device-001", "device-002"]
    secrets = [*layout.folder.glob("devices/*/key"), server.path(server.file.key), layout.server / "tls/ca.key"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    units = {path.name: path.read_text() for path in (layout.folder / "units").iterdir()}
    assert len(units) == 5
    assert all("Restart=always" in text for name, text in units.items() if "node" in name or "superlink" in name)
    assert "Restart=on-failure\n" in units["deepfusion-run.service"]
    assert all("RestartPreventExitStatus=2 78\n" in text for text in units.values())
    assert "StartLimitIntervalSec=86400\nStartLimitBurst=20\n\n[Service]" in units["deepfusion-run.service"]
    assert "StartLimitIntervalSec=0\n\n[Service]" in units["deepfusion-node-device-001.service"]  # it never gives up
    readme = (layout.folder / "README.md").read_text()
    assert f"deepfusion fleet node {layout.device('device-001')}/device.toml" in readme
    assert "run only where it has failed (`Restart=on-failure`)" in readme
    with pytest.raises(ConfigError, match="is not empty; choose a new folder"):
        make_fleet(tmp_path / "text", tmp_path / "trial")
    with pytest.raises(FederationError, match="no device is registered; run: deepfusion fleet register"):
        server.nodes()


def test_a_stage_that_does_not_exist_is_refused_before_a_superlink_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text")
    layout = make_fleet(tmp_path / "text", tmp_path / "trial")
    monkeypatch.setattr("deepfusion.fleet.running.wait_for", lambda *_, **__: pytest.fail("nobody listens"))
    with pytest.raises(ConfigError, match="nosuch"):
        run_on(open_server(layout.server), resume=False, until="nosuch")


def test_the_text_of_named_devices_stays_where_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    tree = small_tree(tmp_path / "text")
    tree["devices"]["named"] = [{"id": "clinic", "model": "gpt2", "files": ["garden/private.jsonl"], "text": "{text}"}]
    for port in (0, 65532):
        with pytest.raises(ConfigError, match=rf"--port {port}: no room for it and 4 more; choose 1 to 65531"):
            init_fleet(parse_config(tree), tmp_path / "trial", devices=3, port=port)
    assert not (tmp_path / "trial").exists()
    layout = init_fleet(parse_config(tree), tmp_path / "trial", devices=3)
    own = load_device(layout.devices()["clinic"])
    assert own.text.files == (str(tmp_path / "text" / "garden/private.jsonl"),)
    assert not (layout.device("clinic") / "text.jsonl").exists()
    with pytest.raises(ConfigError, match="no files; add them, or reach the devices by `deepfusion fleet run`"):
        check_text(parse_config({**tree, "devices": {**tree["devices"], "named": [{"id": "clinic", "model": "gpt2"}]}}))


def test_a_trial_needs_no_configuration() -> None:
    assert trial_config(["devices.count=4"], seed=3).devices.count == 4
    assert trial_config().seed == 0


def test_the_certificate_is_made_out_to_the_server_and_to_loopback(tmp_path: Path) -> None:
    write_certificates(tmp_path, "fusion.example")
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{n}.crt").read_bytes()) for n in ("ca", "server"))
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"fusion.example", "localhost"}
    assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}
    server.verify_directly_issued_by(ca)


def test_keys_that_flower_cannot_use_are_all_named_before_anybody_is_called(tmp_path: Path) -> None:
    write_node_key(tmp_path / "a", tmp_path / "a.pub")
    (tmp_path / "b.pub").write_bytes((tmp_path / "a.pub").read_bytes())
    (tmp_path / "c.pub").write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGVtcHR5ZW1wdHllbXB0eWVtcHR5ZW1wdHllbXB0 x")
    (tmp_path / "d.pub").write_text("no key")
    with pytest.raises(ConfigError) as caught:
        admit("localhost:1", tmp_path / "ca.crt", {name: tmp_path / f"{name}.pub" for name in "abcd"})
    same, other, none = caught.value.faults
    assert "b.pub: the same key as a's; let each device make its own" in same
    assert "c.pub: not a key for Flower" in other
    assert "d.pub: not a key for Flower" in none
    assert "ssh-keygen -t ecdsa -b 384" in none


class Control:
    """A SuperLink that has shut one key out; it is asked by `admit`."""

    def __init__(self, shut_out: bytes) -> None:
        self.nodes = [NodeInfo(node_id=7, public_key=shut_out, status=NodeStatus.UNREGISTERED)]

    def ListNodes(self, request: object) -> SimpleNamespace:
        return SimpleNamespace(nodes_info=self.nodes)

    def RegisterNode(self, request: object) -> SimpleNamespace:
        self.nodes.append(NodeInfo(node_id=8, public_key=request.public_key, status=NodeStatus.REGISTERED))
        return SimpleNamespace(node_id=8)

    def close(self) -> None:
        """Nothing is open."""


def test_a_key_that_was_shut_out_keeps_no_other_device_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "text")
    server = open_server(make_fleet(tmp_path / "text", tmp_path / "trial").server)
    server.public_keys()["device-002"].unlink()
    shut_out = admission._read(server.public_keys())["device-000"]
    made = SimpleNamespace(from_server_address=lambda *_, **__: Control(shut_out))
    monkeypatch.setattr(admission, "ControlHttpClient", made)
    with pytest.raises(FederationError, match="device device-000: the SuperLink has shut its key out; restart"):
        commands.register(server)
    assert server.nodes() == {"device-001": 8}


def test_a_fault_counts_only_where_it_has_been_done_to_something() -> None:
    done, vain, late = (
        When(lambda: True, lambda: None),
        When(lambda: True, lambda: False),
        When(lambda: True, print, 1e6),
    )
    with late.watching(), vain.watching(), done.watching():
        while not done.done:
            time.sleep(0.01)
    assert (done.done, vain.done, late.done) == (True, False, False)


def reply_to(message_id: str) -> SimpleNamespace:
    return SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=message_id))


def test_a_reply_that_is_stuck_keeps_no_other_waiting() -> None:
    stuck = threading.Event()

    def pull(message_id: str) -> SimpleNamespace:
        if message_id == "half":
            stuck.wait(60)
        return reply_to(message_id)

    grid = PulledApart(SimpleNamespace(), pull, threads=2)  # type: ignore[arg-type]
    found: list[object] = []
    waiting = ["half", "a", "b", "c"]
    for _ in range(600):
        arrived = list(grid.pull_messages(waiting))
        found += arrived
        waiting = [name for name in waiting if reply_to(name) not in arrived]
        if waiting == ["half"]:
            break
        time.sleep(0.05)
    assert found == [reply_to("a"), reply_to("b"), reply_to("c")]
    stuck.set()
    grid.close()


def test_silent_devices_keep_nobody_waiting() -> None:
    def pull(message_id: str) -> SimpleNamespace | None:
        return None if message_id.startswith("silent") else reply_to(message_id)

    grid = PulledApart(SimpleNamespace(), pull, threads=2)  # type: ignore[arg-type]
    wanted = [*(f"silent-{number}" for number in range(8)), "good"]
    found: list[object] = []
    for _ in range(400):
        found += grid.pull_messages(wanted)
        if found:
            break
        time.sleep(0.02)
    assert found == [reply_to("good")]
    grid.close()


def test_what_a_device_says_of_its_failure_steers_no_terminal() -> None:
    status = FleetStatus(True, None, [DeviceStatus("a", "failed", True, 0.0, "\\[/x] \x1b[2J [red]gone", 0, 0)])
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table(status))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\\[/x]  [2J [red]gone" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize("gone", ["raises", "never answers"])
def test_a_superlink_that_does_not_answer_is_told(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.federation.roll._EVERY", 0.02)
    monkeypatch.setattr("deepfusion.fleet.status.STALE_SECONDS", 1.0)
    over, answers = threading.Event(), iter([[1]])

    def look() -> list[int]:
        for online in answers:
            return online
        if gone == "never answers":
            over.wait()
        raise ConnectionError

    with Roll(tmp_path / ROLL, lambda: {"a": 1}).watching(look):
        ends = time.monotonic() + 60
        while not (status := fleet_status(tmp_path)).devices[0].online and time.monotonic() < ends:
            time.sleep(0.01)
        assert (status.running, status.silent_seconds, status.devices[0].online) == (True, None, True)
        while (status := fleet_status(tmp_path)).silent_seconds is None and time.monotonic() < ends:
            time.sleep(0.05)
        over.set()
    assert status.running
    assert status.silent_seconds is not None
    assert status.silent_seconds >= 1.0
    assert status.devices[0].online is None
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table(status))
    assert "the SuperLink has not answered for" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_full_disk_for_a_while_does_not_end_the_roll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll, "_EVERY", 0.01)
    write, tried, written = roll.write_atomic, threading.Event(), threading.Event()

    def full_once(path: Path, data: str) -> None:
        if not tried.is_set():
            tried.set()
            raise DiskError("no room")
        write(path, data)
        written.set()

    watched = Roll(tmp_path / ROLL, lambda: {"a": 1})
    monkeypatch.setattr(roll, "write_atomic", full_once)
    over = threading.Event()

    def no_answer() -> list[int]:
        over.wait()
        return []

    with watched.watching(no_answer):
        assert tried.wait(20)
        assert written.wait(20), "the writer goes on"
        over.set()


def test_the_status_is_what_the_server_last_saw(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no fleet has run here"):
        fleet_status(tmp_path)
    roll = Roll(tmp_path / ROLL, lambda: {"a": 1, "b": 2, "c": 3, "d": 4})
    roll.look([1, 2])
    roll.tell("a", "answered", "")
    roll.tell("b", "failed", "it broke\nand more")
    (tmp_path / "ledger.jsonl").write_text(
        '{"round": 0, "device": "a", "direction": "up", "what": "model", "bytes": 7}\n'
    )
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "d.safetensors").touch()  # of a run that was killed
    status = fleet_status(tmp_path)
    assert status.running
    assert [(d.device, d.state, d.online, d.reason, d.up_bytes) for d in status.devices] == [
        ("a", "uploaded", True, "", 7), ("b", "failed", True, "it broke", 0), ("c", "registered", False, "", 0),
        ("d", "uploaded", False, "", 0),
    ]  # fmt: skip


def test_a_device_is_not_brought_back_while_another_process_takes_its_place() -> None:
    done: list[str] = []

    def start() -> None:
        tending.start()
        tending.join(0.2)
        done.append("start")

    before = SimpleNamespace(end=lambda: done.append("end"), revive=lambda: done.append("revive the old one"))
    after = SimpleNamespace(start=start, revive=lambda: done.append("revive"))
    link = SimpleNamespace(is_alive=lambda: True)
    fleet = Fleet(SimpleNamespace(), link, {"a": before})  # pyright: ignore[reportArgumentType]
    tending = threading.Thread(target=fleet.tend)
    fleet.put_in("a", after)  # pyright: ignore[reportArgumentType]
    tending.join()
    assert done == ["end", "start", "revive"]
