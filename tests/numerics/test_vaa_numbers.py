# SPDX-License-Identifier: Apache-2.0
"""View-aligned attention against its formulas (method, section 7 and invariants 4 and 5 of section 14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from deepfusion.errors import ConfigError
from deepfusion.stages.distill import Logits, Ofa, Vaa, rule_flops_per_token
from deepfusion.stages.distill.vaa import VaaAdapter, sinusoid, stage_ends

B, T = 3, 20
STUDENT = LlamaConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32)
TEACHER = GPT2Config(n_embd=24, n_layer=5, n_head=2)


def adapter(seed: int = 0, *, tokens: int = T, **options: Any) -> VaaAdapter:
    return Vaa(**{"num_queries": 16, "num_stages": 4, **options}).attach(
        STUDENT, TEACHER, sequence_length=tokens, seed=seed
    )


def hidden(count: int, size: int, seed: int, tokens: int = T) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, tokens, size, generator=generator) for _ in range(count)]


def masks(tokens: int = T) -> torch.Tensor:
    valid_BT = torch.ones(B, tokens, dtype=torch.bool)
    valid_BT[1, 13:] = False
    valid_BT[2, 2:] = False
    return valid_BT


def features(vaa: VaaAdapter, seed: int = 1, tokens: int = T) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return hidden(len(vaa.student_taps), 32, seed, tokens), hidden(len(vaa.teacher_taps), 24, seed + 1, tokens)


VARIANTS = [
    {},
    {"attention": "causal"},
    {"fm_target": "tokens"},
    {"teacher_norm": "none"},
    {"stage_mix": "mean"},
    {"stage_mix": "layer_weighted"},
    {"info_nce": 0.5},
]


@pytest.mark.parametrize("wrong", [1e20, float("inf"), float("nan")])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_row_on_which_the_teacher_overflows_is_as_good_as_padding(options: dict[str, Any], wrong: float) -> None:
    """Also 1e20, which a norm takes for an overflow although the teacher's predictions may be fine."""
    vaa, valid_BT = adapter(**options), torch.ones(B, T, dtype=torch.bool)
    student, teacher = features(vaa)
    mixed = [tap_BTR.clone() for tap_BTR in teacher]
    for tap_BTR in mixed:
        tap_BTR[1, 7:] *= wrong
    without_BT = valid_BT.clone()
    without_BT[1] = False
    losses = [vaa(student, taught, valid_BT, there) for taught, there in ((mixed, valid_BT), (teacher, without_BT))]
    gradients = [torch.autograd.grad(loss, [*vaa.parameters()]) for loss in losses]
    assert torch.equal(*losses)
    assert float(losses[0].detach()) > 0
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("stages", range(1, 7))
def test_stages_end_at_rounded_shares_of_the_depth(stages: int) -> None:
    for depth in range(stages, 30):
        expected = tuple(int(j * depth / stages + 0.5) for j in range(1, stages + 1))
        assert stage_ends(stages, depth) == expected
        assert expected[-1] == depth
        assert len(set(expected)) == stages


@pytest.mark.parametrize("tokens", [16, 20, 17])
def test_patching_is_a_convolution_whose_stride_is_its_kernel(tokens: int) -> None:
    vaa = adapter(tokens=tokens)
    (student, _), valid_BT = features(vaa, tokens=tokens), torch.ones(B, tokens, dtype=torch.bool)
    linear = vaa.patch[0]
    window, width = vaa.window, linear.out_features
    kernel = linear.weight.view(width, window, 32).transpose(1, 2)
    filled_BTS = torch.nn.functional.pad(student[0], (0, 0, 0, vaa.patches * window - tokens))
    expected = torch.nn.functional.conv1d(filled_BTS.transpose(1, 2), kernel, linear.bias, stride=window).transpose(
        1, 2
    )
    full_P = (torch.arange(vaa.patches) + 1) * window <= tokens
    actual = linear(vaa._windows(student[0], valid_BT))
    torch.testing.assert_close(actual[:, full_P], expected[:, full_P], rtol=1e-5, atol=1e-5)


def test_a_partly_filled_window_is_scaled_by_its_missing_tokens() -> None:
    vaa = adapter()
    ones_BTS = torch.ones(B, T, 32)
    windows = vaa._windows(ones_BTS, masks())
    sums_BP = windows.sum(-1) / 32
    expected_BP = torch.where(vaa._valid_patches(masks()), float(vaa.window), 0.0)
    torch.testing.assert_close(sums_BP, expected_BP)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_attention_rows_sum_to_one_and_masked_keys_get_nothing(attention: str) -> None:
    vaa = adapter(attention=attention)
    key_valid_BQ = vaa._valid_patches(masks()).repeat(1, vaa.stages)
    x = torch.randn(B, 16, vaa.width, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        _, weight_BhQQ = vaa.attend(x, key_valid_BQ)
    torch.testing.assert_close(weight_BhQQ.sum(-1), torch.ones(B, 4, 16))
    assert float(weight_BhQQ.masked_select(~key_valid_BQ[:, None, None, :]).abs().max()) == 0
    if attention == "causal":
        patch_Q = torch.arange(16) % vaa.patches
        later_QQ = patch_Q[None, :] > patch_Q[:, None]
        assert float(weight_BhQQ[..., later_QQ].abs().max()) == 0


def test_attention_agrees_with_the_formula() -> None:
    vaa = adapter()
    x = torch.randn(B, 16, vaa.width, generator=torch.Generator().manual_seed(9))
    mixed, _ = vaa.attend(x, torch.ones(B, 16, dtype=torch.bool))
    n = torch.nn.functional.layer_norm(x, (vaa.width,))
    place = sinusoid(16, vaa.width, x.device)
    q, k, v = vaa.query(n) + place, vaa.key(n) + place, vaa.value(n)
    heads = [slice(i * 8, (i + 1) * 8) for i in range(4)]
    expected = torch.cat([(q[..., s] @ k[..., s].mT / 8**0.5).softmax(-1) @ v[..., s] for s in heads], -1)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


def test_feature_loss_is_zero_exactly_when_the_guess_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    vaa = adapter()
    student, teacher = features(vaa)
    targets = [vaa._pool(torch.nn.functional.layer_norm(h, (24,)), masks()) for h in teacher]
    monkeypatch.setattr(vaa, "predict", lambda *_: targets)
    assert float(vaa(student, teacher, masks(), masks())) == 0
    off = [t + 0.1 for t in targets]
    monkeypatch.setattr(vaa, "predict", lambda *_: off)
    assert float(vaa(student, teacher, masks(), masks())) == pytest.approx(4 * 0.01, rel=1e-4)


def test_feature_loss_starts_near_the_number_of_stages_when_every_token_is_a_patch() -> None:
    vaa = adapter(tokens=4)  # 4 patches a stage
    student, teacher = features(vaa, tokens=4)
    valid_BT = torch.ones(B, 4, dtype=torch.bool)
    loss = float(vaa(student, teacher, valid_BT, valid_BT).detach())
    variance = sum(float(o.detach().square().mean()) for o in vaa.predict(student, valid_BT))
    assert loss == pytest.approx(4 + variance, rel=0.1)
    pooled = adapter(tokens=T)
    student, teacher = features(pooled)
    assert float(pooled(student, teacher, torch.ones(B, T) > 0, torch.ones(B, T) > 0).detach()) < loss


@pytest.mark.parametrize(("norm", "moves"), [("layernorm", False), ("none", True)])
def test_only_without_norm_does_the_scale_of_the_teacher_matter(norm: str, moves: bool) -> None:
    vaa = adapter(teacher_norm=norm)
    student, teacher = features(vaa)
    once = float(vaa(student, teacher, masks(), masks()).detach())
    tenfold = float(vaa(student, [10 * h for h in teacher], masks(), masks()).detach())
    assert (abs(tenfold - once) > 1e-3) is moves


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_padding_holds_never_changes_the_loss_or_its_gradients(options: dict[str, Any]) -> None:
    vaa, valid_BT = adapter(**options), masks()
    student, teacher = features(vaa)

    def run(noise: float) -> list[torch.Tensor]:
        pad_BT1 = (~valid_BT)[..., None]
        leaves = [torch.where(pad_BT1, noise, h).requires_grad_() for h in student]
        loss = vaa(leaves, [torch.where(pad_BT1, -noise, h) for h in teacher], valid_BT, valid_BT)
        return [loss, *torch.autograd.grad(loss, [*leaves, *vaa.parameters()])]

    for clean, dirty in zip(run(0.0), run(1e4), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient_reaches_every_tap_and_every_weight_and_none_of_the_teacher(options: dict[str, Any]) -> None:
    vaa = adapter(**options)
    student, teacher = features(vaa)
    for tensor in (*student, *teacher):
        tensor.requires_grad_()
    vaa(student, teacher, masks(), masks()).backward()
    assert all(h.grad is not None and float(h.grad.abs().max()) > 0 for h in student)
    assert all(h.grad is None for h in teacher)
    # the key's bias adds the same to every score of a row: softmax cancels it but for rounding
    dead = [
        n for n, p in vaa.named_parameters() if n != "key.bias" and (p.grad is None or float(p.grad.abs().max()) == 0)
    ]
    assert dead == []


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_batch_of_nothing_but_padding_costs_nothing(options: dict[str, Any]) -> None:
    vaa = adapter(**options)
    student, teacher = features(vaa)
    loss = vaa(student, teacher, torch.zeros(B, T) > 0, torch.zeros(B, T) > 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(bool(p.grad.isfinite().all()) for p in vaa.parameters() if p.grad is not None)


def test_sequences_shorter_than_the_patches_leave_the_rest_empty() -> None:
    vaa = adapter()
    student, teacher = features(vaa, tokens=3)
    valid_BT = torch.ones(B, 3, dtype=torch.bool)
    padded = [torch.cat([h, torch.full((B, T - 3, h.shape[-1]), 7.0)], 1) for h in student]
    padded_teacher = [torch.cat([h, torch.full((B, T - 3, h.shape[-1]), 7.0)], 1) for h in teacher]
    longer_BT = torch.cat([valid_BT, torch.zeros(B, T - 3, dtype=torch.bool)], 1)
    short = vaa(student, teacher, valid_BT, valid_BT)
    torch.testing.assert_close(short, vaa(padded, padded_teacher, longer_BT, longer_BT))


def test_layer_weights_start_as_a_plain_mean_of_all_blocks() -> None:
    vaa = adapter(stage_mix="layer_weighted")
    student, _ = features(vaa)
    assert vaa.student_taps == tuple(range(1, 7))
    mean_BTS = torch.stack(student).mean(0)
    expected = vaa.project_out[2](vaa.project_in(vaa._pool(mean_BTS, masks())))
    torch.testing.assert_close(vaa.predict(student, masks())[2], expected, rtol=1e-5, atol=1e-5)


def test_contrast_prefers_the_own_target() -> None:
    plain, contrast = adapter(), adapter(info_nce=1.0)
    student, teacher = features(plain)

    def extra(predict: Sequence[torch.Tensor]) -> float:
        values = []
        for vaa in (plain, contrast):
            vaa.predict = lambda *_: list(predict)  # type: ignore[method-assign]
            values.append(float(vaa(student, teacher, masks(), masks()).detach()))
        return values[1] - values[0]

    targets = [plain._pool(torch.nn.functional.layer_norm(h, (24,)), masks()) for h in teacher]
    assert extra(targets) < 0.05 < 1 < extra([t.roll(1, dims=1) for t in targets])


def test_an_adapter_depends_on_its_seed_alone_and_draws_from_no_other_stream() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = adapter(3).state_dict(), adapter(3).state_dict(), adapter(4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["query.weight"], other["query.weight"])


def test_defaults_fit_shallow_models_and_odd_widths() -> None:
    shallow = LlamaConfig(hidden_size=26, num_hidden_layers=3, num_attention_heads=1, intermediate_size=8)
    vaa = Vaa().attach(shallow, TEACHER, sequence_length=T, seed=0)
    assert (vaa.stages, vaa.patches, vaa.width) == (3, 10, 24)
    big = LlamaConfig(hidden_size=1024, num_hidden_layers=24)
    assert (Vaa().attach(big, GPT2Config(), sequence_length=T, seed=0).width) == 256


def test_more_stages_than_blocks_is_an_error_that_names_both_models() -> None:
    with pytest.raises(
        ConfigError, match=r"num_stages = 6: the student \(llama\) has 6 blocks and the teacher \(gpt2\) 5"
    ):
        Vaa(num_stages=6, num_queries=36).attach(STUDENT, TEACHER, sequence_length=T, seed=0)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"num_stages": 5}, "num_queries = 32: not divisible by num_stages = 5; choose a multiple such as 30"),
        ({"width": 30}, "heads = 4: does not divide width = 30"),
        ({"num_stages": 0}, "num_stages = 0: must be at least 1"),
        ({"num_queries": 0}, "num_queries = 0: must be at least 1"),
        ({"heads": 0, "width": 8}, "heads = 0: must be at least 1"),
        ({"width": -4}, "width = -4: must be at least 1"),
        ({"info_nce": -1.0}, "info_nce = -1.0: must be finite and not negative"),
    ],
)
def test_impossible_options_are_faults_with_a_cure(options: dict[str, Any], fault: str) -> None:
    assert any(text.startswith(fault) for text in Vaa(**options).faults())


def test_the_default_options_have_no_fault() -> None:
    assert list(Vaa().faults()) == []


def test_what_a_rule_costs_is_the_sum_of_its_products() -> None:
    """Windows of each stage, queries, keys and values, two products of attention, and the teacher's stages out of them."""
    tokens, stages, queries, student, teacher = 64, 4, 16, 32, 24
    windows = stages * tokens * student * student
    products = windows + 3 * queries * student**2 + 2 * queries**2 * student + queries * student * teacher
    vaa = Vaa(num_queries=queries, num_stages=stages)
    assert rule_flops_per_token(vaa, STUDENT, TEACHER, tokens) == 2 * products // tokens
    exits = stages * (student**2 + student * STUDENT.vocab_size)
    assert rule_flops_per_token(Ofa(), STUDENT, TEACHER, tokens) == 2 * exits
    assert rule_flops_per_token(Logits(), STUDENT, TEACHER, tokens) == 0
