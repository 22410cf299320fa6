# SPDX-License-Identifier: Apache-2.0
"""How a model's numbers are written for the wire: whole, in fewer bits, or as small steps from what the server has already.

Codes are compressed (zstd) tensor by tensor. The receiver knows every shape, so the size of all that it unpacks is known before
it unpacks anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import pyarrow
import torch

from deepfusion.errors import UploadError
from deepfusion.federation.header import refuse
from deepfusion.types import State

Plain = Literal["fp32", "bf16", "int8", "nf4"]
"""Formats that can be read by whoever knows the model's shapes."""
Format = Literal[Plain, "delta-int8"]
CODES, SCALES = "codes:", "scales:"
"""Prefixes of what stands for a tensor that is not sent as it is."""
BLOCK = 64
"""Numbers that share a scale in nf4 (QLoRA, arXiv 2305.14314)."""
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""The sixteen values of nf4: quantiles of a normal distribution, zero among them (QLoRA, appendix E)."""
TINY = torch.finfo(torch.float32).tiny
_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
_LEVEL = 3
_CURE = "write it in the [upload] format that the server's configuration names"


class _Code(NamedTuple):
    """How a tensor becomes codes and scales, and how it comes back."""

    write: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    read: Callable[[torch.Tensor, torch.Tensor, torch.Size], torch.Tensor]
    num_codes: Callable[[torch.Size], int]
    num_scales: Callable[[torch.Size], int]


def shrink(state: Mapping[str, torch.Tensor], form: Format, start: Mapping[str, torch.Tensor]) -> State:
    """The state as it crosses the wire. Vectors and whole numbers stay as they are: they are few, and matter most.

    Args:
        start: what the model was before its training, for "delta-int8".
    """
    wire: State = {}
    for name, tensor in state.items():
        if form == "fp32" or not _shrinks(tensor):
            wire[name] = tensor
        elif form == "bf16":
            wire[name] = tensor.bfloat16()
        else:
            rest = tensor - start[name] if form == "delta-int8" else tensor
            codes, scales = _CODES[form].write(rest.detach().cpu().float())
            packed = pyarrow.Codec("zstd", compression_level=_LEVEL).compress(codes.numpy().tobytes(), asbytes=True)
            wire[CODES + name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            wire[SCALES + name] = scales
    return wire


def restore(
    wire: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], form: Format,
    start: Mapping[str, torch.Tensor], source: str,
) -> State:  # fmt: skip
    """The state that an untrusted sender has shrunk. What is not expected at all is kept, for the caller's check to refuse.

    Args:
        expected: the model's tensors; only names, shapes and dtypes are looked at.
        source: who sent it; stands first in every error.

    Raises:
        UploadError: codes or scales that cannot be those of the tensor, or numbers that are not finite.
    """
    if form == "fp32":
        return dict(wire)
    state, left = State(), dict(wire)
    for name, like in expected.items():
        if not _shrinks(like):
            continue
        if form == "bf16":
            if (found := left.pop(name, None)) is not None:
                if found.dtype != torch.bfloat16:
                    refuse(source, f"tensor {name} has dtype {found.dtype}, not bf16", _CURE)
                state[name] = found.to(like.dtype)
        elif name in left:
            refuse(source, f"tensor {name} is sent whole", _CURE)
        elif CODES + name in left and SCALES + name in left:
            read = _read(
                left.pop(CODES + name), left.pop(SCALES + name), like.shape, _CODES[form], f"{source}: tensor {name}"
            )
            if form == "delta-int8":
                read = start[name].float() + read
            if not bool(torch.isfinite(read).all()):
                refuse(
                    source, f"tensor {name} holds numbers that are not finite", "lower the learning rate and send again"
                )
            state[name] = read.to(like.dtype)
    return {**left, **state}


def as_read(state: Mapping[str, torch.Tensor], form: Plain) -> State:
    """The state as whoever it is sent to reads it. Sent again it reads the same."""
    return restore(shrink(state, form, {}), state, form, {}, "server")


def wire_bytes(expected: Mapping[str, torch.Tensor], form: Format) -> int:
    """Bytes of a model's tensors on the wire, at most: before codes are compressed."""
    total = 0
    for tensor in expected.values():
        if form == "fp32" or not _shrinks(tensor):
            total += tensor.numel() * tensor.element_size()
        elif form == "bf16":
            total += 2 * tensor.numel()
        else:
            total += _CODES[form].num_codes(tensor.shape) + 2 * _CODES[form].num_scales(tensor.shape)
    return total


def _shrinks(tensor: torch.Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.is_floating_point()


def _read(packed: torch.Tensor, scales: torch.Tensor, shape: torch.Size, code: _Code, source: str) -> torch.Tensor:
    due = code.num_scales(shape)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or scales.dtype != torch.bfloat16 or scales.shape != (due,):
        said = f"{list(packed.shape)} codes of {packed.dtype} and {list(scales.shape)} scales of {scales.dtype}"
        refuse(source, f"{said}, not a row of bytes and [{due}] scales of torch.bfloat16", _CURE)
    count = code.num_codes(shape)
    try:
        raw = pyarrow.decompress(packed.numpy().tobytes(), count, codec="zstd", asbytes=True)
    except OSError as error:
        raise UploadError(f"{source}: its codes do not unpack to {count:,} bytes ({error}); {_CURE}") from None
    codes = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    return code.read(codes, scales, shape)


def _rows(shape: torch.Size) -> int:
    return shape[:-1].numel()


def _scale(size: torch.Tensor) -> torch.Tensor:
    """Sizes as scales. One too small to be rounded alike a second time is 0, and what it scales is read as 0."""
    return torch.where(size < TINY, 0, size).bfloat16()


def _write_int8(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127 and a scale for each row, of at most half a scale's error."""
    rows = tensor.reshape(_rows(tensor.shape), tensor.shape[-1])
    largest_R = rows.abs().amax(-1) if rows.numel() else torch.zeros(len(rows))
    scale_R = _scale(largest_R / 127)
    used_R1 = scale_R.float().clamp(min=TINY)[:, None]
    return (rows / used_R1).round().clamp(-127, 127).to(torch.int8).view(torch.uint8).flatten(), scale_R


def _read_int8(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return (codes.view(torch.int8).reshape(_rows(shape), shape[-1]).float() * scales.float()[:, None]).reshape(shape)


def _write_nf4(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of sixteen values and a scale for each block of 64; two codes a byte."""
    padded = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % BLOCK)).reshape(-1, BLOCK)
    scale_N = _scale(padded.abs().amax(-1) if len(padded) else torch.zeros(0))
    used_N1 = scale_N.float().clamp(min=TINY)[:, None]
    nearest = torch.bucketize(padded / used_N1, _BETWEEN).to(torch.uint8).reshape(-1, 2)
    return nearest[:, 0] | nearest[:, 1] << 4, scale_N


def _read_nf4(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    both = torch.stack([codes & 15, codes >> 4], -1).flatten().long()
    return (NF4[both].reshape(-1, BLOCK) * scales.float()[:, None]).flatten()[: shape.numel()].reshape(shape)


def _blocks(shape: torch.Size) -> int:
    return -(-shape.numel() // BLOCK)


_INT8 = _Code(_write_int8, _read_int8, lambda shape: shape.numel(), _rows)
_CODES: dict[Format, _Code] = {
    "int8": _INT8,
    "delta-int8": _INT8,
    "nf4": _Code(_write_nf4, _read_nf4, lambda shape: _blocks(shape) * BLOCK // 2, _blocks),
}
