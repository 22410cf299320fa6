# SPDX-License-Identifier: Apache-2.0
"""What flows between the stages: small frozen values, and the letters of their shapes.

Shapes, here and in the whole package: N devices, K domains (clusters), E experts, L layers, B batch, T tokens of a
sequence, U documents, V vocabulary, H hidden size, I intermediate size, D embedding size, P patches of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

State = dict[str, torch.Tensor]
"""A model's parameters and buffers by name, as `Module.state_dict()` gives them."""

Progress = Callable[[str, int, int, str], None]
"""`progress(label, done, total, note)`: called often, must be cheap; the command line draws a bar from it."""


def silent(label: str, done: int, total: int, note: str = "") -> None:
    """The progress that shows nothing."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents: flat memory-mapped arrays, and the rows (documents) of them that this view holds.

    Attributes:
        token_ids: all tokens of the store, one after the other, unsigned integers.
        counted: whether a token counts as a target of the loss (False on prompts), one bool a token.
        token_starts: (stored documents + 1) offsets into `token_ids`.
        text_bytes: all documents' UTF-8 text, one after the other.
        text_starts: (stored documents + 1) offsets into `text_bytes`.
        domain_ids: each stored document's index into `domains`.
        domains: names of the domains.
        rows_U: the stored documents that this view consists of, in order.
    """

    token_ids: np.ndarray
    counted: np.ndarray
    token_starts: np.ndarray
    text_bytes: np.ndarray
    text_starts: np.ndarray
    domain_ids: np.ndarray
    domains: tuple[str, ...]
    rows_U: np.ndarray

    def __len__(self) -> int:
        return len(self.rows_U)

    @property
    def lengths_U(self) -> np.ndarray:
        """Tokens of each document."""
        return self.token_starts[self.rows_U + 1] - self.token_starts[self.rows_U]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents of this view."""
        return int(self.lengths_U.sum())

    @property
    def domain_U(self) -> np.ndarray:
        """Index into `domains` of each document."""
        return self.domain_ids[self.rows_U]

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and counted flags of one document, both of its length."""
        row = self.rows_U[index]
        span = slice(int(self.token_starts[row]), int(self.token_starts[row + 1]))
        return self.token_ids[span], self.counted[span]

    def text(self, index: int) -> str:
        """The text of one document (prompt and answer together)."""
        row = self.rows_U[index]
        return bytes(self.text_bytes[int(self.text_starts[row]) : int(self.text_starts[row + 1])]).decode("utf-8")

    def texts(self) -> Iterator[str]:
        """The text of every document, in order."""
        return (self.text(index) for index in range(len(self)))

    def select(self, index_U: np.ndarray) -> Corpus:
        """The view that holds only the given documents of this view; shares the store."""
        return Corpus(
            self.token_ids, self.counted, self.token_starts, self.text_bytes, self.text_starts,
            self.domain_ids, self.domains, self.rows_U[index_U],
        )  # fmt: skip

    def of_domain(self, name: str) -> Corpus:
        """The documents of one domain."""
        return self.select(np.flatnonzero(self.domain_U == self.domains.index(name)))


@dataclass(frozen=True)
class Batch:
    """Token sequences for one step.

    Attributes:
        input_ids_BT: int64 token ids; padding holds 0.
        counted_BT: bool, whether this token is a target of the loss (predicted from the tokens before it).
        valid_BT: bool, False on padding (always at the end of a row).
    """

    input_ids_BT: torch.Tensor
    counted_BT: torch.Tensor
    valid_BT: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids_BT.to(device), self.counted_BT.to(device), self.valid_BT.to(device))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one length T, one batch after the other."""
    return Batch(
        torch.cat([batch.input_ids_BT for batch in batches]),
        torch.cat([batch.counted_BT for batch in batches]),
        torch.cat([batch.valid_BT for batch in batches]),
    )


def split_rows(batch: Batch, counts: Sequence[int]) -> list[Batch]:
    """Inverse of `concatenate`: batches of `counts` rows each."""
    parts = (part.split(list(counts)) for part in (batch.input_ids_BT, batch.counted_BT, batch.valid_BT))
    return [Batch(*pieces) for pieces in zip(*parts, strict=True)]


class Text(Protocol):
    """An endless stream of training rows, a pure function of the step."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        ...

    def batch(self, step: int, batch_size: int) -> Batch:
        """Rows `step * batch_size` and following."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An architecture and where its first weights come from: exactly one of `preset`, `folder`, `hub`.

    Attributes:
        name: what this run calls the architecture; the name that clusters, proxies and reports show.
        preset: a name out of `deepfusion list`. Those of ours (pico, tiny, small) start from random weights; published models
            bring their own from the hub.
        folder: a folder that `save_pretrained` made (configuration and safetensors weights).
        hub: a model's name on the Hugging Face hub.
        config: Hugging Face configuration keys that override those of the preset, folder or hub model.
        share: relative share of the fleet's devices that carry this architecture.
    """

    name: str
    preset: str | None = None
    folder: str | None = None
    hub: str | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    share: float = 1.0


@dataclass(frozen=True)
class Payload:
    """All that ever crosses the wire, in either direction.

    Attributes:
        what: what the ledger books it as, e.g. "init", "model", "moe", "logits", "embedding".
        arrays: tensors by name; safetensors on the wire and on disk, never pickle.
        metadata: a few small values (JSON scalars).
        round: 0 in one-shot methods.
    """

    what: str
    arrays: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict[str, str | int | float | bool])
    round: int = 0


Call = Callable[[Mapping[str, Payload]], Iterator[tuple[str, Payload]]]
"""The door: requests by device id -> (device id, answer), in order of arrival. A device that fails is left out."""


@dataclass(frozen=True, eq=False)
class Upload:
    """One device's trained model, as it lies on the server's disk.

    Attributes:
        device_id: who sent it.
        architecture: the name of its `ModelSpec`.
        init_id: hash of the weights that its training started from; only equal ones may be averaged.
        path: the safetensors file; tensors are memory-mapped from it when needed.
        embedding_D: unit-length embedding of its private text; all zero when it had none.
        num_tokens: tokens that it trained on.
    """

    device_id: str
    architecture: str
    init_id: str
    path: Path
    embedding_D: np.ndarray
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of the devices into K knowledge domains; clusters are ordered by their smallest member.

    Attributes:
        device_ids: the N devices.
        label_N: cluster of each device, 0..K-1, none empty.
        centroid_KD: unit-length centroids in embedding space.
    """

    device_ids: tuple[str, ...]
    label_N: np.ndarray
    centroid_KD: np.ndarray

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.centroid_KD)

    def members(self, cluster: int) -> tuple[str, ...]:
        """The devices of one cluster."""
        return tuple(d for d, label in zip(self.device_ids, self.label_N, strict=True) if label == cluster)


@dataclass(frozen=True)
class Proxy:
    """The average of one cluster's models of one architecture: a teacher.

    Attributes:
        cluster: its domain, 0..K-1.
        architecture: the name of its `ModelSpec`.
        folder: a Hugging Face model folder.
        num_tokens: tokens that its members trained on, together.
        members: device ids.
        weight: omega, its share of the cluster's tokens as far as they are credible; a cluster's weights sum to 1.
    """

    cluster: int
    architecture: str
    folder: Path
    num_tokens: int
    members: tuple[str, ...]
    weight: float
