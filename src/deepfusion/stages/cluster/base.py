# SPDX-License-Identifier: Apache-2.0
"""What a clustering is, and what every clustering needs: cosines, and a canonical order of the clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse

from deepfusion.errors import UploadError
from deepfusion.registry import Registry
from deepfusion.types import Clusters


class Clustering(Protocol):
    """Groups devices into knowledge domains by their embeddings."""

    def assign(
        self, embedding_ND: np.ndarray, device_ids: Sequence[str], architectures: Sequence[str], *,
        seed: int, note: Callable[[str], None],
    ) -> Clusters:  # fmt: skip
        """A partition of the devices, no cluster empty.

        Args:
            embedding_ND: unit rows; all zero for a device without text, which joins the largest cluster.
            device_ids: no two alike. In which order the devices stand decides how clusters are numbered, nothing else.
            architectures: each device's, for clusterings that keep architectures apart.
            note: called with a sentence when less was possible than was asked for.

        Raises:
            UploadError: no device, or an embedding that holds NaN or infinity; names the device.
        """
        ...


clusterings: Registry[Clustering] = Registry("cluster")


def check_embeddings(embedding_ND: np.ndarray, device_ids: Sequence[str]) -> None:
    """Raise UploadError when there is nothing to cluster, or a number that is not finite."""
    assert len(embedding_ND) == len(device_ids) == len(set(device_ids)), (embedding_ND.shape, device_ids)
    if not len(device_ids):
        raise UploadError("no upload arrived, so there is nothing to cluster; see why the devices failed and run again")
    broken = [device_ids[int(row)] for row in np.flatnonzero(~np.isfinite(embedding_ND).all(1))]
    if broken:
        raise UploadError(f"{', '.join(broken)}: the embedding holds NaN or infinity; let the device send it again")


def similarity(embedding_ND: np.ndarray) -> np.ndarray:
    """Cosine of every pair of devices (DeepFusion, eq. 6): (N, N), symmetric, diagonal 1, entries in [-1, 1]."""
    norm_N1 = np.linalg.norm(embedding_ND.astype(np.float64), axis=1, keepdims=True)
    unit_ND = embedding_ND / np.where(norm_N1 > 0, norm_N1, 1)
    cosine_NN = np.clip(unit_ND @ unit_ND.T, -1.0, 1.0)
    cosine_NN = (cosine_NN + cosine_NN.T) / 2
    np.fill_diagonal(cosine_NN, 1.0)
    return cosine_NN


def describe(clusters: Clusters, embedding_ND: np.ndarray) -> dict[str, Any]:
    """What `clusters.json` tells of a partition."""
    return {
        "members": [clusters.members(k) for k in range(clusters.num_clusters)],
        "device_ids": clusters.device_ids,
        "embedding": np.round(embedding_ND.astype(float), 5).tolist(),
    }


def similarity_margin(embedding_ND: np.ndarray, label_N: np.ndarray) -> float:
    """Mean cosine of pairs within a cluster minus that of pairs across; 0 when there are no pairs of either kind."""
    cosine_NN = similarity(embedding_ND)
    same_NN = label_N[:, None] == label_N
    within, across = cosine_NN[same_NN & ~np.eye(len(label_N), dtype=bool)], cosine_NN[~same_NN]
    return float(within.mean() - across.mean()) if within.size and across.size else 0.0


def sum_by_cluster(points_ND: np.ndarray, label_N: np.ndarray, clusters: int) -> np.ndarray:
    """Sum of each cluster's points, (K, D)."""
    rows = np.arange(len(points_ND))
    member_KN = scipy.sparse.csr_array((np.ones(len(rows)), (label_N, rows)), shape=(clusters, len(rows)))
    return member_KN @ points_ND


def make_clusters(device_ids: Sequence[str], label_N: np.ndarray, embedding_ND: np.ndarray) -> Clusters:
    """Clusters ordered by their smallest member, so that no seed permutes the experts; with unit centroids."""
    _, first = np.unique(label_N, return_index=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    _, dense_N = np.unique(label_N, return_inverse=True)
    label_N = rank[dense_N]
    sums_KD = sum_by_cluster(embedding_ND.astype(np.float64), label_N, len(order))
    norm_K1 = np.linalg.norm(sums_KD, axis=1, keepdims=True)
    return Clusters(tuple(device_ids), label_N, sums_KD / np.where(norm_K1 > 0, norm_K1, 1))
