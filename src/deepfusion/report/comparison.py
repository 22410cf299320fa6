# SPDX-License-Identifier: Apache-2.0
"""Several methods over several seeds: what each is worth and what it costs, as data, as a table, and as one page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

from deepfusion.errors import DataError, printable
from deepfusion.record import Record
from deepfusion.report.fitting import FittingTable
from deepfusion.report.rows import size
from deepfusion.statistics import paired_difference

CLAIM = 3
"""Seeds that a claim needs."""
INTERVAL = (
    "The 95% interval is of the mean over seeds: where it would lie with other seeds and other test documents; "
    "with one seed, with other test documents alone."
)
"""What the bounds of a `Gap` say."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        record: what it measured.
        folder: where it is.
        documents: each test document's negative log-likelihood in nats under its MoE, and its counted tokens.
    """

    record: Record
    folder: Path
    documents: tuple[np.ndarray, np.ndarray]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Part):
    """Mean over seeds, and their standard deviation (None with one seed)."""

    mean: float
    deviation: float | None

    def text(self, digits: int) -> str:
        """For people."""
        return f"{self.mean:.{digits}f}" + ("" if self.deviation is None else f" ± {self.deviation:.{digits}f}")


class Gap(_Part):
    """Log-perplexity above the main method's, in nats a token, and its 95% interval (`paired_difference`).

    Attributes:
        seeds: those that both methods have; with one, the interval is over test documents alone.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.interval}, {self.verdict}"

    @property
    def interval(self) -> str:
        """The mean and its interval, for people."""
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def verdict(self) -> str:
        """A claim only where the interval is over seeds and excludes zero."""
        if self.seeds < 2:
            return "one seed"
        return "worse" if self.low > 0 else "better" if self.high < 0 else "no difference shown"


class MethodResult(_Part):
    """One method over its seeds; costs are means over seeds.

    Attributes:
        gap: None for the main method, and where it has no seed in common with it.
        device_memory_bytes: estimate of the largest device's training.
        rounds: log-perplexity after each round, of each seed; empty for one-shot methods.
        bytes_by_kind: bytes of the whole fleet by direction and kind.
        seconds_by_stage: of the server, and `devices` for the sum of the devices' own.
        left_out: devices that had no part, a seed.
        unanswered: of each seed in whose rounds not every device answered that was asked, how often that was so.
    """

    name: str
    seeds: list[int]
    log_perplexity: Spread
    perplexity: Spread
    token_accuracy: Spread
    public_only: Spread | None
    domains: dict[str, Spread]
    gap: Gap | None
    upload_bytes: float
    download_bytes: float
    init_bytes: float
    total_bytes: float
    device_memory_bytes: float
    device_peak_bytes: float | None
    device_tokens: float
    server_tokens: float
    device_flops: float
    server_flops: float
    left_out: float
    unanswered: dict[int, int]
    rounds: list[list[float]]
    bytes_by_kind: dict[str, float]
    seconds_by_stage: dict[str, float]
    folders: list[str]


class Comparison(_Part):
    """What `compare.json` holds."""

    main: str
    methods: list[MethodResult]
    failures: dict[str, str]
    test_tokens: int

    @property
    def caution(self) -> str:
        """Whose numbers are no claim yet; empty when every method has three seeds, and shares two with the main one."""
        few = [method.name for method in self.methods if len(method.seeds) < CLAIM]
        alone = [method.name for method in self.methods if method.gap and method.gap.seeds < 2]
        said: list[str] = []
        if few:
            said += [f"Fewer than {CLAIM} seeds of {', '.join(few)}: differences are of these runs only, and no claim."]
        if alone:
            said += [
                f"Only one seed of {', '.join(alone)} beside {self.main}: the interval is over test documents alone, and no "
                "verdict is given, because one run does not tell how far another seed would move it."
            ]
        short = [
            f"{method.name}, seed {seed} ({count:,} answers missing)"
            for method in self.methods for seed, count in method.unanswered.items()
        ]  # fmt: skip
        if short:
            said += [f"Devices did not answer in rounds of {'; '.join(short)}: these runs had less than their budget."]
        return " ".join(said)


def compare_runs(runs: Sequence[Run], failures: Mapping[str, str], *, main: str) -> Comparison:
    """Group runs by method, best first, and compare each method with `main` on the seeds that both have.

    Raises:
        DataError: two runs were scored on unlike test text; names their folders.
    """
    for run in runs:
        _check_same_text(runs[0], run)
    by_method: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_method.setdefault(run.record.method, {})[run.record.seed] = run
    results = [_result(name, mine, by_method.get(main, {}), main) for name, mine in by_method.items()]
    return Comparison(
        main=main,
        methods=sorted(results, key=lambda result: result.log_perplexity.mean),
        failures=dict(failures),
        test_tokens=runs[0].record.metrics.tokens,
    )


def _check_same_text(one: Run, other: Run) -> None:
    texts = {run.record.test_text for run in (one, other)} - {None}
    tokens = one.documents[1], other.documents[1]
    if len(texts) > 1 or not np.array_equal(*tokens):
        sizes = [f"{len(tokens_U)} documents of {int(tokens_U.sum()):,} tokens" for tokens_U in tokens]
        raise DataError(
            f"{one.folder} and {other.folder} were scored on unlike test text ({' and '.join(sizes)}): a document of one "
            "would be paired with another document; delete the folder whose text is out of date, and compare again"
        )


def _result(name: str, runs: Mapping[int, Run], mains: Mapping[int, Run], main: str) -> MethodResult:
    records = [runs[seed].record for seed in sorted(runs)]

    def spread(values: Sequence[float]) -> Spread:
        return Spread(mean=statistics.mean(values), deviation=statistics.stdev(values) if len(values) > 1 else None)

    def mean(values: Sequence[float]) -> float:
        return statistics.mean(values) if values else 0.0

    public = [r.baselines.public_only.perplexity for r in records if r.baselines.public_only]
    peaks = [max(found) for r in records if (found := [d.peak_memory_bytes for d in r.devices if d.peak_memory_bytes])]
    budgets = [record.budget for record in records if record.budget]
    stages = {stage for record in records for stage in record.seconds if not stage.startswith("scores/")}
    seconds = {stage: mean([record.seconds.get(stage, 0.0) for record in records]) for stage in sorted(stages)}
    seconds["devices"] = mean([sum(device.seconds or 0.0 for device in record.devices) for record in records])
    kinds = {kind for record in records for kind in record.bytes_by_kind}
    return MethodResult(
        name=name,
        seeds=sorted(runs),
        log_perplexity=spread([record.metrics.log_perplexity for record in records]),
        perplexity=spread([record.metrics.perplexity for record in records]),
        token_accuracy=spread([record.metrics.token_accuracy for record in records]),
        public_only=spread(public) if public else None,
        domains={
            domain: spread([record.metrics.domains[domain].perplexity for record in records])
            for domain in sorted(records[0].metrics.domains)
        },
        gap=None if name == main else _gap(runs, mains),
        upload_bytes=mean([record.ledger.upload_bytes for record in records]),
        download_bytes=mean([record.ledger.download_bytes for record in records]),
        init_bytes=mean([record.ledger.init_bytes for record in records]),
        total_bytes=mean([record.ledger.total_bytes for record in records]),
        device_memory_bytes=mean([max(device.estimated_memory_bytes for device in r.devices) for r in records]),
        device_peak_bytes=mean(peaks) if peaks else None,
        device_tokens=mean([budget.device_tokens for budget in budgets]),
        server_tokens=mean([budget.server_tokens for budget in budgets]),
        device_flops=mean([budget.device_flops for budget in budgets]),
        server_flops=mean([budget.server_flops for budget in budgets]),
        left_out=mean([len(record.failures) for record in records]),
        unanswered={r.seed: count for r in records if (count := sum(n.asked - n.answered for n in r.round_records))},
        rounds=[[metrics.log_perplexity for metrics in record.rounds] for record in records if record.rounds],
        bytes_by_kind={kind: mean([record.bytes_by_kind.get(kind, 0) for record in records]) for kind in sorted(kinds)},
        seconds_by_stage=seconds,
        folders=[str(runs[seed].folder) for seed in sorted(runs)],
    )


def _gap(runs: Mapping[int, Run], mains: Mapping[int, Run]) -> Gap | None:
    both = sorted(runs.keys() & mains.keys())
    if not both:
        return None
    ours, theirs = ([side[seed].documents[0] for seed in both] for side in (runs, mains))
    found = paired_difference(ours, theirs, runs[both[0]].documents[1])
    return Gap(mean=found.mean, low=found.low, high=found.high, seeds=len(both))


# ---------------------------------------------------------------------------------------------- the table


def comparison_table(found: Comparison) -> Table:
    """One row for each method, best first."""
    table = FittingTable(f"Methods by log-perplexity on {found.test_tokens:,} test tokens")
    table.add_column("method")
    for column in ("seeds", "perplexity", f"nats above {found.main}", "verdict", "accuracy", "traffic", "device memory",
                   "device tokens", "server tokens", "device FLOPs", "server FLOPs", "left out"):  # fmt: skip
        table.add_column(column, justify="right")
    for method in found.methods:
        said = (method.gap.interval, method.gap.verdict) if method.gap else ("", "")
        table.add_row(
            escape(method.name), str(len(method.seeds)), method.perplexity.text(1), *said,
            f"{method.token_accuracy.mean:.1%}", size(method.total_bytes), size(method.device_memory_bytes),
            f"{method.device_tokens:,.0f}", f"{method.server_tokens:,.0f}", f"{method.device_flops:.1e}",
            f"{method.server_flops:.1e}", f"{method.left_out:g}", style="bold" if method.name == found.main else "",
        )  # fmt: skip
    said = [f"{escape(run)} failed: {escape(printable(reason))}" for run, reason in found.failures.items()]
    table.caption, table.caption_justify = "\n".join(filter(None, [*said, INTERVAL, found.caution])), "left"
    return table
