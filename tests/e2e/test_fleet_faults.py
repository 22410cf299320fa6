# SPDX-License-Identifier: Apache-2.0
"""Every fault of docs/fleet.md once, on loopback: what `benchmarks/faults.py` counts at moments drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from fault_kinds import FAULTS, World
from faults import SHORT, inject, undisturbed

from deepfusion.fleet.layout import Layout, init_fleet
from deepfusion.fleet.supervise import Fleet, fleet_on_this_machine
from deepfusion.fleet.trial import trial_config
from loopback_world import environment, free_port

pytestmark = pytest.mark.fleet


class Calm(NamedTuple):
    """A fleet, and what it makes undisturbed."""

    layout: Layout
    fleet: Fleet
    expected: dict[str, str]
    spans: dict[str, float]


class Early(random.Random):
    """Draws devices by its seed; every moment is a quarter of its span: before the end, also where the machine has got faster."""

    def uniform(self, a: float, b: float) -> float:
        return (3 * a + b) / 4


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # the fleet imports what this imports
        layout = init_fleet(trial_config(SHORT, seed=0), tmp_path_factory.mktemp("faults") / "fleet", port=free_port())
        with fleet_on_this_machine(layout) as fleet:
            yield Calm(layout, fleet, *undisturbed(layout, fleet))


@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_loses_an_upload_trains_twice_or_changes_a_byte(name: str, calm: Calm) -> None:
    row = inject(name, 0, World(calm.layout, calm.fleet, Early(name), calm.spans), calm.expected)
    assert row.injected
    assert row.lost == []
    assert row.twice == []
    assert not row.wrong, row.said
    assert (row.resumed > 0) == (name in ("client raises", "disk full")), row.said
