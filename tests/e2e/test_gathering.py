# SPDX-License-Identifier: Apache-2.0
"""How uploads come: in fewer bits, and of medoids only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.errors import ConfigError, FederationError
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.payload import read_metadata
from deepfusion.methods import DeepFusion
from deepfusion.methods.exchange import published_bytes
from deepfusion.methods.gathering import ASKED, Described, by_centrality
from deepfusion.plan import make_plan
from deepfusion.record import Record
from deepfusion.types import Clusters
from small_world import QUIET, WARM, small_tree

EVALUATE = {**QUIET, "devices": False, "proxies": False, "students": False}


def tree_of(root: Path, **upload: Any) -> dict[str, Any]:
    return small_tree(root, upload=upload, warm_start=WARM, evaluate=EVALUATE)


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    launch(parse_config(tree_of(root)), root / "whole", until="uploads")
    return root / "whole"


@pytest.fixture(scope="module")
def medoids(root: Path) -> tuple[Path, Record]:
    record = launch(parse_config(tree_of(root, select="medoids", medoids=1)), root / "medoids")
    assert record is not None
    return root / "medoids", record


@pytest.mark.parametrize(
    ("form", "share", "error"),
    [("bf16", 0.52, 0.004), ("int8", 0.3, 0.006), ("nf4", 0.18, 0.16), ("delta-int8", 0.3, 0.001)],
)
def test_a_format_saves_what_it_says_and_the_server_keeps_whole_models(
    form: str, share: float, error: float, root: Path, whole: Path
) -> None:
    config = parse_config(tree_of(root, format=form))
    launch(config, root / form, until="uploads")
    due, sent = (sum(Ledger(folder / "ledger.jsonl").by_device("up").values()) for folder in (whole, root / form))
    header = 6 * 8_000  # names, shapes and frames, which are most of so small a message
    assert share * 0.7 * due < sent < share * due + header
    plan = make_plan(config)
    assert plan.upload_bytes is not None
    assert sent < plan.upload_bytes + header
    for path in sorted((whole / "uploads").glob("*.safetensors")):
        exact, found = load_file(path), load_file(root / form / "uploads" / path.name)
        assert found.keys() == exact.keys()
        for name, tensor in exact.items():
            assert found[name].shape == tensor.shape
            assert found[name].dtype == tensor.dtype
            moved = (found[name].float() - tensor.float()).abs().max()
            assert float(moved) <= error * max(float(tensor.abs().max()), 0.1), name


@pytest.mark.parametrize(("form", "share"), [("bf16", 0.52), ("int8", 0.3), ("nf4", 0.18)])
def test_first_weights_go_down_in_fewer_bits_and_both_sides_go_on_from_what_is_read(
    form: str, share: float, root: Path, whole: Path
) -> None:
    """Both: an upload whose `init_id` is not that of the server's own first weights is refused."""
    tree = {**tree_of(root, format="delta-int8"), "warm_start": {**WARM, "format": form}}
    config = parse_config(tree)
    launch(config, root / f"down-{form}", until="uploads")
    assert isinstance(config.method, DeepFusion)
    both = 6 * published_bytes(config.method.embed)
    due, sent = (
        sum(Ledger(f / "ledger.jsonl").by_device("down").values()) - both for f in (whole, root / f"down-{form}")
    )
    header = 6 * 8_000  # names, shapes and frames
    assert share * 0.7 * due < sent < share * due + header
    priced = make_plan(config).download_bytes
    assert priced is not None
    assert sent < priced - both + header
    assert len(list((root / f"down-{form}" / "uploads").glob("*.safetensors"))) == 6


def test_medoids_train_and_send_a_model_the_others_only_their_embedding(
    root: Path, medoids: tuple[Path, Record]
) -> None:
    folder, record = medoids
    asked = json.loads((folder / ASKED).read_text())
    groups = {(device.cluster, device.architecture) for device in record.devices}
    assert len(asked) == len(groups) < len(record.devices) == 6
    priced = make_plan(parse_config(tree_of(root, select="medoids", medoids=1))).upload_bytes
    assert priced is not None
    assert sum(Ledger(folder / "ledger.jsonl").by_device("up").values()) < priced + 12 * 8_000  # names, shapes, frames
    assert sorted(path.stem for path in (folder / "uploads").glob("*.safetensors")) == asked
    assert record.clusters is not None
    assert len(record.clusters.labels) == 6, "everybody belongs to a domain"
    for device in record.devices:
        assert (device.upload_bytes > 20_000) is (device.id in asked)
    steps = sum(int(read_metadata(path)["steps"]) for path in (folder / "uploads").glob("*.safetensors"))
    assert record.budget is not None
    assert record.budget.device_tokens == steps * 4 * 32, "who is not asked trains nothing"
    assert any("were asked for their models" in note for note in record.notes)


def test_a_plan_counts_only_medoids_models(root: Path) -> None:
    one = {"cluster": {"type": "kmeans", "num_clusters": 1}}
    wide, narrow = (
        make_plan(parse_config({**tree_of(root, select=select, medoids=1), **one})).upload_bytes
        for select in ("all", "medoids")
    )
    assert wide is not None
    assert narrow is not None
    assert 0.3 * wide < narrow < 0.4 * wide, "one of three devices of each architecture"


def test_a_resumed_run_asks_nobody_again(root: Path, medoids: tuple[Path, Record]) -> None:
    folder, record = medoids
    rows = (folder / "ledger.jsonl").read_text()
    again = launch(parse_config(tree_of(root, select="medoids", medoids=1)), folder, resume=True)
    assert again is not None
    assert (folder / "ledger.jsonl").read_text() == rows
    assert again.metrics == record.metrics


def test_the_nearest_to_all_others_comes_first() -> None:
    angles = np.deg2rad([0, 10, 40, 90, 95])
    embedding_ND = np.stack([np.cos(angles), np.sin(angles)], 1)
    ids = ("a", "b", "c", "d", "e")
    clusters = Clusters(ids, np.array([0, 0, 0, 1, 1]), np.eye(2))
    described = Described(ids, ("gpt2", "gpt2", "gpt2", "llama", "gpt2"), embedding_ND)
    assert list(by_centrality(clusters, described)) == [["b", "a", "c"], ["e"], ["d"]]


def test_where_a_medoid_fails_the_next_is_asked_and_a_domain_without_any_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: set[str] = set()
    answer = DeepFusion.client

    def client(self: DeepFusion, device: Any, request: Any) -> Any:
        if device.id in broken and request.what != "embedding":
            raise RuntimeError("out of power")
        return answer(self, device, request)

    monkeypatch.setattr(DeepFusion, "client", client)
    tree = tree_of(root, select="medoids", medoids=1)
    tree["devices"]["models"] = tree["devices"]["models"][:1]
    launch(parse_config(tree), root / "healthy", until="proxies")
    first = json.loads((root / "healthy" / ASKED).read_text())
    members = json.loads((root / "healthy" / "clusters.json").read_text())["members"]
    large = next(group for group in members if len(group) > 1)
    broken.update(set(first) & set(large))
    launch(parse_config(tree), root / "one", until="proxies")
    then = json.loads((root / "one" / ASKED).read_text())
    assert len(then) == len(first) + 1
    broken.update(large)
    with pytest.raises(FederationError, match=f"no model of domain {members.index(large)} arrived"):
        launch(parse_config(tree), root / "none", until="proxies")


def test_where_all_medoids_fail_at_once_the_next_ones_are_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, first = DeepFusion.client, list[str]()

    def client(self: DeepFusion, device: Any, request: Any) -> Any:
        if request.what != "embedding" and not (set(first) - {device.id}):
            first.append(device.id)
            raise RuntimeError("out of power")
        return answer(self, device, request)

    monkeypatch.setattr(DeepFusion, "client", client)
    tree = {**tree_of(root, select="medoids", medoids=1), "cluster": {"type": "kmeans", "num_clusters": 1}}
    tree["devices"]["models"] = tree["devices"]["models"][:1]
    launch(parse_config(tree), root / "wave", until="proxies")
    asked = json.loads((root / "wave" / ASKED).read_text())
    assert len(asked) == 2
    assert first[0] in asked


def test_stages_behind_the_domains_are_made_again_when_the_embeddings_change(root: Path) -> None:
    tree = tree_of(root, select="medoids", medoids=6)
    launch(parse_config({**tree, "embed": {"type": "tfidf", "dimension": 64}}), root / "dimension", until="proxies")
    stage = root / "dimension" / "proxies" / ".stage.json"
    before = json.loads(stage.read_text())["key"]
    launch(
        parse_config({**tree, "embed": {"type": "tfidf", "dimension": 16}}),
        root / "dimension",
        until="proxies",
        resume=True,
    )
    assert json.loads(stage.read_text())["key"] != before


def test_the_ledger_books_what_is_published_and_what_the_moe_costs_beside_the_models(root: Path) -> None:
    tree = {**tree_of(root, select="medoids", medoids=1), "warm_start": {"steps": 0}}
    tree["continue"] = {"type": "hfedmoe", "rounds": 1}
    record = launch(parse_config(tree), root / "booked")
    assert record is not None
    written = [json.loads(line) for line in (root / "booked" / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["bytes"] for row in written) == record.ledger.total_bytes, "no row takes another one's place"
    asked = json.loads((root / "booked" / ASKED).read_text())
    assert record.budget is not None
    assert 0 < len(asked) < 6
    own = sum(int(read_metadata(path)["steps"]) for path in (root / "booked" / "uploads").glob("*.safetensors"))
    assert record.budget.device_tokens > own * 4 * 32, "all have trained the MoE, who was asked also its own model"


def test_an_embedding_that_needs_all_models_cannot_choose_whom_to_ask(root: Path) -> None:
    with pytest.raises(ConfigError, match="needs every model to embed a device"):
        parse_config({**tree_of(root, select="medoids"), "embed": {"type": "probe"}})
    with pytest.raises(ConfigError, match="medoids = 0: no model would arrive"):
        parse_config(tree_of(root, medoids=0))
