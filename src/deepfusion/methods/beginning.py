# SPDX-License-Identifier: Apache-2.0
"""What the server makes of public text before any device answers: M_0 and the reference, the same for all methods.

Methods differ in what they learn from the devices. So they begin from the same weights, and where they are compared, what they
read of public text is read in the same order, at the same rates (baselines, section 9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from deepfusion.data.options import DataOptions
from deepfusion.data.packing import PackedText
from deepfusion.devices.fleet import FleetOptions
from deepfusion.methods import assembly, reading
from deepfusion.methods.base import Site, TargetOptions, family_faults, precision_faults
from deepfusion.methods.budget import Budget
from deepfusion.methods.warm_start import WarmStart, initial_models
from deepfusion.stages.tune import TuneOptions
from deepfusion.training import derive_seed

PREFIX = "reference/"
JUDGED_ON = 128
"""Public documents that warm starts are compared on."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a method is told that trains the MoE itself: from M_0, a training on public text and a last tuning on it.

    Attributes:
        noise: on the copies of the base's FFN that the experts start as, see [merge].
        warm_start: [warm_start] checkpoints of the fleet's architectures; the MoE's base is the best that grows to its size.
        training: [training] on public text, before the devices' part.
        tune: [tune] of the last model on public text; there are no teachers.
    """

    noise: float = 0.01
    warm_start: WarmStart = field(default_factory=WarmStart)
    training: assembly.TextTraining = field(default_factory=partial(assembly.TextTraining, steps=0))
    tune: TuneOptions = field(default_factory=TuneOptions)

    @classmethod
    def beside(cls, budget: Budget) -> Self:
        """The same warm start and tuning; what DeepFusion reads in its distillation is read in the training."""
        return cls(warm_start=budget.warm_start, training=budget.training, tune=budget.tune)

    def faults_with(self, devices: FleetOptions, data: DataOptions, target: TargetOptions) -> Iterator[str]:
        """See `Method.faults_with`."""
        yield from precision_faults(
            {
                "warm_start.training": self.warm_start.training,
                "training.optimisation": self.training.optimisation,
                "tune.optimisation": self.tune.optimisation,
            }
        )
        yield from family_faults(data, target)

    def start(self, site: Site) -> Path:
        """M_0 of this method."""
        return first_base(site, self.warm_start)

    def reference(self, site: Site) -> Path:
        """The same MoE without the devices."""
        return reference(site, self.start(site), self.training, self.noise, self.tune)


def first_base(site: Site, warm_start: WarmStart) -> Path:
    """M_0: the best of the architectures' warm starts that grows to the size of the target's base, or that base itself.

    A target with pretrained weights is its own start. Warm starts are made unless they are there.
    """
    if not warm_start.steps or site.target.base is not None:
        return assembly.base(site)
    sources = initial_models(site, warm_start)
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
