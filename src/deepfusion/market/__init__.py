# SPDX-License-Identifier: Apache-2.0
"""AERIA: pricing edge inference of multi-exit models (arXiv 2503.04521). A sibling: nothing in the pipeline imports it."""

from deepfusion.market import coco, rivals
from deepfusion.market.mechanisms import Mechanism, mechanisms

__all__ = ["Mechanism", "coco", "mechanisms", "rivals"]
