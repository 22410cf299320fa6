# SPDX-License-Identifier: Apache-2.0
"""The paper's two settings are valid, and can be priced without a network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deepfusion.config import load_config
from deepfusion.devices import configurations, memory
from deepfusion.devices.fleet import cards

CONFIGS = Path(__file__).parents[2] / "configs"
UPLOADS_GIB = {  # float32 weights: twice what the paper's half-precision devices send
    "medical": {"gpt2": 0.46, "gpt2-medium": 1.32, "tinyllama": 4.10},
    "finance": {"tinyllama": 4.10, "olmo": 4.38, "bloom": 3.97},
}


@pytest.mark.parametrize("name", UPLOADS_GIB)
def test_the_papers_fleets_are_priced_without_a_network_and_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a price needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = load_config(CONFIGS / f"{name}.toml")
    length, training = config.data.sequence_length, config.devices.training
    shapes = {s.name: configurations.config_of(s, positions=length) for s in config.devices.models}
    for card in cards(config.devices, config.seed):
        memory.check_fits(card.id, shapes[card.model.name], training, length, card.memory_limit_bytes)
    uploads = {name: round(memory.upload_bytes(shape) / 2**30, 2) for name, shape in shapes.items()}
    assert uploads == UPLOADS_GIB[name]
    target = config.target.make(None, length, None)
    assert memory.num_parameters(target) == pytest.approx({"medical": 14.3e9, "finance": 16.4e9}[name], rel=0.01)
