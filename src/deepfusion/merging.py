# SPDX-License-Identifier: Apache-2.0
"""Merge any single-expert folders into one MoE folder: `deepfusion merge`, without a fleet and without a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from deepfusion.devices.configurations import read_config
from deepfusion.devices.models import load
from deepfusion.errors import ModelError
from deepfusion.moe import Family, families
from deepfusion.moe.agreement import check_students, check_tensors, student_of
from deepfusion.moe.stream import merged_tensors
from deepfusion.moe.tensor_files import DTYPES, Reader, Spec, stored_tensors, write_folder
from deepfusion.stages.merge import MergeOptions, check_merge, open_students
from deepfusion.types import Batch, Progress, silent


@dataclass(frozen=True)
class Merged:
    """What `merge_folders` made.

    Attributes:
        folder: the MoE, which AutoModelForCausalLM opens.
        experts: E.
        nbytes: of its tensors.
        largest_logit_difference: of the check: between the MoE forced to an expert and that expert's student.
    """

    folder: Path
    experts: int
    nbytes: int
    largest_logit_difference: float


def merge_folders(
    students: Sequence[Path],
    family_name: str,
    out: Path,
    *,
    experts: int | None = None,
    top_k: int = 2,
    target: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Merged:
    """Merge K single-expert students into a MoE of E experts (eq. 12, 13), tensor by tensor from disk to disk.

    Memory does not grow with the models' size. The folder appears under its name only when it is whole and its first
    layers with experts, opened by transformers, give each student's logits when the router is forced to that expert.

    Args:
        students: Hugging Face folders of one base model (`Family.student_config`); expert e is student e mod K.
        family_name: model type of the MoE, e.g. "qwen2_moe".
        out: must not exist.
        experts: E; as many as students when left out.
        top_k: experts for each token, at most E.
        target: folder or file with the MoE's own configuration, which then decides on both; needed for deepseek_v3.

    Raises:
        ModelError: no such family, the students fit it, the target or one another not, hold NaN, or the check fails.
    """
    if family_name not in families:
        raise ModelError(f"--family {family_name}: no such family; choose one of {', '.join(families)}")
    if out.exists():
        raise ModelError(f"{out}: exists already; choose another --out, or remove it")
    family = families[family_name]
    config = _target(family, students, experts or len(students), top_k, target)
    if family.num_experts(config) < len(students):
        raise ModelError(f"{len(students)} students, but only {family.num_experts(config)} experts; raise --experts")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with Reader() as reader:
            tensors = merged_tensors(students, family, config, reader, seed)
            check_tensors((spec for spec, _ in tensors), config, students[0])
            number = count(1)

            def done(spec: Spec) -> None:
                progress("merge tensors", next(number), len(tensors), spec.name)

            write_folder(partial, tensors, done)
        config.save_pretrained(partial)
        _copy_tokenizer(students[0], partial)
        difference = _check(partial, students, family, config)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(out, family.num_experts(config), sum(spec.nbytes for spec, _ in tensors), difference)


def _target(family: Family, students: Sequence[Path], experts: int, top_k: int, given: Path | None) -> PreTrainedConfig:
    """The MoE's configuration: the one given, or the first student's with more experts."""
    own = student_of(students[0], family)
    if given is not None:
        target = read_config(given)
    elif family.student == "dense":
        raise ModelError(
            f"{family.model_type}: students are dense and do not say how wide an expert is; give --target CONFIG"
        )
    else:
        values = {**own.to_dict(), family.num_experts_key: experts, "num_experts_per_tok": min(top_k, experts)}
        target = type(own).from_dict(values)
    target = family.ready_target(target)
    check_students(students, family=family, target=target, given=given)
    if family.scaling == "calibrated":  # its first router is nearly even: each of the k weights is about 1 / E
        target.routed_scaling_factor = family.num_experts(target) / int(target.num_experts_per_tok or 1)
    dtypes = {stored.spec.dtype for stored in stored_tensors(students[0]).values()}
    target.architectures, target.dtype = own.architectures, DTYPES[min(dtypes)] if len(dtypes) == 1 else own.dtype
    return target


def _copy_tokenizer(source: Path, out: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(out)
    except (OSError, ValueError):
        return  # students without a tokenizer make a MoE without one


def _check(folder: Path, students: Sequence[Path], family: Family, target: PreTrainedConfig) -> float:
    """Open the first layers with experts as a model of their own, and force its router to one expert after the other."""
    depth = family.moe_layers(target)[0] + 1
    shallow = _first_layers(target, depth)
    model = load(folder, shallow)
    truncated = type(target).from_dict({**target.to_dict(), **shallow})
    dense = {"first_k_dense_replace": depth} if family.student == "dense" else {}
    parts = open_students(students, family=family, target=truncated, slices=1, overrides={**shallow, **dense})
    kept = {stored.spec.dtype for stored in stored_tensors(folder).values() if stored.spec.name.endswith(".weight")}
    rounding = DTYPES[next(iter(kept))] if len(kept) == 1 else torch.float32
    parts = replace(parts, shared={name: tensor.to(rounding).float() for name, tensor in parts.shared.items()})
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, int(target.vocab_size), (2, 16), generator=generator)
    every_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    options = MergeOptions(noise=0.0, tolerance=1e-3 if rounding != torch.float32 else 1e-4)
    return check_merge(model, parts, Batch(ids_BT, every_BT, every_BT), family=family, options=options)


def _first_layers(config: PreTrainedConfig, depth: int) -> dict[str, Any]:
    """What makes a configuration that of its first `depth` layers."""
    kinds = config.to_dict().get("layer_types")
    return {"num_hidden_layers": depth, **({"layer_types": kinds[:depth]} if kinds else {})}
