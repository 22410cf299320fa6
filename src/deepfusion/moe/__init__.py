# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts families that students can be merged into."""

from deepfusion.moe.base import Family
from deepfusion.moe.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from deepfusion.moe.qwen import QWEN2_MOE

families: dict[str, Family] = {family.model_type: family for family in (QWEN2_MOE, DEEPSEEK_V2, DEEPSEEK_V3)}
"""Every family by its model type; to add one, write its table beside these."""

__all__ = ["Family", "families"]
