# SPDX-License-Identifier: Apache-2.0
"""Merge any single-expert folders into one MoE folder: `deepfusion merge`, without a fleet and without a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from deepfusion.devices.configurations import read_config
from deepfusion.devices.features import forward
from deepfusion.errors import DiskError, ModelError
from deepfusion.moe import Family, families
from deepfusion.moe.agreement import check_students, check_tensors, student_of
from deepfusion.moe.excerpt import one_layer, open_excerpt
from deepfusion.moe.routing import force_experts, routers
from deepfusion.moe.stream import merged_tensors
from deepfusion.moe.tensor_files import DTYPES, Reader, Spec, stored_tensors, write_folder
from deepfusion.state_dicts import average
from deepfusion.types import Batch, Progress, State, silent

PROBES = 32
"""Tokens that the check after a merge reads."""


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
    and last layer with experts, opened by transformers, give what each student's gives when forced to that expert.

    Args:
        students: Hugging Face folders of one base model (`Family.student_config`); expert e is student e mod K.
        family_name: model type of the MoE, e.g. "qwen2_moe".
        out: must not exist.
        experts: E; as many as students when left out.
        top_k: experts for each token, at most E.
        target: folder or file with the MoE's own configuration, which then decides on both; needed for deepseek_v3.

    Raises:
        DiskError: there is no room for it.
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
    partial = out.parent / f"{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with Reader() as reader:
            tensors = merged_tensors(students, family, config, reader, seed)
            check_tensors((spec for spec, _ in tensors), config, students[0])
            nbytes = sum(spec.nbytes for spec, _ in tensors)
            if nbytes > (free := shutil.disk_usage(partial).free):
                sizes = f"the MoE takes {nbytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
                raise DiskError(f"--out {out}: {sizes}; choose another disk, or fewer experts")
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
    return Merged(out, family.num_experts(config), nbytes, difference)


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
    """Largest difference in logits of the first and the last layer with experts, each opened as a model of its own.

    Two experts or one student are held at a time, and a few rows of the embeddings.
    """
    layers = family.moe_layers(target)
    return max(_check_layer(folder, students, family, target, layer) for layer in {layers[0], layers[-1]})


@torch.no_grad()
def _check_layer(folder: Path, students: Sequence[Path], family: Family, target: PreTrainedConfig, layer: int) -> float:
    """Compare what experts share with the students' mean; force the router to each expert, and compare with its student."""
    generator = torch.Generator().manual_seed(layer)
    ids = torch.randint(0, int(target.vocab_size), (PROBES,), generator=generator).tolist()
    tokens_BT = torch.arange(PROBES).view(2, -1)
    batch = Batch(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), torch.ones_like(tokens_BT, dtype=torch.bool))
    count = family.num_experts(target)
    part = one_layer(target, family=family, layer=layer, tokens=PROBES, experts=min(2, count))

    def with_experts(pair: Sequence[int]) -> PreTrainedModel:
        return open_excerpt(folder, part, layer=layer, ids=ids, experts=pair)

    shared, wanted = family.shared_of(with_experts(range(count)[:2]).state_dict()), list[torch.Tensor]()

    def own_parts() -> Iterator[tuple[str, State, float]]:
        for source in students:
            own = one_layer(student_of(source, family), family=family, layer=layer, tokens=PROBES, experts=None)
            student = open_excerpt(source, own, layer=layer, ids=ids)
            mine, expert = family.split(student.state_dict(), part)
            yield str(source), mine, 1.0
            student.load_state_dict(family.join(shared, expert), strict=False)
            wanted.append(forward(student, batch).logits_BTV)
            del student, mine, expert  # before the next one is opened

    mean, rounding = average(own_parts()), _coarsest(folder)
    for name, tensor in mean.items():
        slack = 1e-6 * float(tensor.abs().max())  # where large numbers cancel
        if not torch.allclose(shared[name], tensor, rtol=torch.finfo(rounding).eps, atol=slack):
            raise _defect(f"has another {name} than the mean of its students in layer {layer}", family)
    tolerance, worst = 1e-3 if rounding != torch.float32 else 1e-4, 0.0
    for first in range(0, count, 2):
        pair = list(dict.fromkeys((first, (first + 1) % count)))
        model = with_experts(pair)
        if count > 1 and not bool(
            torch.cat([cast(torch.Tensor, router.weight) for router in routers(model)]).std() > 0
        ):
            raise _defect(f"has a router in layer {layer} that tells no experts apart", family)
        for place, e in enumerate(pair):
            with force_experts(model, family, [place]):
                difference = float((forward(model, batch).logits_BTV - wanted[e % len(students)]).abs().max())
            if not difference <= tolerance:  # so written, NaN is refused too
                which = f"with expert {e} differs from its student by {difference:.3g} in a logit of layer {layer}"
                raise _defect(f"{which} (tolerance {tolerance:g})", family)
            worst = max(worst, difference)
        del model
    return worst


def _coarsest(folder: Path) -> torch.dtype:
    """The type of a folder's weights that rounds most."""
    kept = {DTYPES[stored.spec.dtype] for stored in stored_tensors(folder).values()}
    return max((dtype for dtype in kept if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)


def _defect(what: str, family: Family) -> ModelError:
    return ModelError(
        f"the merged {family.model_type} {what}; this is a defect of the merge, or of the installed transformers version: "
        "it is not written; please report it"
    )
