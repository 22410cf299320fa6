# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): softmax router, weights renormalised over the chosen experts, a gated shared expert.

Qwen3-MoE: the same router, no shared expert.
"""

from deepfusion.moe.base import Family

QWEN2_MOE = Family(model_type="qwen2_moe", num_experts_key="num_experts", layers="sparse_step", student="single")
QWEN3_MOE = Family(model_type="qwen3_moe", num_experts_key="num_local_experts", layers="sparse_step", student="single")
