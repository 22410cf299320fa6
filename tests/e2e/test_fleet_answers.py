# SPDX-License-Identifier: Apache-2.0
"""A device's answers in a fleet in one process: what is refused is told, and what is kept is of one run alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from deepfusion import artifacts
from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.errors import DiskError, FederationError
from deepfusion.federation.ledger import read_rows
from deepfusion.federation.spool import Spool
from deepfusion.fleet import job
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.layout import Layout
from deepfusion.methods.gathering import ASKED
from deepfusion.training import Checkpoint
from deepfusion.types import Payload
from fleet_world import IDS, Wires, fleet_tree, make_fleet, result_bytes, serve_fleet, server_config

REQUEST, ANSWER = Payload("model", {"x": torch.zeros(1)}), Payload("model", {"x": torch.ones(2)})
AT_WORK = """
import os, signal, sys
from pathlib import Path
from deepfusion.artifacts import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    if sys.argv[2] == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    sys.stdin.read()
"""


@pytest.fixture
def layout(root: Path, tmp_path: Path) -> Layout:
    """A fleet that has never run."""
    return make_fleet(root, tmp_path / "trial")


def test_whose_upload_is_refused_has_failed_with_the_reason_and_the_run_goes_on(layout: Layout) -> None:
    path, said = layout.devices()[IDS[1]], f"device {IDS[1]}: its upload says device = "
    path.write_text(path.read_text().replace(f'id = "{IDS[1]}"', f'id = "{IDS[0]}"'))  # what it sends is another one's
    states: dict[str, list[str]] = {device_id: [] for device_id in IDS}
    last: dict[str, str] = {}

    def tell(device_id: str, state: str, reason: str) -> None:
        states[device_id].append(state)
        last[device_id] = reason

    with pytest.raises(FederationError, match=rf"= 3; missing: {IDS[1]}; what .*\n  {IDS[1]}: {said}"):
        serve_fleet(layout, Wires(layout), "federation.minimum_devices=3")
    serve_fleet(layout, Wires(layout), resume=True, tell=tell)
    written = json.loads((layout.server / "run/record.json").read_text())
    assert list(written["failures"]) == [IDS[1]]
    assert written["failures"][IDS[1]].startswith(said)
    assert states == {IDS[0]: [], IDS[1]: ["asked", "failed"], IDS[2]: []}
    assert last[IDS[1]] == written["failures"][IDS[1]]


def test_a_new_run_is_answered_from_the_text_as_it_is_now_and_a_resumed_one_as_before(layout: Layout) -> None:
    first, second = IDS[:2]

    def uploads(*, resume: bool) -> dict[str, bytes]:
        serve_fleet(layout, Wires(layout), until="uploads", resume=resume)
        return result_bytes(layout.server / "run")

    before = uploads(resume=False)
    text = layout.device(first) / "text.jsonl"
    text.write_text(text.read_text() * 2)
    shutil.rmtree(layout.server / "run/uploads")
    assert uploads(resume=True) == before, "the text of a run is the one that it began with"
    shutil.rmtree(layout.server / "run")
    after = uploads(resume=False)
    assert after[f"uploads/{first}.safetensors"] != before[f"uploads/{first}.safetensors"]
    assert after[f"uploads/{second}.safetensors"] == before[f"uploads/{second}.safetensors"]
    kept = [path.stat().st_ino for path in layout.device(second).glob("place/jobs/*/answers/*.safetensors")]
    assert len(kept) == 2, "trained anew, to the same bytes"


def open_shop(layout: Layout) -> job.Workshop:
    """The first device's workshop, before it was asked anything."""
    serve_fleet(layout, Wires(layout), until="initial")
    path = layout.devices()[IDS[0]]
    own = load_device(path)
    return job.open_workshop(
        own, path, job.job_payload(server_config(layout), layout.server / "run", own.model.name), 1
    )


def when_turned_away(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something whenever somebody finds a lock taken."""
    lock = artifacts._lock

    def told(descriptor: int, kind: int) -> bool:
        taken = lock(descriptor, kind)
        if not taken:
            act()
        return taken

    monkeypatch.setattr(artifacts, "_lock", told)


def test_of_two_clients_at_work_on_a_request_one_trains_and_both_answer(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, turned_away = open_shop(layout), threading.Event()
    when_turned_away(monkeypatch, turned_away.set)
    trained: list[str] = []
    answers: list[Payload] = []

    def second() -> None:
        answers.append(shop.answer(REQUEST, lambda: trained.append("second") or ANSWER))

    other = threading.Thread(target=second)

    def first() -> Payload:
        trained.append("first")
        other.start()
        assert turned_away.wait(20)
        return ANSWER

    answers.append(shop.answer(REQUEST, first))
    other.join()
    assert trained == ["first"]
    assert [answer.arrays["x"].tolist() for answer in answers] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_client_takes_over_from_one_that_has_died_or_was_stopped(
    end: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = open_shop(layout)
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, str(shop.folder.path), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        when_turned_away(monkeypatch, process.kill if end == "killed" else lambda: None)
        assert shop.answer(REQUEST, lambda: ANSWER).arrays["x"].tolist() == [1, 1]
        assert process.wait(20) == -signal.SIGKILL


def test_what_cannot_be_put_under_its_name_is_told_like_a_full_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.path("a").mkdir()
    with pytest.raises(DiskError, match=r"a\.safetensors: [\d,]+ bytes cannot be written \(Is a directory\)"):
        spool.put("a", ANSWER)
    assert list(tmp_path.glob(".*")) == []


def test_a_checkpoint_goes_when_the_answer_is_on_the_disk(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.stages.local.Checkpoint", partial(Checkpoint, every_seconds=0.0))
    put, seen = Spool.put, set[Path]()

    def watched(spool: Spool, name: str, payload: Payload) -> None:
        seen.update(layout.folder.glob("devices/*/place/**/training.safetensors"))
        put(spool, name, payload)

    monkeypatch.setattr(Spool, "put", watched)
    serve_fleet(layout, Wires(layout), until="uploads")
    assert len(seen) == len(IDS)
    assert not any(path.exists() for path in seen)
    assert list(layout.folder.glob("devices/*/place/jobs/*/training/*")) == []


def test_medoids_of_a_fleet_send_small_models_and_end_with_the_bytes_of_one_machine(
    layout: Layout, root: Path, tmp_path: Path
) -> None:
    upload = {"format": "nf4", "select": "medoids", "medoids": 1}
    tree = {**fleet_tree(root, upload=upload), "cluster": {"type": "kmeans", "num_clusters": 1}}
    launch(parse_config(tree), tmp_path / "local")
    wires = Wires(layout)
    changes = [f"upload.{key}={value}" for key, value in upload.items()]
    record = serve_fleet(layout, wires, "cluster.num_clusters=1", *changes)
    run = layout.server / "run"
    assert result_bytes(run) == result_bytes(tmp_path / "local")
    asked = json.loads((run / ASKED).read_text())
    assert 0 < len(asked) < len(IDS), "one of each architecture"
    assert wires.asked == {device_id: 2 if device_id in asked else 1 for device_id in IDS}
    sent = {
        row.device: row.bytes for row in read_rows(run / "ledger.jsonl") if (row.direction, row.what) == ("up", "model")
    }
    assert sorted(sent) == asked
    assert all(
        count < 0.4 * (run / f"uploads/{device_id}.safetensors").stat().st_size for device_id, count in sent.items()
    )
    assert record is not None
    assert record.failures == {}
