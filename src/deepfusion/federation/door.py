# SPDX-License-Identifier: Apache-2.0
"""The door: the only way from the server to its devices and back, and the place where bytes are counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from flwr.app import Message
from flwr.common.constant import ErrorCode

from deepfusion.devices.memory import peak_memory_bytes
from deepfusion.errors import DropoutError, FederationError, UploadError
from deepfusion.federation.ledger import Ledger, Row
from deepfusion.federation.messages import JOB, pack, pack_telemetry, read_telemetry, unpack
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

DROPOUTS = TRANSPORT_ERRORS | {ErrorCode.UNKNOWN}
"""What makes a device one that dropped out; UNKNOWN is what a local grid says of one that took too long."""

_POLL = 0.2
_LONGEST_PAUSE = 300.0
_LONGEST = 2000
"""Characters of what a device says of its failure that are kept."""


Tell = Callable[[str, str, str], None]
"""`tell(device_id, state, reason)`: what has become of a device, for those who watch; see `Roll`."""


class Wire(Protocol):
    """The part of a Flower `Grid` that the door needs."""

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that can be reached now."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that are there."""
        ...


@dataclass(frozen=True)
class _Sent:
    device_id: str
    expires: float


@dataclass(frozen=True)
class _Failure:
    """Why a device gave no answer.

    Attributes:
        dropped: it fell silent, or was never heard; it did not say what is wrong, or answer what cannot be used.
    """

    reason: str
    code: int | None = None
    dropped: bool = True


class Door:
    """A `Call` over any Flower grid.

    Attributes:
        failures: why a device gave no answer, by device id: the last call's word on each device. Who refuses an answer
            puts the reason here, before the next one is asked for.
    """

    def __init__(
        self,
        grid: Wire,
        nodes: Mapping[str, int],
        ledger: Ledger,
        *,
        retries: int = 1,
        timeout: float | None = None,
        deadline: float | None = None,
        in_flight: int | None = None,
        look_up: Callable[[], Mapping[str, int]] | None = None,
        job: Callable[[str], Payload] | None = None,
        tell: Tell = lambda device_id, state, reason: None,
        progress: Progress = silent,
    ) -> None:
        """Open the door.

        Args:
            grid: a local grid, or the one that a ServerApp is given on a fleet.
            nodes: node id of each device.
            ledger: where the bytes of both directions are booked.
            retries: how often a device is asked again after its process broke, or (without `timeout`) its connection.
            timeout: seconds after which an answer is no longer waited for. For a fleet; a local grid has its own. With it, a
                device whose connection broke is asked again as often as it comes back.
            deadline: seconds after which a call waits for nobody any more, not even for those that never were online.
            in_flight: most messages that are out at the same time, None for one to every device at once. On a local
                grid its `in_flight`, so that memory does not grow with the number of devices.
            look_up: asked for the node ids at every turn: on a fleet they change while a call goes on.
                A device that is not among them is shut out, and waited for no longer.
            job: what a device needs before it can answer anything; goes along with its first request.
            tell: told what becomes of each device.
            progress: told of every device that has answered or failed.
        """
        self._grid, self._nodes, self._ledger = grid, dict(nodes), ledger
        self._retries, self._timeout, self._deadline = retries, timeout, deadline if deadline is not None else timeout
        self._look_up, self._job, self._tell, self._progress = look_up, job, tell, progress
        self._in_flight = float("inf") if in_flight is None else in_flight
        self._has_job: set[str] = set()
        self.failures: dict[str, str] = {}

    def __call__(self, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        """Send each device its request and yield (device id, answer) in order of arrival.

        A device that fails is left out and named in `failures`; the others go on.

        Raises:
            FederationError: a device is not connected, or every device failed (with what the first one said).
            DropoutError: every device dropped out.
        """
        strangers = sorted(requests.keys() - self._nodes.keys())
        if strangers and self._look_up is None:
            raise FederationError(
                f"devices {', '.join(strangers[:5])} are not connected ({len(self._nodes)} others are); "
                "start them, or take them out of the configuration"
            )
        return self._exchange(requests)

    def _exchange(self, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        waiting = deque(requests)
        attempts, not_before = dict.fromkeys(requests, 0), dict.fromkeys(requests, 0.0)
        sent: dict[str, _Sent] = {}
        failed: list[str] = []
        settled, answered, dropped, closes = 0, False, True, _after(self._deadline)
        while waiting or sent:
            gone = self._shut_out(waiting, sent)
            ready = {device_id for device_id in waiting if time.monotonic() >= not_before[device_id]}
            self._send_to_those_there(waiting, ready, sent, requests)
            arrivals = self._receive(sent) if time.monotonic() < closes else self._close(waiting, sent)
            for device_id, outcome in chain(gone, arrivals):
                if isinstance(outcome, Payload):
                    answered = True
                    self.failures.pop(device_id, None)
                    yield device_id, outcome  # who takes it may refuse it
                elif self._can_be_mended(outcome, attempts[device_id]):
                    attempts[device_id] += 1
                    not_before[device_id] = time.monotonic() + self._pause(attempts[device_id])
                    waiting.append(device_id)
                    self._tell(device_id, "waiting", outcome.reason)
                    continue
                else:
                    self.failures[device_id] = outcome.reason
                    dropped = dropped and outcome.dropped
                del outcome  # or it would be in memory until the next one has arrived
                settled += 1
                reason = self.failures.get(device_id)
                if reason is not None:
                    failed.append(device_id)
                self._tell(device_id, "answered" if reason is None else "failed", reason or "")
                note = f"{len(failed)} failed" if failed else device_id
                self._progress("devices", settled, len(requests), note)
        if failed and not answered:
            said = f"none of {len(failed)} devices answered; device {failed[0]}: {self.failures[failed[0]]}"
            raise DropoutError(said, tuple(requests)) if dropped else FederationError(said)

    def _can_be_mended(self, failure: _Failure, attempts: int) -> bool:
        if failure.code not in TRANSPORT_ERRORS:
            return False
        comes_back = self._timeout is not None and failure.code != ErrorCode.CLIENT_APP_CRASHED
        return comes_back or attempts < self._retries

    def _pause(self, attempts: int) -> float:
        """Seconds until a device is asked again: none at first, then more each time that its connection breaks."""
        return min(2.0 ** (attempts - 1), _LONGEST_PAUSE) if self._timeout is not None and attempts > 1 else 0.0

    def _shut_out(self, waiting: deque[str], sent: dict[str, _Sent]) -> list[tuple[str, _Failure]]:
        """Look up the node ids anew, and give up those that have none any more."""
        if self._look_up is None:
            return []
        self._nodes = dict(self._look_up())
        asked = {message.device_id: message_id for message_id, message in sent.items()}
        gone = [device_id for device_id in (*waiting, *asked) if device_id not in self._nodes]
        for device_id in gone:
            if device_id in asked:
                del sent[asked[device_id]]
            else:
                waiting.remove(device_id)
        reason = "its key is not registered; put it among the keys, and then: deepfusion fleet register, and --resume"
        return [(device_id, _Failure(reason)) for device_id in gone]

    def _send_to_those_there(
        self, waiting: deque[str], ready: set[str], sent: dict[str, _Sent], requests: Mapping[str, Payload]
    ) -> None:
        """Send the requests of devices that are `ready` and online, as many as may be out; the others go on waiting."""
        if not ready or len(sent) >= self._in_flight:
            return
        online = set(self._grid.get_node_ids())
        for _ in range(len(waiting)):
            device_id = waiting.popleft()
            if len(sent) < self._in_flight and device_id in ready and self._nodes[device_id] in online:
                sent[self._send(device_id, requests[device_id])] = _Sent(device_id, _after(self._timeout))
                self._tell(device_id, "asked", "")
            else:
                waiting.append(device_id)

    def _send(self, device_id: str, request: Payload) -> str:
        """Send a request, book it, and return the message's id."""
        blob = encode(request)
        content = pack(blob)
        if self._job is not None and device_id not in self._has_job:
            job = self._job(device_id)
            told = encode(job)
            content = pack(told, content, JOB)
            self._ledger.book(Row(job.round, device_id, "down", job.what, len(told)))
        message = Message(
            content, self._nodes[device_id], MESSAGE_TYPE, ttl=self._timeout, group_id=str(request.round)
        )  # fmt: skip
        (message_id,) = self._grid.push_messages([message])
        self._ledger.book(Row(request.round, device_id, "down", request.what, len(blob)))
        return message_id

    def _close(self, waiting: deque[str], sent: dict[str, _Sent]) -> Iterator[tuple[str, _Failure]]:
        """The deadline has passed: whoever has not answered is missing."""
        missing = [*((message.device_id, "has not answered") for message in sent.values()),
                   *((device_id, "was not online") for device_id in waiting)]  # fmt: skip
        sent.clear()
        waiting.clear()
        for device_id, why in missing:
            yield device_id, _Failure(f"{why} by the deadline of {self._deadline:g} s; --resume asks it again")

    def _receive(self, sent: dict[str, _Sent]) -> Iterator[tuple[str, Payload | _Failure]]:
        """What has arrived or expired; takes it out of `sent`. Waits a little when there is nothing."""
        began = time.monotonic()
        replies = deque(self._grid.pull_messages(list(sent)) if sent else ())
        if not replies:  # a grid that has itself waited for a reply is not made to wait again
            time.sleep(max(0.0, _POLL - (time.monotonic() - began)))
        while replies:
            message = sent.pop(replies[0].metadata.reply_to_message_id, None)
            if message is None:  # answered already, or nobody asked
                replies.popleft()
                continue
            yield message.device_id, self._open_reply(message.device_id, replies.popleft())
        for message_id, message in list(sent.items()):
            if time.monotonic() > message.expires:
                del sent[message_id]
                yield message.device_id, _Failure(f"gave no answer within {self._timeout:g} s")

    def _open_reply(self, device_id: str, reply: Message) -> Payload | _Failure:
        """Book the bytes of a reply, and check and decode it."""
        if reply.has_error():
            error = reply.error
            reason = (error.reason or "it failed without a word")[:_LONGEST]
            return _Failure(reason, error.code, dropped=error.code in DROPOUTS)
        source = f"device {device_id}"
        try:
            blob = unpack(reply, source)
            try:
                payload = decode(blob, source=source)
            except UploadError:
                self._ledger.book(Row(0, device_id, "up", "refused", len(blob)))  # it did cross, whatever it was
                raise
        except UploadError as error:
            return _Failure(str(error), dropped=False)
        self._ledger.book(Row(payload.round, device_id, "up", payload.what, len(blob), *read_telemetry(reply)))
        self._has_job.add(device_id)
        return payload


def _after(seconds: float | None) -> float:
    return float("inf") if seconds is None else time.monotonic() + seconds


def job_of(message: Message) -> Payload | None:
    """On the device: the job that came along with a request, if it is the first one.

    Raises:
        UploadError: it is not a payload.
    """
    return decode(unpack(message, "server", JOB), source="server") if JOB in message.content else None


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
