# SPDX-License-Identifier: Apache-2.0
"""Mixtral and OLMoE: experts in every layer, no shared expert; an expert is as wide as a dense model's MLP.

Mixtral always renormalises the weights of the chosen experts, OLMoE when told to.
"""

from deepfusion.moe.base import Family

MIXTRAL = Family(
    model_type="mixtral", num_experts_key="num_local_experts", width_key="intermediate_size", layers="all", student="single",
)  # fmt: skip
OLMOE = Family(
    model_type="olmoe", num_experts_key="num_experts", width_key="intermediate_size", layers="all", student="single",
)  # fmt: skip
