# SPDX-License-Identifier: Apache-2.0
"""The door: the only way from the server to its devices and back, and the place where bytes are counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from deepfusion.devices.memory import peak_memory_bytes
from deepfusion.errors import FederationError, UploadError
from deepfusion.federation.ledger import Ledger, Row
from deepfusion.federation.messages import pack, pack_telemetry, read_telemetry, unpack
from deepfusion.federation.payload import decode, encode
from deepfusion.types import Payload, Progress, silent

MESSAGE_TYPE = "train"
"""The kind of the door's messages: a ClientApp answers them in its `@app.train()` function."""

TRANSPORT_ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
}
"""What another attempt may mend. An exception in the client's code would only be raised again."""

_POLL = 0.2


@dataclass(frozen=True)
class _Sent:
    device_id: str
    expires: float


@dataclass(frozen=True)
class _Failure:
    reason: str
    can_be_mended: bool


class Door:
    """A `Call` over any Flower grid.

    Attributes:
        failures: why a device gave no answer, by device id: the last call's word on each device.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        ledger: Ledger,
        *,
        retries: int = 1,
        timeout: float | None = None,
        in_flight: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """Open the door.

        Args:
            grid: a local grid, or the one that a ServerApp is given on a fleet.
            nodes: node id of each device.
            ledger: where the bytes of both directions are booked.
            retries: how often a device is asked again after its process or its connection broke.
            timeout: seconds after which an answer is no longer waited for. For a fleet; a local grid has its own.
            in_flight: most messages that are out at the same time, None for one to every device at once. On a local
                grid its `in_flight`, so that memory does not grow with the number of devices.
            progress: told of every device that has answered or failed.
        """
        self._grid, self._nodes, self._ledger = grid, dict(nodes), ledger
        self._retries, self._timeout, self._progress = retries, timeout, progress
        self._in_flight = in_flight if in_flight is not None else max(1, len(self._nodes))
        self.failures: dict[str, str] = {}

    def __call__(self, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        """Send each device its request and yield (device id, answer) in order of arrival.

        A device that fails is left out and named in `failures`; the others go on.

        Raises:
            FederationError: a device is not connected, or every device failed (with what the first one said).
        """
        strangers = sorted(requests.keys() - self._nodes.keys())
        if strangers:
            raise FederationError(
                f"devices {', '.join(strangers[:5])} are not connected ({len(self._nodes)} others are); "
                "start them, or take them out of the configuration"
            )
        return self._exchange(requests)

    def _exchange(self, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        waiting = deque(requests)
        attempts = dict.fromkeys(requests, 0)
        sent: dict[str, _Sent] = {}
        failed: list[str] = []
        answered = 0
        while waiting or sent:
            while waiting and len(sent) < self._in_flight:
                device_id = waiting.popleft()
                attempts[device_id] += 1
                sent[self._send(device_id, requests[device_id])] = _Sent(device_id, self._expiry())
            for device_id, outcome in self._receive(sent):
                if isinstance(outcome, Payload):
                    answered += 1
                    self.failures.pop(device_id, None)
                elif outcome.can_be_mended and attempts[device_id] <= self._retries:
                    waiting.append(device_id)
                    continue
                else:
                    self.failures[device_id] = outcome.reason
                    failed.append(device_id)
                note = f"{len(failed)} failed" if failed else device_id
                self._progress("devices", answered + len(failed), len(requests), note)
                if isinstance(outcome, Payload):
                    yield device_id, outcome
                del outcome  # or it would be in memory until the next one has arrived
        if failed and not answered:
            raise FederationError(
                f"none of {len(failed)} devices answered; device {failed[0]}: {self.failures[failed[0]]}"
            )

    def _send(self, device_id: str, request: Payload) -> str:
        """Send a request, book it, and return the message's id."""
        blob = encode(request)
        message = Message(
            pack(blob), self._nodes[device_id], MESSAGE_TYPE, ttl=self._timeout, group_id=str(request.round)
        )  # fmt: skip
        (message_id,) = self._grid.push_messages([message])
        self._ledger.book(Row(request.round, device_id, "down", request.what, len(blob)))
        return message_id

    def _expiry(self) -> float:
        return float("inf") if self._timeout is None else time.monotonic() + self._timeout

    def _receive(self, sent: dict[str, _Sent]) -> Iterator[tuple[str, Payload | _Failure]]:
        """What has arrived or expired; takes it out of `sent`. Waits a little when there is nothing."""
        began = time.monotonic()
        replies = deque(self._grid.pull_messages(list(sent)))
        if not replies:  # a grid that has itself waited for a reply is not made to wait again
            time.sleep(max(0.0, _POLL - (time.monotonic() - began)))
        while replies:
            device_id = sent.pop(replies[0].metadata.reply_to_message_id).device_id
            yield device_id, self._open_reply(device_id, replies.popleft())
        for message_id, message in list(sent.items()):
            if time.monotonic() > message.expires:
                del sent[message_id]
                yield message.device_id, _Failure(f"gave no answer within {self._timeout:g} s", can_be_mended=False)

    def _open_reply(self, device_id: str, reply: Message) -> Payload | _Failure:
        """Book the bytes of a reply, and check and decode it."""
        if reply.has_error():
            return _Failure(reply.error.reason or "it failed without a word", reply.error.code in TRANSPORT_ERRORS)
        source = f"device {device_id}"
        try:
            blob = unpack(reply, source)
            try:
                payload = decode(blob, source=source)
            except UploadError:
                self._ledger.book(Row(0, device_id, "up", "refused", len(blob)))  # it did cross, whatever it was
                raise
        except UploadError as error:
            return _Failure(str(error), can_be_mended=False)
        self._ledger.book(Row(payload.round, device_id, "up", payload.what, len(blob), *read_telemetry(reply)))
        return payload


def answer(message: Message, device_id: str, handler: Callable[[Payload], Payload]) -> Message:
    """The device's side of the door: decode the request, let `handler` answer it, and encode the answer.

    Raises:
        FederationError: whatever was raised, with the device's id and what it was asked for.
    """
    what, began = "request", time.monotonic()
    try:
        request = decode(unpack(message, "server"), source="server")
        what = request.what
        blob = encode(handler(request))
    except Exception as error:
        text = f"device {device_id}, asked for {what!r}: {type(error).__name__}: {error}"
        raise FederationError(text) from error
    content = pack_telemetry(pack(blob), time.monotonic() - began, peak_memory_bytes())
    return Message(content, reply_to=message)
