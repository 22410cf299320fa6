# SPDX-License-Identifier: Apache-2.0
"""The loops of phase II: K students at once over one set of shared layers ("joint"), or K independent ones ("paper").

Both are one loop. It trains the students of a group of domains that share every parameter but their experts; "joint" is
one group of all domains (method, section 10b), "paper" is a group for each domain, so with one domain they are the same.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.artifacts import write_atomic
from deepfusion.devices.models import load, save
from deepfusion.moe import Family
from deepfusion.moe.single import compute_as_mlp
from deepfusion.spread import spread
from deepfusion.stages.distill.align import check_same_vocabulary
from deepfusion.stages.distill.base import Adapter, DistillOptions, Exits, Rule
from deepfusion.stages.distill.objective import Teacher, domain_losses, reader
from deepfusion.training import Checkpoint, accelerator, derive_seed, fit, to_device
from deepfusion.types import Progress, Proxy, State, Text, silent

Rows = list[dict[str, float]]
"""What one training logged, a row for each step: `loss`, `ce`, `kl`, `features`, and each for domain i as `loss/i`."""
History = dict[str, Rows]
"""The rows of each training: "joint", or the number of each domain."""


@dataclass(frozen=True, eq=False)
class Domain:
    """One knowledge domain in training.

    Attributes:
        index: its number, 0..K-1.
        teachers: one for each architecture of its devices.
        text: its public text.
        expert: its own tensors by the student's names; leaves that require gradients.
    """

    index: int
    teachers: tuple[Teacher, ...]
    text: Text
    expert: State


def distill(
    base_folder: Path,
    teachers: Sequence[Sequence[Proxy]],
    texts: Sequence[Text],
    *,
    family: Family,
    target: PreTrainedConfig,
    slices: int = 1,
    rule: Rule,
    recipe: Literal["joint", "paper"],
    options: DistillOptions,
    seed: int,
    tokenizer_folder: Path,
    scratch: Path | None = None,
    progress: Progress = silent,
    workers: int = 1,
    out: Path,
) -> History:
    """Distil each domain's teachers into a student grown from the same base (DeepFusion, eq. 11).

    Args:
        base_folder: the base model M_0, a single-expert Hugging Face folder.
        teachers: each domain's proxies; a domain may have none and then learns by cross-entropy alone.
        texts: each domain's training text.
        target: configuration of the MoE that the students will be merged into.
        slices: experts that one student is cut into, 1 unless merged with `split`.
        scratch: a folder for what is needed to go on after a crash, or None to keep none.
        workers: students that are distilled at a time where they are independent, see `spread`.
        out: gets one Hugging Face folder a domain, `0`, `1`, ..., and `history.json`.

    Returns:
        What `history.json` holds.

    Raises:
        ModelError: a teacher has another vocabulary than the student.
        ConfigError: the rule's options do not fit a teacher.
    """
    assert len(teachers) == len(texts), "one text for each domain"
    if options.align == "same" and options.beta:
        for proxy in (proxy for domain in teachers for proxy in domain):
            check_same_vocabulary(tokenizer_folder, proxy.folder, f"{proxy.architecture} of domain {proxy.cluster}")
    job = _Job(
        base_folder, teachers, texts, family, target, slices, rule, options, seed, tokenizer_folder, scratch, progress
    )
    if recipe == "joint":
        history = {"joint": job.train("joint", range(len(teachers)), out)}
    else:
        away = job if workers == 1 else replace(job, progress=silent)  # a worker has nobody to tell
        count = len(teachers)
        rows = spread(
            partial(away.train_once, out=out), range(count), workers, done=lambda n: progress("distil students", n, count, "")
        )  # fmt: skip
        history = {str(k): each for k, each in enumerate(rows)}
    write_atomic(out / "history.json", json.dumps(history))
    return history


@dataclass(frozen=True, eq=False)
class _Job:
    """The arguments of `distill` that every group of domains needs."""

    base_folder: Path
    teachers: Sequence[Sequence[Proxy]]
    texts: Sequence[Text]
    family: Family
    target: PreTrainedConfig
    slices: int
    rule: Rule
    options: DistillOptions
    seed: int
    tokenizer_folder: Path
    scratch: Path | None
    progress: Progress

    def train_once(self, domain: int, out: Path) -> Rows:
        """Train one domain's own student, or take it from the scratch folder when a crashed run had finished it."""
        if self.scratch is None:
            return self.train(f"domain {domain}", [domain], out)
        done = self.scratch / f"student-{domain}"
        if not done.exists():
            partial = done.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            rows = self.train(f"domain {domain}", [domain], partial)
            write_atomic(partial / "rows.json", json.dumps(rows))
            os.replace(partial, done)
        shutil.copytree(done / str(domain), out / str(domain), dirs_exist_ok=True)
        return json.loads((done / "rows.json").read_text())

    def train(self, name: str, group: Sequence[int], out: Path) -> Rows:
        """Train the students of a group over one set of shared tensors and save them to `out`; returns the history."""
        optimisation = self.options.optimisation
        student = to_device(load(self.base_folder), optimisation).train()
        if self.family.student == "single":
            compute_as_mlp(student)
        if optimisation.gradient_checkpointing:
            student.activation_checkpointing_enable()
        shared, expert = self.family.split(dict(student.named_parameters()), self.target, slices=self.slices)
        student.requires_grad_(False)  # what is trained are the leaves below, which take the place of its tensors
        shared = _leaves(shared)
        domains = [Domain(k, tuple(self._load(k, student.config)), self.texts[k], _leaves(expert)) for k in group]
        sequences = optimisation.batch_size * optimisation.accumulate
        rows = fit(
            _parameters(shared, domains),
            _step(student, shared, domains, self.family, self.options),
            steps=self.options.steps,
            optimisation=optimisation,
            seed=derive_seed(self.seed, "distill", *group),
            label=f"distill {name}",
            tokens_per_step=sum(sequences * domain.text.sequence_length for domain in domains),
            progress=self.progress,
            checkpoint=Checkpoint(self.scratch / f"{name}.safetensors") if self.scratch else None,
        )
        for domain in domains:
            unknown = student.load_state_dict(self.family.join(shared, domain.expert), strict=False).unexpected_keys
            assert not unknown, unknown
            save(student, out / str(domain.index), self.tokenizer_folder)
        return rows

    def _load(self, domain: int, student: PreTrainedConfig) -> Iterator[Teacher]:
        """A domain's proxies, loaded and frozen, each with a fresh adapter."""
        length = self.texts[domain].sequence_length
        for number, proxy in enumerate(self.teachers[domain]):
            model = to_device(load(proxy.folder), self.options.optimisation).requires_grad_(False)
            adapter: Adapter | Exits | None = None
            if self.options.alpha:
                seed = derive_seed(self.seed, "adapter", domain, number)
                adapter = self.rule.attach(student, model.config, sequence_length=length, seed=seed)
            yield Teacher(model, proxy.weight, None if adapter is None else adapter.to(model.device))


def _step(
    student: PreTrainedModel, shared: State, domains: Sequence[Domain], family: Family, options: DistillOptions
) -> Callable[[int], Mapping[str, float]]:
    """The backward pass of one optimiser step: a batch of every domain, in turn (method, section 10b)."""
    compute = accelerator(options.optimisation.precision)
    size, parts = options.optimisation.batch_size, options.optimisation.accumulate

    one_pass = family.student == "single" and options.together
    groups = [domains] if one_pass else [[domain] for domain in domains]
    readers = {domain.index: reader(domain.teachers, domain.text, options) for domain in domains}

    def backward(step: int) -> dict[str, float]:
        sums: dict[str, torch.Tensor] = {}
        for group, part in itertools.product(groups, range(parts)):
            batches = [domain.text.batch(step * parts + part, size).to(compute.device) for domain in group]
            begin = (step * parts + part) * size
            reads = [readers[domain.index](begin, begin + size) for domain in group]
            expert = {name: torch.cat([domain.expert[name] for domain in group]) for name in group[0].expert}
            with holding(student, family.join(shared, expert if len(group) > 1 else group[0].expert)):
                with compute.autocast():
                    losses = domain_losses(student, [domain.teachers for domain in group], reads, batches, options)
                total = torch.stack([each["loss"] for each in losses]).sum()
                compute.backward(total / (len(domains) * parts))
            for domain, each in zip(group, losses, strict=True):
                for key, value in each.items():
                    sums[f"{key}/{domain.index}"] = sums.get(f"{key}/{domain.index}", 0.0) + value.detach() / parts
        if len(domains) > 1:
            _scale_expert_gradients(domains, alike=step < options.branch * options.steps)
        metrics = {name: float(value) for name, value in sums.items()}
        for key in {name.split("/")[0]: None for name in metrics}:
            metrics[key] = sum(v for name, v in metrics.items() if name.startswith(f"{key}/")) / len(domains)
        return metrics

    return backward


def _scale_expert_gradients(domains: Sequence[Domain], *, alike: bool) -> None:
    """Give experts gradients as large as those of the shared layers, which see K batches where an expert sees its own.

    Before the domains part, all experts take the same step on all batches: K copies of one, to the last bit.
    """
    for name in domains[0].expert:
        gradients = [gradient for domain in domains if (gradient := domain.expert[name].grad) is not None]
        assert len(gradients) == len(domains)
        whole = torch.stack(gradients).sum(0) if alike else None
        for gradient in gradients:
            if whole is not None:
                gradient.copy_(whole)
            else:
                gradient *= len(domains)


@contextmanager
def holding(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Generator[None]:
    """Within it `model` computes with `tensors` in place of its own parameters of these names, tied ones included.

    Unlike `torch.func.functional_call` it stays in force during the backward pass, where recomputed activations
    (gradient checkpointing) need the same tensors again.
    """
    takes = {id(model.get_parameter(name)): tensor for name, tensor in tensors.items()}
    own: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for module in model.modules():
        slots = module._parameters  # pyright: ignore[reportPrivateUsage] (torch has no public way to hold a non-leaf)
        own += [(slots, name, p) for name, p in slots.items() if p is not None and id(p) in takes]
    try:
        for slots, name, parameter in own:
            slots[name] = cast(nn.Parameter, takes[id(parameter)])
        yield
    finally:
        for slots, name, parameter in own:
            slots[name] = parameter


def _parameters(shared: State, domains: Sequence[Domain]) -> State:
    """All that is trained, by a name of its own."""
    parameters = {f"shared/{name}": tensor for name, tensor in shared.items()}
    for domain in domains:
        parameters |= {f"expert {domain.index}/{name}": tensor for name, tensor in domain.expert.items()}
        for number, teacher in enumerate(domain.teachers):
            if teacher.adapter is not None:
                named = teacher.adapter.named_parameters()
                parameters |= {f"adapter {domain.index}.{number}/{name}": tensor for name, tensor in named}
    return parameters


def _leaves(state: State) -> State:
    """Independent copies that can be trained."""
    return {name: tensor.detach().clone().contiguous().requires_grad_() for name, tensor in state.items()}
