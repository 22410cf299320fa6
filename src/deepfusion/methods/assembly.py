# SPDX-License-Identifier: Apache-2.0
"""The server's work on the target MoE that methods share: its base, merging into it, tuning it, and training it on text.

Each function is a stage: made once, kept under a key of all that it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.artifacts import file_digest
from deepfusion.data.packing import PackedText
from deepfusion.devices import configurations, models
from deepfusion.devices.features import forward
from deepfusion.errors import ModelError
from deepfusion.methods.base import Site
from deepfusion.moe import Family, families
from deepfusion.moe.growth import cannot_grow, grow
from deepfusion.moe.routing import router_weights
from deepfusion.moe.upcycle import mean_expert, student_state
from deepfusion.stages import merge, router, tune
from deepfusion.stages.distill import DistillOptions, Logits, distill
from deepfusion.training import Optimisation, derive_seed
from deepfusion.types import Batch, Proxy, Text

GROWN_TOLERANCE = 1e-3
"""Largest difference in logits between a dense model and the student that grew out of it, in float32."""
GROWN_LOSS = 0.1
"""Nats a token that a small model may lose when it grows; beyond them it is no better a start than any."""


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """[training]: training on text by cross-entropy, before the tuning of the MoE.

    Attributes:
        steps: optimiser steps; 0 trains nothing here.
        optimisation: [training.optimisation]
    """

    steps: int
    optimisation: Optimisation = field(default_factory=Optimisation)

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.steps < 0:
            yield f"steps = {self.steps}: must not be negative; 0 trains nothing here"


def family_and_config(site: Site) -> tuple[Family, PreTrainedConfig]:
    """The target's family and full configuration."""
    family = families[site.target.model_type]
    return family, family.ready_target(site.target.make(site.data.vocab_size, site.sequence_length, site.data.eos_id))


def num_experts(site: Site) -> int:
    """E, the target's routed experts."""
    family, target = family_and_config(site)
    return family.num_experts(target)


def base(site: Site, slices: int = 1) -> Path:
    """M_0: the one base model that all students start from (method, section 8)."""
    family, target = family_and_config(site)
    source = site.target.base

    def make(folder: Path) -> None:
        student = family.student_config(target, slices=slices)
        model = models.from_config(student, derive_seed(site.seed, "base"))
        if source is not None:
            _grow(model, source, site, family)
        models.save(model, folder, site.data.tokenizer)

    weights = digests(Path(source)) if source else []
    return site.keep("base", make, site.target, weights, slices, site.data_key, site.sequence_length)


def digests(folder: Path) -> list[str]:
    """Hashes of a model folder's weights and configuration."""
    return [file_digest(path) for path in (*sorted(folder.glob("*.safetensors")), *folder.glob("config.json"))]


def grown(
    site: Site, name: str, sources: Mapping[str, Path], judge: Callable[[PreTrainedModel], float], *parts: object,
    slices: int = 1,
) -> Path:  # fmt: skip
    """The best of some small models, grown into the base of the target, as the stage `name`.

    Falls back to `base`, with a note, where none can grow, or where what has grown predicts worse by `GROWN_LOSS`.

    Args:
        sources: folders by name.
        judge: mean negative log-likelihood of public text, in nats a token.
        parts: keys of what the judge depends on.
    """
    family, target = family_and_config(site)
    student = family.student_config(target, slices=slices)
    reasons = {
        n: cannot_grow(configurations.read_config(str(path)), student, family, site.sequence_length)
        for n, path in sources.items()
    }
    able = {n: path for n, path in sources.items() if reasons[n] is None}
    if not able:
        why = "; ".join(sorted({str(reason) for reason in reasons.values()}))
        site.note(f"{name}: the target's base is taken, for none of these models can grow into it: {why}")
        return base(site, slices)

    def make(folder: Path) -> None:
        values = {n: judge(models.load(path)) for n, path in able.items()}
        best = min(values, key=lambda n: values[n])
        source = models.load(able[best])
        model = models.from_config(student, derive_seed(site.seed, "base"))
        model.load_state_dict(grow(source.state_dict(), source.config, model.state_dict(), student, family))
        after = judge(model)
        models.save(model, folder, site.data.tokenizer)
        (folder / "grown.json").write_text(json.dumps({"from": best, "before": values[best], "after": after}))

    found = {n: digests(path) for n, path in able.items()}
    folder = site.keep(name, make, *parts, site.target, found, slices, site.data_key, site.sequence_length)
    told = json.loads((folder / "grown.json").read_text())
    if not told["after"] < told["before"] + GROWN_LOSS:
        worse = told["after"] - told["before"]
        site.note(
            f"{name}: the target's base is taken, for {told['from']} is worse by {worse:.2f} nats a token once it has grown"
        )
        return base(site, slices)
    return folder


def _grow(student: PreTrainedModel, source: str, site: Site, family: Family) -> None:
    """Give a new student the weights of a pretrained model; one that grew out of a dense model must predict what that does.

    Raises:
        ModelError: the weights do not fit, or the student predicts something else.
    """
    data = site.data
    try:
        base = models.pretrained(
            source, {}, vocab_size=data.vocab_size, eos_id=data.eos_id, tokenizer_folder=data.tokenizer
        )
        weights, fresh = base.state_dict(), student.state_dict()
        probe = PackedText(data.public, min(site.sequence_length, 64), derive_seed(site.seed, "probe")).batch(0, 2)
        with torch.no_grad(), router_weights(base) as sure:
            theirs_BTV = forward(base, probe).logits_BTV
        if base.config.model_type == family.model_type:
            sums = [float(weight_Tk.sum(-1).mean()) for weight_Tk in sure]
            student.load_state_dict(mean_expert(weights, fresh, family, base.config, sums))
            return
        student.load_state_dict(student_state(weights, fresh, family.width_key))
        with torch.no_grad():
            ours_BTV = forward(student, probe).logits_BTV
    except ModelError as error:
        raise ModelError(f"[target] base = {source}: {error}") from error
    gap = float((ours_BTV - theirs_BTV).abs().max())
    if not gap <= GROWN_TOLERANCE:
        raise ModelError(
            f"[target] base = {source}: a {student.config.model_type} with its weights gives logits that differ by {gap:.2g}; "
            "take what changes its computation out of [target.config]"
        )


def merged(
    site: Site,
    name: str,
    students: Sequence[Path],
    domain_batches: Sequence[Sequence[Batch]],
    *parts: object,
    options: merge.MergeOptions,
    start: router.RouterOptions,
) -> Path:
    """Merge `students` into the stage `name`; its `merge.json` holds the result of the check.

    Args:
        domain_batches: text of each student's domain, for the router's prototypes and for the check.
        parts: keys of what the students are made from.
        start: how the router starts.
    """
    family, target = family_and_config(site)
    slices = options.slices(len(students), family.num_experts(target))
    seed, notes = derive_seed(site.seed, name), list[str]()

    def make(folder: Path) -> None:
        parts = merge.open_students(students, family=family, target=target, slices=slices)
        routers = router.random_router(target, family=family, seed=seed)
        model = merge.merge(parts, routers, family=family, target=target, options=options, seed=seed)
        if start.start == "prototype" and len(students) > 1:
            prototypes = router.prototype_router(
                model, domain_batches, family=family, slices=slices, options=start, seed=seed, note=notes.append
            )
            router.set_routers(model, prototypes)
        probes = [batches[0] for batches in domain_batches]
        scale = merge.calibrate_scale(model, probes, family=family)
        worst = max(merge.check_merge(model, parts, probe, family=family, options=options) for probe in probes)
        models.save(model, folder, site.data.tokenizer)
        said = {"largest_logit_difference": worst, "routed_scaling_factor": scale, "notes": notes}
        (folder / "merge.json").write_text(json.dumps(said))

    folder = site.keep(name, make, options, start, site.target, *parts)
    for sentence in json.loads((folder / "merge.json").read_text())["notes"]:  # perhaps of a run that crashed since
        site.note(sentence)
    return folder


def tuned(
    site: Site,
    name: str,
    moe: Path,
    teachers: Sequence[Sequence[Proxy]],
    texts: Sequence[Text],
    *parts: object,
    options: tune.TuneOptions,
) -> Path:
    """Tune the model of folder `moe` into the stage `name`.

    Args:
        teachers: of each text; empty lists where there are none.
        parts: keys of what `moe`, the teachers and the texts are made from.
    """
    family, _ = family_and_config(site)

    def make(folder: Path) -> None:
        tune.tune(
            moe, teachers, texts, family=family, options=options, seed=derive_seed(site.seed, name),
            tokenizer_folder=site.data.tokenizer, scratch=site.folder.scratch(name), shards=site.server.shards,
            progress=site.progress, out=folder,
        )  # fmt: skip

    return site.keep(name, make, options, *parts)


def upcycled(
    site: Site, prefix: str, text: Text, start: Path, *parts: object, training: TextTraining, noise: float
) -> Path:
    """The target MoE from one text: the base `start` trained on it (as it is with 0 steps), and copied to all experts.

    Args:
        prefix: of the stages `trained` and `merged`.
        parts: keys of what the text is made from.
        noise: see [merge].
    """
    family, target = family_and_config(site)
    name, options = f"{prefix}trained", DistillOptions(steps=training.steps, optimisation=training.optimisation)

    def make(folder: Path) -> None:
        distill(
            start, [[]], [text], family=family, target=target, rule=Logits(), recipe="joint", options=options,
            seed=derive_seed(site.seed, name), tokenizer_folder=site.data.tokenizer,
            scratch=site.folder.scratch(name), progress=site.progress, out=folder,
        )  # fmt: skip

    whole = (training, site.target, site.data_key, site.sequence_length, digests(start), *parts)
    student = site.keep(name, make, *whole) / "0" if training.steps else start
    copies, random = merge.MergeOptions(noise=noise), router.RouterOptions(start="random")
    return merged(site, f"{prefix}merged", [student], [[text.batch(0, 8)]], *whole, options=copies, start=random)


def tuned_on_text(site: Site, name: str, moe: Path, text: Text, *parts: object, options: tune.TuneOptions) -> Path:
    """Tune the model of folder `moe` on one text by cross-entropy alone, into the stage `name`."""
    plain = replace(options, beta=0.0, temperature=1.0, trust="all")
    whole = (site.target, site.data_key, site.sequence_length, *parts)
    return tuned(site, name, moe, [[]], [text], *whole, options=plain)
