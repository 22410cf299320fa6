# SPDX-License-Identifier: Apache-2.0
"""DP-SGD over documents (Abadi et al. 2016, algorithm 1): what is learnt would nearly be the same without any one of them.

Documents are read one at a time, each as a row of its own: so a gradient is that of one document in every architecture, with tied
weights and positions too, no row is padded, and memory holds one gradient besides the sum (decision 17).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from deepfusion.devices.noise import Noise
from deepfusion.devices.releases import Draws
from deepfusion.errors import DataError
from deepfusion.types import Batch, Corpus


class PrivateDocuments:
    """The documents that each step of a training draws, and the noisy gradient that it makes of them.

    Documents and noise of a step come out of the key and the step's number, so a training can be taken up at any step.

    Raises:
        DataError: the corpus holds no document.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, draws: Draws, clip: float, noise: Noise) -> None:
        """Set it up.

        Args:
            clip: longest gradient of a document.
            noise: nobody else may know its key: neither what is drawn nor what is added.
        """
        if len(corpus) == 0:
            raise DataError("no document to train on; add text, or lower what is held back or left out")
        self.sequence_length = sequence_length
        self._corpus, self._draws, self._clip, self._noise = corpus, draws, clip, noise

    def rows(self, step: int) -> Iterator[Batch]:
        """The step's documents, each drawn by itself (Poisson sampling), as batches of one row (1, t <= T).

        Of a longer document one of its windows, drawn too. One without a token to predict is left out.
        """
        stream = self._noise.stream(2 * step)
        drawn = np.flatnonzero(stream.uniform(len(self._corpus)) < self._draws.rate)
        stride = self.sequence_length - 1
        for index, word in zip(drawn.tolist(), stream.words(len(drawn)).tolist(), strict=True):
            ids, counted = self._corpus.document(index)
            windows = max(1, -(-(len(ids) - 1) // stride))
            begin = word % windows * stride
            place = slice(begin, begin + self.sequence_length)
            row, target = ids[place].astype(np.int64), counted[place].copy()
            target[:1] = False  # the first token is context only
            if target.any():
                shape = (1, len(row))
                yield Batch(
                    torch.from_numpy(row).view(shape),
                    torch.from_numpy(target).view(shape),
                    torch.ones(shape, dtype=torch.bool),
                )

    def backward(self, step: int, parameters: Mapping[str, torch.Tensor], backward: Callable[[Batch], object]) -> None:
        """Leave in each parameter's `grad` the step's noisy sum of clipped gradients, over the expected number of documents.

        Args:
            backward: leaves the gradient of the loss on a batch in `grad`, which is empty when it is called.
        """
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in self.rows(step):
            for p in parameters.values():
                p.grad = None
            backward(batch)
            found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            length = float(torch.nn.utils.get_total_norm(list(found.values())))
            if math.isfinite(length):  # else it counts as zero: an error would tell of the document
                scale = min(1.0, self._clip / max(length, 1e-12))
                for name, gradient in found.items():
                    sums[name].add_(gradient, alpha=scale)
        stream, expected = self._noise.stream(2 * step + 1), self._draws.rate * len(self._corpus)
        deviation = self._draws.multiplier * self._clip
        for name, p in parameters.items():
            noise = stream.normal(p.numel()).view_as(p).to(p.device)
            p.grad = sums.pop(name).add_(noise, alpha=deviation).div_(expected)
