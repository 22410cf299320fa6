# SPDX-License-Identifier: Apache-2.0
"""DeepFusion (arXiv 2602.14301): cluster the uploads, average proxies, distil each into a student, merge, tune.

Read `server` first: it is the paper's algorithm. Two recipes share it (method, section 10b): "paper" distils K
independent students whose shared layers are averaged, "joint" trains the shared layers once for all domains.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from transformers import PreTrainedConfig

from deepfusion.artifacts import file_digest, key_of, write_atomic
from deepfusion.data.options import DataOptions
from deepfusion.data.packing import document_batches
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import FleetOptions
from deepfusion.devices.memory import forward_flops_per_token, skeleton_state
from deepfusion.errors import ModelError
from deepfusion.federation.formats import wire_bytes
from deepfusion.methods import assembly, beginning, exchange, reading, rounds
from deepfusion.methods.base import Site, TargetOptions, Training, methods, plugin, precision_faults
from deepfusion.methods.budget import Budget, Shapes, Traffic, Work, message, rows
from deepfusion.methods.gathering import Described, Gathering, UploadOptions, answer_with_model
from deepfusion.methods.learning import ADAPTERS
from deepfusion.methods.selective import SelectiveRounds, continuations
from deepfusion.methods.warm_start import WarmStart, initial_models
from deepfusion.moe import families
from deepfusion.stages import generate, merge, proxy, router, tune
from deepfusion.stages.cluster import Clustering, clusterings, describe
from deepfusion.stages.distill import DistillOptions, Rule, distill, rule_flops_per_token, rules
from deepfusion.stages.embed import Embedding, ServerProbe, embeddings
from deepfusion.training import derive_seed
from deepfusion.types import Call, Clusters, Payload, Proxy, Text, Upload


@methods.register("deepfusion")
@dataclass(frozen=True, kw_only=True)
class DeepFusion:
    """One-shot federated distillation of unlike on-device models into one Mixture-of-Experts model.

    Attributes:
        recipe: "joint" trains shared layers once for all domains and merges exactly; "paper" trains K students.
        warm_start: [warm_start] checkpoints that devices start from.
        embed: [embed] how a device describes its text.
        upload: [upload] how devices send their models.
        cluster: [cluster] how devices are grouped into domains.
        proxy: [proxy] how a group's models are averaged.
        generate: [generate] text that the teachers write.
        distill: [distill] the rule that turns proxies into students.
        distillation: [distillation] steps, loss weights and optimisation of phase II.
        merge: [merge] how students become experts.
        router: [router] how the router starts.
        tune: [tune] how the merged model is tuned.
        continued: [continue] rounds in which the devices go on with the tuned model; none when left out. Each device then
            has to hold the MoE as well, and reads its text a second time.
    """

    stages: ClassVar[tuple[str, ...]] = (
        "data", "initial", "uploads", "clusters", "proxies", "generated", "start", "experts", "merged", "tuned", "rounds", "moe",
    )  # fmt: skip

    recipe: Literal["joint", "paper"] = "joint"
    warm_start: WarmStart = field(default_factory=WarmStart)
    embed: Embedding = plugin(embeddings, "tfidf")
    upload: UploadOptions = field(default_factory=UploadOptions)
    cluster: Clustering = plugin(clusterings)
    proxy: proxy.ProxyOptions = field(default_factory=proxy.ProxyOptions)
    generate: generate.GenerateOptions = field(default_factory=generate.GenerateOptions)
    distill: Rule = plugin(rules, "vaa")
    distillation: DistillOptions
    merge: merge.MergeOptions = field(default_factory=merge.MergeOptions)
    router: router.RouterOptions = field(default_factory=router.RouterOptions)
    tune: tune.TuneOptions
    continued: SelectiveRounds | None = plugin(continuations, optional="continue")

    @property
    def trains_privately(self) -> bool:
        """As long as the devices do not go on with the MoE."""
        return self.continued is None

    def client(self, device: Device, request: Payload) -> Payload:
        """Train the device's own model, describe its text by an embedding, and answer with both; later, train the MoE."""
        if self.continued and request.what == rounds.MOE:
            return self.continued.client(device, request)
        return answer_with_model(device, request, self.embed, self.upload, self.warm_start.format)

    def server(self, site: Site, call: Call) -> Path:
        """Phases I, II and III (DeepFusion, Algorithm 1); returns the folder of the fused MoE."""
        published = self.embed.publish(site.data.public, site.seed)
        initials = initial_models(site, self.warm_start)
        document_UD = self.embed.embed_documents(site.data.public, published, site.seed)
        gathering = Gathering(
            site, call, self.embed, self.upload, initials, published, self.warm_start.sent, self.upload_key(site)
        )
        uploads, clusters = gathering.gather(document_UD, partial(self.find_domains, site))
        closeness_UK = document_UD @ clusters.centroid_KD.T
        weights = reading.domain_weights(closeness_UK, self.distillation.text, self.distillation.text_temperature)
        teachers = self.average(site, uploads, clusters, initials, weights)
        texts = reading.domain_texts(site, weights, teachers, self.generate)
        start = self.start(site, initials, teachers, weights)
        experts = self.distil(site, start, teachers, texts)
        merged = self.merge_students(site, experts, closeness_UK)
        return self.go_on(site, call, self.tune_merged(site, merged, teachers, texts))

    def upload_key(self, site: Site) -> str:
        """Hash of all that the uploads depend on besides each device's own part of [devices]."""
        parts = (self.warm_start, self.embed, self.upload)
        return key_of("uploads", site.seed, site.data_key, *parts, site.sequence_length)

    def find_domains(self, site: Site, found: Described) -> Clusters:
        """Phase I: group the devices by the cosine of their embeddings; written to `clusters.json`."""
        clusters = self.cluster.assign(
            found.embedding_ND, found.ids, found.architectures, seed=derive_seed(site.seed, "cluster"), note=site.note
        )
        write_atomic(site.folder / "clusters.json", json.dumps(describe(clusters, found.embedding_ND)))
        site.reached("clusters")
        return clusters

    def average(
        self,
        site: Site,
        uploads: Sequence[Upload],
        clusters: Clusters,
        initials: dict[str, Path],
        weights: reading.Weights,
    ) -> list[list[Proxy]]:
        """Phase I: one proxy for each domain and architecture, as a list of teachers for each domain; some may have none."""

        def make(folder: Path) -> None:
            judge = reading.judge_on_public_text(site, weights, self.proxy.read_on)
            proxy.make_proxies(
                uploads, clusters, options=self.proxy, initials=initials, judge=judge,
                tokenizer_folder=site.data.tokenizer, out=folder, progress=site.progress,
            )  # fmt: skip

        digests = {upload.device_id: file_digest(upload.path) for upload in uploads}
        options = self.distillation
        read = (options.text, options.text_temperature, site.data_key)
        domains = (clusters.label_N.tolist(), clusters.centroid_KD.tolist())  # all that follows knows them by this key
        folder = site.keep("proxies", make, self.proxy, digests, *domains, *read)
        for reason in json.loads((folder / proxy.SCREENED).read_text()).values():
            site.note(f"left out of the proxies: {reason}")
        proxies = proxy.load_proxies(folder)
        teachers = [[p for p in proxies if p.cluster == k] for k in range(clusters.num_clusters)]
        for k in (k for k, mine in enumerate(teachers) if not mine):
            site.note(
                f"domain {k} has no teacher, all its models were left out: its student learns from public text alone"
            )
        return teachers

    def start(
        self, site: Site, initials: Mapping[str, Path], teachers: Sequence[Sequence[Proxy]], weights: reading.Weights
    ) -> Path:
        """What all students start as: the best proxy or warm start that can grow to their size, or the target's base."""
        slices = self.slices(site, len(teachers))
        if self.grows(site):
            proxies = {p.folder.name: p.folder for domain in teachers for p in domain}
            sources = initials if self.distillation.start == "warm_start" else proxies
            judge = reading.mean_judge(site, weights, self.proxy.judged_on)
            parts = (self.proxy.judged_on, reading.weights_key(weights))
            folder = assembly.grown(site, "start", sources, judge, *parts, slices=slices)
        else:
            folder = assembly.base(site, slices)
        site.reached("start")
        return folder

    def grows(self, site: Site) -> bool:
        """Whether students start from a small model where one can grow; a target with pretrained weights is their start."""
        return self.distillation.start != "base" and site.target.base is None

    def slices(self, site: Site, domains: int) -> int:
        """Experts that are cut out of one student."""
        return self.merge.slices(domains, assembly.num_experts(site))

    def distil(self, site: Site, start: Path, teachers: Sequence[Sequence[Proxy]], texts: Sequence[Text]) -> list[Path]:
        """Phase II: one student a domain, all from one start; returns their folders."""
        family, moe = assembly.family_and_config(site)
        slices = self.slices(site, len(teachers))

        def make(folder: Path) -> None:
            distill(
                start, teachers, texts, family=family, target=moe, slices=slices, rule=self.distill,
                recipe=self.recipe, options=self.distillation, seed=derive_seed(site.seed, "distill"),
                tokenizer_folder=site.data.tokenizer, scratch=site.folder.scratch("experts"), progress=site.progress,
                out=folder, workers=site.server.workers,
            )  # fmt: skip

        parts = (self.recipe, self.distill, self.distillation, self.generate, site.target, slices)
        folder = site.keep("experts", make, *parts, assembly.digests(start), site.folder.key("proxies"))
        return [folder / str(k) for k in range(len(teachers))]

    def merge_students(self, site: Site, students: Sequence[Path], closeness_UK: np.ndarray) -> Path:
        """Phase III: students to experts, a router that knows the domains, and the proof that nothing was lost."""
        nearest_KU = np.argsort(-closeness_UK.T, axis=1, kind="stable")[:, : self.router.documents]
        texts = [site.data.public.select(nearest_U) for nearest_U in nearest_KU]
        beginnings = [document_batches(text, site.sequence_length, 2048, most_windows=1) for text in texts]
        batches = [[batch for _, batch in rows] for rows in beginnings]
        return assembly.merged(
            site, "merged", students, batches, site.folder.key("experts"), options=self.merge, start=self.router
        )

    def tune_merged(self, site: Site, merged: Path, teachers: Sequence[Sequence[Proxy]], texts: Sequence[Text]) -> Path:
        """Phase III: tune the merged model on the domains' text, under their teachers."""
        parts = (site.folder.key("merged"), self.generate)
        name = "tuned" if self.continued else "moe"
        return assembly.tuned(site, name, merged, teachers, texts, *parts, options=self.tune)

    def go_on(self, site: Site, call: Call, moe: Path) -> Path:
        """The federation's last rounds with the tuned model, where there are any."""
        if self.continued is None:
            return moe
        last = self.continued.run(site, call, moe)

        def make(folder: Path) -> None:
            shutil.copytree(
                last, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", rounds.ROUND, ADAPTERS)
            )

        return site.keep("moe", make, assembly.digests(last))

    def reference(self, site: Site) -> Path:
        """The same MoE from public text alone, with as many tokens: a base trained on it, copied to E experts, tuned.

        One batch of the base's training is as large as those of all domains together. Where students start from a grown
        proxy, it starts from the best warm start (on public text alone) of an architecture that grows.
        """
        domains = len(json.loads((site.folder / "clusters.json").read_text())["members"])
        start = beginning.first_base(site, self.warm_start) if self.grows(site) else assembly.base(site)
        training = self.budget(domains).training
        return beginning.reference(site, start, training, self.merge.noise, self.tune)

    def server_work(self, shapes: Shapes) -> tuple[Work, ...]:
        """Distillation of all domains with what the rule attaches for each teacher, and tuning; the teachers read along."""
        first, last, student = self.distillation, self.tune, shapes.student
        teachers = sum(forward_flops_per_token(own) for own in shapes.own)
        attached = sum(
            rule_flops_per_token(self.distill, student, own, shapes.length) for own in shapes.own if first.alpha
        )
        reads = first.steps * rows(first.optimisation) * shapes.domains * shapes.length
        tunes = last.steps * rows(last.optimisation) * shapes.length
        return (
            Work(reads, 3 * (forward_flops_per_token(student) + attached) + teachers),
            Work(tunes, 3 * forward_flops_per_token(shapes.target) + (teachers if last.beta else 0)),
        )

    def budget(self, domains: int) -> Budget:
        """What its rivals may spend on the server, when it finds so many domains."""
        optimisation = self.distillation.optimisation
        wide = replace(optimisation, batch_size=optimisation.batch_size * domains)
        training = assembly.TextTraining(steps=self.distillation.steps, optimisation=wide)
        return Budget(self.embed, self.warm_start, training, self.tune)

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> Traffic:
        """At most: the model up with its embedding, after a warm start also down; with `[continue]` the rounds' MoE besides."""
        down = message(0, self.warm_start.bytes_down(own) + exchange.published_bytes(self.embed))
        up = message(0, wire_bytes(skeleton_state(own), self.upload.format) + 2 * self.embed.dimension)
        more = self.continued.traffic_of(shapes.target) if self.continued else Traffic(0, 0)
        return Traffic(down + more.down, up + more.up)

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """The device's own model; the MoE too, where the federation goes on with it."""
        return (Training(own), *([self.continued.training_of(target)] if self.continued else []))

    def faults_with(self, devices: FleetOptions, data: DataOptions, target: TargetOptions) -> Iterator[str]:
        """See `Method.faults_with`."""
        parts = {"warm_start.training": self.warm_start.training} if self.warm_start.steps else {}
        parts |= {
            "distillation.optimisation": self.distillation.optimisation,
            "tune.optimisation": self.tune.optimisation,
        }
        yield from precision_faults(parts)
        if self.distillation.start == "warm_start" and not self.warm_start.steps:
            yield '[distillation] start = "warm_start": there is none; set [warm_start] steps, or choose "proxy" or "base"'
        if self.continued:
            yield from self.continued.selection_faults(devices, target)
        if self.upload.select == "medoids" and isinstance(self.embed, ServerProbe):
            yield '[upload] select = "medoids": [embed] type = "probe" needs every model to embed a device; choose another type'
        family = families[target.model_type]
        size = devices.count + len(devices.named)
        vocabulary = data.tokenizer.vocab_size or None
        try:
            config = family.ready_target(target.make(vocabulary, data.sequence_length, None))
            wanted: object = getattr(self.cluster, "num_clusters", None)
            if isinstance(wanted, int):
                if wanted > size:
                    yield f"[cluster] num_clusters = {wanted}: only {size} devices; lower num_clusters or raise [devices] count"
                family.student_config(config, slices=self.merge.slices(wanted, family.num_experts(config)))
        except ModelError as error:
            yield str(error)


@methods.register("ofa")
@dataclass(frozen=True, kw_only=True)
class OfaKd(DeepFusion):
    """OFA-KD (arXiv 2310.19444): the same, but early exits of the students learn the proxies' predictions; no VAA."""

    distill: Rule = plugin(rules, "ofa")


@methods.register("fedmkt1")
@dataclass(frozen=True, kw_only=True)
class FedMktOneShot(DeepFusion):
    """FedMKT (arXiv 2406.02224) in one shot: the same, but the students learn the proxies' predictions alone; no VAA."""

    distill: Rule = plugin(rules, "logits")
