# SPDX-License-Identifier: Apache-2.0
"""Flower's own SuperLink in memory, with its own checks, and devices that send it whatever objects they like."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto, run_from_proto, run_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from deepfusion.federation.messages import pack, pack_telemetry


class Objects(dict[str, bytes]):
    """Flower objects by their id, made of any kind, children and body."""

    def add(self, kind: str, children: list[str], body: bytes) -> str:
        """Add an object; returns its id."""
        content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
        name = sha256(content).hexdigest()
        self[name] = content
        return name

    def tree(self, name: str) -> ObjectTree:
        """The tree below an object, as its objects tell it."""
        children = dict.fromkeys(get_object_children_ids_from_object_content(self[name]))
        return ObjectTree(object_id=name, children=[self.tree(child) for child in children])


class SuperLink:
    """One run and its devices. `grid` is what its ServerApp is given."""

    def __init__(self) -> None:
        self.state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
        self.run_id = self.state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
        (run,) = self.state.get_run_info(run_ids=[self.run_id])
        assert run.primary_task_id is not None
        self.state.claim_task(run.primary_task_id)
        assert self.state.activate_task(run.primary_task_id)
        (self._task,) = self.state.get_tasks(task_ids=[run.primary_task_id])
        TaskIdentity.task_id, TaskIdentity.run_id = run.primary_task_id, self.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self.grid = HttpGrid(token="t")
        self.grid.set_run(run_from_proto(run_to_proto(run)))
        self.grid._client = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        """The server's calls, each parsed again after the way through HTTP."""
        handlers = {
            "PullMessages": runtime_handlers.pull_messages, "PushMessages": runtime_handlers.push_messages,
            "PullObject": runtime_handlers.pull_object, "PushObject": runtime_handlers.push_object,
            "ConfirmMessageReceived": runtime_handlers.confirm_message_received, "GetNodes": runtime_handlers.get_nodes,
        }  # fmt: skip

        def call(request: Any) -> Any:
            try:
                found = handlers[name](request, self.state, self._task)
            except Exception as error:
                asked = httpx.Request("POST", f"https://superlink/{name}")
                raise httpx.HTTPStatusError(str(error), request=asked, response=httpx.Response(500)) from error
            return type(found).FromString(found.SerializeToString())

        if name not in handlers:
            raise AttributeError(name)
        return call

    def node(self, key: bytes) -> int:
        """A device that is online."""
        node = self.state.create_node("", "", key, 60.0)
        self.state.activate_node(node, 3600.0)
        return node

    def take(self, node: int) -> Message:
        """The request that is waiting for a device."""
        (message,) = self.state.get_message_ins(node, limit=1)
        return message

    def send(self, told: ProtoMessage, objects: Objects, name: str, tree: ObjectTree | None = None) -> None:
        """Push objects as a device does, the outermost one's id being `name`."""
        deque(self.send_slowly(told, objects, name, tree), maxlen=0)

    def send_slowly(
        self, told: ProtoMessage, objects: Objects, name: str, tree: ObjectTree | None = None
    ) -> Iterator[str]:
        """The same, one object at a time: announces the reply, then pushes an object and yields its id."""
        told.metadata.message_id = name
        node = Node(node_id=told.metadata.src_node_id)
        request = PushMessagesRequest(
            node=node, messages_list=[told], message_object_trees=[tree if tree is not None else objects.tree(name)]
        )
        pushed = fleet_handlers.push_messages(request, self.state)
        for each in pushed.objects_to_push:
            one = PushObjectRequest(
                node=node,
                run_id=self.run_id,
                object_id=each,
                object_content=objects[each],
                session_id=pushed.session_id,
            )
            assert fleet_handlers.push_object(one, self.state).stored
            yield each


def reply(request: Message, blob: bytes) -> tuple[ProtoMessage, Objects, str]:
    """What a device of ours answers: what it tells the SuperLink, its objects, and the outermost one's id."""
    message = Message(pack_telemetry(pack(blob), 1.5, 7), reply_to=request)
    objects = Objects({name: each.deflate() for name, each in get_all_nested_objects(message).items()})
    return message_to_proto(remove_content_from_message(message)), objects, message.object_id
