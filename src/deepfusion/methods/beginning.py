# SPDX-License-Identifier: Apache-2.0
"""What the server makes of public text before any device answers: M_0 and the reference, the same for all methods.

Methods differ in what they learn from the devices. So they begin from the same weights, and where they are compared, what they
read of public text is read in the same order, at the same rates (baselines, section 9).
"""

from __future__ import annotations

from pathlib import Path

from deepfusion.data.packing import PackedText
from deepfusion.methods import assembly, exchange, reading
from deepfusion.methods.base import Site
from deepfusion.stages.tune import TuneOptions
from deepfusion.training import derive_seed

PREFIX = "reference/"
JUDGED_ON = 128
"""Public documents that warm starts are compared on."""


def first_base(site: Site, warm_start: exchange.WarmStart) -> Path:
    """M_0: the best of the architectures' warm starts that grows to the size of the target's base, or that base itself.

    A target with pretrained weights is its own start. Warm starts are made unless they are there.
    """
    if not warm_start.steps or site.target.base is not None:
        return assembly.base(site)
    sources = exchange.initial_models(site, warm_start)
    judge = reading.mean_judge(site, [None], JUDGED_ON)
    return assembly.grown(site, f"{PREFIX}start", sources, judge, JUDGED_ON)


def taught(site: Site, start: Path, training: assembly.TextTraining, noise: float) -> Path:
    """The MoE that public text alone has taught: `start` trained on it, and copied to all experts."""
    return assembly.upcycled(site, PREFIX, _text(site), start, training=training, noise=noise)


def common_expert(site: Site, start: Path, training: assembly.TextTraining) -> Path:
    """The base that the experts of `taught` are copies of."""
    return site.folder / PREFIX / "trained" / "0" if training.steps else start


def reference(site: Site, start: Path, training: assembly.TextTraining, noise: float, tuning: TuneOptions) -> Path:
    """The same MoE, tuned on public text too: what the server could do without the fleet."""
    moe = taught(site, start, training, noise)
    return assembly.tuned_on_text(site, f"{PREFIX}moe", moe, _text(site), assembly.digests(moe), options=tuning)


def _text(site: Site) -> PackedText:
    return PackedText(site.data.public, site.sequence_length, derive_seed(site.seed, "reference"))
