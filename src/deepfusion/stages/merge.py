# SPDX-License-Identifier: Apache-2.0
"""Phase III, merge: each student's FFN becomes an expert, everything else is averaged (DeepFusion, eq. 12 and 13).

No merge leaves this file unchecked: with every token forced to expert i, the MoE must give the logits of student i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.devices.features import forward
from deepfusion.devices.models import from_config, load
from deepfusion.errors import ModelError
from deepfusion.moe import Family
from deepfusion.moe.base import ROUTER
from deepfusion.moe.routing import force_experts, router_weights, routers
from deepfusion.state_dicts import average, check_finite
from deepfusion.training import derive_seed
from deepfusion.types import Batch, State

Fill = Literal["replicate", "split"]
Matrices = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """[merge]: how K students fill E experts.

    Attributes:
        fill: with E > K, "replicate" copies each student's expert; "split" trains students q = E / K times as wide and
            cuts each into q experts.
        noise: standard deviation of the noise on further copies, relative to the tensor's own; breaks their symmetry.
        tolerance: largest difference in logits that the check after the merge accepts.
    """

    fill: Fill = "replicate"
    noise: float = 0.01
    tolerance: float = 1e-4

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.noise < 0:
            yield f"noise = {self.noise}: must not be negative; 0 makes exact copies"
        if self.tolerance <= 0:
            yield f"tolerance = {self.tolerance}: must be positive; 1e-4 suits float32"

    def slices(self, num_students: int, num_experts: int) -> int:
        """How many experts are cut out of one student.

        Raises:
            ModelError: more students than experts, or a split that does not come out even.
        """
        if num_students > num_experts:
            raise ModelError(
                f"[cluster] num_clusters = {num_students}, but the target has {num_experts} experts; "
                f"lower num_clusters to {num_experts} or raise the target's number of experts"
            )
        if self.fill == "replicate":
            return 1
        if num_experts % num_students:
            raise ModelError(
                f'[merge] fill = "split": {num_experts} experts cannot be cut evenly out of {num_students} students; '
                f'choose a num_clusters that divides {num_experts}, or fill = "replicate"'
            )
        return num_experts // num_students


@dataclass(frozen=True, eq=False)
class Students:
    """K students on disk, taken apart: shared tensors averaged, experts as matrices.

    Attributes:
        shared: mean of the shared tensors, under the student's names.
        experts: each student's own tensors.
        config: the students' configuration.
    """

    shared: State
    experts: tuple[State, ...]
    config: PreTrainedConfig


def open_students(
    folders: Sequence[Path],
    *,
    family: Family,
    target: PreTrainedConfig,
    slices: int,
    overrides: Mapping[str, Any] | None = None,
) -> Students:
    """Read the students one by one and average what they share; one student is held at a time, beside the experts.

    Args:
        overrides: of the students' configurations, for a target that is a part of theirs.

    Raises:
        ModelError: a student's shape is not that of the target's base model, or it holds NaN or infinity.
    """
    experts: list[State] = []
    wanted = family.student_config(target, slices=slices)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in from_config(wanted, 0).state_dict().items()}

    def shared_parts() -> Iterator[tuple[str, State, float]]:
        for folder in folders:
            state = load(folder, overrides).state_dict()
            _check_shapes(state, shapes, folder)
            shared, expert = family.split(state, target, slices=slices)
            check_finite(expert, str(folder))
            experts.append({name: tensor.clone() for name, tensor in expert.items()})
            yield str(folder), shared, 1.0

    shared = average(shared_parts())
    return Students(shared, tuple(experts), wanted)


def _check_shapes(state: State, shapes: Mapping[str, torch.Size], folder: Path) -> None:
    for name in sorted({*state, *shapes}):
        have = tuple(state[name].shape) if name in state else "missing"
        want = tuple(shapes[name]) if name in shapes else "absent"
        if have != want:
            raise ModelError(
                f"{folder}: {name} is {have} but the base model of this target wants {want}; distil again for this target"
            )


def merge(
    students: Students, router: Sequence[torch.Tensor], *, family: Family, target: PreTrainedConfig,
    options: MergeOptions, seed: int,
) -> PreTrainedModel:  # fmt: skip
    """The MoE of `students`: expert e is student e mod K's, or a slice of it.

    Args:
        router: for each MoE layer, the router's weight (E, H).

    Raises:
        ModelError: more students than experts, an uneven split, or a router of another shape.
    """
    count, layers = family.num_experts(target), family.moe_layers(target)
    slices = options.slices(len(students.experts), count)
    shapes, wanted = [tuple(weight.shape) for weight in router], (count, int(target.hidden_size))
    if shapes != [wanted] * len(layers):
        raise ModelError(
            f"router of shapes {shapes}: the target has {len(layers)} MoE layers and wants {wanted} in each"
        )
    filled: list[list[Matrices]] = []
    for layer in layers:
        whole = [family.expert_matrices(expert, layer) for expert in students.experts]
        if slices > 1:
            filled.append([piece for pair in whole for piece in _slices(pair, slices)])
        else:
            copies = (_copy(whole[e % len(whole)], options.noise, seed, layer, e) for e in range(len(whole), count))
            filled.append([*whole, *copies])
    model = from_config(type(target).from_dict(target.to_dict()), seed)  # a model keeps and changes its configuration
    model.load_state_dict(family.merged_state(students.shared, filled, router, target))
    return model


def _copy(pair: Matrices, noise: float, seed: int, layer: int, index: int) -> Matrices:
    generator = torch.Generator().manual_seed(derive_seed(seed, "copy", layer, index))
    gate_up, down = (t + torch.randn(t.shape, generator=generator) * (noise * t.std()) for t in pair)
    return gate_up, down


def _slices(pair: Matrices, count: int) -> Iterator[Matrices]:
    gate, up = pair[0].chunk(2)
    for g, u, down in zip(gate.chunk(count), up.chunk(count), pair[1].chunk(count, dim=1), strict=True):
        yield torch.cat([g, u]), down * count


@torch.no_grad()
def check_merge(
    model: PreTrainedModel, students: Students, batch: Batch, *, family: Family, options: MergeOptions
) -> float:
    """Largest difference in logits between the MoE forced to a student's experts and that student, over all experts.

    The slices of a student are forced together. A further copy is compared with a student that has the copy's own
    tensors, which must themselves be within the noise of what they are a copy of.

    Raises:
        ModelError: the difference is above `options.tolerance`, so the merge is wrong and must not be used.
    """
    count, num_students = family.num_experts(model.config), len(students.experts)
    slices, merged = options.slices(num_students, count), model.state_dict()
    student, worst = from_config(students.config, 0), 0.0
    for first in range(0, count, slices):
        expert = students.experts[(first // slices) % num_students]
        if first >= num_students and slices == 1:
            copied = family.expert_of(merged, first, model.config)
            _check_copy(copied, expert, first, options, family)
            expert = copied
        _fill_student(student, family.join(students.shared, expert))
        with force_experts(model, family, range(first, first + slices)):
            forced_BTV = forward(model, batch).logits_BTV
        difference = float((forced_BTV - forward(student, batch).logits_BTV)[batch.valid_BT].abs().max())
        if not difference <= options.tolerance:  # so written, NaN is refused too
            which = f"with expert {first} differs from its student by {difference:.3g} in a logit"
            raise _defect(f"{which} (tolerance {options.tolerance:g})", family)
        worst = max(worst, difference)
    return worst


def _fill_student(student: PreTrainedModel, state: State) -> None:
    found = student.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if not ROUTER.search(name)]  # one expert's router has no effect
    assert not missing, f"a student lacks {missing}"
    assert not found.unexpected_keys, f"a student has no {found.unexpected_keys}"


def _check_copy(copy: State, original: State, index: int, options: MergeOptions, family: Family) -> None:
    """A copy may differ from its original by the noise and rounding, no more."""
    for name, tensor in original.items():
        difference, spread = float((copy[name] - tensor).square().mean().sqrt()), float(tensor.std())
        if not difference <= (2 * options.noise + 1e-6) * spread:
            raise _defect(f"has an expert {index} that is no copy: {name} is off by {difference:.3g}", family)


def _defect(what: str, family: Family) -> ModelError:
    return ModelError(
        f"the merged {family.model_type} {what}; this is a defect of the merge, or of the installed transformers version: "
        "it is not written; please report it"
    )


@torch.no_grad()
def calibrate_scale(model: PreTrainedModel, batches: Sequence[Batch], *, family: Family) -> float:
    """For a family whose weights do not sum to 1: set the routed scaling factor so that they do on average.

    The mean is taken over the tokens of `batches` and over the layers, under the model's own router
    (docs/decisions/0003-deepseek-v2-scale.md). Returns the factor, 1 for other families, and leaves it in the model and
    in its configuration.
    """
    if family.scaling != "calibrated":
        return 1.0
    sums: list[torch.Tensor] = []
    for batch in batches:
        with router_weights(model) as layers:
            forward(model, batch)
        sums += [weights_Tk.sum(-1)[batch.valid_BT.flatten()] for weights_Tk in layers]
    scale = float(model.config.routed_scaling_factor) / float(torch.cat(sums).double().mean())
    model.config.routed_scaling_factor = scale
    for router in routers(model):
        router.routed_scaling_factor = scale  # pyright: ignore[reportArgumentType]
    return scale
