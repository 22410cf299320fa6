# SPDX-License-Identifier: Apache-2.0
"""The router's start: prototypes send a domain's tokens to its expert; too little or too like text falls back to chance."""

from pathlib import Path

import pytest
import torch
from moe_world import H, V, make_batch, make_target, merged_from, write_students

from deepfusion.devices.features import forward
from deepfusion.moe import families
from deepfusion.moe.routing import router_inputs, router_logits
from deepfusion.stages.router import LEAST_TOKENS, RANDOM_STD, RouterOptions, prototype_router, random_router
from deepfusion.types import Batch

EVERY = sorted(families)


def domain(index: int, domains: int, rows: int = 12) -> list[Batch]:
    """Two batches of a text that uses its own part of the vocabulary, enough for a prototype."""
    size = V // domains
    return [make_batch(10 * index + n, rows, 14, index * size, (index + 1) * size) for n in range(2)]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("experts", [2, 4])
def test_the_strongest_prototype_gives_its_own_expert_the_wanted_logit(name: str, experts: int, tmp_path: Path) -> None:
    family, target = families[name], make_target(name, experts=experts)
    moe, _, _ = merged_from(write_students(tmp_path, family, target, [1, 2]), family, target)
    notes: list[str] = []
    texts = [domain(0, 2), domain(1, 2)]
    weights = prototype_router(
        moe, texts, family=family, slices=1, options=RouterOptions(strength=3.0), seed=0, note=notes.append
    )
    assert not notes
    assert [tuple(w.shape) for w in weights] == [(experts, H)] * 2
    for layer, weight_EH in enumerate(weights):
        mean_KH = torch.stack([_mean(moe, batches, layer) for batches in texts])
        delta_KH = mean_KH - mean_KH.mean(0)
        strongest = float((delta_KH @ weight_EH[:2].T).diagonal().max())
        assert strongest == pytest.approx(3.0, rel=1e-3 if experts == 2 else 0.05)
        assert experts == 2 or 0 < float((weight_EH[0] - weight_EH[2]).abs().max()) < RANDOM_STD


@pytest.mark.parametrize("name", EVERY)
def test_prototypes_route_a_domains_tokens_to_its_expert_better_than_chance(name: str, tmp_path: Path) -> None:
    family, target = families[name], make_target(name, top=1)
    paths = write_students(tmp_path, family, target, [1, 2, 3, 4])
    moe, _, _ = merged_from(paths, family, target)
    texts = [domain(k, 4) for k in range(4)]
    weights = prototype_router(
        moe, texts, family=family, slices=1, options=RouterOptions(), seed=0, note=lambda note: pytest.fail(note)
    )
    routed, _, _ = merged_from(paths, family, target, router=weights)
    hits: list[torch.Tensor] = []
    for k, batches in enumerate(texts):
        for batch in batches:
            with router_logits(routed) as logits:
                forward(routed, batch)
            hits += [(layer_TE.argmax(-1) == k)[batch.valid_BT.flatten()] for layer_TE in logits]
    share = float(torch.cat(hits).float().mean())
    print(f"{name}: {share:.3f} of the tokens go to their domain's expert")
    assert share > 0.5


def test_slices_of_one_student_share_its_prototype(tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    moe, _, _ = merged_from(write_students(tmp_path, family, target, [1, 2], 2), family, target, fill="split")
    texts = [domain(0, 2), domain(1, 2)]
    for weight_EH in prototype_router(
        moe, texts, family=family, slices=2, options=RouterOptions(), seed=0, note=lambda note: pytest.fail(note)
    ):
        own, other = (weight_EH[0] - weight_EH[1]).norm(), (weight_EH[0] - weight_EH[2]).norm()
        assert 0 < own < 0.2 * other


def test_padding_does_not_move_the_prototypes(tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    moe, _, _ = merged_from(write_students(tmp_path, family, target, [1, 2]), family, target)
    texts = [domain(0, 2), domain(1, 2)]
    longer = [[_padded(batch) for batch in batches] for batches in texts]
    first, second = (
        prototype_router(moe, t, family=family, slices=1, options=RouterOptions(), seed=0, note=lambda note: pytest.fail(note))
        for t in (texts, longer)
    )  # fmt: skip
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("texts", "said"), [("thin", "only 33 public tokens"), ("alike", "looks alike")])
def test_thin_or_like_text_starts_the_router_at_random_and_says_so(texts: str, said: str, tmp_path: Path) -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe")
    moe, _, _ = merged_from(write_students(tmp_path, family, target, [1, 2, 3]), family, target)
    given = [domain(0, 2), domain(1, 2), [make_batch()]] if texts == "thin" else [domain(0, 2)] * 3
    assert sum(int(b.valid_BT.sum()) for b in given[0]) >= LEAST_TOKENS
    notes: list[str] = []
    weights = prototype_router(
        moe, given, family=family, slices=1, options=RouterOptions(), seed=4, note=notes.append
    )  # fmt: skip
    assert notes
    assert all(said in note for note in notes)
    for weight, expected in zip(weights, random_router(target, family=family, seed=4), strict=True):
        assert torch.equal(weight, expected)


def test_a_random_router_has_the_published_spread_and_depends_on_its_seed_alone() -> None:
    family, target = families["qwen2_moe"], make_target("qwen2_moe", experts=64)
    torch.manual_seed(0)
    first = random_router(target, family=family, seed=1)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, random_router(target, family=family, seed=1), strict=True))
    assert not torch.equal(first[0], first[1])
    assert float(first[0].std()) == pytest.approx(RANDOM_STD, rel=0.1)


def test_router_options_name_their_faults() -> None:
    faults = list(RouterOptions(documents=0, strength=-1.0).faults())
    assert [fault.partition(":")[0] for fault in faults] == ["documents = 0", "strength = -1.0"]
    assert not list(RouterOptions().faults())


def _mean(moe: torch.nn.Module, batches: list[Batch], layer: int) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for batch in batches:
        with torch.no_grad(), router_inputs(moe) as inputs:  # pyright: ignore[reportArgumentType]
            forward(moe, batch)  # pyright: ignore[reportArgumentType]
        rows.append(inputs[layer][batch.valid_BT.flatten()])
    return torch.cat(rows).mean(0)


def _padded(batch: Batch) -> Batch:
    rows = batch.input_ids_BT.shape[0]
    tail = torch.full((rows, 4), 5)
    nothing = torch.zeros(rows, 4, dtype=torch.bool)
    valid_BT = torch.cat([batch.valid_BT, nothing], 1)
    return Batch(torch.cat([batch.input_ids_BT, tail], 1), valid_BT, valid_BT)
