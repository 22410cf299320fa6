# SPDX-License-Identifier: Apache-2.0
"""The door of a fleet: node ids that change, devices that are shut out, connections that break again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from deepfusion.devices.fleet import FleetOptions, NamedDevice, cards
from deepfusion.devices.privacy import PrivacyOptions
from deepfusion.errors import FederationError
from deepfusion.federation import door
from deepfusion.federation.door import Door
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.messages import pack
from deepfusion.federation.payload import encode
from deepfusion.methods.base import Site
from deepfusion.training import Optimisation
from deepfusion.types import ModelSpec, Payload

ANSWER = Payload("model", {}, {})


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(door, "time", clock)
    return clock


class Link:
    """A wire to nodes 1, 2, ... that are all online. `broken` nodes say that they are not there, `silent` ones nothing."""

    def __init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
        self.online, self.broken, self.silent = {11, 12, 13}, set[int](), set[int]()
        self.asked: Counter[int] = Counter()
        self._out: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return self.online

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.asked[message.metadata.dst_node_id] += 1
            ids.append(f"m{sum(self.asked.values())}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._out[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in list(message_ids):
            message = self._out[message_id]
            node = message.metadata.dst_node_id
            if node in self.broken:
                yield Message(Error(ErrorCode.NODE_UNAVAILABLE, "it is not there"), reply_to=message)
            elif node not in self.silent:
                yield Message(pack(encode(ANSWER)), reply_to=message)


def open_door(link: Link, folder: Path, nodes: dict[str, int], **options: Any) -> Door:
    options = {"timeout": 1e6, "look_up": lambda: nodes, **options}
    return Door(link, nodes, Ledger(folder / "ledger.jsonl"), **options)


REQUESTS = dict.fromkeys(("a", "b", "c"), Payload("request", {}, {}))


def test_a_device_that_comes_back_under_another_number_is_asked_under_it(tmp_path: Path, clock: Clock) -> None:
    link, nodes = Link(), {"a": 11, "b": 12, "c": 99}
    answers = open_door(link, tmp_path, nodes)(REQUESTS)
    assert [next(answers)[0], next(answers)[0]] == ["a", "b"]
    nodes["c"] = 13  # the SuperLink gives it this one when its key is registered
    assert next(answers)[0] == "c"
    assert link.asked == {11: 1, 12: 1, 13: 1}


@pytest.mark.parametrize("silent", [True, False], ids=["asked", "waiting"])
def test_a_device_that_is_shut_out_is_named_and_stops_nobody(tmp_path: Path, clock: Clock, silent: bool) -> None:
    link, nodes = Link(), {"a": 11, "b": 12, "c": 13}
    link.silent = {13} if silent else set()
    link.online -= set() if silent else {13}
    opened = open_door(link, tmp_path, nodes)
    answers = opened(REQUESTS)
    assert [next(answers)[0], next(answers)[0]] == ["a", "b"]
    del nodes["c"]
    assert list(answers) == []
    assert opened.failures == {
        "c": "its key is not registered; put it among the keys, and then: deepfusion fleet register, and --resume"
    }
    nodes.clear()
    with pytest.raises(FederationError, match="none of 3 devices answered; device a: its key is not registered"):
        list(opened(REQUESTS))


def test_a_device_whose_connection_breaks_again_and_again_is_asked_less_and_less_often(
    tmp_path: Path, clock: Clock
) -> None:
    link, nodes = Link(), {"a": 11, "b": 12, "c": 13}
    link.broken = {13}
    opened = open_door(link, tmp_path, nodes, deadline=3600.0)
    assert [device_id for device_id, _ in opened(REQUESTS)] == ["a", "b"]
    assert opened.failures == {"c": "was not online by the deadline of 3600 s; --resume asks it again"}
    assert link.asked == {11: 1, 12: 1, 13: 20}  # at once, after 2, 4, ..., 256 s, and then every 300 s


MODELS = (ModelSpec(name="m", preset="gpt2-pico"), ModelSpec(name="n", preset="llama-pico"))
NAMED = (NamedDevice(id="x", model="m"), NamedDevice(id="y", model="n"))
FLEET = FleetOptions(count=0, models=MODELS, named=NAMED)


def keys(fleet: FleetOptions) -> dict[str, str]:
    """Under which key each device's answer is kept."""
    return Site.by_device(SimpleNamespace(fleet=fleet, cards=cards(fleet, 0)), "common")  # type: ignore[arg-type]


def test_a_devices_upload_is_kept_when_another_device_is_taken_out_comes_in_or_changes() -> None:
    before = keys(FLEET)
    assert before["x"] != before["y"]
    assert keys(replace(FLEET, named=NAMED[:1]))["x"] == before["x"]
    third = NamedDevice(id="z", model="n")
    assert {**keys(replace(FLEET, named=(third, *NAMED))), **before}.items() >= before.items()
    assert keys(replace(FLEET, named=(third, *NAMED)))["y"] == before["y"]
    other = replace(FLEET, named=(NAMED[0], replace(NAMED[1], model="m")))
    assert keys(other)["x"] == before["x"]
    assert keys(other)["y"] != before["y"]
    assert keys(replace(FLEET, models=(MODELS[0], replace(MODELS[1], config={"n_layer": 3}))))["x"] == before["x"]


OTHERS: dict[str, Any] = {
    "count": 2, "alpha": 0.1, "sigma": 0.1, "memory_limit_gib": 3.0, "unfit": "leave out", "epochs": 2.0, "max_steps": 3,
    "threads": 2, "training": Optimisation(learning_rate=0.5), "privacy": PrivacyOptions(epsilon=8.0),
    "models": (replace(MODELS[0], config={"n_layer": 3}), MODELS[1]),
    "named": (replace(NAMED[0], files=("other.txt",)), NAMED[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(FleetOptions)])
def test_whatever_else_is_changed_in_the_devices_section_nothing_is_reused(name: str) -> None:
    assert keys(replace(FLEET, **{name: OTHERS[name]}))["x"] != keys(FLEET)["x"]
