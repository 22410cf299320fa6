# SPDX-License-Identifier: Apache-2.0
"""Phase I: each domain's models of one architecture are averaged into a proxy, a teacher (method, section 6)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from deepfusion.devices.models import load, save
from deepfusion.errors import ModelError, UploadError
from deepfusion.robust import credible, robust_average
from deepfusion.state_dicts import average, distinct_state, load_distinct
from deepfusion.types import Clusters, Progress, Proxy, State, Upload, silent

MODEL = "model/"
"""Prefix of the model's tensors in an upload."""

SCREENED = "screened.json"
"""Beside the proxies: why a device's model was left out, by its id."""
GLANCE = 8
"""Public documents that show whether a model predicts finite numbers, where models are not compared."""

Judge = Callable[[int, PreTrainedModel], float]
"""Log-perplexity of a model on a domain's public text."""


@dataclass(frozen=True, kw_only=True)
class ProxyOptions:
    """[proxy]: how a domain's models are averaged.

    Attributes:
        average: "mean" of all models of a domain and architecture (paper). Models that were trained on unlike text can
            average to something worse than each, so "soup" averages a model only with such as do not make the result
            worse at the domain's public text (greedy soup, arXiv 2203.05482); what fits nowhere begins a soup of its own.
            "trimmed", "median" and "krum" bear a minority of hostile models, see `robust_average`; groups must be large: in
            one of one or two models a hostile one counts.
        soups: most proxies of one domain and architecture; the worst models that fit in none of them are left out.
        judged_on: public documents that models are compared on, for a soup or for `screen`.
        weights: "uniform" counts every device alike (the paper), "tokens" by the tokens that it says that it trained on, see
            `credible` (alike where no device of a group trained on any).
        bad: share of a group that may be hostile, for "trimmed" (which leaves out at least one model on each side of three or
            more) and "krum".
        screen: nats by which a model may predict its domain's public text worse than the weights that it started from; one that
            is worse is left out, and named in the record. When left out, all are taken but those that overflow.
    """

    average: Literal["mean", "soup", "trimmed", "median", "krum"] = "soup"
    soups: int = 4
    judged_on: int = 128
    weights: Literal["uniform", "tokens"] = "uniform"
    bad: float = 0.2
    screen: float | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.soups < 1:
            yield f"soups = {self.soups}: a domain needs a proxy; choose at least 1"
        if self.judged_on < 1:
            yield f"judged_on = {self.judged_on}: too few documents to compare models on; choose at least 1"
        if not 0 <= self.bad < 0.5:
            yield f"bad = {self.bad}: a majority cannot be borne; give a share from 0, below 0.5"
        if self.weights == "tokens" and self.average in ("trimmed", "median", "krum"):
            yield f'weights = "tokens": average = "{self.average}" counts every model alike; set weights = "uniform"'
        if self.screen is not None and not math.isfinite(self.screen):
            yield f"screen = {self.screen}: must be finite; leave it out to compare with no start"

    @property
    def read_on(self) -> int:
        """Public documents that each model is read on: many where models are compared by them."""
        return self.judged_on if self.average == "soup" or self.screen is not None else GLANCE


def make_proxies(
    uploads: Sequence[Upload], clusters: Clusters, *, options: ProxyOptions, initials: Mapping[str, Path],
    tokenizer_folder: Path, judge: Judge, out: Path, progress: Progress = silent,
) -> None:  # fmt: skip
    """Write one Hugging Face folder for each domain and architecture, and `proxies.json` beside them.

    Models are read one at a time, so memory does not grow with the number of devices. A domain whose models are all left out
    has no proxy.

    Args:
        initials: folder of each architecture's first weights, for its configuration.
        judge: reads `ProxyOptions.read_on` documents.

    Raises:
        UploadError: models of one architecture that started from different weights (averaging those means nothing),
            are not of that architecture, or hold NaN or infinity, or all are left out; names the devices.
    """
    rows: list[dict[str, Any]] = []
    screened: dict[str, str] = {}
    by_id = {upload.device_id: upload for upload in uploads}
    done = 0
    for cluster in range(clusters.num_clusters):
        members = [by_id[device_id] for device_id in clusters.members(cluster)]
        made: list[dict[str, Any]] = []
        for architecture in sorted({upload.architecture for upload in members}):
            group = [upload for upload in members if upload.architecture == architecture]
            _same_start(group)
            model = load(initials[architecture])
            done += len(group)
            group, alone = _screened(group, options, model, partial(judge, cluster), screened)
            if not group:
                continue
            soups = (
                _soups(group, alone, options, model, partial(judge, cluster)) if options.average == "soup" else [group]
            )
            for number, soup in enumerate(soups, 1):
                folder = f"cluster-{cluster}-{architecture}" + (f"-{number}" if number > 1 else "")
                load_distinct(model, _average(soup, options, distinct_state(model)))
                save(model, out / folder, tokenizer_folder)
                made.append({
                    "cluster": cluster, "architecture": architecture, "folder": folder,
                    "members": [upload.device_id for upload in soup],
                    "num_tokens": sum(upload.num_tokens for upload in soup),
                })  # fmt: skip
            progress("average proxies", done, len(uploads), f"cluster-{cluster}-{architecture}")
        rows += _weighed(made, by_id)
    if not rows:
        worst = "; ".join(list(screened.values())[:3])
        raise UploadError(f"no domain has a model left ({worst}); raise [proxy] screen, or train the devices longer")
    (out / SCREENED).write_text(json.dumps(screened, indent=1), encoding="utf-8")
    (out / "proxies.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _weighed(made: Sequence[Mapping[str, Any]], by_id: Mapping[str, Upload]) -> list[dict[str, Any]]:
    """A domain's proxies with omega: by their members' tokens, or by their number where nobody has any."""
    ids = [device_id for row in made for device_id in row["members"]]
    tokens = dict(zip(ids, credible([by_id[device_id].num_tokens for device_id in ids]), strict=True))
    parts = [sum(tokens[device_id] if any(tokens.values()) else 1 for device_id in row["members"]) for row in made]
    return [{**row, "weight": part / sum(parts)} for row, part in zip(made, parts, strict=True)]


def _screened(
    group: list[Upload], options: ProxyOptions, model: PreTrainedModel, judge: Callable[[PreTrainedModel], float],
    screened: dict[str, str],
) -> tuple[list[Upload], dict[str, float]]:  # fmt: skip
    """The models of a group that predict finite numbers, and with `screen` are not much worse than their start; their nats.

    Args:
        model: holds the group's first weights, and is used to try the others.
        screened: gets the others.
    """
    start, expected = math.inf if options.screen is None else judge(model), distinct_state(model)
    if math.isnan(start):
        who = ", ".join(upload.device_id for upload in group)
        raise ModelError(f"the weights that {who} started from predict NaN: nothing can be screened by them")
    alone = {upload.device_id: _nats(model, _mean([upload], options, expected), judge) for upload in group}
    for upload in group:
        nats, said = alone[upload.device_id], f"{upload.device_id} predicts its domain's public text at"
        if not math.isfinite(nats):
            screened[upload.device_id] = f"{said} no finite number of nats: its weights overflow"
        elif nats > start + (options.screen or 0):
            screened[upload.device_id] = f"{said} {nats:.2f} nats, the weights that it started from at {start:.2f}"
    return [upload for upload in group if upload.device_id not in screened], alone


def _nats(model: PreTrainedModel, state: State, judge: Callable[[PreTrainedModel], float]) -> float:
    load_distinct(model, state)
    value = judge(model)
    return math.inf if math.isnan(value) else value


def _soups(
    group: Sequence[Upload], alone: Mapping[str, float], options: ProxyOptions, model: PreTrainedModel,
    judge: Callable[[PreTrainedModel], float],
) -> list[list[Upload]]:  # fmt: skip
    """The models of a group, divided into those whose mean is a proxy, best first; `model` is used to try them."""
    expected = distinct_state(model)
    soups: list[tuple[list[Upload], float]] = []
    for upload in sorted(group, key=lambda upload: alone[upload.device_id]):
        for index, (soup, best) in enumerate(soups):
            if (together := _nats(model, _mean([*soup, upload], options, expected), judge)) <= best:
                soups[index] = [*soup, upload], together
                break
        else:
            if len(soups) < options.soups:
                soups.append(([upload], alone[upload.device_id]))
    return [soup for soup, _ in soups]


def _average(group: Sequence[Upload], options: ProxyOptions, expected: State) -> State:
    """A proxy's tensors out of its members'."""
    if options.average in ("mean", "soup"):
        return _mean(group, options, expected)
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(upload.path, framework="pt")) for upload in group]
        for file, upload in zip(files, group, strict=True):
            names = [name.removeprefix(MODEL) for name in file.keys() if name.startswith(MODEL)]  # noqa: SIM118
            shapes = {name: torch.empty(file.get_slice(MODEL + name).get_shape(), device="meta") for name in names}
            _same_shapes(shapes, expected, upload)
        readers = [partial(_read, file) for file in files]
        return robust_average(readers, list(expected), options.average, options.bad)


def _read(file: Any, name: str) -> torch.Tensor:
    return file.get_tensor(MODEL + name)


def _mean(group: Sequence[Upload], options: ProxyOptions, expected: State) -> State:
    """Mean of the uploads of one cluster and architecture, whose tensors must look like `expected`."""
    weights = [float(tokens) for tokens in credible([upload.num_tokens for upload in group])]
    if options.weights == "uniform" or not any(weights):
        weights = [1.0] * len(group)

    def states() -> Iterator[tuple[str, State, float]]:
        for upload, weight in zip(group, weights, strict=True):
            state = read_model(upload.path)
            _same_shapes(state, expected, upload)
            yield upload.device_id, state, weight
            del state  # before the next one is read

    try:
        return average(states())
    except ModelError as error:
        raise UploadError(str(error)) from error


def load_proxies(folder: Path) -> list[Proxy]:
    """What `make_proxies` wrote."""
    rows: list[dict[str, Any]] = json.loads((folder / "proxies.json").read_text(encoding="utf-8"))
    return [
        Proxy(
            cluster=row["cluster"], architecture=row["architecture"], folder=folder / row["folder"],
            num_tokens=row["num_tokens"], members=tuple(row["members"]), weight=row["weight"],
        )
        for row in rows
    ]  # fmt: skip


def read_model(path: Path) -> State:
    """The model's tensors of an upload, by state-dict name."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = [name for name in file.keys() if name.startswith(MODEL)]  # noqa: SIM118
        return {name.removeprefix(MODEL): file.get_tensor(name) for name in names}


def load_upload(path: Path, start: Path) -> PreTrainedModel:
    """A device's uploaded model; `start` is the folder of its architecture's first weights."""
    model = load(start)
    load_distinct(model, read_model(path))
    return model


def _same_start(group: Sequence[Upload]) -> None:
    if odd := [upload.device_id for upload in group if upload.init_id != group[0].init_id]:
        raise UploadError(
            f"{', '.join(odd)} started from other weights than {group[0].device_id} ({group[0].architecture}): their average "
            "means nothing; start all devices of an architecture from one checkpoint"
        )


def _same_shapes(state: State, expected: State, upload: Upload) -> None:
    for name in sorted({*state, *expected}):
        found, wanted = (list(s[name].shape) if name in s else "missing" for s in (state, expected))
        if found != wanted:
            raise UploadError(
                f"{upload.device_id}: tensor {name} is {found}, where {upload.architecture} has {wanted}; "
                "let the device send the architecture that it was given"
            )
