# SPDX-License-Identifier: Apache-2.0
"""Phase II: each domain's proxies teach one student (DeepFusion, section IV)."""

from deepfusion.stages.distill.base import Adapter, DistillOptions, Exits, Rule, rules
from deepfusion.stages.distill.costs import rule_flops_per_token
from deepfusion.stages.distill.logits import Logits
from deepfusion.stages.distill.loop import distill
from deepfusion.stages.distill.ofa import Ofa
from deepfusion.stages.distill.vaa import Vaa

__all__ = [
    "Adapter",
    "DistillOptions",
    "Exits",
    "Logits",
    "Ofa",
    "Rule",
    "Vaa",
    "distill",
    "rule_flops_per_token",
    "rules",
]
