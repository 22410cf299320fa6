# SPDX-License-Identifier: Apache-2.0
"""A MoE layer of one expert, computed as the plain MLP that it is: how students are trained.

transformers sorts, gathers and scatters tokens even when there is one expert to send them to, and its grouped products
leave autocast out of account. Several students that share all but their experts can also read at once: hold their
experts side by side, and each reads its own block of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import bmm
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "single_expert"


def single_expert(
    experts: Any, hidden_TH: torch.Tensor, chosen_Tk: torch.Tensor, weight_Tk: torch.Tensor
) -> torch.Tensor:
    """Each token's own expert's output: of K experts, the i-th reads the i-th of K equal blocks of the tokens.

    The routing weight, a softmax over one logit, is constant: no gradient flows through it.
    """
    if len(experts.gate_up_proj) == 1:
        gated_TI = experts._apply_gate(linear(hidden_TH, experts.gate_up_proj[0]))
        return linear(gated_TI, experts.down_proj[0]) * weight_Tk.detach()
    hidden_KNH = hidden_TH.unflatten(0, (len(experts.gate_up_proj), -1))
    gated_KNI = experts._apply_gate(bmm(hidden_KNH, experts.gate_up_proj.mT))
    return bmm(gated_KNI, experts.down_proj.mT).flatten(0, 1) * weight_Tk.detach()


ALL_EXPERTS_FUNCTIONS.register(NAME, single_expert)


def compute_as_mlp(student: PreTrainedModel) -> None:
    """Let a model of one routed expert compute its MoE layers as MLPs. Nothing of it is saved with the model."""
    student.set_experts_implementation(NAME)
