# SPDX-License-Identifier: Apache-2.0
"""Flower messages that carry a payload, and messages as files: how they pass between processes of one machine."""

from __future__ import annotations

import mmap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

from deepfusion.errors import UploadError

RECORD, JOB, BLOB, FORMAT, TELEMETRY = "payload", "job", "blob", "safetensors", "telemetry"
_LENGTH = 8


def pack(blob: bytes, content: RecordDict | None = None, record: str = RECORD) -> RecordDict:
    """A message's content that is one blob; or `content` with one more."""
    array = Array("uint8", (len(blob),), FORMAT, blob)
    content = RecordDict() if content is None else content
    content[record] = ArrayRecord({BLOB: array}, keep_input=False)
    return content


def pack_telemetry(content: RecordDict, seconds: float, peak_memory_bytes: int) -> RecordDict:
    """Put beside the blob what the work took: not in it, so that equal work gives equal blobs."""
    content[TELEMETRY] = MetricRecord({"seconds": seconds, "peak_memory_bytes": peak_memory_bytes})
    return content


def read_telemetry(message: Message) -> tuple[float, int]:
    """Seconds and peak memory bytes that a device tells of its work; zeros where it tells nothing sensible."""
    record = message.content.get(TELEMETRY)
    told = dict(record) if isinstance(record, MetricRecord) else {}
    seconds, peak = told.get("seconds"), told.get("peak_memory_bytes")
    if not (isinstance(seconds, float) and isinstance(peak, int) and 0 <= seconds < 1e9 and 0 <= peak < 2**60):
        return 0.0, 0
    return seconds, peak


def unpack(message: Message, source: str, name: str = RECORD) -> bytes | memoryview:
    """The blob of a message's content, in the record of this name.

    Raises:
        UploadError: the content is not what `pack` makes.
    """
    # Not by `content.array_records`, here and below: it makes a circle of references, which keeps the blob in memory.
    record = message.content.get(name)
    array = record.get(BLOB) if isinstance(record, ArrayRecord) else None
    if array is None or array.stype != FORMAT:
        raise UploadError(f'{source}: its message has no "{name}" with a {FORMAT} blob; answer it with `door.answer`')
    return array.data


def run_client(client_app: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """The client's reply; if its code raises, a reply that says so: the error's text first, then the traceback."""
    try:
        reply = client_app(message, context)
        if type(reply) is not Message:
            raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
        return reply
    except (Exception, SystemExit) as error:
        trace = "".join(traceback.format_exception(error))
        reason = f"{type(error).__name__}: {error}\n{trace}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def write_message(path: Path, message: Message, context: Context) -> None:
    """Write a message and the context that goes with it.

    The file holds `<u64 length><context><u64 length><message>`, in which each array's data is replaced by its length,
    and then the arrays' data, so that neither side copies them. Nothing is pickled.
    """
    datas: list[bytes] = []
    skeleton = _without_data(message, datas)
    with open(path, "wb") as file:
        for part in (context_to_proto(context), message_to_proto(skeleton)):
            octets = part.SerializeToString()
            file.write(len(octets).to_bytes(_LENGTH, "little") + octets)
        for data in datas:
            file.write(data)


def read_message(path: Path) -> tuple[Message, Context]:
    """Read what `write_message` wrote; the data of arrays is memory-mapped, and stays so when the file is removed."""
    with open(path, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    position = 0
    sections: list[bytes] = []
    for _ in range(2):
        length = int.from_bytes(view[position : position + _LENGTH], "little")
        position += _LENGTH
        sections.append(bytes(view[position : position + length]))
        position += length
    context = context_from_proto(ProtoContext.FromString(sections[0]))
    message = message_from_proto(ProtoMessage.FromString(sections[1]))
    if message.has_content():
        for array in _arrays(message.content):
            length = int.from_bytes(array.data, "little")
            array.data = view[position : position + length]  # pyright: ignore[reportAttributeAccessIssue] (bytes-like)
            position += length
    return message, context


def _arrays(content: RecordDict) -> Iterator[Array]:
    for record in content.values():
        if isinstance(record, ArrayRecord):
            yield from record.values()


def _without_data(message: Message, datas: list[bytes]) -> Message:
    """The message with each array's data moved to `datas` and replaced by its length."""
    if not message.has_content():
        return message
    content = RecordDict()
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord):
            light: dict[str, Array] = {}
            for name, array in record.items():
                datas.append(array.data)
                light[name] = Array(array.dtype, array.shape, array.stype, len(array.data).to_bytes(_LENGTH, "little"))
            content[key] = ArrayRecord(light, keep_input=False)
        else:
            content[key] = record
    skeleton = Message(content, reply_to=message)
    skeleton.__dict__["_metadata"] = message.metadata
    return skeleton
