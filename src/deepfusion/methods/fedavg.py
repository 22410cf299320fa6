# SPDX-License-Identifier: Apache-2.0
"""FedAvg (McMahan et al., arXiv 1602.05629) of the whole MoE: the upper bound in memory and traffic (baselines, section 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.devices.device import Device
from deepfusion.devices.memory import num_parameters
from deepfusion.methods import exchange, rounds
from deepfusion.methods.base import Site, Training, methods
from deepfusion.methods.budget import Shapes, Traffic, message
from deepfusion.moe.routing import balance_penalty
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import average, distinct_state, load_distinct
from deepfusion.types import Call, Payload


@methods.register("fedavg")
@dataclass(frozen=True, kw_only=True)
class FedAvg(rounds.Rounds):
    """Every device trains the whole MoE; the server averages all parameters, by the devices' tokens."""

    stages: ClassVar[tuple[str, ...]] = ("data", "initial", "reference/trained", "reference/merged", "rounds", "moe")

    def client(self, device: Device, request: Payload) -> Payload:
        """Train the MoE on the round's part of the device's text."""
        model = rounds.received_model(device, request)
        load_distinct(model, exchange.with_prefix(request, MODEL))
        penalty = balance_penalty(model, self.balance) if self.balance else None
        told = rounds.train_part(device, request, model, penalty)
        return rounds.answer(request, distinct_state(model), told)

    def server(self, site: Site, call: Call) -> Path:
        """Rounds of sending, training and averaging; then the tuning on public text that every method ends with."""
        moe = self.begin(site)
        for number in range(self.rounds):
            moe = self.run_round(site, call, number, moe)
        rounds.reached(site, self.rounds)
        return self.finish(site, moe)

    def run_round(self, site: Site, call: Call, number: int, moe: Path) -> Path:
        """Send the model to all participants and average what comes back."""

        def ask(model: PreTrainedModel) -> dict[str, Payload]:
            sent = rounds.request(distinct_state(model), model.config, self.rounds)
            return {card.id: sent for card in self.participants(site, number)}

        def fold(model: PreTrainedModel, files: Mapping[str, Path], _folder: Path) -> dict[str, Any]:
            load_distinct(model, average(rounds.answers(files)))
            return {}

        return rounds.run_round(site, call, number, moe, ask, fold, self.rounds, self.participation, self.balance)

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> Traffic:
        """The whole MoE both ways, each round."""
        each = self.times(message(num_parameters(shapes.target)))
        return Traffic(each, each)

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """The whole MoE."""
        return (Training(target, self.participation),)
