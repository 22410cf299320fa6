# SPDX-License-Identifier: Apache-2.0
"""FedJETS: who hosts what, what crosses the door, and what an average over holders leaves alone."""

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
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import cards
from deepfusion.errors import ConfigError, ModelError
from deepfusion.methods import FedJets, exchange, rounds
from deepfusion.moe.base import EXPERT, ROUTER
from deepfusion.moe.hosting import part, pieces, put_back, with_experts
from deepfusion.record import Record
from deepfusion.run import make_device
from deepfusion.stages.embed import HashedTfidf
from deepfusion.stages.preference import gate_preference
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import average_present, distinct_state
from deepfusion.types import Payload, State
from small_world import rounds_tree
from wire_world import ASKED, TOLD, Seen, check_ledger, tapped


def tree_of(root: Path, method: str = "fedjets", **changes: Any) -> dict[str, Any]:
    return rounds_tree(root, method, **changes)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with tapped() as found:
        yield found


@pytest.fixture(scope="module")
def run(root: Path, seen: Seen) -> tuple[Path, Record]:
    record = launch(parse_config(tree_of(root)), root / "fedjets")
    assert record is not None
    return root / "fedjets", record


def test_the_ledger_is_the_closed_form(run: tuple[Path, Record], seen: Seen) -> None:
    """Once M_0 down and an embedding up; each round G down, E numbers up, and S + G + K_d X both ways."""
    folder, record = run
    state = distinct_state(models.load(folder / "rounds" / "0"))
    hosted = {MODEL + n: t[:2] if EXPERT.search(n) else t for n, t in state.items()}  # S, G, and two of four experts
    common = distinct_state(models.load(folder / "reference" / "trained" / "0"))
    statistics = torch.zeros(2 ** HashedTfidf().hash_bits, dtype=torch.float16)
    due: dict[tuple[str, str], State] = {
        ("down", "init"): {
            **{MODEL + name: tensor for name, tensor in common.items()},
            **{f"published/{name}": statistics for name in ("idf", "mean")},
        },
        ("up", "embedding"): {"embedding": torch.zeros(64, dtype=torch.float16)},
        ("down", "gate"): {name: tensor for name, tensor in state.items() if ROUTER.search(name)},
        ("up", "preference"): {"preference": torch.zeros(4)},
        ("down", "moe"): hosted,
        ("up", "moe"): hosted,
    }
    says = {
        ("down", "init"): {"config", "run_seed"}, ("up", "embedding"): {"device"},
        ("down", "gate"): set[str](), ("up", "preference"): {"device"},
        ("down", "moe"): {*ASKED, "anchor", "hosted"}, ("up", "moe"): TOLD,
    }  # fmt: skip
    rows = check_ledger(folder, seen, lambda row: due[row["direction"], row["what"]], says)
    devices = len(record.devices)
    counts = Counter((row["direction"], row["what"]) for row in rows)
    assert counts == {**dict.fromkeys(due, 2 * devices), ("up", "embedding"): devices, ("down", "init"): devices}
    assert sum(row["bytes"] for row in rows) == record.ledger.total_bytes
    assert record.devices[0].parameters < sum(t.numel() for t in state.values()), "a device holds two of four experts"


def test_with_all_experts_everywhere_it_is_fedavg(root: Path) -> None:
    whole = launch(parse_config(tree_of(root, hosted_experts=4, anchors=False, mu=0.0)), root / "all", until="rounds")
    mean = launch(parse_config(tree_of(root, "fedavg")), root / "fedavg", until="rounds")
    assert whole is mean is None
    ours, theirs = (distinct_state(models.load(root / name / "rounds" / "1")) for name in ("all", "fedavg"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def device(run: tuple[Path, Record]) -> Device:
    config = load_config(run[0] / CONFIG)
    return replace(make_device(config, RunFolder(run[0]), cards(config.devices, config.seed)[0]), scratch=None)


def asked(folder: Path, hosted: list[int], anchor: int) -> Payload:
    model = models.load(folder / "reference" / "merged")
    sent = rounds.request(part(distinct_state(model), hosted), with_experts(model.config, len(hosted)), 1)
    told = {"hosted": ",".join(map(str, hosted)), "anchor": anchor, "architecture": "qwen2_moe", "init_id": "x"}
    return replace(sent, metadata={**sent.metadata, **told})


def test_a_device_moves_the_gate_of_its_own_experts_only(run: tuple[Path, Record], device: Device) -> None:
    request = asked(run[0], [1, 3], 3)
    reply = FedJets(mu=0.5).client(device, request)
    assert {name: t.shape for name, t in reply.arrays.items()} == {name: t.shape for name, t in request.arrays.items()}
    for name, before in request.arrays.items():
        after = reply.arrays[name]
        if ROUTER.search(name):
            assert torch.equal(after[[0, 2]], before[[0, 2]])
            assert not torch.equal(after[[1, 3]], before[[1, 3]])
        elif EXPERT.search(name):
            assert not torch.equal(after, before)


def test_an_anchor_teaches_the_gate_to_choose_its_expert(run: tuple[Path, Record], device: Device) -> None:
    common = models.load(run[0] / "reference" / "trained" / "0")
    text = PackedText(device.corpus, 32, 0)

    def liking(mu: float) -> float:
        reply = FedJets(mu=mu, balance=0.0).client(device, asked(run[0], [1, 3], 3))
        gates = [t for name, t in exchange.with_prefix(reply, MODEL).items() if ROUTER.search(name)]
        q_E = gate_preference(common, gates, text)
        assert float(q_E.sum()) == pytest.approx(1.0, abs=1e-5)
        return float(q_E[3])

    assert liking(5.0) > liking(0.0) + 1e-3


def test_an_anchor_hosts_its_own_expert_and_others_what_they_like() -> None:
    q_E = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert FedJets().choose(q_E, None) == [1, 3]
    assert FedJets().choose(q_E, 0) == [0, 1]
    assert FedJets(hosted_experts=1).choose(q_E, 2) == [2]
    assert FedJets(hosted_experts=4).choose(q_E, None) == [0, 1, 2, 3]


def state_of(value: float) -> State:
    return {
        "model.layers.0.mlp.experts.down_proj": torch.full((3, 2, 2), value),
        "model.layers.0.mlp.gate.weight": torch.full((3, 2), value),
        "model.norm.weight": torch.full((2,), value),
    }


def test_a_tensor_is_averaged_over_those_who_held_it_and_left_alone_where_nobody_did() -> None:
    answers = [
        ("a", pieces(part(state_of(1.0), [0]), [0]), 1.0),
        ("b", pieces(part(state_of(5.0), [0, 1]), [0, 1]), 3.0),
    ]
    mean = put_back(state_of(9.0), average_present(answers))
    experts, gate, norm = mean.values()
    assert experts[:, 0, 0].tolist() == [4.0, 5.0, 9.0]
    assert gate[:, 0].tolist() == [4.0, 5.0, 9.0]
    assert norm.tolist() == [4.0, 4.0]
    assert torch.equal(put_back(state_of(9.0), average_present(answers[::-1]))["model.norm.weight"], norm)


def test_anchors_are_distinct_devices_and_always_take_part(run: tuple[Path, Record], root: Path) -> None:
    rows = [json.loads(line) for line in (run[0] / "ledger.jsonl").read_text().splitlines()]
    assert {row["round"] for row in rows if row["what"] == "gate"} == {0, 1}
    launch(parse_config(tree_of(root, participation=0.2)), root / "few", until="rounds")
    rows = [json.loads(line) for line in (root / "few" / "ledger.jsonl").read_text().splitlines()]
    by_round = [
        {row["device"] for row in rows if row["what"] == "gate" and row["round"] == number} for number in (0, 1)
    ]
    assert len(by_round[0] & by_round[1]) >= 4, "one for each expert, in both rounds"


def test_a_device_that_has_lost_the_common_expert_says_so(
    run: tuple[Path, Record], device: Device, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="not on this device any more"):
        FedJets().client(replace(device, scratch=tmp_path), Payload("gate"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hosted_experts": 0}, "hosted_experts = 0: a device must hold"),
        ({"hosted_experts": 5}, "hosted_experts = 5: the target has 4 experts"),
        ({"mu": -1.0}, "mu = -1.0: must be finite"),
        ({"embed": {"type": "probe"}}, r"\[embed\] type = \"probe\""),
        ({"target": {"preset": "deepseek-v2-pico"}}, "its base has no router to read"),
    ],
)
def test_values_that_cannot_work_are_named(change: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({**tree_of(root), **change})
