# SPDX-License-Identifier: Apache-2.0
"""Properties of the clusterings (method, sections 5 and 14)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from domains_world import unit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score, silhouette_score

from deepfusion.errors import ConfigError, UploadError
from deepfusion.stages.cluster import Clustering, KMeans, RandomClusters, clusterings, similarity, similarity_margin
from deepfusion.stages.cluster.kmeans import _shares, _silhouette, spherical_kmeans
from deepfusion.types import Clusters

ARCHITECTURES = ("gpt2", "llama", "olmo2")


def names(count: int) -> tuple[str, ...]:
    return tuple(f"device-{n}" for n in range(count))


def assign(clustering: Clustering, embedding_ND: np.ndarray, seed: int = 0, **changes: Any) -> Clusters:
    count = len(embedding_ND)
    architectures = [ARCHITECTURES[n % 3] for n in range(count)]
    given = {"device_ids": names(count), "architectures": architectures, "note": lambda _: None, **changes}
    return clustering.assign(embedding_ND, seed=seed, **given)


def domains(count: int, topics: int, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around `topics` random directions, and which is which."""
    rng = np.random.default_rng(seed)
    centre_KD = unit(rng.normal(size=(topics, 64)))
    true_N = np.arange(count) % topics
    return unit(centre_KD[true_N] + spread * unit(rng.normal(size=(count, 64)))), true_N


def is_partition(clusters: Clusters, count: int, size: int) -> bool:
    return (
        len(clusters.label_N) == count
        and set(clusters.label_N.tolist()) == set(range(size))
        and sorted(sum((clusters.members(k) for k in range(size)), ())) == sorted(clusters.device_ids)
    )


rows = st.integers(1, 14).flatmap(
    # Few different values: duplicates, opposites and zero vectors are the rule, not the exception.
    lambda n: arrays(np.float64, (n, 3), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
)


@settings(max_examples=150, deadline=None)
@given(
    rows=rows, wanted=st.integers(1, 16), seed=st.integers(0, 3), space=st.sampled_from(["embedding", "similarity"]),
    groups=st.sampled_from(["mixed", "pure"]),
)  # fmt: skip
def test_clusters_are_a_partition_whatever_comes(
    rows: np.ndarray, wanted: int, seed: int, space: Any, groups: Any
) -> None:
    norm_N1 = np.linalg.norm(rows, axis=1, keepdims=True)
    embedding_ND = rows / np.where(norm_N1 > 0, norm_N1, 1)
    heard_N = norm_N1[:, 0] > 0
    present = len({n % 3 for n in np.flatnonzero(heard_N)})
    clustering = KMeans(num_clusters=wanted, restarts=2, space=space, groups=groups)
    if groups == "pure" and min(wanted, heard_N.sum()) < present:
        with pytest.raises(ConfigError, match=r"\[cluster\] num_clusters"):
            assign(clustering, embedding_ND, seed)
        return
    clusters = assign(clustering, embedding_ND, seed)
    size = min(wanted, max(int(heard_N.sum()), 1))
    assert clusters.num_clusters == size
    assert is_partition(clusters, len(rows), size)
    first = [int(np.flatnonzero(clusters.label_N == k)[0]) for k in range(size)]
    assert first == sorted(first)
    norm_K = np.linalg.norm(clusters.centroid_KD, axis=1)
    assert ((np.abs(norm_K - 1) < 1e-9) | (norm_K == 0)).all()
    again = assign(clustering, embedding_ND, seed)
    assert np.array_equal(again.label_N, clusters.label_N)


@settings(max_examples=60, deadline=None)
@given(rows=rows, wanted=st.integers(1, 6), order_seed=st.integers(0, 99), groups=st.sampled_from(["mixed", "random"]))
def test_permuting_devices_permutes_labels_only(rows: np.ndarray, wanted: int, order_seed: int, groups: str) -> None:
    clustering = RandomClusters(num_clusters=wanted) if groups == "random" else KMeans(num_clusters=wanted, restarts=2)
    order = np.random.default_rng(order_seed).permutation(len(rows))
    straight = assign(clustering, rows)
    ids = [names(len(rows))[n] for n in order]
    permuted = assign(clustering, rows[order], device_ids=ids, architectures=["a"] * len(rows))
    assert {frozenset(straight.members(k)) for k in range(straight.num_clusters)} == {
        frozenset(permuted.members(k)) for k in range(permuted.num_clusters)
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("space", ["embedding", "similarity"])
def test_clear_domains_are_recovered_by_any_seed(seed: int, space: Any) -> None:
    embedding_ND, true_N = domains(16, 4, seed)
    found = assign(KMeans(num_clusters=4, space=space), embedding_ND, seed)
    assert adjusted_rand_score(true_N, found.label_N) == 1.0
    assert found.label_N[:4].tolist() == [0, 1, 2, 3]
    sums_KD = np.stack([embedding_ND[true_N == k].sum(0) for k in range(4)])
    assert found.centroid_KD == pytest.approx(unit(sums_KD))


def test_no_seed_permutes_the_clusters() -> None:
    embedding_ND, _ = domains(20, 5)
    labels = [assign(KMeans(num_clusters=5), embedding_ND, seed).label_N for seed in range(8)]
    assert all(np.array_equal(label_N, labels[0]) for label_N in labels)


def test_more_restarts_never_fit_worse() -> None:
    points_ND = unit(np.random.default_rng(3).normal(size=(60, 8)))

    def objective(restarts: int) -> float:
        label_N = spherical_kmeans(points_ND, 6, restarts, seed=1)
        return sum(float(np.linalg.norm(points_ND[label_N == k].sum(0))) for k in range(6))

    values = [objective(restarts) for restarts in (1, 3, 10)]
    assert values == sorted(values)
    label_N = spherical_kmeans(points_ND, 6, 10, seed=1)
    centroid_KD = unit(np.stack([points_ND[label_N == k].sum(0) for k in range(6)]))
    assert np.array_equal((points_ND @ centroid_KD.T).argmax(1), label_N), "it did not run to convergence"


def test_fewer_devices_than_clusters_are_each_their_own_and_it_is_said() -> None:
    notes: list[str] = []
    embedding_ND, _ = domains(3, 3)
    found = assign(KMeans(num_clusters=8), embedding_ND, note=notes.append)
    assert found.label_N.tolist() == [0, 1, 2]
    assert len(notes) == 1
    assert "3" in notes[0]
    assert "not 8" in notes[0]


def test_a_device_without_text_joins_the_largest_cluster_and_it_is_said() -> None:
    embedding_ND, _ = domains(9, 3)
    crowd_ND = np.concatenate([np.zeros((1, 64)), embedding_ND, embedding_ND[[2, 2]]])
    notes: list[str] = []
    found = assign(KMeans(num_clusters=3), crowd_ND, note=notes.append)
    assert found.label_N[0] == found.label_N[3]
    assert np.array_equal(found.label_N[1:] == found.label_N[3], np.arange(11) % 3 == np.r_[[2] * 9, 0, 1])
    assert any("1 devices sent an empty embedding" in note for note in notes)
    pure = assign(KMeans(num_clusters=3, groups="pure"), crowd_ND)
    assert pure.label_N[0] == pure.label_N[3], "with pure groups it joins its own architecture"


def test_a_fleet_without_any_text_is_one_domain() -> None:
    found = assign(KMeans(num_clusters=3), np.zeros((5, 8)))
    assert found.label_N.tolist() == [0] * 5
    assert found.num_clusters == 1


@pytest.mark.parametrize("topics", [2, 3, 5])
def test_auto_finds_the_number_of_clear_domains(topics: int) -> None:
    embedding_ND, true_N = domains(20, topics)
    notes: list[str] = []
    found = assign(KMeans(num_clusters="auto", max_clusters=8), embedding_ND, note=notes.append)
    assert adjusted_rand_score(true_N, found.label_N) == 1.0
    assert f"found {topics} domains" in notes[0]


def test_auto_sees_one_domain_where_there_is_one_and_stays_within_its_limit() -> None:
    one_ND = np.repeat(unit(np.ones((1, 8))), 6, axis=0)
    assert assign(KMeans(num_clusters="auto"), one_ND).num_clusters == 1
    noise_ND = unit(np.random.default_rng(0).normal(size=(24, 256)))
    assert assign(KMeans(num_clusters="auto"), noise_ND).num_clusters == 1
    many_ND, _ = domains(24, 8)
    assert assign(KMeans(num_clusters="auto", max_clusters=4), many_ND).num_clusters <= 4


def test_the_silhouette_is_scikit_learns() -> None:
    points_ND = unit(np.random.default_rng(0).normal(size=(30, 6)))
    label_N = np.r_[np.arange(29) % 4, 4]
    expected = silhouette_score(points_ND, label_N, metric="cosine")
    assert _silhouette(points_ND, label_N) == pytest.approx(expected, abs=1e-9)


def test_pure_groups_never_mix_architectures_and_equal_mixed_ones_when_those_are_pure() -> None:
    embedding_ND, true_N = domains(18, 6)
    architectures = [ARCHITECTURES[n // 2] for n in true_N]
    pure = assign(KMeans(num_clusters=6, groups="pure"), embedding_ND, architectures=architectures)
    mixed = assign(KMeans(num_clusters=6), embedding_ND, architectures=architectures)
    assert np.array_equal(pure.label_N, mixed.label_N)
    shuffled = assign(KMeans(num_clusters=6, groups="pure"), embedding_ND)
    for cluster in range(6):
        assert len({n % 3 for n in np.flatnonzero(shuffled.label_N == cluster)}) == 1


def test_pure_groups_with_auto_give_each_architecture_at_least_one_domain() -> None:
    embedding_ND, _ = domains(12, 1, spread=0.0)
    found = assign(KMeans(num_clusters="auto", groups="pure"), embedding_ND)
    assert found.label_N.tolist() == [0, 1, 2] * 4


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), extra=st.integers(0, 40))
def test_shares_sum_to_what_is_wanted_and_give_each_one(sizes: list[int], extra: int) -> None:
    wanted = min(len(sizes) + extra, sum(sizes))
    share = _shares(np.asarray(sizes), wanted)
    assert share.sum() == wanted
    assert (share >= 1).all()
    assert (share <= sizes).all()


def test_random_clusters_are_as_even_as_can_be_and_depend_on_the_seed() -> None:
    embedding_ND, _ = domains(18, 4)
    labels = [assign(RandomClusters(num_clusters=4), embedding_ND, seed).label_N for seed in range(5)]
    assert all(sorted(np.bincount(label_N)) == [4, 4, 5, 5] for label_N in labels)
    assert len({tuple(label_N) for label_N in labels}) > 1


def test_cosines_are_symmetric_with_ones_on_the_diagonal() -> None:
    rows_ND = np.random.default_rng(0).normal(size=(9, 5))
    rows_ND[3] = 0
    rows_ND[5] = -2 * rows_ND[4]
    cosine_NN = similarity(rows_ND)
    assert np.array_equal(cosine_NN, cosine_NN.T)
    assert np.array_equal(np.diag(cosine_NN), np.ones(9))
    assert np.abs(cosine_NN).max() <= 1
    assert cosine_NN[4, 5] == pytest.approx(-1)
    assert not np.delete(cosine_NN[3], 3).any()


def test_the_margin_is_within_minus_across() -> None:
    rows_ND = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert similarity_margin(rows_ND, np.array([0, 0, 1, 1])) == pytest.approx(1)
    assert similarity_margin(rows_ND, np.array([0, 1, 0, 1])) == pytest.approx(-0.5)
    assert similarity_margin(rows_ND, np.zeros(4, int)) == 0


@pytest.mark.parametrize("name", ["kmeans", "random"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused_with_its_device(name: str, bad: float) -> None:
    embedding_ND, _ = domains(4, 2)
    embedding_ND[2, 5] = bad
    with pytest.raises(UploadError, match="device-2: the embedding holds NaN"):
        assign(clusterings[name](num_clusters=2), embedding_ND)
    with pytest.raises(UploadError, match="no upload"):
        assign(clusterings[name](num_clusters=2), np.zeros((0, 64)))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"num_clusters": 0}, "num_clusters = 0"), ({"max_clusters": 0}, "max_clusters = 0"), ({"restarts": 0}, "restarts")],
)  # fmt: skip
def test_impossible_options_are_named_with_their_value(options: dict[str, int], says: str) -> None:
    assert [fault.startswith(says) for fault in KMeans(**{"num_clusters": 4, **options}).faults()] == [True]
    assert [*RandomClusters(num_clusters=0).faults()] != []


def test_ten_thousand_devices_take_seconds() -> None:
    embedding_ND, true_N = domains(10_000, 16, spread=0.8)
    began = time.process_time()
    found = assign(KMeans(num_clusters=16), embedding_ND)
    assert time.process_time() - began < 20
    assert adjusted_rand_score(true_N, found.label_N) > 0.99
