# SPDX-License-Identifier: Apache-2.0
"""The audit finds what is there: all of an overfitted model's text, and nothing in a model that has seen none."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import small_world
from deepfusion import audit
from deepfusion.app import launch
from deepfusion.audit import CONTROL, Audit, audit_run, audit_table
from deepfusion.cli import app
from deepfusion.config import CONFIG, load_config, parse_config
from deepfusion.data.prepare import load_prepared
from deepfusion.devices.fleet import cards
from deepfusion.errors import DataError
from deepfusion.run import private_corpus
from deepfusion.stages.proxy import load_proxies
from deepfusion.types import Corpus
from small_world import small_tree, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three devices that have learnt twenty documents each by heart: of words in random order, so that nothing else helps."""
    root = tmp_path_factory.mktemp("audit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_world, "DOCUMENTS", {"private": 20, "public": 24, "test": 40})
        write_text(root)
        tree: dict[str, Any] = small_tree(root)
    tree["devices"] |= {
        "count": 3, "alpha": 0.01, "sigma": 0.0, "epochs": 60.0, "max_steps": 200,
        "training": {"batch_size": 8, "learning_rate": 1e-2},
        "models": [{"name": "llama", "preset": "llama-pico", "config": {"hidden_size": 64, "intermediate_size": 128}}],
    }  # fmt: skip
    config = parse_config({**tree, "evaluate": {"devices": False, "proxies": False, "students": False}})
    assert launch(config, root / "run") is not None
    return root / "run"


@pytest.fixture(scope="module")
def found(run: Path) -> Audit:
    return audit_run(run)


def test_a_model_that_knows_its_text_by_heart_gives_it_away(found: Audit) -> None:
    devices = next(kind for kind in found.kinds if kind.kind == "devices")
    for attack in devices.attacks.values():
        assert attack.auc > 0.95
        assert attack.low > 0.9
        assert attack.caught > 0.5
    assert sorted(devices.attacks) == ["loss", "reference"]


def test_a_model_that_has_seen_none_of_the_text_gives_nothing_away(found: Audit) -> None:
    control = next(kind for kind in found.kinds if kind.kind == CONTROL)
    assert list(control.attacks) == ["loss"]
    assert control.attacks["loss"].low < 0.5 < control.attacks["loss"].high


def test_both_sides_have_as_many_documents_and_every_kind_is_there(found: Audit) -> None:
    assert [kind.kind for kind in found.kinds] == ["devices", "proxies", "fused MoE", CONTROL]
    assert all(model.members == model.others >= 10 for model in found.models)
    assert sum(model.kind == "devices" for model in found.models) == 3
    assert next(model for model in found.models if model.kind == "fused MoE").members > 40


def test_members_of_the_moe_are_of_the_devices_that_it_has_learnt_from(
    run: Path, found: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of one that is in no proxy, because it was not asked, failed or was left out."""
    members, strata = list[list[str]](), audit._Strata.of

    def seen(self: audit._Strata, corpora: list[Corpus]) -> list[tuple[str, int]]:
        members.append([text for corpus in corpora for text in corpus.texts()])
        return strata(self, corpora)

    proxies = load_proxies(run / "proxies")
    left = proxies[0].members[0]
    kept = [replace(p, members=tuple(m for m in p.members if m != left)) for p in proxies]
    monkeypatch.setattr(audit, "load_proxies", lambda _folder: [p for p in kept if p.members])
    monkeypatch.setattr(audit._Strata, "of", seen)
    shutil.copytree(run, tmp_path / "run")
    audit_run(tmp_path / "run")
    config, data = load_config(run / CONFIG), load_prepared(run / "data")
    texts = {card.id: [*private_corpus(config, data, card.id).texts()] for card in cards(config.devices, config.seed)}
    taught = sorted(text for device, mine in texts.items() if device != left for text in mine)
    assert len(taught) < sum(map(len, texts.values()))
    assert sorted(members[-4]) == taught, "the fused MoE"
    assert sorted(members[-2]) == taught, "the control, so that both are attacked on the same text"


def test_what_is_found_is_written_shown_and_the_same_again(run: Path, found: Audit) -> None:
    assert Audit.model_validate_json((run / "audit.json").read_text()) == found
    shown = CliRunner().invoke(app, ["audit", str(run), "--json"])
    assert json.loads(shown.stdout) == json.loads(found.model_dump_json())
    console = Console(file=io.StringIO(), width=200)
    noted = found.model_copy(update={"notes": ["no model from public text alone ([evaluate] public_only)"]})
    console.print(audit_table(noted))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Membership inference" in text
    assert f"{found.kinds[0].attacks['loss'].auc:.3f} (" in text
    assert "0.5 is guessing, 1 certainty." in text
    assert "([evaluate] public_only)" in text, "a section's brackets are no markup"


def test_a_folder_without_a_run_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run; give a run folder, after `deepfusion run`"):
        audit_run(tmp_path)
