# SPDX-License-Identifier: Apache-2.0
"""FedMKT in rounds: the bytes of its predictions, what a device keeps, and predictions that cannot be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.app import launch
from deepfusion.artifacts import RunFolder
from deepfusion.config import CONFIG, load_config, parse_config
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import load_prepared
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import cards
from deepfusion.errors import ConfigError, ModelError, UploadError
from deepfusion.methods import FedMkt
from deepfusion.methods.fedmkt import NAMES, _admit  # pyright: ignore[reportPrivateUsage]
from deepfusion.methods.rounds import read_round
from deepfusion.record import Record
from deepfusion.run import make_device
from deepfusion.stages.mutual import predict
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Payload, State
from small_world import rounds_tree
from wire_world import TOLD, Seen, check_ledger, tapped

SEQUENCES, KEPT, LENGTH = 12, 16, 32


def tree_of(root: Path, **changes: Any) -> dict[str, Any]:
    return rounds_tree(root, "fedmkt", **{"sequences": SEQUENCES, "kept": KEPT, **changes})


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with tapped() as found:
        yield found


@pytest.fixture(scope="module")
def run(root: Path, seen: Seen) -> tuple[Path, Record]:
    record = launch(parse_config(tree_of(root)), root / "run")
    assert record is not None
    return root / "run", record


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_the_ledger_is_the_closed_form(run: tuple[Path, Record], seen: Seen) -> None:
    """Q both ways each round: positions times kept logits times (value + index), and a loss a row; the text down besides."""
    folder, record = run
    positions = (SEQUENCES, LENGTH)
    predictions = {
        "value": torch.zeros(*positions, KEPT, dtype=torch.float16),
        "index": torch.zeros(*positions, KEPT, dtype=torch.int16),
        "loss": torch.zeros(SEQUENCES),
    }
    masks = {name: torch.zeros(positions, dtype=torch.bool) for name in ("counted", "valid")}
    text = {"input_ids": torch.zeros(positions, dtype=torch.int16), **masks}
    first = {name: models.load(Path(path)) for name, path in json.loads((folder / "initial.json").read_text()).items()}
    architecture = {device.id: device.architecture for device in record.devices}

    def due(row: dict[str, Any]) -> State:
        if row["what"] == "init":
            return {MODEL + name: t for name, t in distinct_state(first[architecture[row["device"]]]).items()}
        return {("down", "logits"): predictions | text, ("up", "logits"): predictions}.get(
            (row["direction"], row["what"]), {}
        )

    says = {
        ("down", "init"): {"eos_id", "run", "run_seed", "seed", "vocab_size"}, ("up", "ready"): {"device"},
        ("down", "logits"): {"architecture", "init_id", "parts", "run"}, ("up", "logits"): TOLD,
    }  # fmt: skip
    rows = check_ledger(folder, seen, due, says)
    assert sum(t.nbytes for t in predictions.values()) == SEQUENCES * LENGTH * KEPT * (2 + 2) + SEQUENCES * 4, "Q"
    counts, devices = Counter((row["direction"], row["what"]) for row in rows), len(record.devices)
    assert counts == {("down", "init"): devices, ("up", "ready"): devices,
                      ("down", "logits"): 2 * devices, ("up", "logits"): 2 * devices}  # fmt: skip
    assert sum(row["bytes"] for row in rows) == record.ledger.total_bytes


def test_the_moe_learns_and_the_rounds_say_from_whom(run: tuple[Path, Record]) -> None:
    start, last = (models.load(run[0] / name) for name in ("reference/merged", "rounds/1"))
    data = load_prepared(run[0] / "data")
    text = PackedText(data.public, LENGTH, 3).batch(0, 16)
    assert float(predict(last, text, 4).loss_S.mean()) < float(predict(start, text, 4).loss_S.mean())
    told = read_round(run[0] / "rounds" / "1")
    assert set(told["losses"]) == {device.id for device in run[1].devices}
    assert 0 <= told["rows_of_devices"] <= 1
    assert run[1].budget is not None
    assert run[1].budget.server_tokens == (2 * SEQUENCES + 2 * 4 + 4 * 4) * LENGTH, (
        "rounds, training before them, tuning"
    )


def test_a_round_that_a_crash_has_lost_comes_back_the_same(root: Path) -> None:
    folder, config = root / "crash", parse_config(tree_of(root))
    launch(config, folder, until="rounds")
    before, rows = (folder / "rounds" / "1" / "model.safetensors").read_bytes(), len(ledger(folder))
    for name in ("model.safetensors", ".stage.json"):
        (folder / "rounds" / "1" / name).unlink()
    launch(config, folder, resume=True, until="rounds")
    assert (folder / "rounds" / "1" / "model.safetensors").read_bytes() == before
    assert len(ledger(folder)) == rows + 2 * 6


@pytest.fixture(scope="module")
def device(run: tuple[Path, Record], root: Path) -> Device:
    config = load_config(run[0] / CONFIG)
    return replace(make_device(config, RunFolder(run[0]), cards(config.devices, config.seed)[0]), scratch=root / "own")


def request_of(folder: Path) -> Payload:
    data, model = load_prepared(folder / "data"), models.load(folder / "reference" / "merged")
    text = PackedText(data.public, LENGTH, 9).batch(0, SEQUENCES)
    arrays = {"input_ids": text.input_ids_BT.to(torch.int16), "counted": text.counted_BT, "valid": text.valid_BT}
    arrays |= dict(zip(NAMES, predict(model, text, KEPT), strict=True))
    return Payload("logits", arrays, {"parts": 2, "run": "now", "architecture": "qwen2_moe", "init_id": "x"})


def test_a_device_keeps_its_model_between_rounds(run: tuple[Path, Record], device: Device) -> None:
    method, asked = FedMkt(rounds=2, kept=KEPT), request_of(run[0])
    with pytest.raises(ModelError, match="has not kept its model"):
        method.client(device, asked)
    first = Payload("statistics", {}, {"vocab_size": 400, "eos_id": 0, "seed": 1, "run_seed": 0, "run": "now"})
    assert method.client(device, first).what == "ready"
    answers = [method.client(device, replace(asked, round=number)) for number in (0, 1, 2)]
    losses = [float(answer.arrays["loss"].mean()) for answer in answers]
    assert losses == sorted(losses, reverse=True)
    assert device.scratch is not None
    assert sorted(path.name for path in device.scratch.iterdir()) == ["own-now-2", "own-now-3"]
    other = replace(asked, metadata={**asked.metadata, "run": "another"})
    with pytest.raises(ModelError, match="has not kept its model"):
        method.client(device, other)
    again = method.client(device, replace(asked, round=2))
    assert all(torch.equal(tensor, answers[2].arrays[name]) for name, tensor in again.arrays.items()), (
        "asked twice, the same"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": lambda t: t.clone().fill_(999)}, "it predicts token 999, the vocabulary has 400"),
        ({"index": lambda t: t.clone().fill_(-1)}, "it predicts token 65535"),
        ({"loss": lambda t: t * 0}, "its own predictions make at least"),
        ({"loss": lambda t: t - 100}, "its loss on row \\d+ is"),
        ({"value": lambda t: t[:, :, :3]}, r"value has shape"),
        ({"value": lambda t: t.float()}, "value has dtype"),
    ],
)
def test_predictions_that_cannot_be_are_refused(change: dict[str, Any], said: str, run: tuple[Path, Record]) -> None:
    asked = request_of(run[0])
    good = replace(asked, arrays={name: asked.arrays[name] for name in NAMES})
    _admit(400, "device-000", good, asked)
    arrays = {name: change[name](tensor) if name in change else tensor for name, tensor in good.arrays.items()}
    with pytest.raises(UploadError, match=said):
        _admit(400, "device-000", replace(good, arrays=arrays), asked)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sequences": 0}, "sequences = 0: nothing would be exchanged"),
        ({"kept": 0}, "kept = 0: nothing"),
        ({"mixture": 1.5}, "mixture = 1.5: not between 0"),
        ({"temperature": 0.0}, "temperature = 0.0: must be finite"),
    ],
)
def test_values_that_cannot_work_are_named(change: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({**tree_of(root), **change})
