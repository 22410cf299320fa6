# SPDX-License-Identifier: Apache-2.0
"""What phase II minimises: eq. (11) of every domain, on one batch of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from deepfusion.devices.features import Reading, read
from deepfusion.devices.read_ahead import ReadAhead
from deepfusion.losses import TeacherScores, listen, next_token_losses
from deepfusion.stages.distill.align import same_tokens
from deepfusion.stages.distill.base import Adapter, DistillOptions
from deepfusion.types import Batch, Text, concatenate


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen proxy at work.

    Attributes:
        model: in evaluation mode, without gradients.
        weight: omega, its share of its domain.
        adapter: compares its hidden states with the student's; None when features are not compared.
    """

    model: PreTrainedModel
    weight: float
    adapter: Adapter | None


def reader(teachers: Sequence[Teacher], text: Text, options: DistillOptions) -> ReadAhead:
    """A domain's teachers, reading its text; nobody reads where nothing is asked of them."""
    asked = teachers if _kl_weight(options) or any(teacher.adapter is not None for teacher in teachers) else ()
    models = [(teacher.model, teacher.adapter.teacher_taps if teacher.adapter else ()) for teacher in asked]
    return ReadAhead(models, text, options.optimisation.batch_size, options.optimisation.precision)


def _kl_weight(options: DistillOptions) -> float:
    return options.beta if options.align == "same" else 0.0


def domain_losses(
    student: PreTrainedModel,
    teachers: Sequence[Sequence[Teacher]],
    reads: Sequence[Sequence[Reading]],
    batches: Sequence[Batch],
    options: DistillOptions,
) -> list[dict[str, torch.Tensor]]:
    """Eq. (11) of each domain's batch: `loss` with gradient, and its parts `ce`, `kl` and `features`.

    The student reads all batches in one forward pass: row block i is domain i's, and goes through expert i.

    Args:
        teachers: of each domain.
        reads: each teacher's outputs on its domain's batch; may be empty when nothing is asked of the teachers.
        batches: of each domain, of one shape.
    """
    adapters = [teacher.adapter for mine in teachers for teacher in mine if teacher.adapter is not None]
    taps = sorted({tap for adapter in adapters for tap in adapter.student_taps})
    reading = read(student, concatenate(batches), taps=taps)
    counts = [len(batch.valid_BT) for batch in batches]
    scores = reading.scores.split(counts)
    hidden = zip(*(tap_BTH.split(counts) for tap_BTH in reading.taps), strict=True) if taps else [()] * len(batches)
    return [
        _losses(Reading(own, of_taps), taps, list(zip(mine, heard, strict=bool(heard))), batch, options)
        for own, of_taps, mine, heard, batch in zip(scores, hidden, teachers, reads, batches, strict=True)
    ]


def _losses(
    student: Reading,
    taps: Sequence[int],
    teachers: Sequence[tuple[Teacher, Reading]],
    batch: Batch,
    options: DistillOptions,
) -> dict[str, torch.Tensor]:
    """Eq. (11) of one domain, from the student's and its teachers' outputs on its batch."""
    alignment, beta = same_tokens(batch), _kl_weight(options)
    predictions = [
        TeacherScores(alignment.on_student(heard.scores), beta * teacher.weight, alignment.matched_BT)
        for teacher, heard in (teachers if beta else ())
    ]
    predictions = listen(predictions, student.scores, batch, options.trust)
    loss, parts = next_token_losses(student.scores, predictions, batch, options.temperature)
    losses = {"ce": parts.cross_entropy, "kl": parts.divergence}
    hidden = dict(zip(taps, student.taps, strict=True))
    for teacher, heard in teachers:
        if teacher.adapter is not None:
            student_hidden = [hidden[tap] for tap in teacher.adapter.student_taps]
            features = teacher.adapter(student_hidden, heard.taps, batch.valid_BT, alignment.batch.valid_BT)
            loss = loss + options.alpha * teacher.weight * features
            losses["features"] = losses.get("features", 0.0) + teacher.weight * features
    return {"loss": loss, **losses}
