# SPDX-License-Identifier: Apache-2.0
"""A Flower `Grid` on one machine, without sockets or Ray: the same ServerApp and ClientApp as on a fleet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from deepfusion.federation.engines import Engine, ForkServer, Inline
from deepfusion.federation.ray_engine import OnRay

_POLL = 0.2


class LocalGrid(Grid):
    """One node a device. Every engine gives the same bytes; node ids are the same in every run.

    At most twice `workers` clients are running or have replies that nobody has pulled, so memory does not grow with
    the number of devices, provided that the ServerApp does not push more than `in_flight` messages ahead.
    """

    def __init__(
        self,
        client_app: str,
        device_ids: Sequence[str],
        *,
        engine: Literal["forkserver", "inline", "ray"] = "forkserver",
        workers: int = 2,
        timeout: float | None = None,
        node_config: Mapping[str, str | int | float | bool] | None = None,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        """A grid whose clients start when their messages are pushed ("forkserver", "ray") or pulled ("inline").

        Args:
            client_app: `module:attribute`.
            device_ids: one node each, in this order. A client finds its own in `context.node_config["device-id"]`.
            workers: clients that run at the same time (not "inline").
            timeout: seconds that a client may take (not "inline").
            node_config: what every node's configuration holds besides `device-id` and `partition-id`.
            run_config: the run's configuration, for every client.
            preload: modules that are imported once for all clients ("forkserver").
        """
        self._engine: Engine
        if engine == "inline":
            self._engine = Inline(client_app)
        elif engine == "ray":
            self._engine = OnRay(client_app, workers=workers, timeout=timeout)
        else:
            self._engine = ForkServer(client_app, workers=workers, timeout=timeout, preload=preload)
        self.nodes = {device_id: SUPERLINK_NODE_ID + 1 + i for i, device_id in enumerate(device_ids)}
        """Node id of each device."""
        self._run = Run.create_empty(run_id=1)
        self._run_config = dict(run_config or {})
        self._contexts = {
            node: Context(
                run_id=self._run.run_id, node_id=node, state=RecordDict(), run_config=dict(self._run_config),
                node_config={
                    **(node_config or {}), "device-id": device_id, "partition-id": i, "num-partitions": len(self.nodes),
                },
            )
            for i, (device_id, node) in enumerate(self.nodes.items())
        }  # fmt: skip
        self._todo: deque[Message] = deque()
        self._running = 0
        self._done: dict[str, Message] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        """Messages that keep all workers busy; to push more ahead of their replies only takes memory."""
        return 2 * self._engine.workers

    def serve(self, server_app: ServerApp) -> None:
        """Run a ServerApp on this grid to its end."""
        # Flower's own engines do the same: messages take their sender from here.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, SUPERLINK_NODE_ID
        context = Context(
            run_id=self._run.run_id, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(),
            run_config=dict(self._run_config),
        )  # fmt: skip
        server_app(self, context)

    def close(self) -> None:
        """End all clients. Messages that were pushed and not answered are forgotten."""
        self._engine.close()
        self._todo.clear()
        self._done.clear()
        self._running = 0

    # ------------------------------------------------------------------ flwr.serverapp.Grid

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids, in the order of the devices."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; returns their ids."""
        ids: list[str] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex  # on a fleet the SuperLink sets it
            ids.append(message.metadata.message_id)
            self._todo.append(message)
        self._start_more()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that are there; waits a fifth of a second for the first one."""
        wanted = list(message_ids)
        deadline = time.monotonic() + _POLL
        while True:
            replies = [self._done.pop(i) for i in wanted if i in self._done]
            self._start_more()
            if not replies and not self._running and self._todo:
                self._start_one()  # or a ServerApp that pulls in an order of its own would wait for ever
            left = deadline - time.monotonic()
            if replies or not self._running or left <= 0:
                return replies
            for reply, context in self._engine.finished(left):
                self._running -= 1
                self._contexts[context.node_id] = context
                reply.metadata.__dict__["_message_id"] = uuid4().hex
                self._done[reply.metadata.reply_to_message_id] = reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and return all replies that come within `timeout` seconds."""
        waiting = set(self.push_messages(messages))
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def _start_more(self) -> None:
        while self._todo and self._running < self._engine.workers and self._running + len(self._done) < self.in_flight:
            self._start_one()

    def _start_one(self) -> None:
        message = self._todo.popleft()
        self._running += 1
        self._engine.start(message, self._contexts[message.metadata.dst_node_id])
