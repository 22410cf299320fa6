# SPDX-License-Identifier: Apache-2.0
"""Replies as a SuperLink keeps them: what of a registered device's objects comes through, and that none stops a run."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.superlink.servicer.fleet import fleet_handlers

from deepfusion.errors import FederationError, UploadError
from deepfusion.federation.apart import PulledApart
from deepfusion.federation.door import DROPOUTS, TRANSPORT_ERRORS, Door
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.messages import pack, unpack
from deepfusion.federation.payload import encode
from deepfusion.federation.replies import Replies, unpacked
from deepfusion.types import Payload
from superlink_world import Objects, SuperLink, reply

ANSWER = Payload("model", {"x": torch.arange(1000.0)}, {"device": "a"})
BLOB = encode(ANSWER)
MOST = 100_000


def body(message: Message, **changes: str) -> bytes:
    """A message object's own part."""
    told, _, _ = reply(message, BLOB)
    told.ClearField("content")
    told.metadata.message_id = ""
    for key, value in changes.items():
        setattr(told.metadata, key, value)
    return told.SerializeToString()


def with_array(message: Message, objects: Objects, array: str) -> str:
    record = objects.add("ArrayRecord", [array], json.dumps({"blob": array}).encode())
    content = objects.add("RecordDict", [record], json.dumps({"payload": record}).encode())
    return objects.add("Message", [content], body(message))


def array(objects: Objects, chunks: list[str], places: object, **more: object) -> str:
    text = {"dtype": "uint8", "shape": [1], "stype": "safetensors", "arraychunk_ids": places, **more}
    return objects.add("Array", chunks, json.dumps(text).encode())


def nested(message: Message, objects: Objects, depth: int = 2) -> str:
    inner = objects.add("RecordDict", [], b"{}")
    for _ in range(depth - 1):
        inner = objects.add("RecordDict", [inner], json.dumps({"x": inner}).encode())
    return objects.add("Message", [inner], body(message))


def named_often(message: Message, objects: Objects) -> str:
    chunk = objects.add("ArrayChunk", [], bytes(50_000))
    return with_array(message, objects, array(objects, [chunk], [0] * 4000))


def large(message: Message, objects: Objects) -> str:
    chunk = objects.add("ArrayChunk", [], bytes(MOST))
    return with_array(message, objects, array(objects, [chunk], [0]))


def crumbs(message: Message, objects: Objects) -> str:
    chunks = [objects.add("ArrayChunk", [], bytes([number])) for number in range(9)]
    return with_array(message, objects, array(objects, chunks, list(range(9))))


def deep_json(message: Message, objects: Objects) -> str:
    chunk = objects.add("ArrayChunk", [], b"x")
    text = b'{"arraychunk_ids": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    return with_array(message, objects, objects.add("Array", [chunk], text))


def bad_place(message: Message, objects: Objects) -> str:
    chunk = objects.add("ArrayChunk", [], b"x")
    return with_array(message, objects, array(objects, [chunk], [-1]))


def many_records(message: Message, objects: Objects) -> str:
    records = [objects.add("MetricRecord", [], bytes(number)) for number in range(3)]
    content = objects.add("RecordDict", records, json.dumps({name[:9]: name for name in records}).encode())
    return objects.add("Message", [content], body(message))


Make = Callable[[Message, Objects], str]
MALFORMED: dict[str, tuple[Make, str]] = {
    "a message without anything": (lambda m, o: o.add("Message", [], body(m)), "cannot be read .IndexError"),
    "records that are a list": (
        lambda m, o: o.add("Message", [o.add("RecordDict", [], b"[]")], body(m)), "cannot be read .AttributeError",
    ),
    "not protobuf": (lambda m, o: o.add("Message", [], b"\xff" * 9), "cannot be read .DecodeError"),
    "objects in objects": (nested, 'an object "RecordDict" where ArrayRecord or MetricRecord was due'),
    "a chunk in the place of a message": (
        lambda m, o: o.add("ArrayChunk", [], b"x"), 'an object "ArrayChunk" where Message was due',
    ),
    "a configuration": (
        lambda m, o: o.add("Message", [o.add("ConfigRecord", [], b"")], body(m)), '"ConfigRecord" where RecordDict was due',
    ),
    "three records": (many_records, "a RecordDict of 3 objects, not of 2"),
    "a chunk named 4,000 times": (named_often, "weighs 200,000,000 bytes or more, over the limit of 100,000"),
    "more than any answer": (large, "weighs 100,0.. bytes or more, over the limit of 100,000"),
    "many small chunks": (crumbs, "is of more than 6 objects"),
    "an array nested in itself": (deep_json, "cannot be read .RecursionError"),
    "a chunk before the first": (bad_place, "an Array that names a chunk which is not there"),
    "an answer to another message": (
        lambda m, o: o.add("Message", [o.add("RecordDict", [], b"{}")], body(m, reply_to_message_id="f" * 64)),
        "claims to answer another message",
    ),
}  # fmt: skip


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


def ask(link: SuperLink, device: str = "a") -> Message:
    """Send a device a request; what it gets."""
    node = link.node(device.encode())
    link.grid.push_messages([Message(pack(encode(Payload("request"))), node, "train", ttl=60.0)])
    return link.take(node)


def answer(link: SuperLink, message: Message, make: Make) -> Message | None:
    """What the server gets of a reply made so."""
    told, _, _ = reply(message, BLOB)
    objects = Objects()
    link.send(told, objects, make(message, objects))
    return Replies(link.grid, MOST).pull(message.metadata.message_id)


def test_an_honest_reply_is_what_flower_itself_would_give(link: SuperLink) -> None:
    found: list[Message] = []
    for device in ("a", "b"):
        message = ask(link, device)
        told, objects, root = reply(message, BLOB)
        link.send(told, objects, root)
        name = message.metadata.message_id
        pulled = Replies(link.grid, MOST).pull(name) if device == "a" else next(iter(link.grid.pull_messages([name])))
        assert pulled is not None
        assert pulled.metadata.reply_to_message_id == name
        found.append(pulled)
        assert root not in link.state.object_store  # it need not be kept any more
    assert found[0].content == found[1].content
    assert bytes(unpack(found[0], "a")) == BLOB
    assert vars(found[0].metadata).keys() == vars(found[1].metadata).keys()
    assert Replies(link.grid, MOST).pull(ask(link, "c").metadata.message_id) is None


def test_a_device_that_says_that_it_failed_is_understood(link: SuperLink) -> None:
    message = ask(link)
    failed = Message(Error(2, "no text"), reply_to=message)
    objects = Objects({failed.object_id: failed.deflate()})
    link.send(message_to_proto(failed), objects, failed.object_id)
    got = Replies(link.grid, MOST).pull(message.metadata.message_id)
    assert got is not None
    assert (got.error.code, got.error.reason) == (2, "no text")


def test_equal_chunks_that_flower_sends_once_are_put_together_again(link: SuperLink) -> None:
    blob = bytes(3 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 5)
    message = ask(link)
    told, objects, name = reply(message, blob)
    assert len(objects) == 7  # two chunks, not four
    link.send(told, objects, name)
    got = Replies(link.grid, 2 * len(blob)).pull(message.metadata.message_id)
    assert got is not None
    assert bytes(unpack(got, "a")) == blob


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_reply_is_an_error_of_its_device_that_says_why(name: str, link: SuperLink) -> None:
    make, said = MALFORMED[name]
    message = ask(link)
    got = answer(link, message, make)
    assert got is not None
    assert got.metadata.reply_to_message_id == message.metadata.message_id
    assert got.error.code not in DROPOUTS  # or it would be asked again, or such a round be passed over
    assert re.search(said, got.error.reason)


def test_nobody_waits_for_the_rest_of_a_reply(link: SuperLink) -> None:
    """Every object is asked for until it is there, and fetched once more when all are."""
    fetched: list[str] = []
    pull = link.PullObject

    def counted(request: PullObjectRequest) -> PullObjectResponse:
        found = pull(request)
        fetched.extend([request.object_id] if found.object_available else [])
        return found

    link.__dict__["PullObject"] = counted
    slow, quick = ask(link, "a"), ask(link, "b")
    replies = Replies(link.grid, MOST)
    told, objects, name = reply(slow, BLOB)
    other = reply(quick, BLOB[::-1])
    link.send(*other)
    for number, _ in enumerate(link.send_slowly(told, objects, name), 1):
        if number < len(objects.keys() - other[1].keys()):
            assert replies.pull(slow.metadata.message_id) is None
        if number == 1:
            assert replies.pull(quick.metadata.message_id) is not None
    got = replies.pull(slow.metadata.message_id)
    assert got is not None
    assert bytes(unpack(got, "a")) == BLOB
    assert all(fetched.count(each) <= 2 for each in objects.keys() - other[1].keys())


def test_a_reply_of_which_the_superlink_has_forgotten_a_part_is_asked_for_again(link: SuperLink) -> None:
    message = ask(link)
    told, objects, name = reply(message, BLOB)
    replies, sending = Replies(link.grid, MOST), link.send_slowly(told, objects, name)
    next(sending)
    assert replies.pull(message.metadata.message_id) is None
    link.state.object_store.delete(name)
    got = replies.pull(message.metadata.message_id)
    assert got is not None
    assert got.error.code in TRANSPORT_ERRORS
    assert "its reply has not arrived whole, and will not" in got.error.reason


def test_objects_nested_a_thousand_deep_are_refused_where_no_limit_is_known(link: SuperLink) -> None:
    message = ask(link)
    objects = Objects()
    root = nested(message, objects, depth=1200)
    told, _, _ = reply(message, BLOB)
    flat = ObjectTree(object_id=root, children=[ObjectTree(object_id=name) for name in objects if name != root])
    link.send(told, objects, root, flat)
    got = Replies(link.grid).pull(message.metadata.message_id)
    assert got is not None
    assert 'an object "RecordDict" where ArrayRecord or MetricRecord was due' in got.error.reason


def test_a_chunk_named_often_is_refused_before_it_is_put_together_even_where_no_limit_is_known(link: SuperLink) -> None:
    objects = Objects()
    name = named_often(ask(link), objects)
    tracemalloc.start()
    with pytest.raises(UploadError, match="weighs 200,000,000 bytes or more"):
        unpacked(name, objects)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_what_is_too_large_is_pulled_no_further(link: SuperLink) -> None:
    pulled: list[str] = []
    pull = link.PullObject
    link.__dict__["PullObject"] = lambda request: pulled.append(request.object_id) or pull(request)

    def make(message: Message, objects: Objects) -> str:
        chunks = [objects.add("ArrayChunk", [], bytes([number]) * MOST) for number in range(2)]
        return with_array(message, objects, array(objects, chunks, [0, 1]))

    got = answer(link, ask(link), make)
    assert got is not None
    assert "over the limit of 100,000" in got.error.reason
    assert len(pulled) < 6


def test_objects_that_the_superlink_stumbles_over_leave_the_run_alone(link: SuperLink) -> None:
    message = ask(link)
    told, _, _ = reply(message, BLOB)
    below: ObjectTree | None = None
    for step in range(30):  # each tree is small enough for the SuperLink, what they make together is not
        tree = below or ObjectTree(object_id=f"{0:064x}")
        for level in range(40):
            tree = ObjectTree(object_id=f"{1 + 40 * step + level:064x}", children=[tree])
        told.metadata.message_id = f"{1200:064x}"
        request = PushMessagesRequest(messages_list=[told], message_object_trees=[tree])
        fleet_handlers.push_messages(request, link.state)
        below = ObjectTree(object_id=tree.object_id)
    got = Replies(link.grid, MOST).pull(message.metadata.message_id)
    assert got is not None
    assert got.error.code in TRANSPORT_ERRORS  # the SuperLink has forgotten the message: ask again
    assert "its reply was lost" in got.error.reason


def test_a_message_that_a_device_sends_the_server_unasked_spoils_no_other_devices_reply(link: SuperLink) -> None:
    message, other = ask(link, "a"), ask(link, "b")
    told, _, _ = reply(other, BLOB)
    told.metadata.reply_to_message_id = ""
    told.metadata.src_node_id = told.metadata.dst_node_id = SUPERLINK_NODE_ID  # Flower believes it
    objects = Objects()
    link.send(told, objects, objects.add("Message", [], b"\xff"))
    link.send(*reply(message, BLOB))
    got = Replies(link.grid, MOST).pull(message.metadata.message_id)
    assert got is not None
    assert bytes(unpack(got, "a")) == BLOB


@pytest.mark.parametrize("error", [httpx.ConnectError("gone"), OSError("gone"), httpx.ReadTimeout("gone")])
def test_a_superlink_that_cannot_be_reached_is_told_as_such(error: Exception, link: SuperLink) -> None:
    def broken(_: object) -> NoReturn:
        raise error

    link.__dict__["PullMessages"] = broken
    with pytest.raises(type(error), match="gone"):
        Replies(link.grid).pull("m")


@pytest.mark.parametrize("name", ["node", "_run"])
def test_another_flower_is_refused_at_once(name: str, link: SuperLink) -> None:
    del link.grid.__dict__[name]
    with pytest.raises(FederationError, match=rf"{name}.*; install flwr>=1\.41,<1\.42"):
        Replies(link.grid)


def test_the_run_goes_on_with_the_others_and_names_the_device(link: SuperLink, tmp_path: Path) -> None:
    nodes = {device: link.node(device.encode()) for device in ("bad", "good")}

    def act(device: str, state: str, reason: str) -> None:
        if state == "asked":
            message = link.take(nodes[device])
            told, objects, name = reply(message, BLOB)
            link.send(
                told, objects, name if device == "good" else MALFORMED["records that are a list"][0](message, objects)
            )

    apart = PulledApart(link.grid, Replies(link.grid, MOST).pull)
    door = Door(apart, nodes, Ledger(tmp_path / "ledger.jsonl"), timeout=60.0, look_up=lambda: nodes, tell=act)
    answers = dict(door(dict.fromkeys(nodes, Payload("request"))))
    apart.close()
    assert torch.equal(answers.pop("good").arrays["x"], ANSWER.arrays["x"])
    assert answers == {}
    assert door.failures == {
        "bad": "its reply cannot be read (AttributeError: 'list' object has no attribute 'values'); answer it with `door.answer`"
    }
