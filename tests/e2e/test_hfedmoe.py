# SPDX-License-Identifier: Apache-2.0
"""HFedMoE: what crosses the door, what is averaged over whom, and answers that are not what they should be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepfusion.app import launch
from deepfusion.artifacts import RunFolder
from deepfusion.config import CONFIG, load_config, parse_config
from deepfusion.data.prepare import load_prepared
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import cards
from deepfusion.devices.memory import num_parameters
from deepfusion.errors import ConfigError, ModelError, UploadError
from deepfusion.methods import HFedMoE, selective
from deepfusion.methods.base import Training
from deepfusion.methods.holding import TABLES, check_returned
from deepfusion.methods.learning import ADAPTERS, FROZEN, Adapters, Everything, check_products
from deepfusion.methods.rounds import read_round
from deepfusion.moe.base import ROUTER
from deepfusion.moe.hosting import apart, expert_of, with_experts
from deepfusion.record import Record
from deepfusion.run import make_device, make_site
from deepfusion.stages.proxy import MODEL
from deepfusion.stages.selective import ExpertSelection
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Payload, State
from small_world import QUIET, WARM, rounds_tree, small_tree
from wire_world import ASKED, TOLD, Seen, check_ledger, tapped


def tree_of(root: Path, **changes: Any) -> dict[str, Any]:
    return rounds_tree(root, "hfedmoe", **changes)


ALL = {(layer, expert) for layer in (0, 1) for expert in range(4)}
SAYS = {("down", "moe"): {*ASKED, "budget", "hosted", "since"}, ("up", "moe"): {*TOLD, "routed"}}


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    """What crossed the door in each of the runs below."""
    return {}


@pytest.fixture(scope="module")
def run(root: Path, seen: dict[str, Seen]) -> tuple[Path, Record]:
    with tapped() as seen["full"]:
        record = launch(parse_config(tree_of(root, threshold=0.2)), root / "full")
    assert record is not None
    return root / "full", record


@pytest.fixture(scope="module")
def subset(root: Path, seen: dict[str, Seen]) -> Path:
    with tapped() as seen["subset"]:
        launch(parse_config(tree_of(root, host="subset", shares=[0.5, 1.0])), root / "subset", until="rounds")
    return root / "subset"


def pieces_of(folder: Path) -> State:
    return apart(distinct_state(models.load(folder)))


def size(pieces: State) -> int:
    return 4 * sum(tensor.numel() for tensor in pieces.values())


def with_experts_of(pieces: State, experts: Collection[tuple[int, int]]) -> State:
    """S + G and these experts (layer, index), as a round's message names them."""
    return {MODEL + n: t for n, t in pieces.items() if (at := expert_of(n)) is None or at in experts}


def sent_back(folder: Path, seen: Seen, row: dict[str, Any], pieces: State) -> State:
    """What is due of an answer: S + G, as many experts as the round tells (which ones, the message says), three tables."""
    names, _ = seen[row["round"], row["device"], "up", "moe"]
    sent = {at for name in names if (at := expert_of(name))}
    assert len(sent) == read_round(folder / "rounds" / str(row["round"]))["devices"][row["device"]]["uploaded"]
    return with_experts_of(pieces, sent) | {name: torch.zeros(2, 4, dtype=dtype) for name, dtype in TABLES.items()}


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_the_ledger_is_the_closed_form(run: tuple[Path, Record], seen: dict[str, Seen]) -> None:
    """Down: everything, later S + G and the experts that have changed; up: S + G, the experts sent, three tables."""
    folder, record = run
    before, between = pieces_of(folder / "reference" / "merged"), pieces_of(folder / "rounds" / "0")
    changed = {at for n, t in between.items() if (at := expert_of(n)) and not torch.equal(t, before[n])}

    def due(row: dict[str, Any]) -> State:
        if row["direction"] == "up":
            return sent_back(folder, seen["full"], row, between)
        return with_experts_of(between, changed if row["round"] else ALL)

    rows = check_ledger(folder, seen["full"], due, SAYS)
    assert len(rows) == 2 * 2 * len(record.devices)
    assert sum(row["bytes"] for row in rows) == record.ledger.total_bytes


def test_what_is_sent_was_trained_and_what_was_trained_was_routed(run: tuple[Path, Record]) -> None:
    for number in (0, 1):
        said = read_round(run[0] / "rounds" / str(number))
        assert said["answered"] == said["asked"] == [device.id for device in run[1].devices]
        assert said["gate_scale"] > 0
        for told in said["devices"].values():
            assert 0 < told["uploaded"] <= told["trained"] <= told["routed"] <= 8
            assert 0 < told["coverage"] <= 1
            assert [sum(row) for row in told["usage"]] == pytest.approx([1.0, 1.0], abs=1e-4)
    budgets = read_round(run[0] / "rounds" / "0")["budgets"].values()
    assert sorted(budgets) == [2, 2, 4, 4, 6, 8], "dealt out evenly"
    for record in run[1].round_records:
        assert (record.asked, record.answered) == (6, 6)
        assert record.by_budget == {"2": (2, 2), "4": (2, 2), "6": (1, 1), "8": (1, 1)}
        assert record.routed is not None
        assert record.trained is not None
        assert record.uploaded is not None
        assert 0 < record.uploaded <= record.trained <= record.routed <= 1


def test_the_page_shows_the_rounds(run: tuple[Path, Record]) -> None:
    page = (run[0] / "report.html").read_text()
    told = run[1].round_records[1]
    assert told.gate_scale is not None
    assert told.trained is not None
    assert "<h2>Rounds</h2>" in page
    assert f"<td>{told.gate_scale:.4f}</td>" in page
    assert f"<td>{100 * told.trained:.0f}%</td>" in page


@pytest.fixture(scope="module")
def adapted(root: Path, seen: dict[str, Seen]) -> Path:
    with tapped() as seen["adapted"]:
        launch(parse_config(tree_of(root, threshold=0.2, adapter_rank=2)), root / "adapted", until="rounds")
    return root / "adapted"


def test_with_adapters_the_model_is_sent_once_and_then_adapters_and_routers(
    adapted: Path, seen: dict[str, Seen]
) -> None:
    first, fresh = models.load(adapted / "reference" / "merged"), Adapters(2, 0)
    whole = distinct_state(first)
    before = apart(fresh.state(first, adapted / "reference" / "merged", adapted / "reference" / "merged"))
    routers = {name: tensor for name, tensor in whole.items() if ROUTER.search(name)}
    parts = apart({**load_file(adapted / "rounds" / "0" / ADAPTERS), **routers})
    assert size(parts) == 4 * fresh.num_parameters(first.config) < num_parameters(first.config), (
        "a quarter of the whole"
    )
    changed = {at for n, t in parts.items() if (at := expert_of(n)) and not torch.equal(t, before[n])}

    def due(row: dict[str, Any]) -> State:
        if row["direction"] == "up":
            return sent_back(adapted, seen["adapted"], row, parts)
        if row["round"]:
            return with_experts_of(parts, changed)
        frozen = {MODEL + FROZEN + name: tensor for name, tensor in whole.items() if name not in routers}
        return {MODEL + name: tensor for name, tensor in parts.items()} | frozen

    assert len(check_ledger(adapted, seen["adapted"], due, SAYS)) == 2 * 2 * 6


def test_with_adapters_a_round_s_model_is_the_first_one_and_their_products(adapted: Path) -> None:
    first, last = (distinct_state(models.load(adapted / name)) for name in ("reference/merged", "rounds/1"))
    adapters = load_file(adapted / "rounds" / "1" / ADAPTERS)
    moved = 0
    for name, tensor in last.items():
        if f"lora_A.{name}" in adapters:
            product = adapters[f"lora_B.{name}"] @ adapters[f"lora_A.{name}"]
            assert torch.equal(tensor, first[name] + product), name
            moved += not torch.equal(tensor, first[name])
        else:
            assert torch.equal(tensor, first[name]) is not bool(ROUTER.search(name)), name
    assert moved == 2 * 9, "of each layer four of attention, three of the shared expert, the experts' two"


def test_adapters_whose_product_is_not_finite_are_refused() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    fine = {f"lora_A.{name}": torch.full((2, 3), 1e3), f"lora_B.{name}": torch.full((4, 2), 1e3)}
    check_products(fine, "d")
    with pytest.raises(UploadError, match=f"device d: the adapter of {name} makes numbers that are not finite"):
        check_products({key: tensor * 1e22 for key, tensor in fine.items()}, "d")


def test_a_round_that_a_crash_has_lost_comes_back_the_same(root: Path) -> None:
    folder, config = root / "crash", parse_config(tree_of(root, threshold=0.2))
    launch(config, folder, until="rounds")
    before, rows = (folder / "rounds" / "1" / "model.safetensors").read_bytes(), len(ledger(folder))
    for name in ("model.safetensors", ".stage.json"):
        (folder / "rounds" / "1" / name).unlink()
    launch(config, folder, resume=True, until="rounds")
    assert (folder / "rounds" / "1" / "model.safetensors").read_bytes() == before
    assert len(ledger(folder)) == rows + 2 * 6, "one round was lost"


def test_a_device_of_half_the_experts_is_sent_half_and_later_the_ones_it_used(
    subset: Path, seen: dict[str, Seen]
) -> None:
    whole, said = pieces_of(subset / "reference" / "merged"), read_round(subset / "rounds" / "0")
    assert set(said["budgets"].values()) == {4, 8}

    def due(row: dict[str, Any]) -> State:
        if row["direction"] == "up":
            return sent_back(subset, seen["subset"], row, whole)
        hosted = read_round(subset / "rounds" / str(row["round"]))["devices"][row["device"]]["hosted"]
        experts = {(layer, expert) for layer, row_E in enumerate(hosted) for expert in row_E}
        assert len(experts) == said["budgets"][row["device"]]
        return with_experts_of(whole, experts)

    check_ledger(subset, seen["subset"], due, SAYS)
    later = read_round(subset / "rounds" / "1")["devices"]
    for device, told in said["devices"].items():
        assert all(value > 0 for row in told["usage"] for value in row), "over all experts, by the whole router"
        held = said["budgets"][device] // 2
        for row, hosted in zip(told["usage"], later[device]["hosted"], strict=True):
            assert hosted == sorted(sorted(range(4), key=lambda e, row=row: (-row[e], e))[:held])


def test_an_expert_that_nobody_sends_back_stays_as_it_was_and_is_not_sent_again(root: Path) -> None:
    with tapped() as seen:
        launch(parse_config(tree_of(root, threshold=0.9)), root / "nobody", until="rounds")
    start, end = pieces_of(root / "nobody" / "reference" / "merged"), pieces_of(root / "nobody" / "rounds" / "1")
    for name, tensor in start.items():
        assert torch.equal(tensor, end[name]) is (expert_of(name) is not None), name
    assert read_round(root / "nobody" / "rounds" / "0")["gate_scale"] == 0, "the gate is averaged by tokens then"

    def due(row: dict[str, Any]) -> State:
        if row["direction"] == "up":
            return sent_back(root / "nobody", seen, row, start)
        return with_experts_of(start, set() if row["round"] else ALL)

    assert len(check_ledger(root / "nobody", seen, due, SAYS)) == 2 * 2 * 6


def test_without_threshold_and_with_every_expert_trained_the_experts_are_fedavgs(root: Path) -> None:
    common = {"threshold": 0.0, "shares": [1.0], "selection": {"bottleneck": 0.0}}
    for name in ("selective", "fedavg"):
        launch(parse_config(tree_of(root, average=name, **common)), root / name, until="rounds")
    told = read_round(root / "selective" / "rounds" / "0")["devices"].values()
    assert all(said["trained"] == said["uploaded"] == 8 for said in told)
    ours, theirs = (pieces_of(root / name / "rounds" / "0") for name in ("selective", "fedavg"))
    for name, tensor in ours.items():
        if not ROUTER.search(name):
            assert torch.equal(tensor, theirs[name]), name
    gates = [name for name in ours if ROUTER.search(name)]
    assert any(not torch.equal(ours[name], theirs[name]) for name in gates)


def test_the_literal_weights_shrink_the_gate(root: Path, run: tuple[Path, Record]) -> None:
    launch(parse_config(tree_of(root, threshold=0.2, gate_weights="literal")), root / "literal", until="rounds")
    name = "model.layers.0.mlp.gate.weight"
    literal, kept = (pieces_of(folder / "rounds" / "0")[name] for folder in (root / "literal", run[0]))
    scale = read_round(root / "literal" / "rounds" / "0")["gate_scale"]
    assert scale < 0.9
    assert torch.allclose(literal, kept * scale, atol=1e-7)


def test_budgets_out_of_memory_are_what_fits(root: Path) -> None:
    config = parse_config(tree_of(root, host="subset", budget="memory"))
    target = config.target.make(400, 32, None)
    parts = [with_experts(target, n) for n in (2, 3, 4)]
    needs = [Training(p, remade=Everything().num_remade(p)).memory(config.devices.training, 32) for p in parts]
    devices = replace(config.devices, memory_limit_gib=(needs[1] + 1) / 2**30)
    config = replace(config, devices=devices)
    site = make_site(config, RunFolder(root / "memory"), load_prepared(root / "full" / "data"))
    assert isinstance(config.method, HFedMoE)
    assert set(config.method.means(site).values()) == {(3, 6)}


def test_deepfusion_goes_on_with_its_merged_moe_in_the_federation(root: Path) -> None:
    tree = small_tree(root, warm_start=WARM, evaluate={**QUIET, "devices": False, "proxies": False, "students": False})
    tree["devices"]["max_steps"] = 4
    plain = launch(parse_config(tree), root / "plain")
    more = launch(parse_config({**tree, "continue": {"type": "hfedmoe", "rounds": 2}}), root / "continued")
    assert plain is not None
    assert more is not None
    folder = root / "continued"
    assert (folder / "tuned" / "model.safetensors").read_bytes() == (
        root / "plain" / "moe" / "model.safetensors"
    ).read_bytes()
    assert (folder / "moe" / "model.safetensors").read_bytes() == (
        folder / "rounds" / "1" / "model.safetensors"
    ).read_bytes()
    assert len(more.round_records) == 2
    assert more.metrics.log_perplexity < plain.metrics.log_perplexity, "private text read with the MoE itself"
    assert plain.budget is not None
    assert more.budget is not None
    assert more.budget.device_tokens == 2 * plain.budget.device_tokens
    assert more.devices[0].parameters > plain.devices[0].parameters, "a device holds the MoE as well"


def asked_first(folder: Path, place: int) -> tuple[HFedMoE, Device, Payload]:
    """A run's method, one of its devices, and what that was asked in the first round."""
    config = load_config(folder / CONFIG)
    site = make_site(config, RunFolder(folder), load_prepared(folder / "data"))
    method, card, sent = config.method, cards(config.devices, config.seed)[place], folder / "reference" / "merged"
    assert isinstance(method, HFedMoE)
    model = models.load(sent)
    request = method._request(
        site, [], card, method.means(site)[card.id], model.config, pieces_of(sent), [sent], {}, {}, Everything()
    )  # pyright: ignore[reportPrivateUsage]
    request = replace(request, metadata={**request.metadata, "architecture": "qwen2_moe", "init_id": "x"})
    return method, replace(make_device(config, RunFolder(folder), card), scratch=None), request


@pytest.fixture(scope="module")
def exchange(run: tuple[Path, Record]) -> tuple[Device, Payload, Payload]:
    """A device, what it was asked in the first round, and what it answers."""
    method, device, request = asked_first(run[0], 0)
    return device, request, method.client(device, request)


def test_the_experts_that_are_sent_are_among_those_trained_and_these_among_those_routed(
    run: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    choosers: list[ExpertSelection] = []

    def watched(*arguments: Any) -> ExpertSelection:
        choosers.append(ExpertSelection(*arguments))
        return choosers[-1]

    monkeypatch.setattr(selective, "ExpertSelection", watched)
    left_out = Counter[str]()
    for place, record in enumerate(run[1].devices):
        method, device, request = asked_first(run[0], place)
        answer = replace(method, threshold=0.25).client(device, request)  # a threshold that stops some
        routed = {(layer, expert) for layer, expert in choosers[-1].routed_LE.nonzero().tolist()}
        trained = {(layer, expert) for layer, expert in answer.arrays["count"].nonzero().tolist()}
        sent = {at for name in answer.arrays if (at := expert_of(name))}
        assert sent <= trained <= routed
        assert sent == {at for at in trained if float(answer.arrays["usage"][at]) >= 0.25}
        told = read_round(run[0] / "rounds" / "0")["devices"][record.id]
        assert told["routed"] == answer.metadata["routed"] == len(routed)
        assert told["trained"] == len(trained)
        left_out += Counter(untrained=len(routed - trained), unsent=len(trained - sent))
    assert left_out["untrained"]
    assert left_out["unsent"], "or all sets were equal"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"usage": None}, "its usage of the experts is not a table"),
        ({"count": torch.zeros(2, 3, dtype=torch.int32)}, "its count of the experts is not a table"),
        ({"score": torch.full((2, 4), -1.0)}, "its score of the experts is not a table"),
        ({"count": torch.zeros(2, 4, dtype=torch.int32)}, "which it says that it did not use and train"),
        (
            {"usage": torch.full((2, 4), 1e30), "score": torch.full((2, 4), 1e30)},
            "its usage of the experts is not a table",
        ),
        ({"usage": torch.full((2, 4), 0.9)}, "usage of a layer's experts does not sum to 1"),
        ({"usage": torch.tensor([[1.0, 0, 0, 0]] * 2)}, "which it says that it did not use and train"),
        ({MODEL + "model.layers.0.mlp.experts.down_proj:x": torch.zeros(32, 48)}, "1 tensors were not asked for"),
        ({MODEL + "model.norm.weight": None}, "1 tensors are missing"),
        ({MODEL + "model.layers.0.mlp.experts.down_proj:9": torch.zeros(32, 48)}, "1 tensors were not asked for"),
        ({MODEL + "model.norm.weight": torch.zeros(7)}, r"has shape \[7\]"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    change: dict[str, torch.Tensor | None],
    said: str,
    exchange: tuple[Device, Payload, Payload],
    run: tuple[Path, Record],
) -> None:
    device, request, answer = exchange
    shapes = pieces_of(run[0] / "reference" / "merged")
    check_returned(shapes, 0.2, device.id, answer, request)
    arrays = {name: tensor for name, tensor in {**answer.arrays, **change}.items() if tensor is not None}
    with pytest.raises(UploadError, match=said):
        check_returned(shapes, 0.2, device.id, replace(answer, arrays=arrays), request)


@pytest.mark.parametrize("routed", [None, "all", 9, -1, True])
def test_a_count_that_cannot_be_is_refused(
    routed: Any, exchange: tuple[Device, Payload, Payload], run: tuple[Path, Record]
) -> None:
    device, request, answer = exchange
    metadata = {name: value for name, value in {**answer.metadata, "routed": routed}.items() if value is not None}
    with pytest.raises(UploadError, match="it says routed"):
        check_returned(
            pieces_of(run[0] / "reference" / "merged"), 0.2, device.id, replace(answer, metadata=metadata), request
        )


def test_an_expert_comes_whole_or_not_at_all(
    exchange: tuple[Device, Payload, Payload], run: tuple[Path, Record]
) -> None:
    device, request, answer = exchange
    half = next(name for name in answer.arrays if "down_proj:" in name)
    arrays = {name: tensor for name, tensor in answer.arrays.items() if name != half}
    with pytest.raises(UploadError, match="1 tensors are missing"):
        check_returned(
            pieces_of(run[0] / "reference" / "merged"), 0.2, device.id, replace(answer, arrays=arrays), request
        )


def test_a_device_that_has_lost_its_experts_says_so(exchange: tuple[Device, Payload, Payload], tmp_path: Path) -> None:
    device, request, _ = exchange
    later = replace(request, metadata={**request.metadata, "since": 0}, round=1)
    with pytest.raises(ModelError, match="has not kept the experts of round 0"):
        HFedMoE().client(replace(device, scratch=tmp_path), later)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shares": [0.0, 1.0]}, r"shares = \[0.0, 1.0\]: every budget"),
        ({"threshold": 1.0}, "threshold = 1.0: not a probability"),
        ({"adapter_rank": 0}, "adapter_rank = 0: nothing would learn"),
        ({"adapter_rank": 8, "host": "subset"}, "adapter_rank: a device keeps what does not learn"),
        ({"budget": "memory"}, 'budget = "memory": a device that holds all experts'),
        ({"selection": {"mixture": 1.5}}, "mixture = 1.5: not between 0"),
        ({"selection": {"bottleneck": -1.0}}, "bottleneck = -1.0: must be finite"),
        ({"host": "subset", "target": {"preset": "deepseek-v3-pico"}}, "has more to it than rows"),
    ],
)
def test_values_that_cannot_work_are_named(change: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({**tree_of(root), **change})


def test_experts_are_chosen_for_each_batch_so_batches_are_not_accumulated(root: Path) -> None:
    tree = tree_of(root)
    tree["devices"]["training"]["accumulate"] = 2
    with pytest.raises(ConfigError, match="accumulate = 2: experts are chosen for each batch"):
        parse_config(tree)
