# SPDX-License-Identifier: Apache-2.0
"""Rounds in which devices train the experts that matter to them (HFedMoE, arXiv 2601.00583).

A method of its own (`hfedmoe`), and what DeepFusion may go on with after its merge (`[continue] type = "hfedmoe"`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard, FleetOptions
from deepfusion.devices.memory import num_parameters
from deepfusion.federation.payload import read_metadata
from deepfusion.methods import assembly, exchange, rounds
from deepfusion.methods.base import Site, TargetOptions, Training
from deepfusion.methods.budget import Traffic, message
from deepfusion.methods.holding import TABLES, Means, check_returned, choose_hosted, fitting, held_of, with_kept
from deepfusion.methods.learning import FROZEN, Adapters, Everything, Learning, check_products, learning_on
from deepfusion.moe import families
from deepfusion.moe.base import ROUTER
from deepfusion.moe.hosting import apart, expert_of, gate_rows, put_back, sent_back, together, with_experts
from deepfusion.moe.routing import balance_penalty
from deepfusion.registry import Registry
from deepfusion.stages.proxy import MODEL
from deepfusion.stages.selective import ExpertSelection, SelectOptions, gate_shares
from deepfusion.state_dicts import average_present
from deepfusion.training import derive_seed
from deepfusion.types import Call, Payload, State


@dataclass(frozen=True, kw_only=True)
class SelectiveRounds(rounds.RoundOptions):
    """Each device trains, batch by batch, the experts that are worth most to it; the server averages what was really used.

    Attributes:
        selection: [selection] how a device chooses.
        host: whether a device holds all experts, or only as many as its budget allows, the most used ones.
        budget: where budgets come from: dealt out of `shares`, or (held subsets only) what fits the device's memory.
        shares: budgets as shares of all experts of all layers, dealt out evenly by the seed; memory is checked for the largest.
        threshold: tau, mean probability from which an expert counts as used; half of the even one when left out.
        average: "selective" averages an expert over the devices that used and trained it, and the gate by how well they did;
            "fedavg" averages everything by the devices' tokens.
        gate_weights: "normalised" sum to 1; "literal" are those of eq. (20), which shrink the gate: for demonstration only.
        adapter_rank: devices train adapters of this rank and the routers, and send only these; all weights when left out.
    """

    selection: SelectOptions = field(default_factory=SelectOptions)
    host: Literal["full", "subset"] = "full"
    budget: Literal["shares", "memory"] = "shares"
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    threshold: float | None = None
    average: Literal["selective", "fedavg"] = "selective"
    gate_weights: Literal["normalised", "literal"] = "normalised"
    adapter_rank: int | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        yield from super().faults()
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            yield f"shares = {list(self.shares)}: every budget is a share of the experts; give numbers above 0, up to 1"
        if self.threshold is not None and not 0 <= self.threshold < 1:
            yield f"threshold = {self.threshold}: not a probability; give a number from 0, below 1"
        if self.adapter_rank is not None and self.adapter_rank < 1:
            yield f"adapter_rank = {self.adapter_rank}: nothing would learn; choose at least 1, or leave it out"
        if self.adapter_rank is not None and self.host == "subset":
            yield 'adapter_rank: a device keeps what does not learn, so it must hold all experts; set host = "full"'
        if self.budget == "memory" and self.host == "full":
            yield 'budget = "memory": a device that holds all experts has no choice; set host = "subset"'

    def selection_faults(self, devices: FleetOptions, target: TargetOptions) -> Iterator[str]:
        """Combinations with other sections that cannot work."""
        family = families[target.model_type]
        if self.host == "subset" and (family.scores != "softmax" or family.group_size):
            yield f'host = "subset": the router of {target.model_type} has more to it than rows; choose host = "full"'
        if devices.training.accumulate > 1:
            said = f"[devices.training] accumulate = {devices.training.accumulate}"
            yield f"{said}: experts are chosen for each batch; set it to 1 and raise batch_size"

    def traffic_of(self, target: PreTrainedConfig) -> Traffic:
        """What is hosted both ways each round, at most: experts that have not changed, or were not used, are not sent."""
        family, shape = families[str(target.model_type)], self.training_of(target).model
        rest = (family.num_experts(target) - family.num_experts(shape)) * int(target.hidden_size)
        layers = len(family.moe_layers(target))
        each = self._learning(0).num_parameters(shape) + rest * layers
        tables = sum(dtype.itemsize for dtype in TABLES.values()) * family.num_experts(target) * layers
        once = 0 if self.adapter_rank is None else 4 * num_parameters(target)
        return Traffic(once + self.times(message(each)), self.times(message(each, tables)))

    def training_of(self, target: PreTrainedConfig) -> Training:
        """A device's training of the MoE: of all experts, of the largest budget's, or of the fewest that memory must hold."""
        experts, top = families[str(target.model_type)].num_experts(target), int(target.num_experts_per_tok)
        if self.host == "subset":
            target = with_experts(target, top if self.budget == "memory" else held_of(max(self.shares), experts, top))
        return self._training(target)

    def _training(self, held: PreTrainedConfig) -> Training:
        learning = self._learning(0)
        learns = None if self.adapter_rank is None else learning.num_parameters(held)
        return Training(held, self.participation, learns=learns, remade=learning.num_remade(held))

    # ------------------------------------------------------------------------------------------ on the server

    def run(self, site: Site, call: Call, moe: Path) -> Path:
        """All rounds, from the model of the folder `moe`; returns the folder of the last round's."""
        sent: list[Path] = []
        for number in range(self.rounds):
            sent.append(moe)
            moe = self._round(site, call, number, sent)
        rounds.reached(site, self.rounds)
        return moe

    def _round(self, site: Site, call: Call, number: int, sent: Sequence[Path]) -> Path:
        means, shapes, hosts = self.means(site), dict[str, torch.Tensor](), dict[str, list[list[int]]]()
        told = [rounds.read_round(site.folder / "rounds" / str(n)) for n in range(number)]
        learning = self._learning(site.seed)

        def ask(model: PreTrainedModel) -> dict[str, Payload]:
            pieces = apart(learning.state(model, sent[-1], sent[0]))
            shapes.update({name: tensor.to("meta") for name, tensor in pieces.items()})
            before: dict[Path, State] = {}
            return {
                card.id: self._request(
                    site, told, card, means[card.id], model.config, pieces, sent, before, hosts, learning
                )
                for card in self.participants(site, number)
            }

        def fold(model: PreTrainedModel, files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
            state = learning.state(model, sent[-1], sent[0])
            told = self._fold(state, files, means, hosts)
            learning.settle(model, state, sent[0], folder)
            return told

        threshold = self._threshold(assembly.num_experts(site)) if self.average == "selective" else None

        def admit(device_id: str, payload: Payload, request: Payload) -> None:
            check_returned(shapes, threshold, device_id, payload, request)
            check_products(exchange.with_prefix(payload, MODEL), device_id)

        return rounds.run_round(site, call, number, sent[-1], ask, fold, *self._key(), admit=admit)

    def _key(self) -> tuple[object, ...]:
        """All options that a round depends on."""
        return tuple(getattr(self, field.name) for field in fields(SelectiveRounds))

    def means(self, site: Site) -> dict[str, Means]:
        """What each device may hold and train."""
        family, target = assembly.family_and_config(site)
        experts, layers = family.num_experts(target), len(family.moe_layers(target))
        top = int(target.num_experts_per_tok)
        if self.budget == "memory":
            held = {card.id: fitting(site, card, target, experts, top) for card in site.cards}
            return {device: Means(count, layers * count) for device, count in held.items()}
        order = np.random.default_rng(derive_seed(site.seed, "budgets")).permutation(len(site.cards))
        found: dict[str, Means] = {}
        for card, place in zip(site.cards, order, strict=True):
            share = self.shares[int(place) % len(self.shares)]
            held = experts if self.host == "full" else held_of(share, experts, top)
            found[card.id] = Means(held, min(max(1, int(share * layers * experts)), layers * held))
        return found

    def _request(
        self, site: Site, told: Sequence[Mapping[str, Any]], card: DeviceCard, means: Means, config: PreTrainedConfig,
        pieces: State, sent: Sequence[Path], before: dict[Path, State], hosts: dict[str, list[list[int]]],
        learning: Learning,
    ) -> Payload:  # fmt: skip
        """What the device has not got yet, and which experts it is to hold; these are noted in `hosts`."""
        last = max((n for n, said in enumerate(told) if card.id in said["answered"]), default=-1)
        usage = told[last]["devices"][card.id]["usage"] if last >= 0 else None
        layers = families[str(config.model_type)].moe_layers(config)
        hosted = choose_hosted(
            site, card, means.held, usage, len(layers), families[str(config.model_type)].num_experts(config)
        )
        hosts[card.id] = hosted
        place = {layer: set(experts) for layer, experts in zip(layers, hosted, strict=True)}
        wanted = {n: t for n, t in pieces.items() if (at := expert_of(n)) is None or at[1] in place[at[0]]}
        if self.host == "full" and last >= 0:
            if sent[last] not in before:
                learnt = learning.state(models.load(sent[last]), sent[last], sent[0])
                before[sent[last]] = apart(learnt)
            old = before[sent[last]]
            wanted = {n: t for n, t in wanted.items() if expert_of(n) is None or not torch.equal(t, old[n])}
        frozen = {} if last >= 0 else learning.frozen(sent[0])
        wanted |= {FROZEN + name: tensor for name, tensor in frozen.items()}
        asked = rounds.request(wanted, with_experts(config, means.held), self.rounds)
        about = {"hosted": json.dumps(hosted), "budget": means.budget, "since": last if self.host == "full" else -1}
        return replace(asked, metadata={**asked.metadata, **about})

    def _fold(
        self, state: State, files: Mapping[str, Path], means: Mapping[str, Means], hosts: Mapping[str, list[list[int]]]
    ) -> dict[str, Any]:
        """Make `state` the next one: experts over those who used and trained them, the rest by tokens.

        Each row of a router is averaged over the devices that hold its expert, by the worth of their routers.
        """
        tables = {device: _tables(path) for device, path in files.items()}
        usage_CLE, score_CLE = (torch.stack([t[name] for t in tables.values()]) for name in ("usage", "score"))
        shares = gate_shares(usage_CLE, score_CLE, self._threshold(usage_CLE.shape[-1]))
        worth, scale = dict(zip(files, shares.weight_C.tolist(), strict=True)), float(shares.weight_C.sum())
        by_tokens = self.average == "fedavg" or not scale

        def weighed() -> Iterator[tuple[str, State, float]]:
            """Each answer in two parts of different weight, which have no tensor in common."""
            for device, came, tokens in rounds.answers(files):
                gates = {name: tensor for name, tensor in came.items() if ROUTER.search(name)}
                yield device, {name: tensor for name, tensor in came.items() if name not in gates}, tokens
                if weight := tokens if by_tokens else worth[device]:
                    yield device, gate_rows(gates, hosts[device]), weight

        new = average_present(weighed())
        if self.gate_weights == "literal" and not by_tokens:
            new = {
                name: tensor * scale if ROUTER.search(name.partition(":")[0]) else tensor
                for name, tensor in new.items()
            }
        state.update(put_back(state, new))
        return {
            "gate_scale": scale,
            "budgets": {device: found.budget for device, found in means.items()},
            "devices": {
                device: {
                    "hosted": hosts[device],
                    "coverage": float(coverage),
                    "routed": int(table["routed"]),
                    "trained": int((table["count"] > 0).sum()),
                    "uploaded": int(table["uploaded"]),
                    "usage": [[round(float(u), 6) for u in row_E] for row_E in table["usage"]],
                }
                for (device, table), coverage in zip(tables.items(), shares.coverage_C, strict=True)
            },
        }

    def _learning(self, seed: int) -> Learning:
        return Everything() if self.adapter_rank is None else Adapters(self.adapter_rank, seed)

    def _threshold(self, experts: int) -> float:
        return 0.5 / experts if self.threshold is None else self.threshold

    # ------------------------------------------------------------------------------------------ on a device

    def client(self, device: Device, request: Payload) -> Payload:
        """Train the experts that are worth most to each batch, and send back those that were used."""
        hosted: list[list[int]] = json.loads(str(request.metadata["hosted"]))
        sent = exchange.with_prefix(request, MODEL)
        if self.host == "full":
            sent = with_kept(device, sent, request.round, int(request.metadata["since"]))
        frozen = {name.removeprefix(FROZEN): tensor for name, tensor in sent.items() if name.startswith(FROZEN)}
        pieces = {name: tensor for name, tensor in sent.items() if not name.startswith(FROZEN)}
        model = rounds.received_model(device, request, self._training)
        layers = families[model.config.model_type].moe_layers(model.config)
        state = together(pieces, hosted, layers)
        balance = balance_penalty(model, self.balance) if self.balance else None
        with learning_on(model, state, frozen) as parameters:
            gates = [pieces[f"model.layers.{layer}.mlp.gate.weight"] for layer in layers]
            whole = None if self.host == "full" else list(zip(gates, hosted, strict=True))
            budget = int(request.metadata["budget"])
            chooser = ExpertSelection(model, parameters, self.selection, budget, balance, whole)
            told = rounds.train_part(replace(device, scratch=None), request, model, chooser)
        wide = len(gates[0])  # E, of which the device holds some
        count_LE = torch.zeros(len(layers), wide, dtype=TABLES["count"]).scatter_(
            1, torch.tensor(hosted), chooser.count_LE
        )
        tables = {"usage": chooser.usage_LE, "score": chooser.score_LE, "count": count_LE}
        sent_LE = torch.ones_like(tables["count"], dtype=torch.bool)
        if self.average == "selective":
            sent_LE = (tables["usage"] >= self._threshold(wide)) & (tables["count"] > 0)
        told |= {"routed": int(chooser.routed_LE.sum())}
        return rounds.answer(request, sent_back(state, pieces, hosted, layers, sent_LE), told, tables)


continuations: Registry[SelectiveRounds] = Registry("continuation")
"""What a method may go on with in the federation, once its MoE is merged."""
continuations.register("hfedmoe")(SelectiveRounds)


def _tables(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = {name: file.get_tensor(name) for name in TABLES}
        names = list(file.keys())
    return {
        **found,
        "routed": read_metadata(path)["routed"],
        "uploaded": len({at for n in names if (at := expert_of(n))}),
    }
