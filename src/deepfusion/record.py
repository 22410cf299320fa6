# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to be compared: one JSON file with everything that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from deepfusion.artifacts import write_atomic
from deepfusion.errors import DataError
from deepfusion.schema import misfits

SCHEMA = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class DomainMetrics(_Part):
    """Quality on one domain's test text."""

    log_perplexity: float
    perplexity: float
    token_accuracy: float
    tokens: int


class Metrics(DomainMetrics):
    """Quality on all test text, every counted token with the same weight, and on each domain."""

    domains: dict[str, DomainMetrics]


class ModelMetrics(_Part):
    """One of several models of a kind.

    Attributes:
        name: device id, proxy or student.
        cluster: its domain.
        own: the test domain that it is best at.
    """

    name: str
    cluster: int | None = None
    architecture: str | None = None
    metrics: Metrics


class Group(_Part):
    """Several models of a kind, and the mean over them (of log-perplexity and accuracy)."""

    mean: Metrics
    items: list[ModelMetrics]


class Baselines(_Part):
    """What the fused MoE is compared with.

    Attributes:
        public_only: the same MoE trained on public text alone, with the server's number of tokens.
        merged: the MoE after the merge, before tuning.
        proxies: the teachers.
        students: the distilled single-expert models.
        devices: the devices' own models.
        oracle: every test domain scored by the proxy that is best at it.
    """

    public_only: Metrics | None = None
    merged: Metrics | None = None
    proxies: Group | None = None
    students: Group | None = None
    devices: Group | None = None
    oracle: Metrics | None = None


class LedgerTotals(_Part):
    """Bytes that crossed the door."""

    upload_bytes: int
    download_bytes: int
    init_bytes: int
    total_bytes: int


class BudgetRecord(_Part):
    """What the trainings of a run read and computed, the fleet and the server apart (baselines, section 9).

    Warm starts are outside, and so is what devices compute beside their training.

    Attributes:
        device_tokens: private tokens that all devices' trainings read; of rounds, those whose answers the server had.
        server_tokens: public tokens that the server's trainings read.
        device_flops, server_flops: 6 FLOPs a token and parameter that is trained, 2 for one that is only read through.
    """

    device_tokens: int
    server_tokens: int
    device_flops: int
    server_flops: int


class RoundRecord(_Part):
    """Who took part in a round, and how much of the MoE was used (HFedMoE).

    Attributes:
        asked, answered: devices.
        by_budget: for each budget of experts that a device may train on a batch, the devices asked and those that answered.
        gate_scale: sum of the devices' gate weights before they are normalised.
        routed, trained, uploaded: share of all experts, mean over the devices that answered.
    """

    asked: int
    answered: int
    by_budget: dict[str, tuple[int, int]] = {}
    gate_scale: float | None = None
    routed: float | None = None
    trained: float | None = None
    uploaded: float | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> RoundRecord:
        """From what a round's `round.json` tells."""
        asked, answered, devices = said["asked"], said["answered"], said.get("devices", {})
        if not devices:
            return cls(asked=len(asked), answered=len(answered))
        budgets = {device: str(said["budgets"][device]) for device in asked}
        experts = sum(len(row) for row in next(iter(devices.values()))["usage"])
        shares = {
            name: sum(told[name] for told in devices.values()) / experts / len(devices)
            for name in ("routed", "trained", "uploaded")
        }
        by_budget = {
            budget: (list(budgets.values()).count(budget), sum(budgets[device] == budget for device in answered))
            for budget in sorted(set(budgets.values()), key=int)
        }
        return cls(
            asked=len(asked), answered=len(answered), by_budget=by_budget, gate_scale=said["gate_scale"], **shares
        )


class DeviceRecord(_Part):
    """One device.

    Attributes:
        epsilon: what a document's privacy lost at most by its training, at [devices.privacy] delta; None without privacy.
    """

    id: str
    architecture: str
    parameters: int
    estimated_memory_bytes: int
    peak_memory_bytes: int | None
    upload_bytes: int
    cluster: int | None
    documents: int
    tokens: int
    domains: dict[str, int]
    seconds: float | None
    epsilon: float | None = None


class ClusterRecord(_Part):
    """The domains that were found.

    Attributes:
        labels: domain of each device.
        similarity: cosine of each pair of devices, in the order of `labels`; None where devices are many.
        projection: two coordinates of each device, for a map.
    """

    num_clusters: int
    labels: dict[str, int]
    similarity: list[list[float]] | None
    projection: list[list[float]]


class Record(_Part):
    """Everything that a run measured.

    Attributes:
        rounds: of a method in rounds, the score of the model after each one, before the last tuning.
        round_records: what happened in each of them.
        test_text: hash of the documents that `metrics` are of, as text and as tokens; None in records from before there was one.
        failures: why a device had no part: it did not answer, what it sent was refused, or what it would train does not fit
            its memory.
    """

    schema_version: int = SCHEMA
    run_id: str
    name: str
    method: str
    recipe: str | None
    seed: int
    started: str
    metrics: Metrics
    test_text: str | None = None
    baselines: Baselines
    ledger: LedgerTotals
    bytes_by_kind: dict[str, int] = {}
    budget: BudgetRecord | None = None
    devices: list[DeviceRecord]
    clusters: ClusterRecord | None
    seconds: dict[str, float]
    versions: dict[str, str]
    curves: dict[str, dict[str, list[tuple[float, float]]]]
    rounds: list[Metrics] = []
    round_records: list[RoundRecord] = []
    expert_load: dict[str, list[float]]
    expert_mutual_information: float
    merge_check: float | None
    notes: list[str]
    failures: dict[str, str]
    config: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_atomic(path, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            DataError: there is none, or it was written by another version.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: no record there; give a run folder that `deepfusion run` has finished") from error
        except ValidationError as error:
            said = f"not a record of this version ({misfits(error)[0]}); run again with --resume"
            raise DataError(f"{path}: {said}") from error
