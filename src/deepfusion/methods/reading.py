# SPDX-License-Identifier: Apache-2.0
"""The public text that the server reads for each domain: which documents, judged how, mixed with what (method, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from deepfusion.data.mixed import MixedText
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import load_corpus, write_corpus
from deepfusion.methods.base import Site
from deepfusion.stages import evaluate, generate
from deepfusion.stages.proxy import Judge
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, Proxy, Text

Weights = Sequence[np.ndarray | None]
"""For each domain the weight of every public document in its text, None where all weigh alike."""


def domain_weights(closeness_UK: np.ndarray, text: Literal["domain", "uniform"], temperature: float) -> Weights:
    """The public text of each domain: what is near it, or all alike (method, section 7).

    Document u is drawn for domain i with probability proportional to exp(cos(e_u, c_i) / temperature).
    """
    if text == "uniform":
        return [None] * closeness_UK.shape[1]
    return [np.exp((near_U - near_U.max()) / temperature) for near_U in closeness_UK.T]


def weights_key(weights: Weights) -> list[list[float] | None]:
    """The weights as part of a stage's key."""
    return [None if weights_U is None else np.round(weights_U, 6).tolist() for weights_U in weights]


def judge_on_public_text(site: Site, weights: Weights, count: int) -> Judge:
    """Compares models by their log-perplexity on `count` public documents of a domain, drawn by the domain's weights.

    Where these have no token to predict, all models are alike: 0.
    """
    public = site.data.public
    texts: list[Corpus] = []
    for domain, weights_U in enumerate(weights):
        generator = np.random.default_rng(derive_seed(site.seed, "judge", domain))
        share_U = None if weights_U is None else weights_U / weights_U.sum()
        rows = generator.choice(len(public), size=min(count, len(public)), replace=False, p=share_U)
        texts.append(public.select(np.sort(rows)))

    def judge(domain: int, model: PreTrainedModel) -> float:
        score = sum(evaluate.score_documents(model, texts[domain], site.sequence_length), evaluate.Score())
        return score.log_perplexity if score.tokens else 0.0

    return judge


def mean_judge(site: Site, weights: Weights, count: int) -> Callable[[PreTrainedModel], float]:
    """A model's mean log-perplexity over the domains, as `judge_on_public_text` finds it."""
    judge = judge_on_public_text(site, weights, count)
    return lambda model: float(np.mean([judge(domain, model) for domain in range(len(weights))]))


def domain_texts(
    site: Site, weights: Weights, teachers: Sequence[Sequence[Proxy]], options: generate.GenerateOptions
) -> list[Text]:
    """Each domain's training text: its part of the public text, mixed with what its teachers wrote, if it has any."""
    share, length = options.share, site.sequence_length
    texts: list[Text] = []
    for k, (weights_U, domain_teachers) in enumerate(zip(weights, teachers, strict=True)):
        public = PackedText(site.data.public, length, derive_seed(site.seed, "text", k), weights_U)
        if share and domain_teachers:
            corpus = written(site, k, domain_teachers, options)
            own = PackedText(corpus, length, derive_seed(site.seed, "written", k))
            texts.append(MixedText(public, own, share))
        else:
            texts.append(public)
    site.reached("generated")
    return texts


def written(site: Site, domain: int, teachers: Sequence[Proxy], options: generate.GenerateOptions) -> Corpus:
    """Text that a domain's teachers wrote."""

    def make(folder: Path) -> None:
        corpus = generate.sample(
            teachers, domain=f"domain-{domain}", options=options, sequence_length=site.sequence_length,
            seed=site.seed, tokenizer_folder=site.data.tokenizer, progress=site.progress,
        )  # fmt: skip
        write_corpus(corpus, folder)

    return load_corpus(site.keep(f"generated/{domain}", make, options, site.folder.key("proxies")))
