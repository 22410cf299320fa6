# SPDX-License-Identifier: Apache-2.0
"""FedJETS (arXiv 2306.08586) for a token-routed causal LM: devices train the few experts that suit them (baselines, section 5).

A frozen common expert, the base that all experts start from, tells the gate what a device's text is like; the gate says
which experts the device hosts. Anchor devices, one for each expert, always host theirs and teach the gate to choose it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.artifacts import key_of
from deepfusion.data.options import DataOptions
from deepfusion.data.packing import PackedText
from deepfusion.devices import configurations, models
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import FleetOptions
from deepfusion.devices.memory import num_parameters
from deepfusion.errors import ModelError, UploadError
from deepfusion.federation.payload import check_embedding, read_file
from deepfusion.methods import assembly, exchange, rounds
from deepfusion.methods.base import Site, TargetOptions, Training, methods, plugin
from deepfusion.methods.budget import Budget, Shapes, Traffic, message
from deepfusion.moe import families
from deepfusion.moe.base import ROUTER
from deepfusion.moe.hosting import by_layer, part, pieces, put_back, with_experts
from deepfusion.moe.routing import Penalty, Routing, balance_penalty, routers
from deepfusion.stages.cluster import KMeans
from deepfusion.stages.embed import Embedding, ServerProbe, embeddings
from deepfusion.stages.preference import gate_preference
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import average_present, distinct_state, load_distinct
from deepfusion.training import derive_seed
from deepfusion.types import Call, Payload, State

COMMON = "common-expert.safetensors"
"""Where a device keeps the common expert between rounds, among its own files."""


@methods.register("fedjets")
@dataclass(frozen=True, kw_only=True)
class FedJets(rounds.Rounds):
    """Each device trains the shared layers and a few experts that the gate chooses for it; the server averages by holders.

    Attributes:
        hosted_experts: K_d, experts that a device holds.
        anchors: whether each expert has a device of its own, the nearest to one of E clusters of the devices' texts.
        mu: weight of the loss by which an anchor teaches the gate to choose its expert.
        embed: [embed] how a device describes its text, for the choice of anchors.
    """

    stages: ClassVar[tuple[str, ...]] = (
        "data", "initial", "reference/trained", "reference/merged", "anchors", "rounds", "moe",
    )  # fmt: skip

    hosted_experts: int = 2
    anchors: bool = True
    mu: float = 0.1
    embed: Embedding = plugin(embeddings, "tfidf")

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        yield from super().faults()
        if self.hosted_experts < 1:
            yield f"hosted_experts = {self.hosted_experts}: a device must hold at least 1; 2 is usual"
        if not 0 <= self.mu < float("inf"):
            yield f"mu = {self.mu}: must be finite and not negative; use 0 to switch the anchors' loss off"
        if isinstance(self.embed, ServerProbe):
            yield '[embed] type = "probe": the server gets no whole models to probe here; use "tfidf" or "encoder"'

    def faults_with(self, devices: FleetOptions, data: DataOptions, target: TargetOptions) -> Iterator[str]:
        """See `Method.faults_with`."""
        yield from super().faults_with(devices, data, target)
        family = families[target.model_type]
        if family.student != "single" or family.group_size:
            yield f'[target] is a {family.model_type}: its base has no router to read; choose a family such as "qwen2_moe"'
        try:
            experts = family.num_experts(target.make(data.tokenizer.vocab_size, data.sequence_length, None))
        except ModelError:
            return  # said already
        if self.hosted_experts > experts:
            yield f"hosted_experts = {self.hosted_experts}: the target has {experts} experts; lower hosted_experts"

    @classmethod
    def beside(cls, budget: Budget) -> Self:
        """The same embeddings besides."""
        return replace(super().beside(budget), embed=budget.embed)

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> Traffic:
        """The common expert and an embedding once; each round the gate, preferences, and what is hosted both ways."""
        family, target = families[str(shapes.target.model_type)], shapes.target
        experts, width = family.num_experts(target), int(target.hidden_size) * len(family.moe_layers(target))
        hosted = num_parameters(with_experts(target, self.hosted_experts)) + (experts - self.hosted_experts) * width
        once = message(num_parameters(shapes.student), exchange.published_bytes(self.embed))
        return Traffic(
            once + self.times(message(experts * width) + message(hosted)),
            message(0, 2 * self.embed.dimension) + self.times(message(experts) + message(hosted)),
        )

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """The MoE with K_d experts."""
        return (Training(with_experts(target, self.hosted_experts), self.participation),)

    # ------------------------------------------------------------------------------------------ on the server

    def server(self, site: Site, call: Call) -> Path:
        """Send the common expert once, find the anchors, then rounds of preferences, hosting and averaging."""
        moe = self.begin(site)
        anchors = self.find_anchors(site, call)
        site.reached("anchors")
        for number in range(self.rounds):
            moe = self.run_round(site, call, number, moe, anchors)
        rounds.reached(site, self.rounds)
        return self.finish(site, moe)

    def find_anchors(self, site: Site, call: Call) -> dict[str, int]:
        """Send everyone the common expert, and give each expert the device nearest to its cluster; expert by device id."""
        common = models.load(self.common_expert(site))
        published = self.embed.publish(site.data.public, site.seed)
        arrays = {MODEL + name: tensor for name, tensor in distinct_state(common).items()}
        arrays |= {exchange.PUBLISHED + name: tensor for name, tensor in published.items()}
        sent = Payload("init", arrays, {"config": common.config.to_json_string(use_diff=False), "run_seed": site.seed})

        def check(device_id: str, payload: Payload) -> None:
            check_embedding(payload, self.embed.dimension, device_id)

        key = key_of("embeddings", site.seed, site.data_key, self.embed, models.init_id(common))
        requests = {card.id: sent for card in site.cards}
        files = exchange.spool_answers(site, call, requests, check, key, "uploads/embeddings")
        if not self.anchors:
            return {}
        found = {
            device: read_file(path, source=device).arrays[exchange.EMBEDDING].float() for device, path in files.items()
        }
        embedding_ND = torch.stack(list(found.values())).numpy()
        experts = assembly.num_experts(site)
        if len(found) < experts:
            site.note(f"{len(found)} devices for {experts} experts: {experts - len(found)} experts have no anchor")
        clusters = KMeans(num_clusters=min(experts, len(found))).assign(
            embedding_ND, tuple(found), tuple(card.model.name for card in site.cards if card.id in found),
            seed=derive_seed(site.seed, "anchors"), note=site.note,
        )  # fmt: skip
        near_NK = embedding_ND @ clusters.centroid_KD.T
        near_NK[clusters.label_N[:, None] != np.arange(clusters.num_clusters)] = -np.inf
        return {clusters.device_ids[int(near_NK[:, k].argmax())]: k for k in range(clusters.num_clusters)}

    def run_round(self, site: Site, call: Call, number: int, moe: Path, anchors: Mapping[str, int]) -> Path:
        """Ask for preferences, send each participant its experts, and average every tensor over those who held it."""
        asked = {card.id for card in self.participants(site, number)} | set(anchors)
        hosts: dict[str, list[int]] = {}

        def ask(model: PreTrainedModel) -> dict[str, Payload]:
            state = distinct_state(model)
            gates = {name: tensor for name, tensor in state.items() if ROUTER.search(name)}
            likes = self.ask_preferences(site, call, number, gates, [c.id for c in site.cards if c.id in asked])
            hosts.update({device: self.choose(q_E, anchors.get(device)) for device, q_E in likes.items()})
            config = with_experts(model.config, self.hosted_experts)
            requests: dict[str, Payload] = {}
            for device, hosted in hosts.items():
                sent = rounds.request(part(state, hosted), config, self.rounds)
                told = {"hosted": ",".join(map(str, hosted)), "anchor": anchors.get(device, -1)}
                requests[device] = replace(sent, metadata={**sent.metadata, **told})
            return requests

        def fold(model: PreTrainedModel, files: Mapping[str, Path], _folder: Path) -> dict[str, Any]:
            held = ((device, pieces(state, hosts[device]), tokens) for device, state, tokens in rounds.answers(files))
            load_distinct(model, put_back(distinct_state(model), average_present(held)))
            return {"hosted": hosts}

        own = (self.rounds, self.participation, self.balance, self.hosted_experts, self.mu, sorted(anchors.items()))
        return rounds.run_round(site, call, number, moe, ask, fold, *own)

    def ask_preferences(
        self, site: Site, call: Call, number: int, gates: State, devices: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """q of each device: how the gate would spread its text over the experts, as the common expert reads it."""
        sent = Payload("gate", gates, round=number)
        experts = assembly.num_experts(site)

        def check(device_id: str, payload: Payload) -> None:
            q_E = payload.arrays.get("preference")
            if q_E is None or q_E.dtype != torch.float32 or tuple(q_E.shape) != (experts,):
                raise UploadError(
                    f"device {device_id}: no preference for each of {experts} experts; answer with float32"
                )

        key = key_of("preferences", site.seed, number, [float(gate.double().sum()) for gate in gates.values()])
        files = exchange.spool_answers(
            site, call, dict.fromkeys(devices, sent), check, key, f"uploads/preferences-{number}"
        )
        return {device: read_file(path, source=device).arrays["preference"] for device, path in files.items()}

    def choose(self, q_E: torch.Tensor, anchor: int | None) -> list[int]:
        """H_n: an anchor's own expert, then those that the device prefers, up to K_d; sorted."""
        first = [] if anchor is None else [anchor]
        liked = [e for e in q_E.argsort(descending=True, stable=True).tolist() if e not in first]
        return sorted((first + liked)[: self.hosted_experts])

    # ------------------------------------------------------------------------------------------ on a device

    def client(self, device: Device, request: Payload) -> Payload:
        """Keep the common expert and describe the text; tell preferences; or train the experts that were sent."""
        if request.what == "init":
            return self._keep_common(device, request)
        if request.what == "gate":
            return _preferences(device, request)
        hosted = [int(e) for e in str(request.metadata["hosted"]).split(",")]
        sent = exchange.with_prefix(request, MODEL)
        model = rounds.received_model(device, request)
        gates = by_layer({name: tensor for name, tensor in sent.items() if ROUTER.search(name)})
        load_distinct(model, {**sent, **{name: tensor[hosted] for name, tensor in gates.items()}})
        penalty = self._penalty(model, list(gates.values()), hosted, int(request.metadata["anchor"]))
        told = rounds.train_part(device, request, model, penalty)
        state = distinct_state(model)
        for name, whole_EH in gates.items():  # rows of experts that are not here go back as they came
            state[name] = whole_EH.clone().index_copy_(0, torch.tensor(hosted), state[name].cpu())
        return rounds.answer(request, state, told)

    def _keep_common(self, device: Device, request: Payload) -> Payload:
        if device.scratch is None:
            raise ModelError("a device of FedJETS keeps the common expert between rounds; give it a folder of its own")
        device.scratch.mkdir(parents=True, exist_ok=True)
        told = {"config": str(request.metadata["config"])}
        save_file(exchange.with_prefix(request, MODEL), device.scratch / COMMON, metadata=told)
        vector_D = exchange.describe_text(device, request, self.embed)
        return Payload("embedding", {exchange.EMBEDDING: vector_D}, {"device": device.id})

    def _penalty(
        self, model: PreTrainedModel, gates: Sequence[torch.Tensor], hosted: Sequence[int], anchor: int
    ) -> Penalty:
        """Balance over the experts that are here and, on an anchor, mu times the surprise of the whole gate at its expert."""
        balance, family = balance_penalty(model, self.balance), families[model.config.model_type]
        rows = torch.tensor(hosted)

        def penalty(routing: Routing) -> torch.Tensor:
            loss = balance(routing) if self.balance else torch.zeros(())
            if anchor < 0 or not self.mu:
                return loss
            kept_R = routing.valid_BT.flatten()
            for inputs_RH, whole_EH, router in zip(routing.inputs, gates, routers(model), strict=True):
                weight_EH = whole_EH.to(inputs_RH.device).index_copy(0, rows.to(inputs_RH.device), router.weight)  # pyright: ignore[reportArgumentType]
                share_RE = family.probabilities(inputs_RH[kept_R].float() @ weight_EH.float().T)
                loss = loss - self.mu / len(gates) * share_RE[:, anchor].log().mean()
            return loss

        return penalty


def _preferences(device: Device, request: Payload) -> Payload:
    """q of this device's text, by the gates of the request."""
    path = device.scratch / COMMON if device.scratch else None
    if path is None or not path.exists():
        raise ModelError(
            "the common expert is not on this device any more; begin a new run folder, so that it is sent again"
        )
    with safe_open(path, framework="pt") as file:
        config = configurations.config_from_json(file.metadata()["config"])
    common = models.from_config(config, seed=0)
    load_distinct(common, load_file(path))
    exchange.check_vocabulary(device, common)
    text = PackedText(device.corpus, device.sequence_length, device.seed)
    q_E = gate_preference(common, list(by_layer(request.arrays).values()), text)
    return Payload("preference", {"preference": q_E}, {"device": device.id}, round=request.round)
