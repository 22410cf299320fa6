# SPDX-License-Identifier: Apache-2.0
"""Methods that train the target MoE itself in the federation, round after round: what they share (baselines, section 9).

The server sends (parts of) the model, participants train them on a part of their private tokens, the server averages what
comes back. What the server reads of public text it reads before the rounds, and in the last tuning, as every method does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.artifacts import key_of
from deepfusion.data.packing import PackedText
from deepfusion.devices import configurations, models
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import DeviceCard
from deepfusion.errors import DropoutError, few
from deepfusion.federation.payload import check_metadata, check_state, read_file, read_metadata
from deepfusion.methods import assembly, beginning, exchange
from deepfusion.methods.base import Site, Training
from deepfusion.methods.budget import Shapes, Work, work
from deepfusion.moe.routing import Penalty
from deepfusion.robust import credible
from deepfusion.stages.proxy import MODEL
from deepfusion.training import derive_seed
from deepfusion.types import Call, Payload, State

Ask = Callable[[PreTrainedModel], Mapping[str, Payload]]
"""`ask(model)`: this round's requests by device id, made of the model of the round before."""
Fold = Callable[[PreTrainedModel, Mapping[str, Path], Path], Mapping[str, Any]]
"""`fold(model, answers, folder)`: make the last model the next one, in place, out of the files of the good answers.

What the next round reads besides may be written to `folder`, the model's own; what is returned is told of the round.
"""
Admit = Callable[[str, Payload, Payload], None]
"""`admit(device, answer, request)` raises UploadError where an answer is not what was asked for."""
ROUND = "round.json"
MOE = "moe"
"""What rounds' messages are booked as; a device's own model is another thing."""


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How often, and whom.

    Attributes:
        rounds: how often the devices train; a device reads its text in equal parts, one a round.
        participation: share of the devices that are asked in a round.
        balance: weight of the balance loss over the experts, on the devices.
    """

    rounds: int = 4
    participation: float = 1.0
    balance: float = 0.01

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.rounds < 1:
            yield f"rounds = {self.rounds}: no device would train; choose at least 1"
        if not 0 < self.participation <= 1:
            yield f"participation = {self.participation}: not a share of the devices; choose a number above 0, up to 1"
        if not 0 <= self.balance < float("inf"):
            yield f"balance = {self.balance}: must be finite and not negative; use 0 to switch this loss off"

    def times(self, size: float) -> int:
        """Bytes of messages of this size in all rounds, of one device on average."""
        return round(self.rounds * self.participation * size)

    def participants(self, site: Site, number: int) -> list[DeviceCard]:
        """Who is asked in round `number`, in the fleet's order."""
        count = max(1, round(self.participation * len(site.cards)))
        drawn = np.random.default_rng(derive_seed(site.seed, "round", number)).permutation(len(site.cards))[:count]
        return [site.cards[index] for index in sorted(drawn)]


@dataclass(frozen=True, kw_only=True)
class Rounds(beginning.Beginning, RoundOptions):
    """A method in rounds from a MoE that public text has taught, to a last tuning on public text."""

    @property
    def trains_privately(self) -> bool:
        """No: a round's part would have to be charged with those before it, and some answers tell more than a model."""
        return False

    def server_work(self, shapes: Shapes) -> tuple[Work, ...]:
        """The base's training before the rounds, and the last tuning."""
        return (
            work(self.training.steps, self.training.optimisation, shapes, shapes.student),
            work(self.tune.steps, self.tune.optimisation, shapes, shapes.target),
        )

    def begin(self, site: Site) -> Path:
        """The MoE that the first round sends: experts that are copies of the base, which public text has taught."""
        return beginning.taught(site, self.start(site), self.training, self.noise)

    def common_expert(self, site: Site) -> Path:
        """The base that all experts are copies of, once `begin` has made it."""
        return beginning.common_expert(site, self.start(site), self.training)

    def finish(self, site: Site, moe: Path) -> Path:
        """Tune the last round's MoE on public text."""
        text = PackedText(site.data.public, site.sequence_length, derive_seed(site.seed, "public"))
        return assembly.tuned_on_text(site, "moe", moe, text, assembly.digests(moe), options=self.tune)


def run_round(
    site: Site, call: Call, number: int, moe: Path, ask: Ask, fold: Fold, *parts: object, admit: Admit | None = None
) -> Path:
    """One round as the stage `rounds/<number>`: ask, wait for the answers, fold them into the next model.

    Where every device drops out the round is skipped, and `moe` is returned (baselines, section 13).

    Args:
        moe: the model of the round before.
        parts: keys of what the answers and their folding depend on.
        admit: None takes an answer that holds the very tensors that its device was sent, in the same shapes.

    Raises:
        FederationError: fewer have answered than [federation] minimum_devices, where that is more than one.
    """
    inputs = (number, assembly.digests(moe), site.fleet, site.data_key, site.sequence_length, *parts)
    key, place = key_of("round", site.seed, *inputs), f"uploads/round-{number}"

    def make(folder: Path) -> None:
        model = models.load(moe)
        kind = str(model.config.model_type)

        def exchanged() -> dict[str, Any]:
            requests = {
                device: replace(sent, metadata={**sent.metadata, "architecture": kind, "init_id": key}, round=number)
                for device, sent in ask(model).items()
            }

            def check(device_id: str, payload: Payload) -> None:
                check_metadata(payload, device_id, kind, key)
                (admit or _same_tensors)(device_id, payload, requests[device_id])

            files = exchange.spool_answers(site, call, requests, check, key, place)
            return {"asked": list(requests), "answered": list(files), **fold(model, files, folder)}

        try:
            said = exchanged()
        except DropoutError as error:
            if site.quorum > 1:  # the operator would rather wait
                raise
            said = {"asked": error.asked, "answered": [], "skipped": str(error)}
        models.save(model, folder, site.data.tokenizer)
        (folder / ROUND).write_text(json.dumps(said))

    folder = site.keep(f"rounds/{number}", make, *inputs)
    shutil.rmtree(site.folder / place, ignore_errors=True)  # the answers are in the model now
    told = read_round(folder)
    if reason := told.get("skipped"):
        site.note(f"round {number + 1} was skipped, the model stays as it was: {reason}")
        return moe
    if absent := [device for device in told["asked"] if device not in told["answered"]]:
        site.note(f"round {number + 1} had no answer of {len(absent)} of {len(told['asked'])} devices: {few(absent)}")
    return folder


def reached(site: Site, count: int) -> None:
    """The end of all `count` rounds.

    Raises:
        DropoutError: not one of them had an answer; they are forgotten, so that a resumed run asks again.
        StageReached: the run is to stop here.
    """
    folders = [site.folder / "rounds" / str(number) for number in range(count)]
    told = [read_round(folder) for folder in folders]
    if all("skipped" in said for said in told):
        for folder in folders:
            shutil.rmtree(folder)
        raise DropoutError(
            f"no device took part in any of {count} rounds ({told[0]['skipped']}); see to them and go on with --resume",
            told[0]["asked"],
        )
    site.reached("rounds")


def _same_tensors(device_id: str, payload: Payload, request: Payload) -> None:
    check_state(payload.arrays, request.arrays, device_id)


def round_folders(run: Path, method: object) -> list[Path]:
    """Those of a method's rounds, or of what it goes on with; a resumed run may hold more, of an earlier configuration."""
    count = int(getattr(getattr(method, "continued", None) or method, "rounds", 0))
    return [run / "rounds" / str(number) for number in range(count)]


def read_round(folder: Path) -> dict[str, Any]:
    """What is told of a round: who was asked, who answered, and what its method adds."""
    return json.loads((folder / ROUND).read_text())


def request(state: State, config: PreTrainedConfig, parts: int) -> Payload:
    """What asks a device to train a model: its tensors, its configuration, and in how many parts devices read their text."""
    arrays = {MODEL + name: tensor for name, tensor in state.items()}
    return Payload(MOE, arrays, {"config": config.to_json_string(use_diff=False), "parts": parts})


def received_model(
    device: Device, request: Payload, training: Callable[[PreTrainedConfig], Training] = Training
) -> PreTrainedModel:
    """On the device: a model of the request's configuration; its weights are yet to be put in.

    Args:
        training: how a model of this configuration is trained, for the memory.

    Raises:
        MemoryLimitError: the device does not give the memory that its training needs.
    """
    config = configurations.config_from_json(str(request.metadata["config"]))
    exchange.check_fits(device, training(config))
    return models.from_config(config, seed=0)


def train_part(device: Device, request: Payload, model: PreTrainedModel, penalty: Penalty | None) -> dict[str, Any]:
    """On the device: train the model in place on the round's part of the text; what the answer says of it."""
    parts = int(request.metadata["parts"])
    return exchange.train_here(device, model, penalty=penalty, part=request.round, parts=parts)


def answer(
    request: Payload, state: State, told: exchange.Told, tables: Mapping[str, torch.Tensor] | None = None
) -> Payload:
    """On the device: the trained tensors as an answer, of the request's kind.

    Args:
        tables: what is sent beside the model's tensors.
    """
    arrays = {MODEL + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    echoed = {name: request.metadata[name] for name in ("architecture", "init_id")}
    return Payload(request.what, {**arrays, **(tables or {})}, {**told, **echoed}, round=request.round)


def answers(files: Mapping[str, Path]) -> Iterator[tuple[str, State, int]]:
    """Each answer's device, tensors and weight (its `credible` tokens, or one without text); one is in memory at a time."""
    tokens = credible([int(read_metadata(path)["tokens"]) for path in files.values()])
    for (device, path), count in zip(files.items(), tokens, strict=True):
        payload = read_file(path, source=f"device {device}")
        yield device, exchange.with_prefix(payload, MODEL), max(1, count)
