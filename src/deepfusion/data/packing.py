# SPDX-License-Identifier: Apache-2.0
"""From documents to batches: packed rows for training, and each document by itself for evaluation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from deepfusion.errors import DataError
from deepfusion.training import derive_seed
from deepfusion.types import Batch, Corpus


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One pass: the order of its documents, and where each starts in the epoch's stream of tokens."""

    order_U: np.ndarray
    offsets: np.ndarray  # U + 1


class PackedText:
    """Training rows of exactly T tokens, cut from an endless stream of documents one after the other.

    Epoch e of the stream is a permutation of the documents that depends on (seed, e) only; with `weights_U` it is U
    systematic draws in proportion to them: a document that should come n times comes floor(n) or ceil(n) times. A row
    that reaches the end of an epoch goes on in the next. `batch` is a pure function of its arguments, so a training
    can be taken up at any step.

    Raises:
        DataError: the corpus holds no document.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, weights_U: np.ndarray | None = None) -> None:
        if len(corpus) == 0:
            raise DataError("no document to train on; add text, or lower what is held back or left out")
        self.corpus, self.sequence_length = corpus, sequence_length
        self._seed = seed
        self._lengths_U = corpus.lengths_U
        self._share_U = None if weights_U is None else _shares(weights_U, len(corpus))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._epoch_starts = [0]  # of weighted epochs, whose lengths differ; filled in as far as needed

    @property
    def num_rows(self) -> int:
        """Rows that one epoch begins; with weights, that it begins on average."""
        draws_U = 1.0 if self._share_U is None else self._share_U * len(self.corpus)
        return max(1, int(np.ceil((self._lengths_U * draws_U).sum() / self.sequence_length - 1e-9)))

    def batch(self, step: int, batch_size: int) -> Batch:
        """Rows `step * batch_size` and following of the stream, (batch_size, T)."""
        length = batch_size * self.sequence_length
        position_L = self._positions(step * length, length)
        shape = (batch_size, self.sequence_length)
        return Batch(
            torch.from_numpy(self.corpus.token_ids[position_L].astype(np.int64).reshape(shape)),
            torch.from_numpy(self.corpus.counted[position_L].reshape(shape)),
            torch.ones(shape, dtype=torch.bool),
        )

    def _positions(self, begin: int, length: int) -> np.ndarray:
        """Where in the store the stream's tokens `begin` .. `begin + length - 1` lie."""
        index, offset = self._locate(begin)
        parts: list[np.ndarray] = []
        while length:
            epoch = self._epoch(index)
            stop = min(offset + length, int(epoch.offsets[-1]))
            parts.append(self._span(epoch, offset, stop))
            length -= stop - offset
            index, offset = index + 1, 0
        return np.concatenate(parts)

    def _span(self, epoch: _Epoch, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(epoch.offsets, start, side="right")) - 1
        last = int(np.searchsorted(epoch.offsets, stop, side="left"))
        begins = np.maximum(epoch.offsets[first:last], start)
        counts = np.minimum(epoch.offsets[first + 1 : last + 1], stop) - begins
        stored = self.corpus.token_starts[self.corpus.rows_U[epoch.order_U[first:last]]]
        shifts = stored - epoch.offsets[first:last]
        return np.arange(start, stop) + np.repeat(shifts, counts)

    def _locate(self, position: int) -> tuple[int, int]:
        """Epoch of a position of the stream, and the position within it."""
        if self._share_U is None:
            return divmod(position, int(self._lengths_U.sum()))
        while self._epoch_starts[-1] <= position:
            order_U = self._draw(len(self._epoch_starts) - 1)
            self._epoch_starts.append(self._epoch_starts[-1] + int(self._lengths_U[order_U].sum()))
        index = int(np.searchsorted(self._epoch_starts, position, side="right")) - 1
        return index, position - self._epoch_starts[index]

    def _epoch(self, index: int) -> _Epoch:
        if index not in self._epochs:
            order_U = self._draw(index)
            offsets = np.concatenate([[0], np.cumsum(self._lengths_U[order_U])])
            self._epochs[index] = _Epoch(order_U, offsets)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[index]

    def _draw(self, index: int) -> np.ndarray:
        generator = np.random.default_rng(derive_seed("epoch", self._seed, index))
        if self._share_U is None:
            return generator.permutation(len(self.corpus))
        marks_U = (np.arange(len(self.corpus)) + generator.random()) / len(self.corpus)
        drawn_U = np.searchsorted(self._share_U.cumsum(), marks_U).clip(max=self._share_U.nonzero()[0][-1])
        return generator.permutation(drawn_U)


def document_batches(
    corpus: Corpus, sequence_length: int, tokens_per_batch: int = 8192, most_windows: int | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every document by itself, for evaluation: (document of each row, batch), longest rows first, padded at the end.

    A document longer than T is cut into windows of T tokens that overlap by one: a window's first token is only the
    context of its second and does not count. So every token but a document's first is a target exactly once.
    A batch holds at most `tokens_per_batch` places, padding included, but at least one row. Of a long document the first
    `most_windows` are read, all when left out.
    """
    lengths_U = corpus.lengths_U
    stride = sequence_length - 1
    windows_U = np.maximum(0, -(-(lengths_U - 1) // stride))  # none for a document of one token
    windows_U = np.minimum(windows_U, most_windows or windows_U)
    document_W = np.repeat(np.arange(len(corpus)), windows_U)
    window_W = np.arange(len(document_W)) - np.repeat(np.cumsum(windows_U) - windows_U, windows_U)
    begin_W = window_W * stride
    length_W = np.minimum(sequence_length, lengths_U[document_W] - begin_W)
    start_W = corpus.token_starts[corpus.rows_U[document_W]] + begin_W
    order_W = np.argsort(-length_W, kind="stable")
    done = 0
    while done < len(order_W):
        longest = int(length_W[order_W[done]])
        rows_B = order_W[done : done + max(1, tokens_per_batch // longest)]
        yield document_W[rows_B], _padded(corpus, start_W[rows_B], length_W[rows_B], longest)
        done += len(rows_B)


def _padded(corpus: Corpus, start_B: np.ndarray, length_B: np.ndarray, longest: int) -> Batch:
    place_T = np.arange(longest)
    valid_BT = place_T < length_B[:, None]
    position_BT = np.where(valid_BT, start_B[:, None] + place_T, start_B[:, None])
    ids_BT = np.where(valid_BT, corpus.token_ids[position_BT], 0).astype(np.int64)
    counted_BT = corpus.counted[position_BT] & valid_BT
    counted_BT[:, 0] = False
    return Batch(torch.from_numpy(ids_BT), torch.from_numpy(counted_BT), torch.from_numpy(valid_BT))


def _shares(weights_U: np.ndarray, count: int) -> np.ndarray:
    weights_U = np.asarray(weights_U, np.float64)
    assert weights_U.shape == (count,), f"{weights_U.shape} weights for {count} documents"
    assert np.isfinite(weights_U).all(), "a weight is not finite"
    assert weights_U.min() >= 0, "a weight is negative"
    assert weights_U.sum() > 0, "no document has a weight"
    return weights_U / weights_U.sum()
