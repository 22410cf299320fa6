# SPDX-License-Identifier: Apache-2.0
"""A device's answers in a fleet in one process: what is refused is told, and what is kept is of one run alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deepfusion.errors import FederationError
from deepfusion.fleet.layout import Layout
from fleet_world import IDS, Wires, make_fleet, result_bytes, serve_fleet


@pytest.fixture
def layout(root: Path, tmp_path: Path) -> Layout:
    """A fleet that has never run."""
    return make_fleet(root, tmp_path / "trial")


def test_whose_upload_is_refused_has_failed_with_the_reason_and_the_run_goes_on(layout: Layout) -> None:
    path, said = layout.devices()[IDS[1]], f"device {IDS[1]}: its upload says device = "
    path.write_text(path.read_text().replace(f'id = "{IDS[1]}"', f'id = "{IDS[0]}"'))  # what it sends is another one's
    states: dict[str, list[str]] = {device_id: [] for device_id in IDS}
    last: dict[str, str] = {}

    def tell(device_id: str, state: str, reason: str) -> None:
        states[device_id].append(state)
        last[device_id] = reason

    with pytest.raises(FederationError, match=rf"= 3; missing: {IDS[1]}; what .*\n  {IDS[1]}: {said}"):
        serve_fleet(layout, Wires(layout), "federation.minimum_devices=3")
    serve_fleet(layout, Wires(layout), resume=True, tell=tell)
    written = json.loads((layout.server / "run/record.json").read_text())
    assert list(written["failures"]) == [IDS[1]]
    assert written["failures"][IDS[1]].startswith(said)
    assert states == {IDS[0]: [], IDS[1]: ["asked", "failed"], IDS[2]: []}
    assert last[IDS[1]] == written["failures"][IDS[1]]


def test_a_new_run_is_answered_from_the_text_as_it_is_now_and_a_resumed_one_as_before(layout: Layout) -> None:
    first, second = IDS[:2]

    def uploads(*, resume: bool) -> dict[str, bytes]:
        serve_fleet(layout, Wires(layout), until="uploads", resume=resume)
        return result_bytes(layout.server / "run")

    before = uploads(resume=False)
    text = layout.device(first) / "text.jsonl"
    text.write_text(text.read_text() * 2)
    shutil.rmtree(layout.server / "run/uploads")
    assert uploads(resume=True) == before, "the text of a run is the one that it began with"
    shutil.rmtree(layout.server / "run")
    after = uploads(resume=False)
    assert after[f"uploads/{first}.safetensors"] != before[f"uploads/{first}.safetensors"]
    assert after[f"uploads/{second}.safetensors"] == before[f"uploads/{second}.safetensors"]
    kept = [path.stat().st_ino for path in layout.device(second).glob("place/jobs/*/answers/*.safetensors")]
    assert len(kept) == 2, "trained anew, to the same bytes"
