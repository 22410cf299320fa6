# SPDX-License-Identifier: Apache-2.0
"""Methods in rounds: the whole way on a tiny fleet, their ledger, and what an average of one or of equal devices is."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfusion.app import launch
from deepfusion.artifacts import RunFolder
from deepfusion.config import CONFIG, load_config, parse_config
from deepfusion.data.prepare import load_prepared
from deepfusion.devices import models
from deepfusion.devices.fleet import cards
from deepfusion.errors import ConfigError, DropoutError, FederationError, MemoryLimitError
from deepfusion.federation.door import Door
from deepfusion.methods import FedAvg, exchange
from deepfusion.methods.rounds import read_round
from deepfusion.record import Record
from deepfusion.run import Notes, make_device, make_site
from deepfusion.stages.local import steps_for
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Payload
from small_world import WARM, rounds_tree, small_tree
from wire_world import ASKED, TOLD, Seen, check_ledger, tapped


def tree_of(root: Path, method: str, **changes: Any) -> dict[str, Any]:
    tree = small_tree(root, method=method, warm_start=WARM, **changes)
    for section in ("cluster", "distillation"):
        del tree[section]
    return tree


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with tapped() as found:
        yield found


@pytest.fixture(scope="module")
def fedavg(root: Path, seen: Seen) -> tuple[Path, Record]:
    record = launch(parse_config(tree_of(root, "fedavg", rounds=2)), root / "fedavg")
    assert record is not None
    return root / "fedavg", record


def test_the_ledger_is_two_whole_models_a_device_and_round(fedavg: tuple[Path, Record], seen: Seen) -> None:
    folder, record = fedavg
    whole = {MODEL + name: tensor for name, tensor in distinct_state(models.load(folder / "moe")).items()}
    rows = check_ledger(folder, seen, lambda row: whole, {("down", "moe"): ASKED, ("up", "moe"): TOLD})
    assert len(rows) == 2 * 2 * len(record.devices)
    assert {row["round"] for row in rows} == {0, 1}
    assert sum(row["bytes"] for row in rows) == record.ledger.total_bytes


def test_every_round_is_scored_and_the_rounds_beat_public_text_alone(fedavg: tuple[Path, Record]) -> None:
    record = fedavg[1]
    assert [len(metrics.domains) for metrics in record.rounds] == [3, 3]
    assert record.rounds[1].log_perplexity < record.rounds[0].log_perplexity
    assert record.baselines.public_only is not None
    assert record.metrics.log_perplexity < record.baselines.public_only.log_perplexity


def test_a_second_run_in_the_folder_trains_nothing_again_and_a_lost_round_comes_back_the_same(
    fedavg: tuple[Path, Record], root: Path
) -> None:
    folder, record = fedavg
    before = {name: (folder / name / "model.safetensors").read_bytes() for name in ("rounds/1", "moe")}
    for name in ("rounds/1", "moe"):
        (folder / name / "model.safetensors").unlink()
        (folder / name / ".stage.json").unlink()
    sent = (folder / "ledger.jsonl").read_text().count("\n")
    again = launch(parse_config(tree_of(root, "fedavg", rounds=2)), folder, resume=True)
    assert again is not None
    assert again.metrics == record.metrics
    assert (folder / "ledger.jsonl").read_text().count("\n") == sent + 2 * len(record.devices), "one round was lost"
    assert {name: (folder / name / "model.safetensors").read_bytes() for name in before} == before


def test_one_device_and_one_round_are_plain_training(fedavg: tuple[Path, Record], root: Path) -> None:
    """... to the last bit: what is sent, trained and averaged is the model that training here gives."""
    tree = tree_of(root, "fedavg", rounds=1, balance=0.0)
    tree["devices"] |= {"count": 1}
    config = parse_config(tree)
    launch(config, root / "alone", until="rounds")
    folder = RunFolder(root / "alone")
    (card,) = cards(config.devices, config.seed)
    device = make_device(config, folder, card)
    model = models.load(folder / "reference" / "merged")
    exchange.train_here(replace(device, scratch=None), model)
    fused = distinct_state(models.load(folder / "rounds" / "0"))
    assert all(torch.equal(tensor, fused[name]) for name, tensor in distinct_state(model).items())


@pytest.mark.parametrize("parts", [1, 2, 3, 100])
def test_a_device_reads_its_text_in_parts_that_are_the_whole(
    parts: int, fedavg: tuple[Path, Record], root: Path
) -> None:
    config = load_config(fedavg[0] / CONFIG)
    card = cards(config.devices, config.seed)[0]
    device = replace(make_device(config, RunFolder(fedavg[0]), card), scratch=None)
    model = models.load(fedavg[0] / "reference" / "merged")
    steps = [int(exchange.train_here(device, model, part=part, parts=parts)["steps"]) for part in range(parts)]
    whole = steps_for(device.corpus.num_tokens, 32, device.training, device.epochs, device.max_steps)
    assert sum(steps) == whole
    assert max(steps) - min(steps) <= 1


def test_a_share_of_the_devices_takes_part_in_a_round(fedavg: tuple[Path, Record]) -> None:
    config = load_config(fedavg[0] / CONFIG)
    folder = RunFolder(fedavg[0])
    site = make_site(config, folder, load_prepared(folder / "data"))
    method = FedAvg(participation=0.5)
    asked = [tuple(card.id for card in method.participants(site, number)) for number in range(20)]
    assert {len(ids) for ids in asked} == {3}
    assert len(set(asked)) > 5, "drawn anew in each round"
    assert asked == [tuple(card.id for card in method.participants(site, number)) for number in range(20)]
    assert [tuple(card.id for card in FedAvg().participants(site, 0))] == [tuple(card.id for card in site.cards)]


def test_an_answer_of_another_round_or_shape_is_refused(fedavg: tuple[Path, Record], tmp_path: Path) -> None:
    config, notes = load_config(fedavg[0] / CONFIG), Notes()
    site = make_site(config, RunFolder(tmp_path), load_prepared(fedavg[0] / "data"), note=notes)

    def call(requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        (first, request), (second, other), (third, good), *_ = requests.items()
        told = {"device": first, "tokens": 5, "documents": 1, "architecture": "qwen2_moe"}
        yield first, Payload("moe", request.arrays, {**told, "init_id": "of another round"})
        short = {name: tensor[:1] for name, tensor in other.arrays.items()}
        yield second, Payload("moe", short, {**told, "device": second, "init_id": other.metadata["init_id"]})
        yield third, Payload("moe", good.arrays, {**told, "device": third, "init_id": good.metadata["init_id"]})

    start = fedavg[0] / "reference" / "merged"
    method = FedAvg()
    moe = method.run_round(site, call, 7, start)
    assert len([note for note in notes.sentences if "was refused" in note]) == 2
    before, after = (distinct_state(models.load(path)) for path in (start, moe))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), (
        "the good one sent back what it was sent"
    )


def dropping(
    monkeypatch: pytest.MonkeyPatch, silent: Collection[int], error: type[FederationError] = DropoutError
) -> None:
    """In these rounds every device is sent its request, which the ledger books, and none answers."""
    through = Door._exchange  # pyright: ignore[reportPrivateUsage]

    def exchange(self: Door, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        (number,) = {sent.round for sent in requests.values()}
        if number not in silent or any(sent.what in ("init", "statistics") for sent in requests.values()):
            yield from through(self, requests)
            return
        for device, sent in requests.items():
            self._send(device, sent)  # pyright: ignore[reportPrivateUsage]
        raise error(f"none of {len(requests)} devices answered; device {next(iter(requests))}: was not online")

    monkeypatch.setattr(Door, "_exchange", exchange)


@pytest.mark.parametrize("method", ["fedavg", "fedjets", "fedmkt", "hfedmoe"])
def test_a_round_without_a_device_is_skipped_and_ledgered_and_the_next_one_goes_on(
    method: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping(monkeypatch, {0})
    few = {"sequences": 48} if method == "fedmkt" else {}
    config = parse_config(rounds_tree(root, method, evaluate={"rounds": True, "public_only": False}, **few))
    record = launch(config, tmp_path)
    assert record is not None
    assert "round 1 was skipped, the model stays as it was: none of 6 devices answered" in " ".join(record.notes)
    first, skipped, last = (
        distinct_state(models.load(tmp_path / name)) for name in ("reference/merged", "rounds/0", "rounds/1")
    )
    assert all(torch.equal(tensor, skipped[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in first.items())
    assert [told.answered for told in record.round_records] == [0, 6]
    assert record.rounds[1].log_perplexity < record.rounds[0].log_perplexity
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    exchanged = {(row["round"], row["direction"]) for row in rows if row["what"] in ("moe", "gate", "logits")}
    assert exchanged == {(0, "down"), (1, "down"), (1, "up")}
    again = launch(config, tmp_path, resume=True)
    assert again is not None
    assert again.notes == record.notes


def test_a_device_that_does_not_answer_a_round_is_named_and_its_part_is_not_counted(
    fedavg: tuple[Path, Record], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = Door._exchange  # pyright: ignore[reportPrivateUsage]

    def exchange(self: Door, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        first = any(sent.what == "moe" and sent.round == 0 for sent in requests.values())
        yield from through(self, {id_: sent for id_, sent in requests.items() if not first or id_ != "device-001"})

    monkeypatch.setattr(Door, "_exchange", exchange)
    config, whole = parse_config(tree_of(root, "fedavg", rounds=2)), fedavg[1]
    short = launch(config, tmp_path)
    assert short is not None
    assert whole.budget is not None
    assert short.budget is not None
    assert "round 1 had no answer of 1 of 6 devices: device-001" in short.notes
    assert not any("had no answer" in note for note in whole.notes)
    options = config.devices.training
    length = config.data.sequence_length
    steps = steps_for(whole.devices[1].tokens, length, options, config.devices.epochs, config.devices.max_steps)
    assert whole.budget.device_tokens - short.budget.device_tokens == steps // 2 * options.batch_size * length
    assert short.budget.device_flops < whole.budget.device_flops


def test_a_round_of_adapters_may_be_skipped_between_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping(monkeypatch, {0, 2})
    launch(parse_config(rounds_tree(root, "hfedmoe", adapter_rank=2, rounds=4)), tmp_path, until="rounds")
    states = [distinct_state(models.load(tmp_path / "rounds" / str(n))) for n in range(4)]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(states)]
    assert same == [False, True, False]


def test_below_the_operators_minimum_a_round_stops_and_resumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(rounds_tree(root, "fedavg", federation={"engine": "inline", "minimum_devices": 2}))
    with monkeypatch.context() as patch:
        dropping(patch, {1})
        with pytest.raises(DropoutError, match="none of 6 devices"):
            launch(config, tmp_path)
    assert launch(config, tmp_path, resume=True) is not None
    assert read_round(tmp_path / "rounds" / "1")["answered"] != []


def test_devices_that_say_what_is_wrong_end_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping(monkeypatch, {0}, FederationError)
    with pytest.raises(FederationError, match="none of 6 devices"):
        launch(parse_config(rounds_tree(root, "fedavg")), tmp_path)
    assert not (tmp_path / "rounds" / "0").exists()


def test_without_any_answer_in_any_round_the_run_ends_and_asks_again_when_resumed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(rounds_tree(root, "fedavg"))
    with monkeypatch.context() as patch:
        dropping(patch, {0, 1})
        with pytest.raises(DropoutError, match=r"in any of 2 rounds \(none of 6 devices"):
            launch(config, tmp_path)
    assert launch(config, tmp_path, resume=True) is not None
    assert [len(read_round(tmp_path / "rounds" / str(n))["answered"]) for n in (0, 1)] == [6, 6]


def test_devices_that_cannot_hold_the_whole_model_are_refused_and_counted(root: Path) -> None:
    tree = tree_of(root, "fedavg", rounds=1)
    small = {"id": "phone", "model": "gpt2", "files": ["garden/private.jsonl"], "memory_limit_gib": 1e-3}
    tree["devices"] |= {"count": 2, "named": [small]}
    with pytest.raises(MemoryLimitError, match=r"phone \(qwen2_moe\) needs"):
        launch(parse_config(tree), root / "stopped")
    tree["devices"] |= {"unfit": "leave out"}
    record = launch(parse_config(tree), root / "left")
    assert record is not None
    assert [device.id for device in record.devices] == ["device-000", "device-001"]
    assert "needs" in record.failures["phone"]
    assert any("1 devices are left out" in note for note in record.notes)
    tree["devices"] |= {"memory_limit_gib": 1e-3}
    with pytest.raises(MemoryLimitError):
        launch(parse_config(tree), root / "nobody")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": 0}, "rounds = 0: no device would train"),
        ({"participation": 0.0}, "participation = 0.0: not a share"),
        ({"balance": -1.0}, "balance = -1.0: must be finite"),
    ],
)
def test_values_that_cannot_work_are_named(change: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({**tree_of(root, "fedavg"), **change})
