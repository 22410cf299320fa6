# SPDX-License-Identifier: Apache-2.0
"""What the documentation says is so: options, examples, links, names of functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from deepfusion.catalogue import reference
from deepfusion.config import load_config
from deepfusion.registry import Registry
from deepfusion.stages.cluster.base import make_clusters
from deepfusion.stages.distill import Adapter
from deepfusion.types import Clusters

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_reference_of_options_is_what_the_code_says() -> None:
    """Renew it with: python -c 'from deepfusion.catalogue import reference; print(reference(), end="")'"""
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tour_stops_where_the_code_is() -> None:
    hops = re.findall(r"^\*\*\d\. (.+?) — \[`.*?`\]\((.*?)\)", (ROOT / "docs/tour.md").read_text("utf-8"), re.MULTILINE)
    assert len(hops) == 6
    for names, target in hops:
        code = (ROOT / "docs" / target).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"(def|class) {part}\b", code), f"{name} is not in {target}"


def test_every_decision_is_listed() -> None:
    listed = set(re.findall(r"\((\d{4}-.*?\.md)\)", (ROOT / "docs/decisions/README.md").read_text("utf-8")))
    assert listed == {path.name for path in (ROOT / "docs/decisions").glob("0*.md")}


def test_the_readmes_configuration_is_one(tmp_path: Path) -> None:
    (path := tmp_path / "run.toml").write_text(examples("README.md", "toml")[0])
    assert load_config(path).devices.count == 16


def built(page: str, start: str, **names: Any) -> dict[str, Any]:
    """What an example defines, run with `names` at hand."""
    code = next(code for code in examples(page, "python") if code.startswith(start))
    space = {"dataclass": dataclass, "np": np, "nn": nn, "torch": torch, **names}
    exec(compile(code, page, "exec"), space)
    return space


def test_the_example_of_a_clustering_works() -> None:
    registry: Registry[Any] = Registry("cluster")
    built("docs/adding.md", '@clusterings.register("alphabetical")', clusterings=registry, make_clusters=make_clusters)
    found: Clusters = registry["alphabetical"](num_clusters=2).assign(
        np.eye(4, dtype=np.float32), ("d", "a", "c", "b"), ("x",) * 4, seed=0, note=print
    )
    assert sorted(found.members(k) for k in range(2)) == [("a", "b"), ("d", "c")]
    assert registry.describe() == {"alphabetical": "Devices in the order of their names, cut into equal parts."}


def test_the_example_of_a_rule_works() -> None:
    registry: Registry[Any] = Registry("distill")
    built("docs/adding.md", '@rules.register("last-layer")', rules=registry, Adapter=Adapter)
    student = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    teacher = LlamaConfig(hidden_size=6, num_hidden_layers=3, num_attention_heads=2)
    before = torch.random.get_rng_state()
    adapter = registry["last-layer"]().attach(student, teacher, sequence_length=5, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    valid_BT = torch.ones(2, 5, dtype=torch.bool)
    loss = adapter([torch.randn(2, 5, 8)], [torch.randn(2, 5, 6)], valid_BT, valid_BT)
    loss.backward()
    assert loss.ndim == 0
    assert adapter.map.weight.grad.abs().sum() > 0
