# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before anything is trained or downloaded (method, section 13)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table
from transformers import PreTrainedConfig

from deepfusion.config import RunConfig
from deepfusion.data.sources import missing_files
from deepfusion.devices import memory
from deepfusion.devices.fleet import cards
from deepfusion.methods import DeepFusion, methods
from deepfusion.methods.base import Method, Training
from deepfusion.methods.budget import Shapes, message
from deepfusion.moe import families
from deepfusion.moe.growth import cannot_grow
from deepfusion.run import largest_trainings, own_configs, shapes_of


@dataclass(frozen=True)
class ArchitecturePlan:
    """The devices of one architecture.

    Attributes:
        parameters: of the largest model that such a device trains.
        memory_bytes: of that training.
        limit_bytes: the fleet's memory limit, None without one.
        advice: what would fit, where it does not.
        upload_bytes, download_bytes: of one device in the whole run, at most; None where it sends its text.
    """

    name: str
    devices: int
    parameters: int
    memory_bytes: int
    limit_bytes: int | None
    advice: str
    upload_bytes: int | None
    download_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """Predicted costs of a run; bytes are of the whole fleet unless said otherwise.

    Attributes:
        domains: that DeepFusion and its kin distil apart; None in other methods.
        target_parameters: of the MoE that comes out; `target_active_parameters` of them work on a token.
        server_flops: of all the server's trainings on public text.
        server_memory_bytes: of the largest: DeepFusion's students (one copy with the joint recipe), else the MoE.
        disk_bytes: what the run folder will hold, at most.
        missing_text: what is not there yet of the files that the run will read.
        start: what DeepFusion's students start as; None in other methods.
    """

    name: str
    method: str
    architectures: tuple[ArchitecturePlan, ...]
    domains: int | None
    upload_bytes: int | None
    download_bytes: int | None
    target_parameters: int
    target_active_parameters: int
    student_parameters: int
    server_flops: int
    server_memory_bytes: int
    disk_bytes: int
    missing_text: tuple[str, ...]
    start: str | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def make_plan(config: RunConfig) -> Plan:
    """Price a configuration. Models are built without their numbers; no weights and no text are read.

    Raises:
        ModelError: an architecture's configuration is not known without network.
    """
    method, shapes = config.method, shapes_of(config)
    fleet = Counter(card.model.name for card in cards(config.devices, config.seed))
    own, hosted = own_configs(config), largest_trainings(config)
    rows = tuple(_architecture(config, name, fleet[name], own, hosted[name], shapes) for name in own)
    family, target = families[config.target.model_type], shapes.target
    parameters, domains, student, start = memory.num_parameters(target), None, shapes.student, None
    if isinstance(method, DeepFusion):
        domains = shapes.domains
        student = family.student_config(target, slices=method.merge.slices(domains, family.num_experts(target)))
        start = _start(config, method, own, student)
        need = memory.training_memory(student, method.distillation.optimisation, shapes.length).total
        need += (
            (domains - 1) * 16 * (parameters - memory.num_parameters(student)) // max(1, family.num_experts(target) - 1)
        )
    else:
        need = memory.training_memory(target, method.tune.optimisation, shapes.length).total
    uploads = _sum(
        row.upload_bytes and _all_uploads(row.devices, row.upload_bytes, method, shapes.domains) for row in rows
    )
    kept = 4 * ((domains or 0) * memory.num_parameters(student) + (3 + getattr(method, "rounds", 0)) * parameters)
    return Plan(
        name=config.name,
        method=methods.name_of(type(method)),
        architectures=rows,
        domains=domains,
        upload_bytes=uploads,
        download_bytes=_sum(row.download_bytes and row.devices * row.download_bytes for row in rows),
        target_parameters=parameters,
        target_active_parameters=memory.num_active_parameters(target),
        student_parameters=memory.num_parameters(student),
        server_flops=sum(work.tokens * work.flops_per_token for work in method.server_work(shapes)),
        server_memory_bytes=need,
        disk_bytes=2 * (uploads or 0) + kept,
        missing_text=tuple(missing_files(config.data)),
        start=start,
    )


def _start(
    config: RunConfig, method: DeepFusion, own: Mapping[str, PreTrainedConfig], student: PreTrainedConfig
) -> str:
    """What the students start as, in words; the largest single part of what fusion is worth, so worth knowing before."""
    if config.target.base is not None:
        return config.target.base
    if method.distillation.start == "base":
        return "random weights"
    family, length = families[config.target.model_type], config.data.sequence_length
    reasons = {name: cannot_grow(model, student, family, length) for name, model in own.items()}
    if able := [name for name, reason in reasons.items() if reason is None]:
        what = "warm start" if method.distillation.start == "warm_start" else "proxy"
        return f"the best {what} of {', '.join(able)}, grown"
    return "random weights: " + "; ".join(f"{name} cannot grow, {reason}" for name, reason in reasons.items())


def _all_uploads(devices: int, each: int, method: Method, domains: int) -> int:
    """Bytes of all devices of an architecture, at most; who is not asked for a model sends an embedding only."""
    if not isinstance(method, DeepFusion):
        return devices * each
    models = method.upload.senders(devices, domains)
    return models * each + (devices - models) * message(0, 2 * method.embed.dimension)


def _sum(parts: Iterable[int | None]) -> int | None:
    """None where a part is not known."""
    found = list(parts)
    return None if None in found else sum(part or 0 for part in found)


def _architecture(
    config: RunConfig, name: str, count: int, own: Mapping[str, PreTrainedConfig], hosted: Training | None,
    shapes: Shapes,
) -> ArchitecturePlan:  # fmt: skip
    length, traffic = config.data.sequence_length, config.method.traffic(own[name], shapes)
    limit = None if config.devices.memory_limit_gib is None else int(config.devices.memory_limit_gib * 2**30)
    private = config.devices.privacy is not None
    need = hosted.memory(config.devices.training, length, private=private) if hosted else 0
    advice = ""
    if hosted and limit is not None and need > limit:
        advice = hosted.what_would_fit(config.devices.training, length, limit, own, private=private)
    return ArchitecturePlan(
        name=name,
        devices=count,
        parameters=memory.num_parameters(hosted.model) if hosted else 0,
        memory_bytes=need,
        limit_bytes=limit,
        advice=advice,
        upload_bytes=traffic.up if traffic else None,
        download_bytes=traffic.down if traffic else None,
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
            row.name, str(row.devices), f"{row.parameters / 1e6:,.2f} M", need, limit, _bytes(row.upload_bytes),
            _bytes(row.download_bytes),
        )  # fmt: skip
        if row.advice:
            devices.caption = f"{row.name} does not fit: {row.advice}"
    server = Table(title="server", title_justify="left", show_header=False)
    for name, value in (
        ("method", plan.method),
        *([("domains", str(plan.domains))] if plan.domains else []),
        (
            "MoE",
            f"{plan.target_parameters / 1e6:,.1f} M parameters, {plan.target_active_parameters / 1e6:,.1f} M a token",
        ),
        ("base of one expert", f"{plan.student_parameters / 1e6:,.1f} M parameters"),
        *([("students start as", plan.start)] if plan.start else []),
        ("all uploads", _bytes(plan.upload_bytes)),
        ("all downloads", _bytes(plan.download_bytes)),
        ("trainings on public text", f"{plan.server_flops:.2e} FLOPs"),
        ("memory of the largest", memory.gib(plan.server_memory_bytes)),
        ("disk", memory.gib(plan.disk_bytes)),
    ):
        server.add_row(name, value)
    return [devices, server]


def _bytes(count: int | None) -> str:
    return "its text" if count is None else memory.gib(count)
