# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts families that students can be merged into."""

from deepfusion.moe.base import Family
from deepfusion.moe.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from deepfusion.moe.mixtral import MIXTRAL, OLMOE
from deepfusion.moe.qwen import QWEN2_MOE, QWEN3_MOE

families: dict[str, Family] = {
    family.model_type: family for family in (QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, MIXTRAL, OLMOE)
}
"""Every family by its model type; to add one, write its table beside these."""

__all__ = ["Family", "families"]
