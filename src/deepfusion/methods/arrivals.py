# SPDX-License-Identifier: Apache-2.0
"""Uploads as they arrive: opened, checked against what was asked for, and kept whole on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import safe_open

from deepfusion.devices import models
from deepfusion.federation.formats import Format, restore
from deepfusion.federation.payload import check_embedding, check_metadata, check_state, read_metadata
from deepfusion.methods import exchange
from deepfusion.methods.base import Site
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state
from deepfusion.types import Call, Payload, Upload


def collect_uploads(
    site: Site, call: Call, requests: Mapping[str, Payload], initials: Mapping[str, Path], form: Format, key: str,
    embedding_size: int | None,
) -> list[Upload]:  # fmt: skip
    """Ask the devices whose upload is not on the disk yet, check each arrival; the good ones in the fleet's order.

    On the disk uploads are whole, in whatever format they came.

    Args:
        form: in which uploads come.
        key: see `exchange.spool_answers`.
        embedding_size: None where the embeddings have been sent before; those of the uploads are empty then.
    """
    arrivals = Arrivals({card.id: card.model.name for card in site.cards}, initials, form, embedding_size)
    files = exchange.spool_answers(site, call, requests, arrivals.check, key, opened=arrivals.opened)
    site.reached("uploads")
    return [read_upload(path) for path in files.values()]


class Arrivals:
    """What is asked of an upload before it counts."""

    def __init__(
        self, architectures: Mapping[str, str], initials: Mapping[str, Path], form: Format, embedding_size: int | None
    ) -> None:
        """Read what uploads are compared with.

        Args:
            architectures: of each device, by its id.
            initials: folder of each architecture's first weights.
            embedding_size: None where an upload must hold no embedding.
        """
        self._form: Format = form
        self._architectures, self._size = architectures, embedding_size
        starts = {name: models.load(folder) for name, folder in initials.items()}
        self._init_ids = {name: models.init_id(model) for name, model in starts.items()}
        self._weights = {name: distinct_state(model) if form == "delta-int8" else {} for name, model in starts.items()}
        self._shapes = {
            name: {key: tensor.to("meta") for key, tensor in distinct_state(model).items()}
            for name, model in starts.items()
        }

    def opened(self, device_id: str, payload: Payload) -> Payload:
        """The upload with whole tensors, whatever the format. Raises UploadError where it is in another one."""
        name, wire = self._architectures[device_id], exchange.with_prefix(payload, MODEL)
        state = restore(wire, self._shapes[name], self._form, self._weights[name], f"device {device_id}")
        rest = {key: tensor for key, tensor in payload.arrays.items() if not key.startswith(MODEL)}
        return replace(payload, arrays={**rest, **{MODEL + key: tensor for key, tensor in state.items()}})

    def check(self, device_id: str, payload: Payload) -> None:
        """Raise UploadError unless an opened upload is what was asked for, and of the device that it says."""
        name, arrays = self._architectures[device_id], dict(payload.arrays)
        check_metadata(payload, device_id, name, self._init_ids[name])
        if self._size is not None:
            check_embedding(payload, self._size, device_id)
            arrays.pop(exchange.EMBEDDING)
        check_state(arrays, {MODEL + key: tensor for key, tensor in self._shapes[name].items()}, device_id)


def read_upload(path: Path) -> Upload:
    """What the server knows of an upload in the spool; its model stays on the disk."""
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        sent = exchange.EMBEDDING in file.keys()  # noqa: SIM118 (safe_open is not a mapping)
        embedding_D = file.get_tensor(exchange.EMBEDDING).float().numpy() if sent else np.empty(0)
    return Upload(
        device_id=str(metadata["device"]),
        architecture=str(metadata["architecture"]),
        init_id=str(metadata["init_id"]),
        path=path,
        embedding_D=embedding_D,
        num_tokens=int(metadata["tokens"]),
    )
