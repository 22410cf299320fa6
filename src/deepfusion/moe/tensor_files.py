# SPDX-License-Identifier: Apache-2.0
"""Safetensors folders as streams: where every tensor's bytes lie, and a writer that never holds a tensor whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from deepfusion.errors import ModelError

BUFFER = 1 << 22
"""Bytes that are read, worked on or written at once."""
SHARD_BYTES = 5 * 10**9
"""Largest weight file; a model of more gets several and an index, as transformers writes them."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8}  # fmt: skip
"""Types of the format that models hold."""


class Spec(NamedTuple):
    """What a tensor is called, its type by the format's name, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its bytes are `begin` .. `begin + spec.nbytes - 1` of `file`."""

    spec: Spec
    file: Path
    begin: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a Hugging Face folder by name, in the order in which they lie on disk. Reads headers only.

    Raises:
        ModelError: there is no safetensors file, one is damaged, or a tensor has a type that models do not hold.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if odd := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{index}: names {odd[0]}, which is not a file beside it; save the model again")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: no such file; give a folder that save_pretrained wrote")
        try:
            with safe_open(file, framework="pt"):  # its own checks of the header
                pass
        except SafetensorError as error:
            raise ModelError(f"{file}: not a sound safetensors file ({error}); copy or save it again") from error
        found |= _header(file)
    return found


def _header(file: Path) -> dict[str, Stored]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        rows: dict[str, Any] = json.loads(stream.read(length))
    rows.pop("__metadata__", None)
    found: dict[str, Stored] = {}
    for name, row in sorted(rows.items(), key=lambda item: item[1]["data_offsets"]):
        if row["dtype"] not in DTYPES:
            raise ModelError(
                f"{file}: tensor {name} is of type {row['dtype']}; convert the model to bfloat16 or float32"
            )
        spec = Spec(name, row["dtype"], tuple(row["shape"]))
        found[name] = Stored(spec, file, 8 + length + row["data_offsets"][0])
    return found


class Reader:
    """Reads bytes of many files, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def descriptor(self, file: Path) -> int:
        """The open file."""
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def into(self, buffer: memoryview, file: Path, begin: int) -> None:
        """Fill `buffer` from byte `begin` of a file."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor(file), [buffer[done:]], begin + done)
            if not count:
                raise ModelError(f"{file}: ends at byte {begin + done}, too early; it changed while it was read")
            done += count


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


Write = Callable[[int], None]
"""Writes a tensor's bytes to a descriptor, in order, from where that stands."""


def write_folder(folder: Path, tensors: Sequence[tuple[Spec, Write]], done: Callable[[Spec], None]) -> None:
    """Write tensors as safetensors, in order: one file, or several with an index.

    Args:
        tensors: each with what writes its bytes.
        done: called after each.
    """
    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec, _ in shard:
            header[spec.name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]
            }  # fmt: skip
            weight_map[spec.name] = name
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb", buffering=0) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for spec, write in shard:
                before = stream.tell()
                write(stream.fileno())
                assert stream.tell() - before == spec.nbytes, spec.name
                done(spec)
            os.fsync(stream.fileno())
    if len(shards) > 1:
        total = sum(spec.nbytes for spec, _ in tensors)
        table = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(table, indent=1), encoding="utf-8")


def _shards(tensors: Sequence[tuple[Spec, Write]]) -> Iterator[list[tuple[Spec, Write]]]:
    shard: list[tuple[Spec, Write]] = []
    size = 0
    for spec, write in tensors:
        if shard and size + spec.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((spec, write))
        size += spec.nbytes
    yield shard
