# SPDX-License-Identifier: Apache-2.0
"""FedMKT (arXiv 2406.02224): devices and server teach each other by their predictions of the same public text.

A round begins with the server's predictions where the paper's ends with them; the first are those of the warm-started MoE. Each
round has public text of its own, which is sent along.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deepfusion.artifacts import key_of
from deepfusion.data.packing import PackedText
from deepfusion.devices import models
from deepfusion.devices.device import Device
from deepfusion.devices.memory import forward_flops_per_token
from deepfusion.errors import ModelError, UploadError
from deepfusion.federation.payload import check_state, read_file
from deepfusion.methods import exchange, rounds
from deepfusion.methods.base import Site, Training, methods
from deepfusion.methods.budget import Budget, Shapes, Traffic, Work, message, rows
from deepfusion.methods.warm_start import ask_everyone, first_model, initial_models
from deepfusion.moe.routing import balance_penalty
from deepfusion.stages.mutual import Predictions, best_of, index_type, learn, least_loss, predict, tokens_of
from deepfusion.training import derive_seed
from deepfusion.types import Batch, Call, Payload

TEXT = ("input_ids", "counted", "valid")
"""The round's public text in a request; after it the server's predictions."""
NAMES = ("value", "index", "loss")
LOSS_TOLERANCE = 0.05
"""Nats by which a row's loss may be below what the predictions, rounded to float16, allow."""
FORWARD = 1 / 3
"""What a forward pass costs of a training step."""


@methods.register("fedmkt")
@dataclass(frozen=True, kw_only=True)
class FedMkt(rounds.Rounds):
    """Devices train their own models; device and server learn, row by row, from whichever predicts public text best.

    [training.optimisation] is also that of what the server learns in the rounds.

    Attributes:
        sequences: of public text a round, whose predictions are exchanged.
        kept: Kt, logits of a position that are sent.
        mixture: lambda, the weight of cross-entropy; the rest is the predictions'.
        temperature: tau of the predictions.
    """

    stages: ClassVar[tuple[str, ...]] = ("data", "initial", "reference/trained", "reference/merged", "rounds", "moe")

    sequences: int = 256
    kept: int = 128
    mixture: float = 0.9
    temperature: float = 1.0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        yield from super().faults()
        for name in ("sequences", "kept"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: nothing would be exchanged; choose at least 1"
        if not 0 <= self.mixture <= 1:
            yield f"mixture = {self.mixture}: not between 0 (predictions alone) and 1 (cross-entropy alone); 0.9 is published"
        if not 0 < self.temperature < float("inf"):
            yield f"temperature = {self.temperature}: must be finite and above 0; 1 leaves the logits as they are"

    @classmethod
    def beside(cls, budget: Budget) -> Self:
        """What the others read before their rounds is read in its rounds, at the same rate."""
        fair = super().beside(budget)
        read = fair.training.steps * rows(fair.training.optimisation)
        return replace(fair, sequences=max(1, read // fair.rounds), training=replace(fair.training, steps=0))

    def traffic(self, own: PreTrainedConfig, shapes: Shapes) -> Traffic:
        """First weights once; each round text and the server's predictions down, and the device's up."""
        vocabulary = int(shapes.target.vocab_size)
        index, positions = index_type(vocabulary).itemsize, self.sequences * shapes.length
        predictions = positions * min(self.kept, vocabulary) * (2 + index) + 4 * self.sequences
        first = message(0, self.warm_start.bytes_down(own))
        return Traffic(
            first + self.times(message(0, predictions + positions * (index + 2))),
            message(0) + self.times(message(0, predictions)),
        )

    def trainings(self, own: PreTrainedConfig, target: PreTrainedConfig) -> tuple[Training, ...]:
        """The device's own model; it learns from each round's public text once, and predicts it twice."""
        read = self.rounds * self.participation * self.sequences * (1 + 2 * FORWARD)
        return (Training(own, self.participation, round(read)),)

    def server_work(self, shapes: Shapes) -> tuple[Work, ...]:
        """The rounds' text, learnt once and predicted once, and the last tuning."""
        each = round((3 + 3 * FORWARD) * forward_flops_per_token(shapes.target))
        return (Work(self.rounds * self.sequences * shapes.length, each), *super().server_work(shapes))

    # ------------------------------------------------------------------------------------------ on the server

    def server(self, site: Site, call: Call) -> Path:
        """Send first weights once, then rounds of predictions both ways; then the tuning that every method ends with."""
        self._start_devices(site, call)
        moe = self.begin(site)
        for number in range(self.rounds):
            moe = self._round(site, call, number, moe)
        rounds.reached(site, self.rounds)
        return self.finish(site, moe)

    def reference(self, site: Site) -> Path:
        """The same from public text alone: no predictions of devices, as many tokens."""
        steps = self.training.steps + round(self.rounds * self.sequences / rows(self.training.optimisation))
        return rounds.Rounds.reference(replace(self, training=replace(self.training, steps=steps)), site)

    def _start_devices(self, site: Site, call: Call) -> None:
        initials = initial_models(site, self.warm_start)
        requests = ask_everyone(site, initials, {}, self.warm_start.sent)
        named = {
            id_: replace(sent, metadata={**sent.metadata, "run": self._name(site)}) for id_, sent in requests.items()
        }
        exchange.spool_answers(site, call, named, lambda _device, _answer: None, self._name(site), "uploads/ready")

    def _options(self) -> tuple[object, ...]:
        """All options that a round depends on."""
        own = (self.rounds, self.participation, self.balance, self.sequences, self.kept, self.mixture, self.temperature)
        return (*own, self.warm_start, self.noise, self.training)

    def _name(self, site: Site) -> str:
        """What devices keep their models under: those of another configuration must not be gone on with."""
        return key_of("own", site.seed, site.fleet, site.target, site.data_key, site.sequence_length, *self._options())

    def _round(self, site: Site, call: Call, number: int, moe: Path) -> Path:
        public = PackedText(site.data.public, site.sequence_length, derive_seed(site.seed, "exchange"))
        text = public.batch(number, self.sequences)
        own: list[Predictions] = []

        def ask(model: PreTrainedModel) -> dict[str, Payload]:
            own.append(predict(model, text, self.kept))
            ids = text.input_ids_BT.to(index_type(int(model.config.vocab_size)))
            arrays = dict(zip(TEXT, (ids, text.counted_BT, text.valid_BT), strict=True)) | _arrays(own[0])
            sent = Payload("logits", arrays, {"parts": self.rounds, "run": self._name(site)})
            return {card.id: sent for card in self.participants(site, number)}

        def fold(model: PreTrainedModel, files: Mapping[str, Path], _folder: Path) -> dict[str, Any]:
            losses: dict[str, float] = {}

            def sources() -> Iterator[Predictions]:
                yield own[0]
                for device, path in files.items():
                    found = _predictions(read_file(path, source=f"device {device}"))
                    losses[device] = float(found.loss_S.mean())
                    yield found

            teacher = best_of(sources())
            learn(
                model, text, teacher, mixture=self.mixture, temperature=self.temperature,
                optimisation=self.training.optimisation, seed=derive_seed(site.seed, "learn", number), label="learn",
                penalty=balance_penalty(model, self.balance) if self.balance else None, progress=site.progress,
            )  # fmt: skip
            ahead = float((teacher.loss_S < own[0].loss_S).float().mean())
            return {"losses": losses, "rows_of_devices": ahead}

        admit = partial(_admit, site.data.vocab_size)
        return rounds.run_round(site, call, number, moe, ask, fold, *self._options(), admit=admit)

    # ------------------------------------------------------------------------------------------ on a device

    def client(self, device: Device, request: Payload) -> Payload:
        """Keep the first weights; or learn from the server's predictions, then from the device's text, and predict."""
        if request.what != "logits":
            model = first_model(device, request, self.warm_start.format)
            if device.scratch:  # of another configuration
                for old in device.scratch.glob("own-*"):
                    shutil.rmtree(old)
            _keep(device, model, str(request.metadata["run"]), 0)
            return Payload("ready", {}, {"device": device.id})
        run = str(request.metadata["run"])
        model, text, server = _own_model(device, run, request.round), _text(request), _predictions(request)
        seed = derive_seed(device.seed, "learn", request.round)
        learn(
            model, text, best_of((predict(model, text, self.kept), server)), mixture=self.mixture,
            temperature=self.temperature, optimisation=device.training, seed=seed, label=device.id,
        )  # fmt: skip
        told = rounds.train_part(replace(device, scratch=None), request, model, None)
        found = predict(model, text, self.kept)
        _keep(device, model, run, request.round + 1)
        return rounds.answer(request, {}, told, _arrays(found))


def _arrays(found: Predictions) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, found, strict=True))


def _predictions(payload: Payload) -> Predictions:
    return Predictions(*(payload.arrays[name] for name in NAMES))


def _text(request: Payload) -> Batch:
    ids, counted, valid = (request.arrays[name] for name in TEXT)
    return Batch(tokens_of(ids), counted, valid)


def _admit(vocabulary: int, device_id: str, payload: Payload, request: Payload) -> None:
    """Refuse predictions of another shape, of tokens that are not, or with an impossible loss."""
    due = {name: request.arrays[name] for name in NAMES}
    check_state(payload.arrays, due, device_id)
    found = _predictions(payload)
    token_STK = found.tokens(torch.arange(len(found.loss_S)))
    for token in (int(token_STK.min()), int(token_STK.max())):
        if not 0 <= token < vocabulary:
            said = f"device {device_id}: it predicts token {token}, the vocabulary has {vocabulary}"
            raise UploadError(f"{said}; use the run's tokenizer")
    short_S = least_loss(found, _text(request)) - found.loss_S
    if bool((short_S > LOSS_TOLERANCE).any()):
        row = int(short_S.argmax())
        said = f"device {device_id}: it says that its loss on row {row} is {float(found.loss_S[row]):.3g}"
        raise UploadError(
            f"{said}, its own predictions make at least {float(short_S[row] + found.loss_S[row]):.3g}; send mean cross-entropies"
        )


def _keep(device: Device, model: PreTrainedModel, run: str, number: int) -> None:
    """Keep the device's model as it is after `number` rounds, and the one before, should the answer get lost."""
    if device.scratch is None:
        raise ModelError("a device of FedMKT keeps its model between rounds; give it a folder of its own")
    shutil.rmtree(device.scratch / "partial", ignore_errors=True)
    models.save(model, device.scratch / "partial", device.tokenizer)
    final = device.scratch / f"own-{run}-{number}"
    shutil.rmtree(final, ignore_errors=True)
    (device.scratch / "partial").rename(final)
    for old in _kept(device, run, number)[:-2]:
        shutil.rmtree(old)


def _kept(device: Device, run: str, number: int) -> list[Path]:
    """The device's models as they were after at most `number` rounds, oldest first."""
    found = device.scratch.glob(f"own-{run}-*") if device.scratch else ()
    numbers = {path: int(path.name.rsplit("-", 1)[1]) for path in found}
    return sorted((path for path in numbers if numbers[path] <= number), key=lambda path: numbers[path])


def _own_model(device: Device, run: str, number: int) -> PreTrainedModel:
    """The device's model as it was before round `number`."""
    if not (kept := _kept(device, run, number)):
        raise ModelError(f"{device.id} has not kept its model; begin a new run folder, so that it starts again")
    return models.load(kept[-1])
