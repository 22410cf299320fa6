# SPDX-License-Identifier: Apache-2.0
"""What a server that lies gets out of devices whose owners keep their text to themselves: refusals, and noise that stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepfusion.errors import FederationError
from deepfusion.federation.payload import read_metadata
from deepfusion.fleet import job
from deepfusion.fleet.device_file import load_device
from deepfusion.fleet.layout import Layout
from deepfusion.methods import exchange
from fleet_world import IDS, Wires, make_fleet, serve_fleet, server_config

PRIVATE = "embed.epsilon=1.0"


@pytest.fixture(scope="module")
def pristine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A fleet that has never run."""
    return make_fleet(root, tmp_path_factory.mktemp("fleet") / "trial", embed={"type": "tfidf"})


@pytest.fixture
def layout(pristine: Layout, tmp_path: Path) -> Layout:
    """A fleet of the test's own."""
    shutil.copytree(pristine.folder, tmp_path / "trial")
    return Layout(tmp_path / "trial")


def demand(layout: Layout, device_id: str, *lines: str) -> None:
    """Write a [privacy] section into a device's file."""
    path = layout.devices()[device_id]
    head, tail = path.read_text().split("[privacy]\n")
    path.write_text(head + "[privacy]\n" + "".join(line + "\n" for line in lines) + tail)


def embedding(layout: Layout, device_id: str) -> torch.Tensor:
    """What a device sent."""
    return load_file(layout.server / f"run/uploads/{device_id}.safetensors")["embedding"]


GIVEN = [("embedding", 1.0), ("training", None)]
"""What a device has given away once: a model without noise costs more than any number."""


def account(layout: Layout, device_id: str) -> list[dict[str, object]]:
    """What a device has given away."""
    path = layout.device(device_id) / "place/privacy/account.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_noise_is_the_devices_own_and_the_same_when_asked_again(layout: Layout, tmp_path: Path) -> None:
    serve_fleet(layout, Wires(layout), PRIVATE, until="uploads")
    first = {device_id: embedding(layout, device_id) for device_id in IDS}
    assert [(row["what"], row.get("epsilon")) for row in account(layout, IDS[0])] == GIVEN
    # asked again, with its kept answers lost
    for folder in layout.folder.glob("devices/*/place/jobs/*/answers"):
        shutil.rmtree(folder)
    shutil.rmtree(layout.server / "run/uploads")
    serve_fleet(layout, Wires(layout), PRIVATE, until="uploads", resume=True)
    assert all(torch.equal(embedding(layout, device_id), first[device_id]) for device_id in IDS)
    assert len(account(layout, IDS[0])) == 2
    # who knows all that the server knows, and not the secret, makes other noise
    (layout.device(IDS[0]) / "place/privacy/secret").write_bytes(bytes(32))
    shutil.rmtree(layout.server / "run/uploads")
    shutil.rmtree(next((layout.device(IDS[0]) / "place/jobs").iterdir()) / "answers")
    serve_fleet(layout, Wires(layout), PRIVATE, until="uploads", resume=True)
    assert not torch.equal(embedding(layout, IDS[0]), first[IDS[0]])
    assert torch.equal(embedding(layout, IDS[1]), first[IDS[1]])
    # another run of the same server is another release
    shutil.rmtree(layout.server / "run")
    serve_fleet(layout, Wires(layout), PRIVATE, until="uploads")
    assert not torch.equal(embedding(layout, IDS[1]), first[IDS[1]])
    assert len(account(layout, IDS[1])) == 4


def test_a_device_answers_until_its_budget_is_spent(layout: Layout) -> None:
    demand(layout, IDS[0], "embedding_epsilon = 1.5")
    failures: dict[str, str] = {}
    for seed in range(2):
        shutil.rmtree(layout.server / "run", ignore_errors=True)
        serve_fleet(layout, Wires(layout), PRIVATE, f"seed={seed}", until="uploads",
                    tell=lambda device, state, reason: failures.update({device: reason}))  # fmt: skip
    assert "device-000 has spent epsilon = 1 of 1.5 on embeddings, this one would cost 1 more" in failures[IDS[0]]
    assert failures[IDS[1]] == ""
    assert [(row["what"], row.get("epsilon")) for row in account(layout, IDS[0])] == GIVEN


def test_an_embedding_without_noise_is_refused_where_noise_is_demanded_before_anything_is_trained(
    layout: Layout,
) -> None:
    for device_id in IDS:
        demand(layout, device_id, "embedding_epsilon = 1.0")
    with pytest.raises(FederationError, match=r"PrivacyError: .* no embedding of its text away without noise"):
        serve_fleet(layout, Wires(layout))
    assert not list(layout.folder.glob("devices/*/place/jobs/*/training"))
    assert account(layout, IDS[0]) == []


def test_a_device_that_wants_private_training_trains_no_other_way_and_no_further_than_its_budget(
    layout: Layout,
) -> None:
    demand(layout, IDS[0], "epsilon = 2.5")
    demand(layout, IDS[1], "epsilon = 2.0")
    failures: dict[str, str] = {}

    def serve(*overrides: str) -> None:
        shutil.rmtree(layout.server / "run", ignore_errors=True)
        failures.clear()
        serve_fleet(layout, Wires(layout), *overrides, until="uploads",
                    tell=lambda device, state, reason: failures.update({device: reason}))  # fmt: skip

    serve("devices.max_steps=2")
    assert "trains with differential privacy only; ask with [devices.privacy] epsilon = 2.5 or less" in failures[IDS[0]]
    assert failures[IDS[2]] == ""
    private = "devices.privacy.epsilon=2.5"
    serve("devices.max_steps=2", private)
    assert failures[IDS[0]] == ""
    assert "has spent epsilon = 0 of 2 at delta = 1e-05 on models, with this one it would be 2." in failures[IDS[1]]
    told = read_metadata(layout.server / f"run/uploads/{IDS[0]}.safetensors")
    assert 2.4 < told["epsilon"] <= 2.5
    assert told["tokens"] == 32 * told["documents"], "not how many they really are"
    assert "first_loss" not in told
    serve("devices.max_steps=2", private, "seed=1")
    assert "has spent epsilon = 2." in failures[IDS[0]]
    assert "of 2.5 at delta = 1e-05 on models, with this one it would be" in failures[IDS[0]]


def test_statistics_that_single_out_a_word_are_refused_by_the_device(layout: Layout) -> None:
    serve_fleet(layout, Wires(layout), until="initial")
    config, path = server_config(layout), layout.devices()[IDS[0]]
    sent = job.job_payload(config, layout.server / "run", load_device(path).model.name)
    idf = torch.ones(2**15).index_fill(0, torch.tensor([123]), 20.0)
    published = {exchange.PUBLISHED + "idf": idf, exchange.PUBLISHED + "mean": torch.zeros(2**15)}
    request = job.Payload("embedding", published, {"run_seed": 0})
    device = job.open_workshop(load_device(path), path, sent, 1).device(request)
    with pytest.raises(job.UploadError, match="weighs a word 20 times as much as the median one"):
        config.method.client(device, request)
    assert not list(layout.device(IDS[0]).rglob("account.jsonl")), "what was not given away is not charged"


@pytest.mark.parametrize("demanded", ["epsilon = 2.5", "embedding_epsilon = 1.0"])
def test_a_device_whose_owner_demands_privacy_does_not_say_on_what_it_failed(
    demanded: str, layout: Layout, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_arguments: object, **_named: object) -> None:
        raise ValueError("the word is quay")

    monkeypatch.setattr(exchange, "train_causal_lm", fails)
    demand(layout, IDS[0], demanded)
    failures: dict[str, str] = {}
    with pytest.raises(FederationError, match="none of 3 devices answered"):
        serve_fleet(layout, Wires(layout), PRIVATE, "devices.privacy.epsilon=2.5", until="uploads",
                    tell=lambda device, state, reason: failures.update({device: reason}))  # fmt: skip
    assert job.FAILED in failures[IDS[0]]
    assert "quay" not in failures[IDS[0]]
    assert "quay" in failures[IDS[1]], "whose owner demands nothing"
    assert "ValueError: the word is quay" in capfd.readouterr().err, "the device's log"
