# SPDX-License-Identifier: Apache-2.0
"""How good a causal LM is on held-out text, and which experts a MoE uses for which domain (DeepFusion, section V).

Every document is scored by itself: no token sees another document. Log-perplexity is the total negative log-likelihood
over counted tokens divided by their number, in nats (what the paper's Table I prints); token accuracy is the share of
counted tokens that the model ranks first under teacher forcing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from deepfusion.data.packing import document_batches
from deepfusion.devices.features import forward
from deepfusion.moe.base import Family
from deepfusion.moe.routing import router_choices
from deepfusion.training import accelerator
from deepfusion.types import Corpus, Progress, silent


@dataclass(frozen=True)
class Score:
    """Sums over counted tokens; scores of disjoint texts add up.

    Attributes:
        nll: total negative log-likelihood in nats.
        hits: tokens whose most likely prediction was right.
        tokens: counted tokens.
    """

    nll: float = 0.0
    hits: int = 0
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nll + other.nll, self.hits + other.hits, self.tokens + other.tokens)

    @property
    def log_perplexity(self) -> float:
        """Nats a token; NaN without a counted token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(log-perplexity); infinite where that overflows."""
        return math.exp(self.log_perplexity) if self.log_perplexity < 700 else math.inf

    @property
    def token_accuracy(self) -> float:
        """Share of counted tokens, 0..1; NaN without a counted token."""
        return self.hits / self.tokens if self.tokens else math.nan


@torch.no_grad()
def score_documents(
    model: PreTrainedModel,
    corpus: Corpus,
    sequence_length: int,
    *,
    label: str = "evaluate",
    progress: Progress = silent,
) -> list[Score]:
    """The score of each document of `corpus`, in order; `model` is left in evaluation mode on the accelerator's device.

    Documents longer than `sequence_length` are scored in consecutive windows of that many tokens.
    """
    compute = accelerator()
    model.to(compute.device).eval()
    nll_U, hits_U, tokens_U = np.zeros(len(corpus)), np.zeros(len(corpus), np.int64), np.zeros(len(corpus), np.int64)
    done, total = 0, corpus.num_tokens
    for documents_B, batch in document_batches(corpus, sequence_length):
        batch = batch.to(compute.device)
        with compute.autocast():
            logits_BTV = forward(model, batch).logits_BTV[:, :-1].float()
        target_BT = batch.input_ids_BT[:, 1:]
        counted_BT = batch.counted_BT[:, 1:] & batch.valid_BT[:, 1:]
        picked_BT = logits_BTV.gather(-1, target_BT[..., None]).squeeze(-1)
        nll_BT = (logits_BTV.logsumexp(-1) - picked_BT) * counted_BT
        hit_BT = (logits_BTV.argmax(-1) == target_BT) & counted_BT
        np.add.at(nll_U, documents_B, nll_BT.double().sum(1).cpu().numpy())
        np.add.at(hits_U, documents_B, hit_BT.sum(1).cpu().numpy())
        np.add.at(tokens_U, documents_B, counted_BT.sum(1).cpu().numpy())
        done += int(batch.valid_BT.sum())
        progress(label, min(done, total), total, "")
    return [Score(float(n), int(h), int(t)) for n, h, t in zip(nll_U, hits_U, tokens_U, strict=True)]


def by_domain(scores: Sequence[Score], corpus: Corpus) -> dict[str, Score]:
    """Scores added up by domain, domains without a document left out."""
    totals: dict[str, Score] = {}
    for score, domain in zip(scores, corpus.domain_U, strict=True):
        name = corpus.domains[domain]
        totals[name] = totals.get(name, Score()) + score
    return dict(sorted(totals.items()))


def total(scores: dict[str, Score]) -> Score:
    """All domains together, every counted token with the same weight."""
    return sum(scores.values(), Score())


@torch.no_grad()
def expert_load(
    model: PreTrainedModel, corpus: Corpus, sequence_length: int, *, family: Family
) -> dict[str, list[float]]:
    """Share of each expert in a domain's routed assignments, mean over the MoE layers; a domain's E shares sum to 1."""
    compute, experts = accelerator(), family.num_experts(model.config)
    model.to(compute.device).eval()
    counts: dict[int, torch.Tensor] = {}
    for documents_B, batch in document_batches(corpus, sequence_length):
        batch = batch.to(compute.device)
        with router_choices(model) as chosen, compute.autocast():
            forward(model, batch)
        domain_B = torch.as_tensor(corpus.domain_U[documents_B], device=compute.device)
        for chosen_Tk in chosen:
            hot_TE = torch.zeros(len(chosen_Tk), experts, dtype=torch.float64, device=chosen_Tk.device)
            hot_BTE = hot_TE.scatter_(1, chosen_Tk, 1.0).view(*batch.valid_BT.shape, -1) * batch.valid_BT[..., None]
            for domain in domain_B.unique().tolist():
                used_E = hot_BTE[domain_B == domain].sum((0, 1)).cpu()
                counts[domain] = counts.get(domain, torch.zeros_like(used_E)) + used_E
    return {corpus.domains[d]: (c / c.sum()).tolist() for d, c in sorted(counts.items())}


def mutual_information(load: dict[str, list[float]]) -> float:
    """Mutual information between domain and expert in nats, domains weighted equally: 0 when all route alike."""
    joint_DE = np.asarray(list(load.values())) / len(load)
    independent_DE = joint_DE.sum(1, keepdims=True) * joint_DE.sum(0, keepdims=True)
    used_DE = joint_DE > 0
    return float((joint_DE[used_DE] * np.log(joint_DE[used_DE] / independent_DE[used_DE])).sum())
