# SPDX-License-Identifier: Apache-2.0
"""Payloads as bytes: one safetensors blob each, the same on the wire and on disk; what arrives is never trusted."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from deepfusion.errors import UploadError, few
from deepfusion.federation.header import (
    DTYPES,
    LARGEST_HEADER,
    METADATA_KEY,
    Header,
    header_length,
    is_tensor_name,
    read_header,
    refuse,
)
from deepfusion.types import Payload, State

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNIT_TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------------------- writing


def parts(payload: Payload) -> Iterator[bytes | memoryview]:
    """The blob's bytes in pieces, the header first; tensors on the CPU are not copied.

    Equal payloads give equal bytes: tensors are ordered by item size (so that each lies aligned) and then by name.
    """
    tensors = sorted(payload.arrays.items(), key=lambda item: (-item[1].element_size(), item[0]))
    values = {"what": payload.what, "round": payload.round, "values": dict(payload.metadata)}
    document = json.dumps(values, sort_keys=True, allow_nan=False, separators=(",", ":"))
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: document}}
    offset = 0
    for name, tensor in tensors:
        assert is_tensor_name(name), f"{name} cannot be a tensor's name on the wire"
        assert tensor.dtype in _DTYPE_NAMES, f"{name}: {tensor.dtype} cannot cross the wire"
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= LARGEST_HEADER, f"a header of {len(text):,} bytes is over the limit"
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():  # an empty tensor may have strides that forbid the view
            yield flat.view(torch.uint8).numpy().data


def encode(payload: Payload) -> bytes:
    """The payload as one safetensors blob."""
    return b"".join(parts(payload))


# ---------------------------------------------------------------------------------------------- reading


def decode(blob: bytes | bytearray | memoryview | mmap.mmap, *, source: str) -> Payload:
    """Read a blob from an untrusted sender.

    Everything that the header says is checked before any tensor is made. Tensors share the memory of a writable
    blob and have a copy of a read-only one.

    Args:
        source: who sent it; stands first in every error.

    Raises:
        UploadError: not a blob of ours, or one with NaN, infinite or impossible values.
    """
    view = memoryview(blob)
    header = read_header(view, len(view), source)
    if view.readonly:
        view = memoryview(bytearray(view))
    raw = torch.frombuffer(view, dtype=torch.uint8)
    arrays: State = {}
    for name, slot in header.slots.items():
        octets = raw[slot.start : slot.end]
        if slot.start % slot.dtype.itemsize:
            octets = octets.clone()
        if slot.dtype is torch.bool and octets.numel() and int(octets.max()) > 1:
            refuse(source, f"tensor {name} is BOOL but holds bytes other than 0 and 1", "write the blob with `encode`")
        arrays[name] = octets.view(slot.dtype).reshape(slot.shape)
        _check_finite(name, arrays[name], source)
    return Payload(header.what, arrays, header.metadata, header.round)


def read_file(path: Path, *, source: str) -> Payload:
    """Like `decode`, from a file; the tensors are memory-mapped (writing to them does not change the file).

    Raises:
        UploadError: as `decode`.
    """
    with open(path, "rb") as file:
        header_length(file.read(8), path.stat().st_size, source)  # refuses the empty file, which cannot be mapped
        return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), source=source)


def inspect_file(path: Path, *, source: str) -> Header:
    """What a file says that it holds: all checks but those of the tensors' values. Reads the header only.

    Raises:
        UploadError: the header is wrong, or does not fit the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = header_length(first, size, source)
        return read_header(first + file.read(length), size, source)


def read_metadata(path: Path) -> Mapping[str, str | int | float | bool]:
    """The metadata of a payload file.

    Raises:
        UploadError: the file's header is wrong.
    """
    return inspect_file(path, source=str(path)).metadata


def _check_finite(name: str, tensor: torch.Tensor, source: str) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # One pass without a temporary as large as the tensor; NaN wins over every number in aminmax.
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        kind = "NaN" if torch.isnan(low) else "infinite values"
        refuse(
            source,
            f"tensor {name} holds {kind}",
            "the device's training diverged; lower its learning rate and send again",
        )


# ---------------------------------------------------------------------------------------------- does it fit?


def check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], device_id: str) -> None:
    """Check names, shapes and dtypes of an upload against the architecture that was asked for.

    Args:
        state: the uploaded tensors.
        expected: tensors of the architecture; only their names, shapes and dtypes are looked at ("meta" will do).

    Raises:
        UploadError: names the device and the first few tensors that are missing, extra, mis-shaped or of another dtype.
    """
    faults: list[str] = []
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({few(missing)})")
    if extra:
        faults.append(f"{len(extra)} tensors were not asked for ({few(extra)})")
    shared = sorted(expected.keys() & state.keys())
    shapes = [
        f"{name} has shape {list(state[name].shape)}, not {list(expected[name].shape)}"
        for name in shared if state[name].shape != expected[name].shape
    ]  # fmt: skip
    dtypes = [
        f"{name} has dtype {state[name].dtype}, not {expected[name].dtype}"
        for name in shared if state[name].dtype != expected[name].dtype
    ]  # fmt: skip
    faults += [few(wrong) for wrong in (shapes, dtypes) if wrong]
    if faults:
        raise UploadError(
            f"device {device_id}: its model is not the architecture that was asked for: {'; '.join(faults)}; "
            "start it from the configuration or checkpoint that the server sent"
        )


def check_embedding(payload: Payload, size: int, device_id: str) -> None:
    """Check that `payload.arrays["embedding"]` is a vector of `size` numbers, of length 1 or (without text) all zero.

    Raises:
        UploadError: names the device, what is wrong, and the cure.
    """
    source, cure = f"device {device_id}", "compute it with the [embed] section that the server sent"
    if "embedding" not in payload.arrays:
        refuse(source, 'no tensor "embedding" in its upload', cure)
    embedding_D = payload.arrays["embedding"]
    if tuple(embedding_D.shape) != (size,):
        refuse(source, f"its embedding has shape {list(embedding_D.shape)}, not [{size}]", cure)
    if not embedding_D.is_floating_point():
        refuse(source, f"its embedding has dtype {embedding_D.dtype}, not a floating one", cure)
    length = float(torch.linalg.vector_norm(embedding_D.double()))
    if not (length == 0.0 or abs(length - 1.0) <= _UNIT_TOLERANCE):  # also refuses NaN
        refuse(
            source,
            f"its embedding has length {length:.4g}, not 1",
            "divide it by its length (all zero if it has no text)",
        )


def check_metadata(payload: Payload, device_id: str, architecture: str, init_id: str) -> None:
    """Check what an upload says of itself: `device`, `architecture`, `init_id`, and the counts `tokens`, `documents`.

    Raises:
        UploadError: names the device, what is wrong, and the cure.
    """
    source = f"device {device_id}"
    due = {"device": device_id, "architecture": architecture, "init_id": init_id}
    for key, value in due.items():
        said = payload.metadata.get(key)
        if said != value:
            cure = (
                "give every device an id of its own"
                if key == "device"
                else "start from what the server sent for this run"
            )
            refuse(source, f"its upload says {key} = {said!r:.80}, but {value!r} was asked", cure)
    for key in ("tokens", "documents"):
        count = payload.metadata.get(key)
        if type(count) is not int or count < 0:
            refuse(source, f"its upload says {key} = {count!r:.40}", "count them: a whole number from 0 up")
