# SPDX-License-Identifier: Apache-2.0
"""What phase II minimises: eq. (11) of every domain, on one batch of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from deepfusion.devices.features import Reading, read
from deepfusion.devices.read_ahead import ReadAhead
from deepfusion.losses import TeacherScores, next_token_losses
from deepfusion.scores import Scores
from deepfusion.stages.distill.align import same_tokens
from deepfusion.stages.distill.base import Adapter, DistillOptions, Exits
from deepfusion.types import Batch, Text, concatenate


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen proxy at work.

    Attributes:
        model: in evaluation mode, without gradients.
        weight: omega, its share of its domain.
        adapter: compares its hidden states with the student's, or lets the student exit early; None when neither is done.
    """

    model: PreTrainedModel
    weight: float
    adapter: Adapter | Exits | None


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
    head: Any = student.get_output_embeddings()
    counts = [len(batch.valid_BT) for batch in batches]
    scores = reading.scores.split(counts)
    hidden = zip(*(tap_BTH.split(counts) for tap_BTH in reading.taps), strict=True) if taps else [()] * len(batches)
    return [
        _losses(Reading(own, of_taps), head, taps, list(zip(mine, heard, strict=bool(heard))), batch, options)
        for own, of_taps, mine, heard, batch in zip(scores, hidden, teachers, reads, batches, strict=True)
    ]


def _losses(
    student: Reading,
    head: Any,
    taps: Sequence[int],
    teachers: Sequence[tuple[Teacher, Reading]],
    batch: Batch,
    options: DistillOptions,
) -> dict[str, torch.Tensor]:
    """Eq. (11) of one domain, from the student's and its teachers' outputs on its batch; `head` is the student's output layer.

    Models of one tokenizer may have output matrices of unlike heights, padded beyond the tokens that there are. Teachers and
    student are compared over the rows that all of them have, as if there were no others; the student's cross-entropy is
    over all of its own.
    """
    alignment, beta = same_tokens(batch), _kl_weight(options)
    asked = teachers if beta or any(isinstance(teacher.adapter, Exits) for teacher, _ in teachers) else ()
    predictions = [
        TeacherScores(
            alignment.on_student(heard.scores), teacher.weight, alignment.matched_BT, exponent=options.exponent
        )
        for teacher, heard in asked
    ]
    common = min([student.scores.vocab_size, *(prediction.scores.vocab_size for prediction in predictions)])
    predictions = [prediction._replace(scores=prediction.scores.first(common)) for prediction in predictions]
    compared = student.scores.first(common)
    whole = compared is student.scores
    loss, parts = next_token_losses(
        compared,
        predictions,
        batch if whole else _unlabelled(batch),
        options.temperature,
        beta=beta,
        trust=options.trust,
    )
    if not whole:
        own_loss, own_parts = next_token_losses(student.scores, [], batch, options.temperature)
        loss, parts = loss + own_loss, parts._replace(cross_entropy=own_parts.cross_entropy)
    losses = {"ce": parts.cross_entropy, "kl": parts.divergence}
    hidden = dict(zip(taps, student.taps, strict=True))
    for number, (teacher, heard) in enumerate(teachers):
        if teacher.adapter is None:
            continue
        student_hidden = [hidden[tap] for tap in teacher.adapter.student_taps]
        if isinstance(teacher.adapter, Exits):
            features = _exit_losses(
                teacher.adapter(student_hidden), head, parts.heard[number], batch, options.temperature
            )
        else:
            features = teacher.adapter(student_hidden, heard.taps, batch.valid_BT, alignment.batch.valid_BT)
            features = teacher.weight * features
        loss = loss + options.alpha * features
        losses["features"] = losses.get("features", 0.0) + features
    return {"loss": loss, **losses}


def _exit_losses(
    exits: Sequence[torch.Tensor], head: Any, teacher: TeacherScores, batch: Batch, temperature: float
) -> torch.Tensor:
    """The sum over exits of the teacher's loss, without cross-entropy."""
    compared, unlabelled = teacher.scores.vocab_size, _unlabelled(batch)
    scores = [Scores(exit_BTH, head.weight, head.bias).first(compared) for exit_BTH in exits]
    losses = [next_token_losses(each, [teacher], unlabelled, temperature)[0] for each in scores]
    return torch.stack(losses).sum()


def _unlabelled(batch: Batch) -> Batch:
    """A batch whose cross-entropy is 0."""
    return replace(batch, counted_BT=torch.zeros_like(batch.counted_BT))
