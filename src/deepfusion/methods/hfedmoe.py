# SPDX-License-Identifier: Apache-2.0
"""HFedMoE (arXiv 2601.00583): federated training of one MoE on devices that can train only some of its experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedConfig

from deepfusion.data.options import DataOptions
from deepfusion.devices.fleet import FleetOptions
from deepfusion.methods.base import Site, TargetOptions, Training, methods
from deepfusion.methods.budget import Shapes, Traffic
from deepfusion.methods.rounds import Rounds
from deepfusion.methods.selective import SelectiveRounds
from deepfusion.types import Call


@methods.register("hfedmoe")
@dataclass(frozen=True, kw_only=True)
class HFedMoE(SelectiveRounds, Rounds):
    """Each device trains, batch by batch, the experts that are worth most to it; the server averages what was really used."""

    stages: ClassVar[tuple[str, ...]] = ("data", "initial", "reference/trained", "reference/merged", "rounds", "moe")

    def server(self, site: Site, call: Call) -> Path:
        """Rounds from the common base; then the tuning on public text that every method ends with."""
        return self.finish(site, self.run(site, call, self.begin(site)))

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> Traffic:
        """See `SelectiveRounds.traffic_of`."""
        return self.traffic_of(shapes.target)

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """The whole MoE, or the part that a device holds."""
        return (self.training_of(target),)

    def faults_with(self, devices: FleetOptions, data: DataOptions, target: TargetOptions) -> Iterator[str]:
        """See `Method.faults_with`."""
        yield from super().faults_with(devices, data, target)
        yield from self.selection_faults(devices, target)
