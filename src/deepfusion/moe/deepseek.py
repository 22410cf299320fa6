# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 and V3: dense first layers, ungated shared experts.

V2's router ignores `norm_topk_prob`: a token's weights sum to less than 1 unless all experts are used. V3's cannot be
built with one expert (it takes the two best of each group), so its student is dense.
"""

from deepfusion.moe.base import Family

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2", num_experts_key="n_routed_experts", layers="after_dense", student="single",
    scaling="calibrated", group_size=1,
)  # fmt: skip
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3", num_experts_key="n_routed_experts", layers="after_dense", student="dense",
    scores="sigmoid", scaling="folded", group_size=2,
)  # fmt: skip
