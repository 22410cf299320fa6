# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before anything is trained or downloaded (method, section 13)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from rich.table import Table

from deepfusion.config import RunConfig
from deepfusion.devices import memory, models
from deepfusion.devices.fleet import cards
from deepfusion.errors import ConfigError
from deepfusion.methods import DeepFusion, methods
from deepfusion.moe import families
from deepfusion.run import shapes_of
from deepfusion.stages.embed import HashedTfidf

HEADER_BYTES = 1024
"""About what names and shapes of one message take."""


@dataclass(frozen=True)
class ArchitecturePlan:
    """The devices of one architecture.

    Attributes:
        memory_bytes: of one device's training.
        limit_bytes: the fleet's memory limit, None without one.
        advice: what would fit, where it does not.
    """

    name: str
    devices: int
    parameters: int
    memory_bytes: int
    limit_bytes: int | None
    advice: str
    upload_bytes: int
    init_bytes: int


@dataclass(frozen=True)
class Plan:
    """Predicted costs of a run; bytes are of the whole fleet unless said otherwise.

    Attributes:
        target_parameters: of the fused MoE; `target_active_parameters` of them work on a token.
        server_flops: of phases II and III together.
        server_memory_bytes: of the students' training: one copy with the joint recipe, K with several machines.
        disk_bytes: uploads, proxies, students, merged and tuned model.
    """

    name: str
    method: str
    architectures: tuple[ArchitecturePlan, ...]
    domains: int
    upload_bytes: int
    download_bytes: int
    target_parameters: int
    target_active_parameters: int
    student_parameters: int
    server_flops: int
    server_memory_bytes: int
    disk_bytes: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def make_plan(config: RunConfig) -> Plan:
    """Price a configuration. Models are built without their numbers; no weights and no text are read.

    Raises:
        ConfigError: the method cannot be priced yet.
        ModelError: an architecture's configuration is not known without network.
    """
    method = _method(config)
    length = config.data.sequence_length
    fleet = Counter(card.model.name for card in cards(config.devices, config.seed))
    published = 2 * 2 * 2**method.embed.hash_bits if isinstance(method.embed, HashedTfidf) else 0
    rows = tuple(_architecture(config, spec.name, fleet[spec.name], published) for spec in config.devices.models)

    family, shapes = families[config.target.model_type], shapes_of(config)
    target, domains = shapes.target, shapes.domains
    student = family.student_config(target, slices=method.merge.slices(domains, family.num_experts(target)))
    parameters, student_parameters = memory.num_parameters(target), memory.num_parameters(student)
    uploads = sum(row.devices * row.upload_bytes for row in rows)
    return Plan(
        name=config.name,
        method=methods.name_of(type(method)),
        architectures=rows,
        domains=domains,
        upload_bytes=uploads,
        download_bytes=sum(row.devices * row.init_bytes for row in rows),
        target_parameters=parameters,
        target_active_parameters=memory.num_active_parameters(target),
        student_parameters=student_parameters,
        server_flops=sum(work.tokens * work.flops_per_token for work in method.server_work(shapes)),
        server_memory_bytes=memory.training_memory(student, method.distillation.optimisation, length).total
        + (domains - 1) * 16 * (parameters - student_parameters) // max(1, family.num_experts(target) - 1),
        disk_bytes=2 * uploads + 4 * (domains * student_parameters + 2 * parameters),
    )


def _method(config: RunConfig) -> DeepFusion:
    if not isinstance(config.method, DeepFusion):
        name = methods.name_of(type(config.method))
        raise ConfigError([f'method = "{name}": only "deepfusion" can be priced so far; run it on little text instead'])
    return config.method


def _architecture(config: RunConfig, name: str, count: int, published: int) -> ArchitecturePlan:
    spec = next(spec for spec in config.devices.models if spec.name == name)
    length, vocabulary = config.data.sequence_length, config.data.tokenizer.vocab_size
    shape = models.config_of(spec, vocab_size=vocabulary, positions=length)
    need = memory.training_memory(shape, config.devices.training, length).total
    limit = None if config.devices.memory_limit_gib is None else int(config.devices.memory_limit_gib * 2**30)
    too_much = limit is not None and need > limit
    others = [(s.name, models.config_of(s, vocab_size=vocabulary, positions=length)) for s in config.devices.models]
    method = _method(config)
    sent = memory.upload_bytes(shape)
    return ArchitecturePlan(
        name=name,
        devices=count,
        parameters=memory.num_parameters(shape),
        memory_bytes=need,
        limit_bytes=limit,
        advice=memory.what_would_fit(shape, config.devices.training, length, limit or 0, others) if too_much else "",
        upload_bytes=sent + 2 * method.embed.dimension + HEADER_BYTES,
        init_bytes=published + HEADER_BYTES + (sent if method.warm_start.steps else 0),
    )


def plan_tables(plan: Plan) -> list[Table]:
    """The plan for people."""
    devices = Table(title=f"{plan.name}: devices", title_justify="left")
    for column in ("architecture", "devices", "parameters", "training memory", "limit", "upload", "download"):
        devices.add_column(column, justify="left" if column == "architecture" else "right")
    for row in plan.architectures:
        limit = memory.gib(row.limit_bytes) if row.limit_bytes else "none"
        need = f"[red]{memory.gib(row.memory_bytes)}[/red]" if row.advice else memory.gib(row.memory_bytes)
        devices.add_row(
            row.name, str(row.devices), f"{row.parameters / 1e6:,.2f} M", need, limit, memory.gib(row.upload_bytes),
            memory.gib(row.init_bytes),
        )  # fmt: skip
        if row.advice:
            devices.caption = f"{row.name} does not fit: {row.advice}"
    server = Table(title="server", title_justify="left", show_header=False)
    for name, value in (
        ("domains", str(plan.domains)),
        (
            "fused MoE",
            f"{plan.target_parameters / 1e6:,.1f} M parameters, {plan.target_active_parameters / 1e6:,.1f} M a token",
        ),
        ("student", f"{plan.student_parameters / 1e6:,.1f} M parameters"),
        ("all uploads", memory.gib(plan.upload_bytes)),
        ("all downloads", memory.gib(plan.download_bytes)),
        ("phases II and III", f"{plan.server_flops:.2e} FLOPs"),
        ("memory of distillation", memory.gib(plan.server_memory_bytes)),
        ("disk", memory.gib(plan.disk_bytes)),
    ):
        server.add_row(name, value)
    return [devices, server]
