# SPDX-License-Identifier: Apache-2.0
"""Replies as the SuperLink keeps them: objects of which a device has written every byte, weighed and looked at before use.

A reply of ours is one `Message` with one `RecordDict`: an `ArrayRecord` of one `Array`, whose bytes lie in `ArrayChunk`s, and
a `MetricRecord`. An array may name a chunk more than once (Flower keeps equal chunks once), so what it takes in memory is
reckoned before it is put together. Flower's own `pull_messages` checks none of this, and one object that it cannot inflate
loses every message that came with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)

from deepfusion.errors import FederationError, UploadError

_BELOW: dict[str, tuple[set[str], int | None]] = {
    "Message": ({"RecordDict"}, 1),
    "RecordDict": ({"ArrayRecord", "MetricRecord"}, 2),
    "ArrayRecord": ({"Array"}, 1),
    "Array": ({"ArrayChunk"}, None),
    "ArrayChunk": (set(), 0),
    "MetricRecord": (set(), 0),
}
"""What each object of a reply may hold, and how many of them: so that a tree has an end."""
_OTHERS = 5
"""Objects of a reply that are no chunks."""
_LARGEST_FORM = 2**20
"""Bytes of an object that is no chunk, besides what it says of chunks: parsed, it takes some twenty times as much memory."""
_PER_CHUNK = 100
"""Bytes that an array says of a chunk, at most: its id, and its place."""
_STUMBLED = 500
"""The HTTP status of a SuperLink that has met an exception of its own."""
_CURE = "answer it with `door.answer`"


@dataclass(frozen=True)
class _Arriving:
    """A reply that its device has announced and perhaps not sent as a whole yet.

    Attributes:
        name: id of the outermost object.
        here: what tells the SuperLink that we have it.
        ids: of all its objects.
        seen: bytes of those that have arrived.
    """

    name: str
    here: ConfirmMessageReceivedRequest
    ids: list[str]
    seen: dict[str, int] = field(default_factory=dict)


class Replies:
    """A SuperLink's replies, one at a time. Whatever a device has written, it costs that device's reply and no other.

    Nobody waits for the rest of a reply (Flower would, for up to two hours): what has not arrived whole is asked for again.
    """

    def __init__(self, grid: Grid, most: int | None = None) -> None:
        """Check that this Flower's grid is the one that this is made for.

        Args:
            grid: what a ServerApp is given on a fleet.
            most: bytes that a reply may weigh, on the wire and put together. None where nobody knows: an array then may be no
                larger than what was sent of it.

        Raises:
            FederationError: it is not.
        """
        inside: Any = grid
        try:
            self._node, self._run_id, client = inside.node, inside._run.run_id, inside._runtime_client
            self._ask, self._fetch, self._confirm = (
                client.PullMessages,
                client.PullObject,
                client.ConfirmMessageReceived,
            )
        except AttributeError as error:
            raise FederationError(
                f"this flwr reaches its SuperLink in another way ({error}); install flwr>=1.41,<1.42"
            ) from error
        self._most = most
        self._arriving: dict[str, _Arriving] = {}

    def pull(self, message_id: str) -> Message | None:
        """The reply to this message, None while it is not here whole; where it cannot be used, one with an error that says why.

        Raises:
            httpx.HTTPError: the SuperLink cannot be reached, or does not answer to us.
        """
        try:
            return self._pull(message_id)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != _STUMBLED:
                raise
            # What a device has said of its objects can make the SuperLink stumble, which has forgotten the message then.
            return self._failed(message_id, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"its reply was lost: {error}")
        except (httpx.HTTPError, OSError):
            raise
        except ObjectPullError as error:
            reason = f"its reply has not arrived whole, and will not: {error}"
            return self._failed(message_id, ErrorCode.MESSAGE_UNAVAILABLE, reason)
        except UploadError as error:
            return self._failed(message_id, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))
        except Exception as error:  # a parser's, of what a device has written: it may be any
            reason = f"its reply cannot be read ({type(error).__name__}: {error}); {_CURE}"
            return self._failed(message_id, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)

    def _pull(self, message_id: str) -> Message | None:
        arriving = self._arriving.get(message_id) or self._announced(message_id)
        if arriving is None:
            return None
        self._arriving[message_id] = arriving
        try:
            contents = self._contents(arriving)
        except ObjectUnavailableError:
            return None
        except UploadError:
            self._confirm(arriving.here)  # the SuperLink need not keep it
            raise
        self._confirm(arriving.here)
        del self._arriving[message_id]
        message = unpacked(arriving.name, contents, self._most)
        if message.metadata.reply_to_message_id != message_id:
            raise UploadError("its reply claims to answer another message than it was sent for; " + _CURE)
        return message

    def _announced(self, message_id: str) -> _Arriving | None:
        """The reply that has been announced; the SuperLink says it once."""
        found = self._ask(PullAppMessagesRequest(message_ids=[message_id]))
        for told, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            if told.metadata.reply_to_message_id != message_id:  # a device has sent it to the server unasked
                continue
            name = told.metadata.message_id
            here = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run_id, message_object_id=name)
            few = None if self._most is None else _OTHERS + 1 + self._most // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
            ids = [each.object_id for each in islice(iterate_object_tree(tree), None if few is None else few + 1)]
            if few is not None and len(ids) > few:
                self._confirm(here)
                raise UploadError(f"its reply is of more than {few:,} objects, over the limit in this run; {_CURE}")
            return _Arriving(name, here, list(dict.fromkeys(ids)))
        return None

    def _contents(self, arriving: _Arriving) -> dict[str, bytes]:
        """The bytes of every object of a reply, by its id; those that were seen are fetched once all have arrived.

        Raises:
            UploadError: they are more than a reply may weigh.
            ObjectUnavailableError: not all of them have arrived yet.
            ObjectPullError: some never will.
        """
        fetch = make_pull_object_fn_protobuf(self._fetch, self._node, self._run_id)
        contents: dict[str, bytes] = {}
        for object_id in arriving.ids:
            if object_id not in arriving.seen:
                contents[object_id] = fetch(object_id)
                arriving.seen[object_id] = len(contents[object_id])
                _check_weight(sum(arriving.seen.values()), self._most)
        return contents | {object_id: fetch(object_id) for object_id in arriving.ids if object_id not in contents}

    def _failed(self, message_id: str, code: int, reason: str) -> Message:
        self._arriving.pop(message_id, None)
        metadata = Metadata(
            run_id=self._run_id, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=message_id, group_id="", created_at=now().timestamp(), ttl=0,
            message_type=SYSTEM_MESSAGE_TYPE,
        )  # fmt: skip
        return make_message(metadata=metadata, error=Error(code=code, reason=reason))


def unpacked(name: str, contents: dict[str, bytes], most: int | None = None) -> Message:
    """A reply from its objects; takes them out of `contents`.

    Args:
        name: id of the outermost one.
        most: see `Replies`.

    Raises:
        UploadError: it is not what our devices send.
        Exception: Flower or a parser cannot read it.
    """
    allowed = sum(map(len, contents.values())) if most is None else most
    _check_weight(_weight(name, {"Message"}, contents), allowed)
    message = inflate_object_from_contents(name, contents)
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = name
    return message


def _weight(name: str, kinds: set[str], contents: Mapping[str, bytes]) -> int:
    """Bytes of the arrays of an object of one of these kinds, put together.

    Raises:
        UploadError: the object is of another kind, or holds what it should not.
    """
    content = contents[name]
    form = _LARGEST_FORM + _PER_CHUNK * len(contents)
    if not content.startswith(b"ArrayChunk  ") and len(content) > form:
        raise UploadError(f"its reply has an object of {len(content):,} bytes that is no data, over {form:,}; {_CURE}")
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind not in kinds:
        raise UploadError(f'its reply has an object "{kind:.40}" where {" or ".join(sorted(kinds))} was due; {_CURE}')
    below, count = _BELOW[kind]
    if count is not None and len(children) > count:
        raise UploadError(f"its reply has a {kind} of {len(children):,} objects, not of {count}; {_CURE}")
    weights = [_weight(child, below, contents) for child in children]
    begin = content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER)
    if kind == "ArrayChunk":
        return len(content) - begin
    if kind != "Array":
        return sum(weights)
    places = json.loads(content[begin:])["arraychunk_ids"]
    if not all(type(place) is int and 0 <= place < len(weights) for place in places):
        raise UploadError(f"its reply has an Array that names a chunk which is not there; {_CURE}")
    return sum(weights[place] for place in places)


def _check_weight(weight: int, most: int | None) -> None:
    if most is not None and weight > most:
        raise UploadError(f"its reply weighs {weight:,} bytes or more, over the limit of {most:,} in this run; {_CURE}")
