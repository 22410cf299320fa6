# SPDX-License-Identifier: Apache-2.0
"""Averages that a minority of bad models cannot move far: trimmed mean, median (Yin 2018), Krum (Blanchard 2017); weights, too.

Models are read tensor by tensor, so memory holds one tensor of each model, not all models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Literal

import numpy as np
import torch

from deepfusion.types import State

Robust = Literal["trimmed", "median", "krum"]
Reader = Callable[[str], torch.Tensor]
"""Gives a model's tensor by its name."""
CREDIBLE = 10
"""A claim counts at most so many times the median one: nobody can check it, and devices of one kind do not differ so much."""


def credible(claims: Sequence[int]) -> list[int]:
    """Numbers of tokens that devices claim to have trained on, as they count where they are weights of one average.

    The median is that of the claims above 0, and of an even number of them the lower one, so that of two devices the one that
    claims more does not vouch for itself.
    """
    said = [claim for claim in claims if claim > 0]
    most = CREDIBLE * median_low(said) if said else 0
    return [min(claim, most) for claim in claims]


def robust_average(models: Sequence[Reader], names: Sequence[str], how: Robust, bad: float) -> State:
    """One model out of N, of which a share `bad` may be anything.

    "trimmed" leaves out, number by number, the floor(bad N) largest and smallest, from three models on at least one of each
    (none where `bad` is 0), and averages the rest; "median" takes each number's median; "krum" takes the one model that is
    nearest to its N - f - 2 nearest others, f = floor(bad N) but at most (N - 3) / 2, above which Krum promises nothing.
    Whole numbers (buffers) are the first model's. Of one or two models the first two give the mean, the third the first
    model: nobody can tell there which one is bad, so it counts.

    Args:
        models: N readers of models of one architecture.
        names: of the tensors.
    """
    if how == "krum":
        chosen = models[krum(models, names, max(0, min(int(bad * len(models)), (len(models) - 3) // 2)))]
        return {name: chosen(name) for name in names}
    size = len(models)
    cut = max(int(bad * size), 1 if bad and size > 2 else 0)
    found: State = {}
    for name in names:
        first = models[0](name)
        if not first.is_floating_point():
            found[name] = first
            continue
        stack_N = np.stack([model(name).double().numpy() for model in models])
        middle = np.median(stack_N, axis=0) if how == "median" else _trimmed(stack_N, cut)
        found[name] = torch.as_tensor(np.asarray(middle)).to(first.dtype)
    return found


def _trimmed(stack_N: np.ndarray, cut: int) -> np.ndarray:
    """The mean over the first axis without the `cut` largest and smallest numbers of each place."""
    stop = len(stack_N) - cut
    return np.partition(stack_N, (cut, stop - 1), axis=0)[cut:stop].mean(axis=0)


def krum(models: Sequence[Reader], names: Sequence[str], bad: int) -> int:
    """Index of the model whose summed squared distance to its N - bad - 2 nearest others (at least one) is smallest."""
    size = len(models)
    square_NN = torch.zeros(size, size, dtype=torch.float64)
    for name in names:
        stack_N = torch.stack([model(name).double().flatten() for model in models])
        square_NN += torch.cdist(stack_N, stack_N, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest_NN = square_NN.sort(dim=1).values[:, 1 : 1 + max(1, size - bad - 2)]  # the first is the model itself
    return int(nearest_NN.sum(1).argmin())
