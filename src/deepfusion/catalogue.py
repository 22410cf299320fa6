# SPDX-License-Identifier: Apache-2.0
"""Everything that a configuration can name."""

from __future__ import annotations

from deepfusion.data.embedded import EMBEDDED
from deepfusion.devices.presets import PRESETS
from deepfusion.methods import methods
from deepfusion.moe import families
from deepfusion.stages.cluster import clusterings
from deepfusion.stages.distill import rules
from deepfusion.stages.embed import embeddings


def catalogue() -> dict[str, dict[str, str]]:
    """What can be plugged in, by kind: names and one line on each."""
    registries = {"method": methods, "[embed] type": embeddings, "[cluster] type": clusterings, "[distill] type": rules}
    parts = {kind: registry.describe() for kind, registry in registries.items()}
    moe = {name: p.about for name, p in PRESETS.items() if p.config["model_type"] in families}
    return {
        **parts,
        "[target] preset": moe,
        "[[devices.models]] preset": {name: p.about for name, p in PRESETS.items() if name not in moe},
        "[[data.corpora]] embedded": dict.fromkeys(EMBEDDED, "real text out of Python packages"),
    }
