# SPDX-License-Identifier: Apache-2.0
"""What devices that send hostile models cannot do to a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.devices.device import Device
from deepfusion.methods import DeepFusion
from deepfusion.stages.proxy import MODEL, SCREENED
from deepfusion.types import Payload
from small_world import small_tree


@pytest.mark.parametrize("changes", [
    {"generate": {"share": 0.5, "sequences": 6}},
    {"recipe": "paper", "proxy": {"average": "mean"}, "distillation": {"steps": 6, "trust": "all"}},
], ids=["joint", "paper"])  # fmt: skip
def test_a_domain_whose_models_all_overflow_has_no_teacher_and_stops_nothing(
    changes: dict[str, Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device chooses its embedding: hostile ones can make a domain of their own."""
    config = parse_config(small_tree(root, **changes))
    launch(config, tmp_path / "healthy", until="clusters")
    members = json.loads((tmp_path / "healthy" / "clusters.json").read_text())["members"]
    hostile, answer = set(members[0]), DeepFusion.client

    def client(self: DeepFusion, device: Device, request: Payload) -> Payload:
        honest = answer(self, device, request)
        if device.id not in hostile:
            return honest
        huge = {
            name: 3e37 * t.sign() if name.startswith(MODEL) and "mlp" in name else t
            for name, t in honest.arrays.items()
        }
        return replace(honest, arrays=huge)

    monkeypatch.setattr(DeepFusion, "client", client)
    record = launch(config, tmp_path / "run")
    assert record is not None
    assert set(json.loads((tmp_path / "run" / "proxies" / SCREENED).read_text())) == hostile
    assert any(note.startswith("domain 0 has no teacher, all its models were left out") for note in record.notes)
    assert all(
        any(note.startswith(f"left out of the proxies: {device} ") for note in record.notes) for device in hostile
    )
    assert record.baselines.proxies is not None
    assert {item.cluster for item in record.baselines.proxies.items} == set(range(1, len(members)))
    assert record.baselines.students is not None
    assert [item.cluster for item in record.baselines.students.items] == list(range(len(members)))
    assert 0 < record.metrics.log_perplexity < 7
    assert (tmp_path / "run" / "report.html").exists()
