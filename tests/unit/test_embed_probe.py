# SPDX-License-Identifier: Apache-2.0
"""Properties of server-side probing: devices send nothing, gains on a domain's documents point into that domain."""

from __future__ import annotations

import numpy as np
import pytest
from domains_world import public_text, unit

from deepfusion.devices.noise import Noise
from deepfusion.stages.cluster import KMeans
from deepfusion.stages.embed import ServerProbe, embeddings

TOPICS = 3
PUBLIC = public_text(TOPICS)
TOPIC_U = np.repeat(np.arange(TOPICS), len(PUBLIC) // TOPICS)
PROBE = ServerProbe(documents=150)


def gains(devices: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What training gained each device on each probe: most on its own topic, something everywhere, and noise."""
    rng, rows_Q = np.random.default_rng(seed), PROBE.probes(PUBLIC, 0)
    topic_N = np.arange(devices) % TOPICS
    own_NQ = (topic_N[:, None] == TOPIC_U[rows_Q]) * 0.3
    hardness_Q = rng.normal(0, 1, len(rows_Q))  # some documents become easier for everybody
    return own_NQ + hardness_Q + rng.normal(0, 0.1, own_NQ.shape), topic_N


def test_devices_send_no_number_and_receive_none() -> None:
    assert embeddings["probe"] is ServerProbe
    assert PROBE.dimension == 0
    assert PROBE.publish(PUBLIC, 0) == {}
    assert PROBE.embed(PUBLIC, {}, 0, lambda: Noise(bytes(32))).shape == (0,)


def test_probes_are_distinct_documents_that_the_seed_decides() -> None:
    rows_Q = PROBE.probes(PUBLIC, 0)
    assert len(set(rows_Q.tolist())) == 150
    assert np.array_equal(rows_Q, PROBE.probes(PUBLIC, 0))
    assert not np.array_equal(rows_Q, PROBE.probes(PUBLIC, 1))
    assert len(ServerProbe(documents=10**6).probes(PUBLIC, 0)) == len(PUBLIC)


@pytest.mark.parametrize("seed", range(3))
def test_domains_are_recovered_and_their_documents_lie_near(seed: int) -> None:
    gain_NQ, topic_N = gains(9, seed)
    document_UD = PROBE.embed_documents(PUBLIC, {}, 0)
    embedding_ND = PROBE.embeddings_of(gain_NQ, document_UD[PROBE.probes(PUBLIC, 0)])
    np.testing.assert_allclose(np.linalg.norm(embedding_ND, axis=1), 1, atol=1e-3)
    names = tuple(f"d{n}" for n in range(9))
    found = KMeans(num_clusters=TOPICS).assign(embedding_ND, names, ("x",) * 9, seed=seed, note=print)
    assert all(len(set(topic_N[found.label_N == k].tolist())) == 1 for k in range(TOPICS))
    closeness_UK = document_UD @ found.centroid_KD.T
    topic_K = [int(topic_N[found.label_N == k][0]) for k in range(TOPICS)]
    nearest_U = np.asarray(topic_K)[closeness_UK.argmax(1)]
    assert (nearest_U == TOPIC_U).mean() > 0.75, "of all public documents, probed or not"


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_a_model_that_overflows_has_no_direction_and_moves_nobodys(wrong: float) -> None:
    gain_NQ, _ = gains(6)
    document_QD = unit(np.random.default_rng(0).normal(size=(gain_NQ.shape[1], 8)))
    bad_NQ = np.insert(gain_NQ, 2, gain_NQ[0], axis=0)
    bad_NQ[2, 5] = wrong
    found_ND = PROBE.embeddings_of(bad_NQ, document_QD)
    assert not found_ND[2].any()
    assert np.array_equal(np.delete(found_ND, 2, axis=0), PROBE.embeddings_of(gain_NQ, document_QD))


def test_a_fleet_of_one_and_equal_devices_are_no_error() -> None:
    document_QD = unit(np.random.default_rng(0).normal(size=(5, 8)))
    one = PROBE.embeddings_of(np.arange(5.0)[None], document_QD)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-3)
    assert not PROBE.embeddings_of(np.ones((3, 5)), document_QD).any(), "no device is told from another: all zero"


@pytest.mark.parametrize(("options", "says"), [({"documents": 1}, "documents = 1"), ({"width": 4}, "width = 4")])
def test_impossible_options_are_named_with_their_value(options: dict[str, int], says: str) -> None:
    (fault,) = ServerProbe(**options).faults()
    assert fault.startswith(says)
    assert "; " in fault
