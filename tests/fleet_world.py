# SPDX-License-Identifier: Apache-2.0
"""The small world as a fleet: three devices with folders of their own, and a wire to them that can be made to fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from deepfusion.app import client_app, serve
from deepfusion.config import RunConfig, load_config, parse_config
from deepfusion.federation.messages import run_client
from deepfusion.fleet.job import job_payload
from deepfusion.fleet.layout import Layout, init_fleet
from deepfusion.record import Record
from deepfusion.run import open_folder, prepare_data
from small_world import small_tree

QUICK = dict.fromkeys(("public_only", "devices", "proxies", "students"), False)
IDS = ("device-000", "device-001", "device-002")
RESULTS = ("proxies", "start", "experts", "merged", "moe")
"""What must be the same bytes on a fleet and in one process."""


def fleet_tree(root: Path, **changes: Any) -> dict[str, Any]:
    """The small configuration with three devices."""
    tree = small_tree(root, evaluate=QUICK, cluster={"type": "kmeans", "num_clusters": 2}, **changes)
    return {**tree, "devices": {**tree["devices"], "count": 3}}


def make_fleet(root: Path, folder: Path, port: int = 18443, **changes: Any) -> Layout:
    """What `deepfusion fleet init` writes for it."""
    return init_fleet(parse_config(fleet_tree(root, **changes)), folder, port=port)


def result_bytes(run: Path) -> dict[str, bytes]:
    """Every result file of a run, and the uploads."""
    files = [
        path for part in RESULTS for path in (run / part).rglob("*") if path.is_file() and path.name != ".stage.json"
    ]
    files += (run / "uploads").glob("*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


class Wires:
    """Wires to devices in this process. `faults[device]` is called with each message; what it returns is the reply.

    Attributes:
        online: devices that can be reached.
        asked: how many messages each device was sent.
        down: everything that was sent to devices, as it crossed.
    """

    def __init__(self, layout: Layout) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
        self.nodes = {device_id: SUPERLINK_NODE_ID + 1 + i for i, device_id in enumerate(layout.devices())}
        self.online = set(self.nodes)
        self.faults: dict[str, Callable[[Message], Message | None]] = {}
        self.asked: Counter[str] = Counter()
        self.down: list[Message] = []
        self._names = {node: device_id for device_id, node in self.nodes.items()}
        self._files = layout.devices()
        self._out: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [self.nodes[device_id] for device_id in self.online]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            self._out[message.metadata.message_id] = message
            self.asked[self._names[message.metadata.dst_node_id]] += 1
            self.down.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            message = self._out.pop(message_id)
            device_id = self._names[message.metadata.dst_node_id]
            fault = self.faults.get(device_id)
            reply = fault(message) if fault else self.answer(message)
            if reply is None:
                self._out[message_id] = message  # it never comes
            else:
                replies.append(reply)
        return replies

    def answer(self, message: Message) -> Message:
        """The device's own answer."""
        device_id = self._names[message.metadata.dst_node_id]
        config = {"device": str(self._files[device_id])}
        context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})  # type: ignore[arg-type]
        return run_client(client_app, message, context)


def failing(code: int, reason: str, message: Message) -> Message:
    """A reply that says that something failed on the way."""
    return Message(Error(code, reason), reply_to=message)


def server_config(layout: Layout, *overrides: str) -> RunConfig:
    """The server's configuration, with changes."""
    return load_config(layout.server / "run.toml", overrides)


def serve_fleet(
    layout: Layout, wires: Wires, *overrides: str, resume: bool = False, until: str | None = None,
    tell: Callable[[str, str, str], None] = lambda device_id, state, reason: None,
) -> Record | None:  # fmt: skip
    """What the ServerApp does, over these wires."""
    config = server_config(layout, *overrides)
    with open_folder(config, layout.server / "run", resume=resume) as folder:
        return serve(
            config, folder, prepare_data(config, folder), wires, wires.nodes, until=until, tell=tell,
            timeout=config.federation.timeout_seconds,
            job=lambda card: job_payload(config, folder.path, card.model.name),
        )  # fmt: skip
