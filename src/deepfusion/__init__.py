# SPDX-License-Identifier: Apache-2.0
"""Fuse a fleet of unlike small language models into one Mixture-of-Experts checkpoint.

    import deepfusion
    record = deepfusion.run("configs/quickstart.toml", out="runs/first")
    print(record.metrics.perplexity)

Names are loaded when they are used, so that `import deepfusion` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepfusion.api import evaluate, generate, load_config, parts, plan, report, run
    from deepfusion.errors import DeepFusionError
    from deepfusion.record import Record

__version__ = version("deepfusion-moe")

_WHERE = {
    **dict.fromkeys(("evaluate", "generate", "load_config", "parts", "plan", "report", "run"), "deepfusion.api"),
    "DeepFusionError": "deepfusion.errors",
    "Record": "deepfusion.record",
}
__all__ = ["DeepFusionError", "Record", "evaluate", "generate", "load_config", "parts", "plan", "report", "run"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'deepfusion' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
