# SPDX-License-Identifier: Apache-2.0
"""A SuperLink's grid of which every reply is pulled in a thread of its own: a large upload keeps no other one waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

from flwr.app import Message

from deepfusion.federation.door import Wire


class PulledApart:
    """The same grid, whose `pull_messages` never waits.

    At most `threads` replies are being pulled or lie here unfetched, which bounds the memory; whoever was asked for longest ago
    is asked for next, so that silent devices keep nobody waiting.
    """

    def __init__(self, grid: Wire, pull: Callable[[str], Message | None], threads: int = 8) -> None:
        """Start no thread yet.

        Args:
            pull: the reply to a message, None while it is not here as a whole; see `Replies`.
            threads: replies at a time.
        """
        self._grid, self._pull, self._threads = grid, pull, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pull")
        self._pulls: dict[str, Future[Message | None]] = {}
        self._turn = count(1)
        self._asked: dict[str, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that have been pulled since the last call.

        Raises:
            Exception: what `pull` raised: the SuperLink could not be reached.
        """
        wanted = list(message_ids)
        replies: list[Message] = []
        for message_id, pull in list(self._pulls.items()):
            if pull.done():
                del self._pulls[message_id]
                reply = pull.result()
                replies += [reply] if reply is not None and message_id in wanted else []
        for message_id in sorted(wanted, key=lambda name: self._asked.get(name, 0)):
            if message_id not in self._pulls and len(self._pulls) < self._threads:
                self._pulls[message_id] = self._pool.submit(self._pull, message_id)
                self._asked[message_id] = next(self._turn)
        return replies

    def close(self) -> None:
        """Wait for no thread any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
