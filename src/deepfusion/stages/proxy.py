# SPDX-License-Identifier: Apache-2.0
"""Phase I: each domain's models of one architecture are averaged into a proxy, a teacher (method, section 6)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from transformers import PreTrainedModel

from deepfusion.devices.models import load, save
from deepfusion.errors import ModelError, UploadError
from deepfusion.state_dicts import average, distinct_state, load_distinct
from deepfusion.types import Clusters, Progress, Proxy, State, Upload, silent

MODEL = "model/"
"""Prefix of the model's tensors in an upload."""


@dataclass(frozen=True, kw_only=True)
class ProxyOptions:
    """[proxy]: how a domain's models are averaged.

    Attributes:
        weights: "uniform" counts every device alike (the paper), "tokens" by the tokens that it trained on (alike where
            no device of a group trained on any).
    """

    weights: Literal["uniform", "tokens"] = "uniform"


def make_proxies(
    uploads: Sequence[Upload], clusters: Clusters, *, options: ProxyOptions, initials: Mapping[str, Path],
    tokenizer_folder: Path, out: Path, progress: Progress = silent,
) -> None:  # fmt: skip
    """Write one Hugging Face folder for each domain and architecture, and `proxies.json` beside them.

    Models are read one at a time, so memory does not grow with the number of devices.

    Args:
        initials: folder of each architecture's first weights, for its configuration.

    Raises:
        UploadError: models of one architecture that started from different weights (averaging those means nothing),
            are not of that architecture, or hold NaN or infinity; names the devices.
    """
    rows: list[dict[str, object]] = []
    by_id = {upload.device_id: upload for upload in uploads}
    done = 0
    for cluster in range(clusters.num_clusters):
        members = [by_id[device_id] for device_id in clusters.members(cluster)]
        tokens = sum(upload.num_tokens for upload in members)
        for architecture in sorted({upload.architecture for upload in members}):
            group = [upload for upload in members if upload.architecture == architecture]
            folder = f"cluster-{cluster}-{architecture}"
            model = load(initials[architecture])
            load_distinct(model, _mean(group, options, distinct_state(model)))
            save(model, out / folder, tokenizer_folder)
            own = sum(upload.num_tokens for upload in group)
            rows.append({
                "cluster": cluster, "architecture": architecture, "folder": folder, "num_tokens": own,
                "members": [upload.device_id for upload in group],
                "weight": own / tokens if tokens else len(group) / len(members),
            })  # fmt: skip
            done += len(group)
            progress("average proxies", done, len(uploads), folder)
    (out / "proxies.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _mean(group: Sequence[Upload], options: ProxyOptions, expected: State) -> State:
    """Mean of the uploads of one cluster and architecture, whose tensors must look like `expected`."""
    _same_start(group)
    weights = [float(upload.num_tokens) for upload in group]
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
