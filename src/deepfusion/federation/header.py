# SPDX-License-Identifier: Apache-2.0
"""The safetensors header of a blob that a stranger sent: every claim in it is checked before anything is allocated.

A blob is `<u64 length of header><JSON header><tensor bytes>`. See https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch

from deepfusion.errors import UploadError

LARGEST_HEADER = 16 * 2**20
"""Bytes: over 100,000 tensors. Reading a header takes a few times its length in memory, so it has a limit."""
METADATA_KEY = "deepfusion"
"""The one key of safetensors' own string metadata; its value is a JSON document."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""What may cross the wire, by its safetensors name."""

_NAME = re.compile(r"[A-Za-z0-9_:\-][A-Za-z0-9_.:\-]*(/[A-Za-z0-9_:\-][A-Za-z0-9_.:\-]*)*")
_WHAT = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: `start` and `end` are bytes counted from the beginning of the blob."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a blob says that it holds, after all checks that need no tensor data."""

    what: str
    round: int
    metadata: dict[str, str | int | float | bool]
    slots: dict[str, Slot]


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may have this name: letters, digits and `_ . : -`, in parts divided by single slashes."""
    return len(name) <= 512 and _NAME.fullmatch(name) is not None


def read_header(prefix: bytes | memoryview, size: int, source: str) -> Header:
    """Check and parse a header.

    Args:
        prefix: the blob's first bytes: the eight of the length and at least the header (or the whole blob).
        size: bytes of the whole blob.
        source: who sent it; stands first in every error.

    Raises:
        UploadError: what is wrong, and the cure.
    """
    length = header_length(prefix[:8], size, source)
    document = _parse(bytes(prefix[8 : 8 + length]), "header", source)
    what, round_, metadata = _read_metadata(document.pop("__metadata__", None), source)
    return Header(what, round_, metadata, _read_slots(document, 8 + length, size, source))


def header_length(first_bytes: bytes | memoryview, size: int, source: str) -> int:
    """Bytes of the JSON header, from the blob's first eight bytes.

    Raises:
        UploadError: the blob is too short, or the header longer than the blob or the limit.
    """
    if size < 8:
        refuse(
            source, f"the blob has {size} bytes, a safetensors file at least 8", "it is empty or cut off; send it again"
        )
    length = int.from_bytes(first_bytes, "little")
    if length > min(LARGEST_HEADER, size - 8) and bytes(first_bytes).startswith((b"\x80", b"PK\x03\x04")):
        refuse(
            source, "this is a pickle or an archive of one, which could run code", "send safetensors, not `torch.save`"
        )
    if length > LARGEST_HEADER:
        refuse(
            source,
            f"the header claims {length:,} bytes, over the limit of {LARGEST_HEADER:,}",
            "send a safetensors blob",
        )
    if length > size - 8:
        refuse(
            source, f"the header claims {length:,} bytes, but only {size - 8:,} follow", "it was cut off; send it again"
        )
    return length


def refuse(source: str, fault: str, cure: str) -> NoReturn:
    """Raise the UploadError `<source>: <fault>; <cure>`."""
    raise UploadError(f"{source}: {fault}; {cure}")


def _parse(text: bytes, place: str, source: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice and no number is NaN or infinite."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known = dict(pairs)
        if len(known) < len(pairs):
            raise ValueError("a name stands twice")
        return known

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        refuse(
            source,
            f"the {place} is not valid JSON ({error})",
            "write the blob with `deepfusion.federation.payload.encode`",
        )
    if not isinstance(value, dict):
        refuse(source, f"the {place} is a JSON {type(value).__name__}, not an object", "write the blob with `encode`")
    return cast(dict[str, Any], value)


def _read_metadata(strings: Any, source: str) -> tuple[str, int, dict[str, str | int | float | bool]]:
    cure = "write the blob with `deepfusion.federation.payload.encode`"
    if not isinstance(strings, dict) or not isinstance(cast(dict[str, Any], strings).get(METADATA_KEY), str):
        refuse(source, f'the header has no "{METADATA_KEY}" metadata', cure)
    text = cast(dict[str, str], strings)[METADATA_KEY]
    try:
        document = _parse(text.encode("utf-8"), "metadata", source)
    except UnicodeEncodeError:
        refuse(source, "the metadata holds half a character (a lone surrogate)", "use valid Unicode")
    if set(document) != {"what", "round", "values"}:
        refuse(source, f"the metadata has the keys {sorted(document)[:5]}, not what, round and values", cure)
    what, round_, values = document["what"], document["round"], document["values"]
    if not isinstance(what, str) or not _WHAT.fullmatch(what):
        refuse(source, f"what = {what!r:.80} is not a short plain word", "use up to 64 letters, digits and _ . -")
    if type(round_) is not int or not 0 <= round_ < 2**31:
        refuse(source, f"round = {round_!r:.40} is no round's number", "use a whole number from 0 up")
    if not isinstance(values, dict):
        refuse(source, f"metadata values is a {type(values).__name__}, not an object", cure)
    values = cast(dict[str, Any], values)
    for key, value in values.items():
        if not isinstance(value, str | int | float):
            refuse(
                source,
                f"metadata {key!r:.80} is a {type(value).__name__}",
                "only strings, numbers, true and false may be sent",
            )
        if isinstance(value, float) and not math.isfinite(value):
            refuse(
                source, f"metadata {key!r:.80} is not finite", "the training may have diverged; lower its learning rate"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            refuse(source, f"metadata {key!r:.80} does not fit in 64 bits", "send a smaller number, or a string")
        if _has_surrogate(key) or (isinstance(value, str) and _has_surrogate(value)):
            refuse(source, f"metadata {key!r:.80} holds half a character (a lone surrogate)", "use valid Unicode")
    return what, round_, values


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _read_slots(entries: dict[str, Any], data_start: int, size: int, source: str) -> dict[str, Slot]:
    """Tensors in the order of their bytes, which must follow each other from `data_start` to the blob's last byte."""
    slots = {name: _read_slot(name, entry, data_start, source) for name, entry in entries.items()}
    end = data_start
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.start != end:
            refuse(
                source, f"tensor {name} begins at byte {slot.start:,} where byte {end:,} was due (a gap or an overlap)",
                "tensors must follow each other; write the blob with `encode`",
            )  # fmt: skip
        end = slot.end
    if end > size:
        refuse(source, f"the tensors take {end:,} bytes, the blob has only {size:,}", "it was cut off; send it again")
    if end < size:
        refuse(source, f"{size - end:,} bytes follow the last tensor", "send the blob alone, without anything after it")
    return slots


def _read_slot(name: str, entry: Any, data_start: int, source: str) -> Slot:
    if not is_tensor_name(name):
        refuse(
            source, f"tensor name {name!r:.80} is not allowed (it could be a path)",
            "use letters, digits and _ . : -, in parts divided by single slashes",
        )  # fmt: skip
    if not isinstance(entry, dict) or set(cast(dict[str, Any], entry)) != {"dtype", "shape", "data_offsets"}:
        refuse(
            source,
            f"tensor {name} has no dtype, shape and data_offsets, or more than these",
            "write the blob with `encode`",
        )
    entry = cast(dict[str, Any], entry)
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        refuse(source, f"tensor {name} has dtype {dtype_name!r:.40}", f"convert it to one of {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    if not _whole_numbers(shape) or len(shape) > 8:
        refuse(source, f"tensor {name} has shape {shape!r:.80}", "use at most 8 dimensions, whole numbers from 0 up")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(
            source, f"tensor {name} has data_offsets {offsets!r:.80}", "give its first byte and the byte after its last"
        )
    extent = math.prod(max(dimension, 1) for dimension in shape) * dtype.itemsize
    needed = math.prod(shape) * dtype.itemsize
    if extent >= 2**63 or needed != offsets[1] - offsets[0]:
        refuse(
            source, f"tensor {name} of shape {shape!r:.80} and dtype {dtype_name} needs {needed:,} bytes, "
            f"its data_offsets give it {offsets[1] - offsets[0]:,}", "write the blob with `encode`",
        )  # fmt: skip
    return Slot(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in cast(list[Any], value))
