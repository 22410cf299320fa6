# SPDX-License-Identifier: Apache-2.0
"""What a rule adds to a step of distillation, in FLOPs (method, section 13)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from deepfusion.stages.distill.base import Exits, Rule


@torch.no_grad()
def rule_flops_per_token(rule: Rule, student: PreTrainedConfig, teacher: PreTrainedConfig, length: int) -> int:
    """Of the forward pass of what the rule attaches for one teacher, counted on one sequence of `length` tokens."""
    with torch.device("meta"):
        attached = rule.attach(student, teacher, sequence_length=length, seed=0)
    if attached is None:
        return 0
    attached.to_empty(device="cpu")  # the values do not matter: weights that nobody writes take no memory
    ours, theirs = (
        [torch.zeros(1, length, int(config.hidden_size)) for _ in taps]
        for config, taps in ((student, attached.student_taps), (teacher, attached.teacher_taps))
    )
    valid_BT, heads = torch.ones(1, length, dtype=torch.bool), 0
    with FlopCounterMode(display=False) as counter:
        if isinstance(attached, Exits):
            heads = len(attached(ours)) * 2 * int(student.hidden_size) * int(student.vocab_size)
        else:
            attached(ours, theirs, valid_BT, valid_BT)
    return counter.get_total_flops() // length + heads
