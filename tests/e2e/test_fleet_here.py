# SPDX-License-Identifier: Apache-2.0
"""A fleet whose devices have files and folders of their own: the same MoE as the local run, and nothing lost on the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import Context
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from deepfusion.app import PRELOAD, serve
from deepfusion.errors import ConfigError, DiskError, FederationError
from deepfusion.federation import spool
from deepfusion.federation.ledger import Ledger, read_rows
from deepfusion.federation.local_grid import LocalGrid
from deepfusion.federation.payload import encode
from deepfusion.fleet import job
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.layout import Layout
from deepfusion.run import open_folder, prepare_data
from deepfusion.stages.embed import FrozenEncoder
from fleet_world import IDS, Wires, failing, make_fleet, result_bytes, serve_fleet, server_config


@pytest.fixture(scope="module")
def pristine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A fleet that has never run."""
    return make_fleet(root, tmp_path_factory.mktemp("fleet") / "trial")


@pytest.fixture
def layout(pristine: Layout, tmp_path: Path) -> Layout:
    """A fleet of the test's own."""
    shutil.copytree(pristine.folder, tmp_path / "trial")
    return Layout(tmp_path / "trial")


def trainings(layout: Layout) -> dict[str, int]:
    """How many answers each device keeps."""
    return {
        device_id: len(list((layout.device(device_id) / "place").glob("jobs/*/answers/*.safetensors")))
        for device_id in IDS
    }


def uploads(layout: Layout) -> dict[str, bytes]:
    """The uploads that the server has."""
    return uploads_of(result_bytes(layout.server / "run"))


def uploads_of(results: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in results.items() if name.startswith("uploads/")}


def test_a_fleet_ends_with_the_same_bytes_as_one_machine(layout: Layout, local: dict[str, bytes]) -> None:
    wires = Wires(layout)
    record = serve_fleet(layout, wires)
    assert record is not None
    assert result_bytes(layout.server / "run") == local
    assert wires.asked == dict.fromkeys(IDS, 1)
    # the bytes of the job are counted like all others
    jobs = {row.device: row.bytes for row in read_rows(layout.server / "run/ledger.jsonl") if row.what == "job"}
    config = server_config(layout)
    sent = {d.id: job.job_payload(config, layout.server / "run", d.model) for d in config.devices.named}
    assert jobs == {device_id: len(encode(payload)) for device_id, payload in sent.items()}
    assert record.ledger.download_bytes > sum(jobs.values()) > 0


def test_the_server_has_and_sends_no_text_of_the_devices(layout: Layout) -> None:
    wires = Wires(layout)
    record = serve_fleet(layout, wires)
    words = [
        json.loads(line)["answer"] for d in IDS for line in (layout.device(d) / "text.jsonl").read_text().splitlines()
    ]
    assert len(words) > 100
    for path in layout.server.rglob("*"):
        if path.is_file():
            assert words[0].encode() not in path.read_bytes(), path
    assert record is not None
    assert {device.documents for device in record.devices} == {
        len((layout.device(d) / "text.jsonl").read_text().splitlines()) for d in IDS
    }
    assert all(device.domains == {} for device in record.devices)  # nobody told the server what the texts are about


def test_an_upload_that_is_lost_on_its_way_is_sent_again_without_training(
    layout: Layout, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    wires, trained = Wires(layout), []
    work = job.Workshop.device

    def counted(shop: job.Workshop, request: job.Payload) -> object:
        device = work(shop, request)
        trained.append(device.id)
        return device

    monkeypatch.setattr(job.Workshop, "device", counted)

    def lost(message: object) -> object:
        del wires.faults["device-001"]
        wires.answer(message)  # it trains and answers, and goes offline before the server has pulled
        return failing(ErrorCode.NODE_UNAVAILABLE, "the node is offline", message)

    wires.faults["device-001"] = lost
    serve_fleet(layout, wires, "federation.retries=0", until="uploads")
    assert wires.asked["device-001"] == 2
    assert sorted(trained) == list(IDS)
    assert uploads(layout) == uploads_of(local)


def test_a_device_that_comes_back_late_is_waited_for(layout: Layout, local: dict[str, bytes]) -> None:
    wires = Wires(layout)
    wires.online.remove("device-002")
    told = []

    def tell(device_id: str, state: str, reason: str) -> None:
        told.append((device_id, state))
        if len([word for _, word in told if word == "answered"]) == 2:
            wires.online.add("device-002")

    serve_fleet(layout, wires, tell=tell, until="uploads")
    assert told[-1] == ("device-002", "answered")
    assert uploads(layout) == uploads_of(local)


def test_a_run_closes_with_its_quorum_names_who_is_missing_and_takes_them_in_later(
    layout: Layout, local: dict[str, bytes]
) -> None:
    wires = Wires(layout)
    wires.online.remove("device-002")
    wires.faults["device-000"] = lambda message: None
    closing = ("federation.deadline_seconds=3", "federation.minimum_devices=2")
    with pytest.raises(
        FederationError, match=r"1 of 3 devices answered, .* = 2; missing: device-000, device-002; .*--resume"
    ):
        serve_fleet(layout, wires, *closing)
    wires.faults.clear()
    record = serve_fleet(layout, wires, "federation.deadline_seconds=1", closing[1], resume=True)
    assert record is not None
    assert record.failures == {"device-002": "was not online by the deadline of 1 s; --resume asks it again"}
    assert wires.asked["device-001"] == 1  # what had arrived was not asked again
    wires.online.add("device-002")
    record = serve_fleet(layout, wires, *closing, resume=True)
    assert record is not None
    assert record.failures == {}
    assert result_bytes(layout.server / "run") == local


def test_a_full_disk_on_the_server_loses_no_upload(
    layout: Layout, local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "server/run/uploads" in path and path.endswith(".partial") and "key" not in path:
            writes.append(path)
            if len(writes) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(spool.os, "fsync", full)
    wires = Wires(layout)
    with pytest.raises(DiskError, match=r"bytes cannot be written \(No space left on device\); make room .*--resume"):
        serve_fleet(layout, wires)
    assert list((layout.server / "run/uploads").glob(".*.partial")) == []
    serve_fleet(layout, wires, resume=True, until="uploads")
    assert trainings(layout) == dict.fromkeys(IDS, 1)
    assert uploads(layout) == uploads_of(local)


def test_a_device_that_raises_is_named_with_what_it_said_and_costs_only_itself(layout: Layout) -> None:
    (layout.device("device-001") / "text.jsonl").unlink()
    record = serve_fleet(layout, Wires(layout))
    assert record is not None
    assert list(record.failures) == ["device-001"]
    assert "device device-001, asked for 'statistics': DataError" in record.failures["device-001"]
    assert {device.id for device in record.devices if device.upload_bytes} == {"device-000", "device-002"}


def test_a_device_keeps_to_its_own_model_limits_and_methods(layout: Layout) -> None:
    for device_id, old, new in (
        ("device-000", "[limits]", "[limits]\nmemory_gib = 0.0001"),
        ("device-001", 'name = "llama"', 'name = "mine"'),
        ("device-002", '"deepfusion"', '"fedavg"'),
    ):
        path = layout.devices()[device_id]
        path.write_text(path.read_text().replace(old, new, 1))
    wires = Wires(layout)
    failures: dict[str, str] = {}
    with pytest.raises(FederationError, match="none of 3 devices answered"):
        serve_fleet(layout, wires, tell=lambda device, state, reason: failures.update({device: reason}))
    assert "device-000 gives 0.1 MiB, the training of a gpt2 needs" in failures["device-000"]
    assert "trains \"mine\" and the run expects 'llama'" in failures["device-001"]
    assert 'takes no part in "deepfusion", only in fedavg' in failures["device-002"]
    assert trainings(layout) == dict.fromkeys(IDS, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": '{"seed": 1}'}, "the server's job: .* faults?"),
        ({"options": "no json"}, "its job cannot be read"),
        ({"end": 7}, "no tokenizer, no end of text or no options"),
        ({"model": "../../etc"}, "the run expects '../../etc'"),
    ],
)
def test_a_job_that_is_not_one_is_refused_on_the_device(layout: Layout, change: dict[str, object], said: str) -> None:
    serve_fleet(layout, Wires(layout), until="initial")
    good = job.job_payload(server_config(layout), layout.server / "run", "gpt2")
    bad = job.Payload(good.what, good.arrays, {**good.metadata, **change})
    path = layout.devices()["device-000"]
    with pytest.raises((FederationError, ConfigError, job.UploadError), match=said):
        job.open_workshop(load_device(path), path, bad, 1)
    assert not list((layout.device("device-000") / "place").glob("jobs/*/job.json"))


def test_an_encoder_is_the_devices_own_copy_or_none(layout: Layout) -> None:
    path = layout.devices()["device-000"]
    serve_fleet(layout, Wires(layout), until="initial")
    config = server_config(layout)
    config = replace(config, method=replace(config.method, embed=FrozenEncoder(model="/etc")))
    payload = job.job_payload(config, layout.server / "run", "gpt2")
    with pytest.raises(FederationError, match=r"describes text by the encoder '/etc'; name the device's copy"):
        job.open_workshop(load_device(path), path, payload, 1)
    path.write_text('encoder = "mine"\n' + path.read_text())
    shop = job.open_workshop(load_device(path), path, payload, 1)
    assert shop.job.method.embed.model == str(layout.device("device-000") / "mine")


def test_answers_of_earlier_rounds_go_and_the_last_is_kept(layout: Layout) -> None:
    serve_fleet(layout, Wires(layout), until="uploads")
    (folder,) = (layout.device("device-000") / "place/jobs").iterdir()
    path = layout.devices()["device-000"]
    shop = job.Workshop(load_device(path), path, folder)
    made: list[int] = []

    def make(number: int) -> job.Payload:
        made.append(number)
        return job.Payload("model", {"x": torch.full((2,), number)}, round=number)

    for number in (1, 1, 2, 1):
        request = job.Payload("model", {"x": torch.zeros(1)}, round=number)
        assert shop.answer(request, partial(make, number)).arrays["x"].tolist() == [number, number]
    assert made == [1, 2, 1]
    kept = sorted(path.name.partition("-")[0] for path in (folder / "answers").glob("*.safetensors"))
    assert kept == ["000001", "000002"]


def test_a_ledger_is_read_while_it_is_written(tmp_path: Path) -> None:
    (path := tmp_path / "ledger.jsonl").write_text(
        '{"round": 0, "device": "d", "direction": "up", "what": "m", "bytes": 3}\n{"ro'
    )
    assert [row.bytes for row in read_rows(path)] == [3]
    assert path.read_text().endswith('{"ro')
    assert [row.bytes for row in Ledger(path).rows()] == [3]
    assert path.read_text().endswith("}\n")


def test_a_full_disk_on_a_device_is_told_and_mended(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "device-001/place" in os.readlink(f"/proc/self/fd/{descriptor}") and not mended:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    mended: list[bool] = []
    monkeypatch.setattr(spool.os, "fsync", full)
    wires, failures = Wires(layout), {}
    with pytest.raises(FederationError, match="missing: device-001"):
        serve_fleet(layout, wires, "federation.minimum_devices=3", until="uploads",
                    tell=lambda device, state, reason: failures.update({device: reason}))  # fmt: skip
    assert "No space left on device" in failures["device-001"]
    mended.append(True)
    serve_fleet(layout, wires, "federation.minimum_devices=3", until="uploads", resume=True)
    assert trainings(layout) == dict.fromkeys(IDS, 1)
    assert wires.asked == {"device-000": 1, "device-001": 2, "device-002": 1}


def test_a_request_that_takes_too_long_is_ended_by_the_device(layout: Layout) -> None:
    path = layout.devices()["device-000"]
    path.write_text(path.read_text().replace("hours = 24.0", "hours = 0.0005"))
    config = server_config(layout, "devices.epochs=1e6", "devices.max_steps=100000000")
    config = replace(config, devices=replace(config.devices, named=config.devices.named[:1]))
    node = {"device": str(path)}
    with (
        open_folder(config, layout.server / "run", resume=False) as folder,
        LocalGrid("deepfusion.app:client_app", ["device-000"], node_config=node, preload=PRELOAD) as grid,
    ):
        server, failures = ServerApp(), {}

        @server.main()
        def main(_grid: Grid, _context: Context) -> None:
            serve(
                config, folder, prepare_data(config, folder), grid, grid.nodes, until="uploads", timeout=300,
                tell=lambda device, state, reason: failures.update({device: reason}),
                job=lambda card: job.job_payload(config, folder.path, card.model.name),
            )  # fmt: skip

        with pytest.raises(FederationError, match="none of 1 devices answered"):
            grid.serve(server)
    assert "ended by SIGALRM before it answered; it had taken all of the [limits] hours" in failures["device-000"]
