# SPDX-License-Identifier: Apache-2.0
"""Centralised training: all text in one place, as the bound that the federated methods are measured against."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepfusion.app import launch
from deepfusion.config import CONFIG, load_config, parse_config
from deepfusion.data.prepare import load_prepared
from deepfusion.errors import UploadError
from deepfusion.federation.spool import Spool
from deepfusion.methods.centralised import check_text
from deepfusion.record import Record
from deepfusion.run import private_corpus
from deepfusion.types import Payload
from small_world import small_tree, write_text

TRAINING = {"steps": 5, "optimisation": {"batch_size": 8, "learning_rate": 3e-3}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    tree = small_tree(root, method="centralised", training=TRAINING)
    for section in ("cluster", "distillation"):
        del tree[section]
    record = launch(parse_config(tree), root / "run")
    assert record is not None
    return root / "run", record


def test_the_devices_send_their_whole_text_and_nothing_else(run: tuple[Path, Record]) -> None:
    folder, record = run
    config, data, spool = load_config(folder / CONFIG), load_prepared(folder / "data"), Spool(folder / "uploads")
    for device in record.devices:
        payload, corpus = spool.get(device.id), private_corpus(config, data, device.id)
        sent = np.concatenate([corpus.document(index)[0] for index in range(len(corpus))])
        assert payload.arrays["token_ids"].tolist() == sent.tolist()
        assert set(payload.arrays) == {"token_ids", "counted", "lengths"}
    assert record.ledger.upload_bytes == sum(path.stat().st_size for path in (folder / "uploads").glob("*.safetensors"))


def test_private_text_adds_the_steps_that_the_devices_would_have_spent_on_it(run: tuple[Path, Record]) -> None:
    folder, record = run
    history = json.loads((folder / "trained" / "history.json").read_text())
    reference = json.loads((folder / "reference" / "trained" / "history.json").read_text())["joint"]
    read = 0
    for device in record.devices:
        steps = -(-device.tokens // (32 * 4))
        read += min(6, max(1, steps)) * 4 * 32
    assert len(reference) == 5
    assert len(history) == 5 + -(-read // (8 * 32))


def test_it_learns_the_private_domains(run: tuple[Path, Record]) -> None:
    record = run[1]
    assert record.method == "centralised"
    assert record.baselines.public_only is not None
    assert record.metrics.log_perplexity < record.baselines.public_only.log_perplexity


GOOD = {
    "token_ids": torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
    "counted": torch.ones(5, dtype=torch.bool),
    "lengths": torch.tensor([2, 3]),
}


def test_good_text_passes() -> None:
    check_text(Payload("text", GOOD, {"device": "a"}), "a", 10)
    nothing = {name: tensor[:0] for name, tensor in GOOD.items()}
    check_text(Payload("text", nothing, {"device": "a"}), "a", 10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": torch.tensor([1, 2, 3, 4, 10], dtype=torch.int32)}, "token ids from 1 to 10"),
        ({"token_ids": torch.tensor([-1, 2, 3, 4, 5], dtype=torch.int32)}, "token ids from -1 to 5"),
        ({"token_ids": torch.tensor([1.0, 2.0])}, "not the vectors"),
        ({"lengths": torch.tensor([[2, 3]])}, "not the vectors"),
        ({"extra": torch.zeros(3)}, "not the vectors"),
        ({"lengths": torch.tensor([2, 2])}, "do not add up"),
        ({"lengths": torch.tensor([5, 0])}, "do not add up"),
        ({"lengths": torch.tensor([2**62, 2**62, 2**62, 2**62, 5])}, "do not add up"),
        ({"counted": torch.ones(4, dtype=torch.bool)}, "5 tokens and 4 flags"),
    ],
)
def test_bad_text_is_refused(change: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UploadError, match=said):
        check_text(Payload("text", {**GOOD, **change}, {"device": "a"}), "a", 10)


def test_text_of_another_device_is_refused() -> None:
    with pytest.raises(UploadError, match="comes from 'b'"):
        check_text(Payload("text", GOOD, {"device": "b"}), "a", 10)
