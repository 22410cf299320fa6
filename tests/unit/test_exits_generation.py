# SPDX-License-Identifier: Apache-2.0
"""Early exit: sigma 1 is the whole model, sigma 0 the first exit, and text at once is the same as token by token."""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import pytest
import torch
from exits_world import FAMILIES, VOCABULARY, backbone_of, heads_of

from deepfusion.errors import MarketError
from deepfusion.market.exits import leaving
from deepfusion.market.exits.backbone import plain
from deepfusion.market.exits.costs import costs_of
from deepfusion.market.exits.generation import StateCache, generate
from deepfusion.market.exits.heads import ExitHeads
from deepfusion.market.exits.leaving import judge, leave_early, leaves
from deepfusion.scores import Scores
from deepfusion.types import Batch

PROMPT = (3, 5, 7, 9, 11)


def known(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[Batch, torch.Tensor]:
    """Prompt and continuation as known text, and the positions that stand for generated tokens."""
    ids_BT = torch.tensor([[*prompt, *tokens]])
    valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    made_BT = torch.zeros_like(valid_BT)
    made_BT[:, len(prompt) - 1 : -1] = True
    return Batch(ids_BT, valid_BT, valid_BT), made_BT


def middling(heads: ExitHeads) -> list[float]:
    """Thresholds that some tokens pass at the first exit and some do not."""
    batch, _ = known(tuple(range(32)), tuple(range(31, 63)))
    state_BTH = heads.backbone.stop_before(2, batch)
    return judge(heads.scores(1, state_BTH[0]), "probability").confidence_R.quantile(torch.tensor([0.3, 0.6])).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_without_leaving_it_is_transformers_own_generation_and_at_zero_all_leave_at_once(name: str) -> None:
    heads = heads_of(backbone_of(name))
    model = cast(Any, heads.backbone.model)
    prompt = torch.tensor([PROMPT])
    wanted = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    whole = generate(heads, PROMPT, 24, 1.0)
    assert list(whole.tokens) == wanted[0, len(PROMPT) :].tolist()
    assert set(whole.exits) == {4}
    assert set(generate(heads, PROMPT, 24, 0.0).exits) == {1}


@pytest.mark.parametrize("name", FAMILIES)
def test_text_at_once_leaves_where_it_leaves_token_by_token(name: str) -> None:
    heads, exits = heads_of(backbone_of(name)), set[int]()
    for sigma, shift in product(middling(heads), (0, 20, 40)):
        prompt = tuple(token + shift for token in PROMPT)
        made = generate(heads, prompt, 8, sigma)
        batch, made_BT = known(prompt, made.tokens)
        found = leave_early(heads, batch, made_BT, sigma)
        assert found.token_BT[made_BT].tolist() == list(made.tokens)
        assert [heads.exit_blocks[m] for m in found.exit_BT[made_BT].tolist()] == list(made.exits)
        exits |= set(made.exits)
    assert len(exits) > 1, "some leave and some do not"


def test_a_token_that_has_left_hands_its_state_to_the_later_caches_and_nothing_else_runs() -> None:
    heads = heads_of(backbone_of("olmo2-pico"))
    backbone, ran = heads.backbone, []
    ids_BT, states, cache = torch.tensor([PROMPT]), [], StateCache(heads.backbone.model.config)
    backbone.run(plain, input_ids_BT=ids_BT, cache=cache)
    backbone.blocks[2].mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    backbone.blocks[2].self_attn.o_proj.register_forward_hook(lambda *_: ran.append("attention"))

    def leave_after_two(number: int, hidden_BTH: torch.Tensor, run: Any) -> torch.Tensor:
        if number > 2:
            return cache.propagate(hidden_BTH, run)
        states.append(run(hidden_BTH))
        return states[-1]

    with torch.no_grad():
        backbone.run(leave_after_two, input_ids_BT=torch.tensor([[2]]), cache=cache)
        value_BTH = backbone.blocks[2].self_attn.v_proj(states[-1])  # OLMo-2 norms after attention, not before
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6, 6, 6]
    kept = cache.layers[2].values[0, :, -1].flatten()
    assert torch.allclose(kept, value_BTH.flatten(), atol=1e-6)
    assert ran == []


def test_leaving_early_saves_what_the_later_blocks_cost() -> None:
    heads = heads_of(backbone_of("gpt2-pico"), exits=(1, 4))
    costs = costs_of(heads)
    own, whole = costs.spent((1, 4), len(PROMPT))
    block, state, head = costs.block_flops[0], costs.state_flops[0], costs.head_flops
    assert costs.of_model(5) == 4 * (block + 5 * costs.pair_flops) + head[1]
    assert own - whole == pytest.approx(3 * (state - block - 5 * costs.pair_flops) + 2 * head[0] - head[1])


def test_generation_ends_with_the_end_and_needs_a_prompt() -> None:
    heads = heads_of(backbone_of("llama-pico"))
    made = generate(heads, PROMPT, 24, 1.0)
    first = made.tokens[3]
    at = made.tokens.index(first)
    assert generate(heads, PROMPT, 24, 1.0, end=first).tokens == made.tokens[: at + 1]
    with pytest.raises(MarketError, match="no token"):
        generate(heads, (), 5, 0.5)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_confidence_is_the_largest_probability_or_one_minus_the_relative_entropy(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits_RV, target_R = 5 * torch.randn(rows, VOCABULARY), torch.randint(0, VOCABULARY, (rows,))
    monkeypatch.setattr(leaving, "LOGITS_AT_ONCE", 3 * VOCABULARY)  # several pieces
    p_RV = logits_RV.double().softmax(-1)
    sure = judge(Scores(logits_RV), "probability", target_R)
    assert torch.allclose(sure.confidence_R.double(), p_RV.amax(-1), atol=1e-6)
    assert torch.equal(sure.token_R, p_RV.argmax(-1))
    assert torch.allclose(sure.nll_R.double(), -p_RV.log().gather(1, target_R[:, None])[:, 0], atol=1e-5)
    entropy_R = -(p_RV * p_RV.log()).sum(-1) / torch.log(torch.tensor(float(VOCABULARY)))
    assert torch.allclose(judge(Scores(logits_RV), "entropy").confidence_R.double(), 1 - entropy_R, atol=1e-5)


def test_nobody_leaves_at_one_however_sure() -> None:
    certain = judge(Scores(torch.tensor([[1e4, 0.0, 0.0]])), "probability")
    assert float(certain.confidence_R) == 1.0
    assert not bool(leaves(certain, 1.0))
    assert bool(leaves(certain, 0.999))
