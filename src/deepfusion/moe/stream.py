# SPDX-License-Identifier: Apache-2.0
"""Merging on disk (DeepFusion, eq. 12 and 13): from single-expert folders to one MoE, a few megabytes at a time.

Names here are those that `save_pretrained` writes: an expert is `<...>.experts.<i>.<...>`, where `moe/base.py` has the
stacked tensors of a model in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from deepfusion.errors import ModelError
from deepfusion.moe.base import DENSE, LAYER, Family
from deepfusion.moe.tensor_files import BUFFER, DTYPES, Reader, Spec, Stored, Write, memory, stored_tensors
from deepfusion.training import derive_seed

_FIRST_EXPERT = re.compile(r"^(?P<layer>.*\.experts\.)0(?P<matrix>\..+)$")
ROUTER_IN_FILE = re.compile(r"\.(?:mlp|block_sparse_moe)\.gate\.weight$")
"""A router's weight as files name it; a model in memory has names of its own (`base.ROUTER`)."""
ROUTER_STD = 0.02
EVEN_STD = 0.01
"""Of the logits, where a token's weights do not sum to 1 by themselves: so near to even, they sum to k / E within 3%."""


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor on disk: some of its rows, and of those some columns; a vector is one column."""

    tensor: Stored
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return (rows, columns) if len(self.tensor.spec.shape) > 1 else (rows,)


def merged_tensors(
    folders: Sequence[Path], family: Family, target: PreTrainedConfig, reader: Reader, seed: int
) -> list[tuple[Spec, Write]]:
    """The target's tensors, each with what writes it: expert e is student e mod K's, the rest is the students' mean.

    Routers are random, N(0, 0.02^2): nothing is known of the domains here. Those of a family whose weights depend on
    how sure a router is are nearly even: N(0, EVEN_STD^2 / H).

    Raises:
        ModelError: a student has other tensors than the first, or is no single-expert student of this family.
    """
    students = [stored_tensors(folder) for folder in folders]
    for folder, student in zip(folders[1:], students[1:], strict=True):
        _check_alike(student, folder, students[0], folders[0])
    made: list[tuple[Spec, Write]] = []
    for name in students[0]:
        made += _made_of(name, [student[name] for student in students], family, target, reader, seed)
    if not any(_FIRST_EXPERT.match(spec.name) for spec, _ in made):
        cure = f"give folders of {family.model_type} students with one expert, as `deepfusion run` leaves in experts/"
        raise ModelError(f"{folders[0]}: no tensor of an expert in it; {cure}")
    return made


def _made_of(
    name: str, of: Sequence[Stored], family: Family, target: PreTrainedConfig, reader: Reader, seed: int
) -> Iterator[tuple[Spec, Write]]:
    """What becomes of one tensor of the students."""
    count, scale = family.num_experts(target), family.sure_weight(target)
    gate = (count, int(target.hidden_size))
    std = EVEN_STD / math.sqrt(gate[1]) if family.scaling == "calibrated" else ROUTER_STD
    found = LAYER.search(name)
    sparse = found is not None and int(found[1]) in family.moe_layers(target)
    if family.student == "dense" and sparse and (kind := DENSE.search(name)):
        expert, shared = _halves(of, int(getattr(target, family.width_key)), down=kind[1] == "down")
        prefix, matrix = name[: kind.start()] + ".mlp.", name[kind.start() + len(".mlp.") :]
        divisor = scale if kind[1] == "down" else 1.0
        for e in range(count):
            yield _mean(f"{prefix}experts.{e}.{matrix}", [expert[e % len(of)]], reader, divisor)
        yield _mean(f"{prefix}shared_experts.{matrix}", shared, reader)
        if kind[1] == "gate":
            yield _router(Spec(prefix + "gate.weight", of[0].spec.dtype, gate), std, seed)
            if family.scores == "sigmoid":
                yield _zeros(Spec(prefix + "gate.e_score_correction_bias", "F32", (count,)))
    elif expert_name := _FIRST_EXPERT.match(name):
        divisor = scale if "down" in name or ".w2." in name else 1.0
        for e in range(count):
            yield _mean(f"{expert_name['layer']}{e}{expert_name['matrix']}", [_whole(of[e % len(of)])], reader, divisor)
    elif sparse and ROUTER_IN_FILE.search(name):
        yield _router(Spec(name, of[0].spec.dtype, gate), std, seed)
    else:
        yield _mean(name, [_whole(tensor) for tensor in of], reader)


def _check_alike(student: dict[str, Stored], folder: Path, first: dict[str, Stored], first_folder: Path) -> None:
    for name in sorted({*student, *first}):
        mine, other = (part[name].spec[1:] if name in part else "missing" for part in (student, first))
        if mine != other:
            raise ModelError(
                f"{folder}: tensor {name} is {mine} but {other} in {first_folder}; merge students of one base model only"
            )


def _whole(tensor: Stored) -> Part:
    shape = tensor.spec.shape
    rows = shape[0] if shape else 1
    return Part(
        tensor, slice(0, rows), slice(0, tensor.spec.nbytes // max(1, rows) // DTYPES[tensor.spec.dtype].itemsize)
    )


def _halves(of: Sequence[Stored], width: int, *, down: bool) -> tuple[list[Part], list[Part]]:
    """The routed expert and the shared one of a dense MLP's matrix: its first `width` neurons, and the others."""
    parts = [_whole(tensor) for tensor in of]
    size = parts[0].shape[1 if down else 0]
    own, rest = slice(0, width), slice(width, size)
    if down:
        return [Part(p.tensor, p.rows, own) for p in parts], [Part(p.tensor, p.rows, rest) for p in parts]
    return [Part(p.tensor, own, p.columns) for p in parts], [Part(p.tensor, rest, p.columns) for p in parts]


def _mean(name: str, parts: Sequence[Part], reader: Reader, divisor: float = 1.0) -> tuple[Spec, Write]:
    """The mean of equal parts, divided by `divisor`."""
    whole = parts[0].tensor.spec
    shape = whole.shape if parts[0] == _whole(parts[0].tensor) else parts[0].shape
    return Spec(name, whole.dtype, shape), partial(_write_mean, parts, reader, divisor)


def _write_mean(parts: Sequence[Part], reader: Reader, divisor: float, out: int) -> None:
    """Stream the mean of `parts` to the descriptor `out`."""
    spec = parts[0].tensor.spec
    dtype = DTYPES[spec.dtype]
    if not dtype.is_floating_point:
        parts = parts[:1]
    # sums of equal numbers must be exact, so that the mean of equal models is that model
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    width = _whole(parts[0].tensor).columns.stop
    at_once = max(1, BUFFER // (width * dtype.itemsize))
    rows, columns = parts[0].rows, parts[0].columns
    buffer = torch.empty(min(at_once, rows.stop - rows.start) * width, dtype=dtype)
    for begin in range(rows.start, rows.stop, at_once):
        block = buffer[: (min(begin + at_once, rows.stop) - begin) * width]
        total: torch.Tensor | None = None
        for part in parts:
            offset = part.tensor.begin + begin * width * dtype.itemsize
            reader.into(memory(block), part.tensor.file, offset)
            if dtype.is_floating_point and not bool(torch.isfinite(block.sum(dtype=wide))):
                raise ModelError(
                    f"{part.tensor.file}: tensor {part.tensor.spec.name} holds NaN or infinity; train that model again"
                )
            if len(parts) > 1:
                total = block.to(wide) if total is None else total.add_(block)
        result = block if total is None else total.div_(len(parts))
        if divisor != 1:
            result = result.to(wide) / divisor
        _write(out, result.view(-1, width)[:, columns].to(dtype))


def _write(out: int, tensor: torch.Tensor) -> None:
    data = memory(tensor.contiguous())
    while data:
        data = data[os.write(out, data) :]


def _router(spec: Spec, std: float, seed: int) -> tuple[Spec, Write]:
    def write(out: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "router", spec.name))
        _write(out, (torch.randn(spec.shape, generator=generator) * std).to(DTYPES[spec.dtype]))

    return spec, write


def _zeros(spec: Spec) -> tuple[Spec, Write]:
    return spec, lambda out: _write(out, torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]))
