# SPDX-License-Identifier: Apache-2.0
"""The [devices.privacy] section, and what a training by DP-SGD costs (Abadi et al. 2016), by Opacus' accountant.

The accountant composes Renyi divergences of the Poisson-subsampled Gaussian mechanism (Mironov et al. 2019): a bound that
holds for one document more or less among the device's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from deepfusion.devices.releases import Draws
from deepfusion.errors import PrivacyError

ORDERS = (*(1 + step / 4 for step in range(1, 40)), *range(11, 64), *(64 * 2 ** (step / 4) // 1 for step in range(17)))
"""Of the Renyi divergences, any of which gives a bound; those above 63 are for small epsilons."""


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """[devices.privacy]: devices train with differential privacy, by DP-SGD; each document is protected.

    A step draws each document with the same chance, clips its gradient and adds noise to the sum; `batch_size` x `accumulate`
    documents of a step are drawn on average. Of a document longer than `sequence_length` a step reads one window.

    Attributes:
        epsilon: what a document's privacy loses at most by the device's training; small is private, 8 is much.
        delta: chance that it loses more; well below one by the number of documents.
        max_grad_norm: longest gradient of a document; what is longer is scaled down to it.
    """

    epsilon: float
    delta: float = 1e-5
    max_grad_norm: float = 1.0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not 0.01 <= self.epsilon < math.inf:
            yield f"epsilon = {self.epsilon}: choose a number from 0.01 on, such as 8; remove the section for no privacy"
        if not 0 < self.delta < 1:
            yield f"delta = {self.delta}: choose a number between 0 and 1, such as 1e-5"
        if not 1e-6 <= self.max_grad_norm <= 1e6:  # beyond, float32 would round gradients and noise unlike real numbers
            yield f"max_grad_norm = {self.max_grad_norm}: choose a number from 1e-6 to 1e6; 1.0 is usual"


def epsilon_of(trainings: Sequence[Draws], delta: float) -> float:
    """Epsilon at `delta` of several trainings on the same documents together; 0 without any."""
    from opacus.accountants.analysis import rdp

    if not trainings:
        return 0.0
    spent = np.zeros(len(ORDERS))
    for one in trainings:
        spent += rdp.compute_rdp(q=one.rate, noise_multiplier=one.multiplier, steps=one.steps, orders=list(ORDERS))
    with warnings.catch_warnings():  # at the first or last order it only says that others might give a better bound
        warnings.simplefilter("ignore", UserWarning)
        return float(rdp.get_privacy_spent(orders=list(ORDERS), rdp=spent.tolist(), delta=delta)[0])


@lru_cache(maxsize=256)
def draws_for(options: PrivacyOptions, rate: float, steps: int) -> Draws:
    """A training of so many steps with the least noise that keeps to the options' epsilon and delta.

    Args:
        rate: chance of each document to be in a step.

    Raises:
        PrivacyError: no noise is enough.
    """
    low, high = 0.0, 1.0
    while epsilon_of([Draws(high, rate, steps)], options.delta) > options.epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise PrivacyError(
                f"[devices.privacy] epsilon = {options.epsilon:g} cannot be kept over {steps} steps; "
                "choose a larger one, or fewer steps"
            )
    while high - low > 3e-3 * high:
        middle = (low + high) / 2
        if epsilon_of([Draws(middle, rate, steps)], options.delta) > options.epsilon:
            low = middle
        else:
            high = middle
    return Draws(high, rate, steps)
