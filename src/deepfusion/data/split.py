# SPDX-License-Identifier: Apache-2.0
"""Which device gets which private document: unlike mixtures of domains and unlike sizes (DeepFusion, section V)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepfusion.errors import DataError
from deepfusion.training import derive_seed
from deepfusion.types import Corpus


def divide(
    corpus: Corpus, device_ids: Sequence[str], *, alpha: float = 0.5, sigma: float = 0.5, seed: int
) -> dict[str, np.ndarray]:
    """Every document goes to exactly one device, every device gets at least one; sorted indices by device id.

    A device's mixture over the D domains is drawn from Dirichlet(alpha), its size from a lognormal of that sigma; a
    domain's documents are then shared out in proportion to size times mixture.

    Args:
        alpha: small values give a device one domain, large ones all; infinity divides every domain by size alone.
        sigma: spread of the sizes; 0 makes them equal.

    Raises:
        DataError: more devices than documents.
    """
    if len(corpus) < len(device_ids):
        raise DataError(
            f"{len(corpus)} private documents for {len(device_ids)} devices: each needs at least one; "
            "lower [devices] count or add private text to [[data.corpora]]"
        )
    generator = np.random.default_rng(derive_seed("divide", seed))
    domain_U = corpus.domain_U
    present = np.unique(domain_U)
    size_N = generator.lognormal(0.0, sigma, len(device_ids))
    if np.isinf(alpha):
        mixture_ND = np.ones((len(device_ids), len(present)))
    else:
        mixture_ND = generator.dirichlet(np.full(len(present), alpha), len(device_ids))
    owner_U = np.empty(len(corpus), np.int64)
    for place, domain in enumerate(present):
        members = generator.permutation(np.flatnonzero(domain_U == domain))
        weight_N = size_N * mixture_ND[:, place]
        counts_N = _largest_remainder(weight_N if weight_N.sum() > 0 else size_N, len(members))
        owner_U[members] = np.repeat(np.arange(len(device_ids)), counts_N)
    _feed_the_empty(owner_U, len(device_ids))
    return {device_id: np.flatnonzero(owner_U == n) for n, device_id in enumerate(device_ids)}


def _largest_remainder(weight_N: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `weight_N` that add up to `total`."""
    exact_N = weight_N / weight_N.sum() * total
    counts_N = np.floor(exact_N).astype(np.int64)
    missing = total - int(counts_N.sum())
    counts_N[np.argsort(counts_N - exact_N, kind="stable")[:missing]] += 1
    return counts_N


def _feed_the_empty(owner_U: np.ndarray, num_devices: int) -> None:
    """Give each device without a document one of the device that has most."""
    counts_N = np.bincount(owner_U, minlength=num_devices)
    for n in np.flatnonzero(counts_N == 0):
        richest = int(counts_N.argmax())
        owner_U[np.flatnonzero(owner_U == richest)[0]] = n
        counts_N[richest] -= 1
        counts_N[n] += 1
