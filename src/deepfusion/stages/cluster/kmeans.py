# SPDX-License-Identifier: Apache-2.0
"""Spherical k-means on the devices' unit vectors (method, section 5).

Our own, because scikit-learn's k-means minimises Euclidean distances to unnormalised centres, may return empty clusters
for duplicates, and knows neither `pure` groups nor the zero vector. It is what optimises the cosines of eq. (6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepfusion.errors import ConfigError
from deepfusion.stages.cluster.base import check_embeddings, clusterings, make_clusters, similarity, sum_by_cluster
from deepfusion.training import derive_seed
from deepfusion.types import Clusters

MAX_ITERATIONS = 100
LEAST_SILHOUETTE = 0.05
"""Below this mean cosine silhouette, `num_clusters = "auto"` sees one domain only."""


@clusterings.register("kmeans")
@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Spherical k-means on the embeddings; the number of domains fixed or found.

    Attributes:
        num_clusters: K, or "auto" for the number with the best silhouette.
        max_clusters: most clusters that "auto" tries; at most the target's number of experts.
        restarts: random starts, of which the best is kept.
        space: "embedding" clusters the vectors, "similarity" the rows of the cosine matrix, scaled to length 1.
        groups: "mixed" clusters all devices together; "pure" keeps architectures apart (the paper, read literally).
    """

    num_clusters: int | Literal["auto"]
    max_clusters: int = 8
    restarts: int = 10
    space: Literal["embedding", "similarity"] = "embedding"
    groups: Literal["mixed", "pure"] = "mixed"

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.num_clusters != "auto" and self.num_clusters < 1:
            yield f'num_clusters = {self.num_clusters}: choose at least 1, or "auto"'
        if self.max_clusters < 1:
            yield f"max_clusters = {self.max_clusters}: choose at least 1"
        if self.restarts < 1:
            yield f"restarts = {self.restarts}: choose at least 1 (10 is usual)"

    def assign(
        self, embedding_ND: np.ndarray, device_ids: Sequence[str], architectures: Sequence[str], *,
        seed: int, note: Callable[[str], None],
    ) -> Clusters:  # fmt: skip
        """See `Clustering.assign`.

        Raises:
            ConfigError: fewer clusters than architectures with `groups = "pure"`.
        """
        check_embeddings(embedding_ND, device_ids)
        by_name = np.argsort(np.asarray(device_ids))  # seeds are drawn by row, so rows must not depend on who is first
        label_N = np.empty(len(device_ids), np.int64)
        label_N[by_name] = self._labels(embedding_ND[by_name], np.asarray(architectures)[by_name], seed, note)
        return make_clusters(device_ids, label_N, embedding_ND)

    def _labels(
        self, embedding_ND: np.ndarray, architecture_N: np.ndarray, seed: int, note: Callable[[str], None]
    ) -> np.ndarray:
        heard_N = np.linalg.norm(embedding_ND.astype(np.float64), axis=1) > 0
        if not heard_N.any():
            note("cluster: no device sent an embedding other than zero, so all are one domain")
            return np.zeros(len(embedding_ND), np.int64)
        points_MD = embedding_ND[heard_N].astype(np.float64)
        if self.space == "similarity":
            points_MD = similarity(points_MD)
        points_MD /= np.linalg.norm(points_MD, axis=1, keepdims=True)
        wanted = self._count(points_MD, seed, note)
        label_N = np.full(len(embedding_ND), -1)
        if self.groups == "mixed":
            label_N[heard_N] = spherical_kmeans(points_MD, wanted, self.restarts, seed)
        else:
            label_N[heard_N] = self._pure(points_MD, architecture_N[heard_N], wanted, seed)
        if not heard_N.all():
            note(f"cluster: {int((~heard_N).sum())} devices sent an empty embedding and joined the largest cluster")
        for row in np.flatnonzero(~heard_N):
            peers_N = heard_N & (architecture_N == architecture_N[row])
            peers_N = peers_N if self.groups == "pure" and peers_N.any() else heard_N
            label_N[row] = np.bincount(label_N[peers_N]).argmax()
        return label_N

    def _count(self, points_ND: np.ndarray, seed: int, note: Callable[[str], None]) -> int:
        count = len(points_ND)
        if self.num_clusters != "auto":
            if count < self.num_clusters:
                note(
                    f"cluster: {count} devices described their text, so there are {count} domains, not {self.num_clusters}"
                )
            return min(self.num_clusters, count)
        scores = {k: _silhouette(points_ND, spherical_kmeans(points_ND, k, self.restarts, seed))
                  for k in range(2, min(count - 1, self.max_clusters) + 1)}  # fmt: skip
        best = max(scores, key=lambda k: scores[k]) if scores else 1
        found = best if scores and scores[best] >= LEAST_SILHOUETTE else 1
        note(f'cluster: num_clusters = "auto" found {found} domains (silhouette {scores.get(found, 0.0):.2f})')
        return found

    def _pure(self, points_ND: np.ndarray, architecture_N: np.ndarray, wanted: int, seed: int) -> np.ndarray:
        names, of_N, sizes = np.unique(architecture_N, return_inverse=True, return_counts=True)
        if self.num_clusters == "auto":
            wanted = max(wanted, len(names))
        elif wanted < len(names):
            raise ConfigError([
                f'[cluster] num_clusters = {wanted}: groups = "pure" needs one for each of the {len(names)} architectures; '
                f'raise it to {len(names)} or more, or use groups = "mixed"'
            ])  # fmt: skip
        label_N = np.zeros(len(points_ND), np.int64)
        offset = 0
        for index, share in enumerate(_shares(sizes, wanted)):
            rows = np.flatnonzero(of_N == index)
            label_N[rows] = offset + spherical_kmeans(
                points_ND[rows], int(share), self.restarts, derive_seed(seed, index)
            )
            offset += int(share)
        return label_N


@clusterings.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomClusters:
    """Devices dealt out at random: the ablation that shows what clustering is worth.

    Attributes:
        num_clusters: K.
    """

    num_clusters: int

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.num_clusters < 1:
            yield f"num_clusters = {self.num_clusters}: choose at least 1"

    def assign(
        self, embedding_ND: np.ndarray, device_ids: Sequence[str], architectures: Sequence[str], *,
        seed: int, note: Callable[[str], None],
    ) -> Clusters:  # fmt: skip
        """See `Clustering.assign`."""
        check_embeddings(embedding_ND, device_ids)
        count = len(device_ids)
        if count < self.num_clusters:
            note(f"cluster: {count} devices uploaded, so there are {count} domains, not {self.num_clusters}")
        label_N = np.empty(count, np.int64)
        dealt_N = np.arange(count) % min(self.num_clusters, count)
        label_N[np.argsort(np.asarray(device_ids))] = np.random.default_rng(seed).permutation(dealt_N)
        return make_clusters(device_ids, label_N, embedding_ND)


def spherical_kmeans(points_ND: np.ndarray, clusters: int, restarts: int, seed: int) -> np.ndarray:
    """Labels (N,) in 0..K-1, none empty, that maximise the sum of cosines to the centroids; K <= N, unit rows."""
    best_N, best_objective = np.zeros(len(points_ND), np.int64), -np.inf
    for restart in range(restarts if clusters > 1 else 1):
        rng = np.random.default_rng(derive_seed(seed, "kmeans", restart))
        label_N = _lloyd(points_ND, _seeds(points_ND, clusters, rng))
        objective = _objective(points_ND, label_N, clusters)
        if objective > best_objective + 1e-12:
            best_N, best_objective = label_N, objective
    return best_N


def _seeds(points_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ with weight 1 - max cosine to a chosen seed."""
    chosen = [int(rng.integers(len(points_ND)))]
    distance_N = np.full(len(points_ND), np.inf)
    while len(chosen) < clusters:
        distance_N = np.minimum(distance_N, np.clip(1 - points_ND @ points_ND[chosen[-1]], 0, None))
        distance_N[chosen] = 0
        total = float(distance_N.sum())
        if total <= 1e-12:  # only duplicates are left: any device that is not a seed yet
            chosen.append(next(i for i in range(len(points_ND)) if i not in chosen))
        else:
            chosen.append(int(rng.choice(len(points_ND), p=distance_N / total)))
    return points_ND[chosen]


def _lloyd(points_ND: np.ndarray, centroid_KD: np.ndarray) -> np.ndarray:
    label_N = np.full(len(points_ND), -1)
    for _ in range(MAX_ITERATIONS):
        cosine_NK = points_ND @ centroid_KD.T
        new_N = _fill_empty(cosine_NK.argmax(1), cosine_NK)
        if (new_N == label_N).all():
            break
        label_N = new_N
        sums_KD = sum_by_cluster(points_ND, label_N, len(centroid_KD))
        norm_K1 = np.linalg.norm(sums_KD, axis=1, keepdims=True)
        centroid_KD = np.where(norm_K1 > 0, sums_KD / np.where(norm_K1 > 0, norm_K1, 1), centroid_KD)
    return label_N


def _fill_empty(label_N: np.ndarray, cosine_NK: np.ndarray) -> np.ndarray:
    """Give each empty cluster the device that fits its own (of two members or more) worst."""
    label_N = label_N.copy()
    sizes = np.bincount(label_N, minlength=cosine_NK.shape[1])
    for cluster in np.flatnonzero(sizes == 0):
        own_N = cosine_NK[np.arange(len(label_N)), label_N]
        movable_N = np.where(sizes[label_N] >= 2, own_N, np.inf)
        worst = int(movable_N.argmin())
        sizes[label_N[worst]] -= 1
        label_N[worst] = cluster
        sizes[cluster] = 1
    return label_N


def _objective(points_ND: np.ndarray, label_N: np.ndarray, clusters: int) -> float:
    return float(np.linalg.norm(sum_by_cluster(points_ND, label_N, clusters), axis=1).sum())


def _silhouette(points_ND: np.ndarray, label_N: np.ndarray) -> float:
    """Mean silhouette with 1 - cosine as distance; 0 for a device alone in its cluster."""
    clusters = int(label_N.max()) + 1
    sums_KD = sum_by_cluster(points_ND, label_N, clusters)
    size_K = np.bincount(label_N, minlength=clusters)
    own = np.arange(len(label_N)), label_N
    distance_NK = 1 - points_ND @ sums_KD.T / size_K
    own_size_N = size_K[label_N]
    within_N = distance_NK[own] * own_size_N / np.maximum(own_size_N - 1, 1)
    distance_NK[own] = np.inf
    nearest_N = distance_NK.min(1)
    score_N = (nearest_N - within_N) / np.maximum(np.maximum(nearest_N, within_N), 1e-12)
    return float(np.where(own_size_N > 1, score_N, 0.0).mean())


def _shares(sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Largest-remainder shares of `wanted`, each at least 1 and at most its size where possible."""
    share = np.ones(len(sizes), np.int64)
    for _ in range(wanted - len(sizes)):
        room = np.where(share < sizes, sizes / sizes.sum() * wanted - share, -np.inf)
        if not np.isfinite(room).any():
            break
        share[int(room.argmax())] += 1
    return share
