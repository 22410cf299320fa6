# SPDX-License-Identifier: Apache-2.0
"""Properties of the hashed TF-IDF embedding (method, sections 4A and 14)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from domains_world import COMMON, corpus_of, documents, public_text
from scipy.stats import norm

from deepfusion.devices.noise import Noise
from deepfusion.errors import UploadError
from deepfusion.stages.cluster import KMeans, similarity, similarity_margin
from deepfusion.stages.embed import HashedTfidf, embeddings
from deepfusion.stages.embed.base import projection
from deepfusion.types import State

TOPICS, DEVICES = 4, 16
TRUE_N = np.arange(DEVICES) % TOPICS


@pytest.fixture(scope="module")
def published() -> State:
    return HashedTfidf().publish(public_text(TOPICS), 0)


def embed_texts(texts: list[str], published: State, embedding: HashedTfidf | None = None, noise: int = 0) -> np.ndarray:
    return (embedding or HashedTfidf()).embed(corpus_of(texts), published, 0, lambda: Noise(bytes([noise] * 32)))


def fleet(published: State, seed: int, topical: float = 0.2) -> np.ndarray:
    return np.stack([embed_texts(documents(TRUE_N[n], 40, seed + n, topical), published) for n in range(DEVICES)])


def same_partition(a_N: np.ndarray, b_N: np.ndarray) -> bool:
    return bool(((a_N[:, None] == a_N) == (b_N[:, None] == b_N)).all())


def test_it_is_the_default_name_of_the_registry() -> None:
    assert embeddings["tfidf"] is HashedTfidf
    assert list(HashedTfidf().faults()) == []


def test_an_embedding_is_a_unit_vector_of_float16_numbers(published: State) -> None:
    vector_D = embed_texts(documents(0, 5, 0), published)
    assert vector_D.shape == (64,)
    assert vector_D.dtype == np.float32
    assert np.array_equal(vector_D, vector_D.astype(np.float16).astype(np.float32))
    assert np.linalg.norm(vector_D) == pytest.approx(1, abs=1e-3)


def test_the_order_of_documents_does_not_change_a_bit(published: State) -> None:
    texts = documents(1, 40, 3)
    shuffled = [texts[index] for index in np.random.default_rng(0).permutation(len(texts))]
    assert np.array_equal(embed_texts(texts, published), embed_texts(shuffled, published))


def test_two_devices_with_one_corpus_have_cosine_one(published: State) -> None:
    twice = [embed_texts(documents(2, 20, 5), published) for _ in range(2)]
    assert np.array_equal(*twice)
    assert similarity(np.stack(twice)) == pytest.approx(1, abs=1e-12)


def test_case_width_and_composition_of_letters_do_not_matter(published: State) -> None:
    """NFKC and lower case: full-width letters, ligatures and decomposed accents are the letters that they mean."""
    plain, fancy = ["the office résumé topic0x1"], ["ＴＨＥ oﬃce re\u0301sume\u0301 TOPIC0X1"]
    assert np.array_equal(embed_texts(plain, published), embed_texts(fancy, published))


def test_scripts_without_spaces_are_told_apart_sign_by_sign() -> None:
    medicine, law = ["患者服用药物治疗疾病", "医生给患者药物"], ["法院判决合同无效", "合同违法由法院判决"]
    embedding = HashedTfidf()
    published = embedding.publish(corpus_of(medicine + law), 0)
    unseen = [embed_texts([text], published) for text in ("药物治疗患者的疾病", "患者与医生", "判决合同违法")]
    cosine_NN = similarity(np.stack(unseen))
    assert cosine_NN[0, 1] > 0.3
    assert cosine_NN[0, 2] < 0


def test_pythons_hash_salt_does_not_change_a_bit(published: State) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit')\n"
        "from domains_world import corpus_of, documents, public_text\n"
        "from deepfusion.stages.embed.tfidf import HashedTfidf\n"
        "from deepfusion.devices.noise import Noise\n"
        "e = HashedTfidf(); p = e.publish(public_text(4), 0)\n"
        "print(e.embed(corpus_of(documents(0, 5, 0)), p, 0, lambda: Noise(bytes(32))).tobytes().hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4242"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == embed_texts(documents(0, 5, 0), published).tobytes().hex()


def test_the_projection_is_made_of_fair_signs_and_of_the_seed_only() -> None:
    matrix_HD = projection(4096, 64, seed=7)
    assert np.array_equal(matrix_HD, projection(4096, 64, seed=7))
    assert np.abs(matrix_HD) == pytest.approx(1 / 8)
    assert abs(matrix_HD.mean()) < 0.001
    other_HD = projection(4096, 64, seed=8)
    assert abs((matrix_HD * other_HD).sum(1).mean()) < 0.01


def test_the_projection_of_a_seed_never_changes() -> None:
    """Devices of any version must agree with the server; these signs are part of the wire format."""
    signs = np.sign(projection(3, 6, seed=0)).astype(int).tolist()
    assert signs == [[1, 1, 1, 1, 1, -1], [1, -1, 1, 1, 1, -1], [1, 1, 1, 1, -1, 1]]


def test_projected_cosines_are_off_by_about_one_over_root_dimension() -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(40, 2048))
    error_NN = similarity(vectors_ND @ projection(2048, 64, seed=0)) - similarity(vectors_ND)
    assert error_NN[np.triu_indices(40, 1)].std() == pytest.approx(1 / 8, rel=0.15)


@pytest.mark.parametrize("seed", [0, 100, 200, 300])
def test_domains_of_disjoint_words_are_recovered_by_any_restart(published: State, seed: int) -> None:
    embedding_ND = fleet(published, seed)
    assert similarity_margin(embedding_ND, TRUE_N) > 0.5
    ids = [f"device-{n}" for n in range(DEVICES)]
    found = KMeans(num_clusters=TOPICS, restarts=10).assign(embedding_ND, ids, ["a"] * DEVICES, seed=seed, note=print)
    assert same_partition(found.label_N, TRUE_N)


def test_centring_is_what_tells_domains_apart(published: State) -> None:
    """With 10% topical words raw cosines across domains are high, centred ones near zero (method, section 4)."""
    raw = {**published, "mean": torch.zeros_like(published["mean"])}
    across_NN = TRUE_N[:, None] != TRUE_N
    cosine = {name: similarity(fleet(p, 0, topical=0.1)) for name, p in (("raw", raw), ("centred", published))}
    assert cosine["raw"][across_NN].mean() > 0.6
    assert abs(cosine["centred"][across_NN].mean()) < 0.25
    within_NN = ~across_NN & ~np.eye(DEVICES, dtype=bool)
    margins = {name: values[within_NN].mean() - values[across_NN].mean() for name, values in cosine.items()}
    assert margins["centred"] > 2 * margins["raw"]


@pytest.mark.parametrize("texts", [[], [""], ["", "  \n "], ["!?", "x"]])
def test_text_without_a_word_gives_the_zero_vector(published: State, texts: list[str]) -> None:
    assert not embed_texts(texts, published).any()
    assert not HashedTfidf().embed_documents(corpus_of(texts), published, 0).any()


def test_empty_documents_change_nothing(published: State) -> None:
    texts = documents(0, 10, 0)
    assert np.array_equal(embed_texts(texts, published), embed_texts(["", *texts, " "], published))


def test_documents_lie_near_their_own_domain(published: State) -> None:
    embedding = HashedTfidf()
    texts = [text for topic in range(TOPICS) for text in documents(topic, 60, 7, topical=0.5)]
    rows_UD = embedding.embed_documents(corpus_of(texts), published, 0)
    assert rows_UD.shape == (60 * TOPICS, 64)
    assert np.linalg.norm(rows_UD, axis=1) == pytest.approx(1)
    centroids_KD = np.stack([embed_texts(documents(topic, 60, 1), published) for topic in range(TOPICS)])
    assert ((rows_UD @ centroids_KD.T).argmax(1) == np.arange(TOPICS).repeat(60)).mean() > 0.85


def test_documents_come_in_chunks_and_no_chunk_border_shows(published: State, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = public_text(2)
    whole = HashedTfidf().embed_documents(corpus, published, 0)
    monkeypatch.setattr("deepfusion.stages.embed.tfidf.CHUNK", 7)
    assert HashedTfidf().embed_documents(corpus, published, 0) == pytest.approx(whole, abs=1e-12)
    again = HashedTfidf().publish(public_text(TOPICS), 0)
    assert all(torch.equal(again[name], published[name]) for name in published)


def test_privacy_noise_has_the_deviation_of_the_gaussian_mechanism(published: State) -> None:
    """s = (2 C / U) sqrt(2 ln(1.25 / delta)) / epsilon on the mean of clipped documents (method, section 4)."""
    embedding = HashedTfidf(epsilon=0.5, delta=1e-5, clip=1.5)
    rows_UD = np.random.default_rng(0).normal(size=(100, 64))
    rows_UD *= 4 / np.linalg.norm(rows_UD, axis=1, keepdims=True)
    noisy = np.stack([embedding._private_mean(rows_UD, 0.5, Noise(seed.to_bytes(32, "big"))) for seed in range(300)])
    clipped_D = (rows_UD * 1.5 / 4).mean(0)
    expected = 2 * 1.5 / 100 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.5
    assert (noisy - clipped_D).std() == pytest.approx(expected, rel=0.02)
    assert abs((noisy - clipped_D).mean()) < 3 * expected / math.sqrt(300 * 64)


def test_privacy_noise_is_the_devices_own_and_leaves_large_corpora_recognisable(published: State) -> None:
    private = HashedTfidf(epsilon=1.0)
    texts = documents(0, 1500, 0)
    clear = embed_texts(texts, published)
    first, again, other = (embed_texts(texts, published, private, noise) for noise in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert clear @ first > 0.8
    assert not embed_texts([], published, private).any()


def test_common_words_alone_say_nothing_of_any_domain(published: State) -> None:
    vector_D = embed_texts([" ".join(COMMON)], published)
    centroids_KD = np.stack([embed_texts(documents(topic, 60, 1), published) for topic in range(TOPICS)])
    assert np.abs(centroids_KD @ vector_D).max() < 0.5


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
def test_the_gaussian_mechanisms_noise_suffices_for_its_epsilon_and_delta(epsilon: float, delta: float) -> None:
    """By the exact curve of a Gaussian (Balle and Wang 2018, theorem 8), for a sensitivity of one."""
    deviation = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    upper, lower = 0.5 / deviation - epsilon * deviation, -0.5 / deviation - epsilon * deviation
    assert norm.cdf(upper) - math.exp(epsilon) * norm.cdf(lower) <= delta


def test_another_document_moves_the_mean_by_no_more_than_the_noise_is_made_for(published: State) -> None:
    """The sensitivity 2 C / U when one document is replaced, however the documents look and whatever the server's mean is."""
    embedding, idf = HashedTfidf(epsilon=1.0, clip=0.5), published["idf"]
    mean = torch.nn.functional.normalize(torch.ones_like(idf).float(), dim=0) * 0.999
    silent = type("Silent", (Noise,), {"stream": lambda self, number: SimpleNamespace(normal=torch.zeros)})(b"")
    found: list[np.ndarray] = []
    for texts in (["topic0x1 topic0x2", "", "common3"], ["topic0x1 topic0x2", "topic1x1 topic1x4", "common3"]):
        rows: list[np.ndarray] = []
        for text in texts:
            x = next(embedding._weighted(corpus_of([text]), idf.double().numpy())) @ projection(2**15, 64, 0)
            rows.append(x[0] - mean.double().numpy() @ projection(2**15, 64, 0))
        found.append(embedding._private_mean(np.stack(rows), 1.0, silent))
    assert 0 < np.linalg.norm(found[0] - found[1]) <= 2 * 0.5 / 3


LYING: dict[str, Callable[[State], State]] = {
    r'published "idf" is none': lambda p: {"mean": p["mean"]},
    r'published "mean" is torch.float16 \[3\]': lambda p: {**p, "mean": p["mean"][:3]},
    r'published "idf" is torch.int64': lambda p: {**p, "idf": p["idf"].long()},
    r'published "idf" is not finite': lambda p: {**p, "idf": p["idf"] * math.nan},
    r"published idf from -1 to 6": lambda p: {**p, "idf": p["idf"].index_fill(0, torch.tensor([7]), -1.0)},
    r"published idf from 0 to 6": lambda p: {**p, "idf": p["idf"].index_fill(0, torch.tensor([7]), 0.0)},
    r"published idf from 6.* to 100, possible are 1 to 23.18": lambda p: {**p, "idf": torch.full_like(p["idf"], 6.0)
                                                                         .index_fill(0, torch.tensor([7]), 100.0)},
    r"weighs a word 20 times as much as the median one, allowed are 3": lambda p: {
        **p, "idf": torch.ones_like(p["idf"]).index_fill(0, torch.tensor([7]), 20.0)},
    r"the mean of its documents has length 2, at most 1": lambda p: {
        **p, "mean": torch.zeros_like(p["mean"]).index_fill(0, torch.tensor([7]), 2.0)},
}  # fmt: skip


@pytest.mark.parametrize("said", LYING)
def test_statistics_that_no_public_text_has_are_refused(published: State, said: str) -> None:
    with pytest.raises(UploadError, match=f"server: .*{said}"):
        embed_texts(documents(0, 5, 0), LYING[said](published))


def test_too_large_a_projection_is_named_with_the_dimension_that_fits() -> None:
    assert list(HashedTfidf(dimension=64, hash_bits=22).faults()) == []
    (fault,) = HashedTfidf(dimension=16384, hash_bits=15).faults()
    assert fault == "dimension = 16384: too large for hash_bits = 15; choose 8192 at most"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dimension": 1}, "dimension = 1"), ({"hash_bits": 4}, "hash_bits = 4"), ({"epsilon": 0.0}, "epsilon = 0.0"),
        ({"epsilon": 2.0}, "epsilon = 2.0"), ({"delta": 1.0}, "delta = 1.0"), ({"clip": 0.0}, "clip = 0.0"),
    ],
)  # fmt: skip
def test_impossible_options_are_named_with_their_value(options: dict[str, float], says: str) -> None:
    assert [fault.startswith(says) for fault in HashedTfidf(**options).faults()] == [True]
