# SPDX-License-Identifier: Apache-2.0
"""What a finished run is worth: the fused MoE and everything it is compared with, scored on the same test text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deepfusion.artifacts import RunFolder, file_digest, key_of
from deepfusion.config import RunConfig, tree_of
from deepfusion.devices import models
from deepfusion.devices.releases import text_digest
from deepfusion.federation.ledger import Ledger
from deepfusion.methods.base import Site, methods
from deepfusion.methods.rounds import ROUND, read_round, round_folders
from deepfusion.moe import families
from deepfusion.record import (
    Baselines,
    ClusterRecord,
    DomainMetrics,
    Group,
    LedgerTotals,
    Metrics,
    ModelMetrics,
    Record,
    RoundRecord,
)  # fmt: skip
from deepfusion.run import Notes, versions
from deepfusion.spending import budget_of, devices_of
from deepfusion.stages.cluster import similarity
from deepfusion.stages.evaluate import Score, by_domain, expert_load, mutual_information, score_documents, total
from deepfusion.stages.proxy import load_proxies, load_upload
from deepfusion.types import Proxy

CURVE_POINTS = 400
"""Longest curve in the record; longer ones are thinned."""
MOST_PAIRED = 64
"""With more devices than this, the record does not hold the cosine of every pair."""


def measure(
    config: RunConfig, site: Site, moe: Path, *, ledger: Ledger, failures: Mapping[str, str], notes: Notes,
    reference: Path | None,
) -> Record:  # fmt: skip
    """Score the MoE and its baselines, and gather what the run's folder tells.

    Args:
        reference: the MoE from public text alone, or None.
    """
    scorer = _Scorer(site)
    score = scorer.folder("moe", moe)
    family = families[config.target.model_type]
    model = models.load(moe)
    load = expert_load(model, site.data.test, site.sequence_length, family=family)
    clusters = read_clusters(site.folder.path)
    merged = site.folder / "merged"
    devices = devices_of(config, site, ledger, clusters)
    return Record(
        run_id=f"{config.name}-{key_of(tree_of(config))[:8]}",
        name=config.name,
        method=methods.name_of(type(config.method)),
        recipe=getattr(config.method, "recipe", None),
        seed=config.seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics=as_metrics(score),
        test_text=text_digest(site.data.test),
        baselines=_baselines(config, site, scorer, clusters, reference),
        ledger=LedgerTotals(**ledger.totals()),
        bytes_by_kind=ledger.by_kind(),
        budget=budget_of(config, site, devices, clusters),
        devices=devices,
        clusters=clusters,
        seconds=_seconds(site.folder),
        versions=versions(),
        curves=_curves(site.folder.path),
        rounds=_rounds(config, site, scorer),
        round_records=_round_records(config, site.folder.path),
        expert_load=load,
        expert_mutual_information=mutual_information(load),
        merge_check=_merge_check(merged),
        notes=notes.sentences,
        failures=dict(failures),
        config=tree_of(config),
    )


class _Scorer:
    """Scores model folders on the run's test text; a folder's score is kept and not computed again."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def folder(self, name: str, folder: Path) -> dict[str, Score]:
        """Score by domain of a model folder."""
        weights = sorted(folder.glob("*.safetensors"))
        return self._kept(name, [file_digest(path) for path in weights], lambda: models.load(folder))

    def upload(self, device_id: str, path: Path, start: Path) -> dict[str, Score]:
        """Score by domain of a device's uploaded model."""
        return self._kept(f"device {device_id}", [file_digest(path)], lambda: load_upload(path, start))

    def _kept(self, name: str, digests: Sequence[str], load: Any) -> dict[str, Score]:
        site = self._site

        def make(out: Path) -> None:
            scores = score_documents(
                load(), site.data.test, site.sequence_length, label=f"score {name}", progress=site.progress
            )
            sums = by_domain(scores, site.data.test)
            rows = {domain: [s.nll, s.hits, s.tokens] for domain, s in sums.items()}
            per_document = [[s.nll, s.hits, s.tokens] for s in scores]
            (out / "scores.json").write_text(json.dumps({"domains": rows, "documents": per_document}))

        place = f"scores/{name.replace(' ', '-')}"
        folder = site.folder.keep(place, make, digests, site.data_key, site.sequence_length)
        rows = json.loads((folder / "scores.json").read_text())["domains"]
        return {domain: Score(*row) for domain, row in rows.items()}


def as_metrics(scores: Mapping[str, Score]) -> Metrics:
    """Scores by domain as they stand in the record."""
    return Metrics(**_domain(total(dict(scores))), domains={k: DomainMetrics(**_domain(s)) for k, s in scores.items()})


def mean_metrics(items: Sequence[Metrics]) -> Metrics:
    """Mean of log-perplexity and accuracy over models; the perplexity is that of the mean log-perplexity."""

    def mean(parts: Sequence[DomainMetrics]) -> dict[str, Any]:
        nats = sum(p.log_perplexity for p in parts) / len(parts)
        accuracy = sum(p.token_accuracy for p in parts) / len(parts)
        return {"log_perplexity": nats, "perplexity": _exp(nats), "token_accuracy": accuracy, "tokens": parts[0].tokens}

    domains = {name: DomainMetrics(**mean([m.domains[name] for m in items])) for name in items[0].domains}
    return Metrics(**mean(items), domains=domains)


def _domain(score: Score) -> dict[str, Any]:
    return {
        "log_perplexity": score.log_perplexity, "perplexity": score.perplexity,
        "token_accuracy": score.token_accuracy, "tokens": score.tokens,
    }  # fmt: skip


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _baselines(
    config: RunConfig, site: Site, scorer: _Scorer, clusters: ClusterRecord | None, reference: Path | None
) -> Baselines:
    wanted, folder = config.evaluate, site.folder.path
    proxies = students = devices = oracle = None
    sent = folder / "initial.json"  # of a method whose devices upload models
    starts = {name: Path(path) for name, path in json.loads(sent.read_text()).items()} if sent.exists() else {}

    def of_proxy(proxy: Proxy) -> dict[str, Score]:
        if len(proxy.members) != 1:
            return scorer.folder(f"proxy {proxy.folder.name}", proxy.folder)
        member = proxy.members[0]  # the proxy is its model as it is
        return scorer.upload(member, folder / "uploads" / f"{member}.safetensors", starts[proxy.architecture])

    if wanted.proxies and (folder / "proxies").exists():
        scored = [(proxy, of_proxy(proxy)) for proxy in load_proxies(folder / "proxies")]
        proxies = _group([
            ModelMetrics(name=p.folder.name, cluster=p.cluster, architecture=p.architecture, metrics=as_metrics(s))
            for p, s in scored
        ])  # fmt: skip
        best = {name: min((s[name] for _, s in scored), key=lambda s: s.log_perplexity) for name in scored[0][1]}
        oracle = as_metrics(best)
    if wanted.students and (folder / "experts").exists():
        found = sorted((f for f in (folder / "experts").iterdir() if f.is_dir()), key=lambda f: int(f.name))
        students = _group([
            ModelMetrics(name=f"student {f.name}", cluster=int(f.name), metrics=as_metrics(scorer.folder(f"student {f.name}", f)))
            for f in found
        ])  # fmt: skip
    if wanted.devices and starts:
        devices = _group([
            ModelMetrics(
                name=card.id, cluster=clusters.labels.get(card.id) if clusters else None, architecture=card.model.name,
                metrics=as_metrics(scorer.upload(card.id, path, starts[card.model.name])),
            )
            for card in site.cards if (path := folder / "uploads" / f"{card.id}.safetensors").exists()
        ])  # fmt: skip
    return Baselines(
        public_only=as_metrics(scorer.folder("public only", reference)) if reference else None,
        merged=as_metrics(scorer.folder("merged", folder / "merged")) if (folder / "merged").exists() else None,
        proxies=proxies, students=students, devices=devices, oracle=oracle,
    )  # fmt: skip


def _rounds(config: RunConfig, site: Site, scorer: _Scorer) -> list[Metrics]:
    if not config.evaluate.rounds or not (site.folder / "rounds").exists():
        return []
    folders = round_folders(site.folder.path, config.method)
    return [as_metrics(scorer.folder(f"round {folder.name}", folder)) for folder in folders]


def _round_records(config: RunConfig, folder: Path) -> list[RoundRecord]:
    """What the rounds' own notes tell."""
    folders = round_folders(folder, config.method)
    return [RoundRecord.of(read_round(path)) for path in folders if (path / ROUND).exists()]


def _group(items: list[ModelMetrics]) -> Group | None:
    return Group(mean=mean_metrics([item.metrics for item in items]), items=items) if items else None


def read_clusters(folder: Path) -> ClusterRecord | None:
    """`clusters.json` for the record, with a map of the devices: the two main axes of their embeddings."""
    path = folder / "clusters.json"
    if not path.exists():
        return None
    table = json.loads(path.read_text())
    labels = {device: k for k, members in enumerate(table["members"]) for device in members}
    embedding_ND = np.asarray(table["embedding"])
    centred_ND = embedding_ND - embedding_ND.mean(0)
    axes_NN, size_N, _ = np.linalg.svd(centred_ND, full_matrices=False)
    flat_N2 = np.zeros((len(centred_ND), 2))
    flat_N2[:, : min(2, len(size_N))] = (axes_NN * size_N)[:, :2]
    return ClusterRecord(
        num_clusters=len(table["members"]),
        labels={device: labels[device] for device in table["device_ids"]},
        similarity=np.round(similarity(embedding_ND), 4).tolist() if len(labels) <= MOST_PAIRED else None,
        projection=np.round(flat_N2, 4).tolist(),
    )


def _seconds(folder: RunFolder) -> dict[str, float]:
    """How long each stage of the run folder took."""
    names = sorted(str(path.parent.relative_to(folder.path)) for path in folder.path.rglob(".stage.json"))
    return {name: folder.seconds(name) for name in names if not name.startswith(".partial")}


def _merge_check(merged: Path) -> float | None:
    path = merged / "merge.json"
    return float(json.loads(path.read_text())["largest_logit_difference"]) if path.exists() else None


def _curves(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Every training's history, thinned: `history.json` holds rows of metrics, by training or for one training."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for path in sorted(folder.rglob("history.json")):
        stage = str(path.parent.relative_to(folder))
        history = json.loads(path.read_text())
        trainings = history if isinstance(history, dict) else {"": history}
        for training, steps in trainings.items():
            name = f"{stage}/{training}" if training else stage
            thin = steps[:: max(1, math.ceil(len(steps) / CURVE_POINTS))]
            curves[name] = {
                metric: [(row["step"], row[metric]) for row in thin if metric in row]
                for metric in sorted({key for row in thin for key in row} - {"step"})
            }
    return curves
