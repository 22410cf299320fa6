# SPDX-License-Identifier: Apache-2.0
"""The exit table of a real model: counts agree with what torch counts, shares add up, and the market sells it at once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from devices_world import TEXT, batch_of, byte_tokenizer
from exits_world import FAMILIES, VOCABULARY, backbone_of, heads_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from deepfusion import cli
from deepfusion.artifacts import key_of
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import corpus_from_texts
from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config, save
from deepfusion.devices.presets import PRESETS
from deepfusion.errors import DataError, DeepFusionError
from deepfusion.market.architectures import SIGMAS, shipped_profiles
from deepfusion.market.exits.costs import costs_of
from deepfusion.market.exits.heads import load_heads
from deepfusion.market.exits.leaving import leave_early
from deepfusion.market.exits.making import ProfileOptions, make_profile, plan_profile, read_text
from deepfusion.market.exits.page import headline, write_page
from deepfusion.market.exits.table import Request, _monotone, measure, to_profile
from deepfusion.market.profiles import Mode, load_profile, load_profiles

REQUEST = Request(prompt=10, made=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-moe"
    config = make_config(PRESETS["qwen2-moe-pico"].config, vocab_size=300, positions=128, eos_id=0)
    save(from_config(config, seed=0), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("\n\n".join(f"{number} {line} and {number} more" for number, line in enumerate(TEXT * 4)))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """With attention and experts that the counter can look into; it counts all pairs of tokens, masked or not."""
    backbone = backbone_of(name)
    heads, tokens = heads_of(backbone), 7
    costs, model = costs_of(heads), cast(Any, backbone.model)
    model.set_attn_implementation("eager")
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"
    ids_BT = batch_of(1, tokens, VOCABULARY).input_ids_BT
    counted: list[float] = []

    def step(number: int, hidden_BTH: torch.Tensor, run: Any) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            out_BTH = run(hidden_BTH)
        counted.append(counter.get_total_flops())
        return out_BTH

    with torch.no_grad():
        last_BTH = backbone.run(step, input_ids_BT=ids_BT)
        with FlopCounterMode(display=False) as counter:
            heads.scores(1, last_BTH[:, -1]).logits(slice(None))
    assert counted == [tokens * flops + tokens**2 * costs.pair_flops for flops in costs.block_flops]
    assert counter.get_total_flops() == costs.head_flops[0]
    assert all(0 < state < block for state, block in zip(costs.state_flops, costs.block_flops, strict=True))
    assert costs.state_bytes == (4.0, *[4.0 * backbone.hidden_size] * 3, 0.0)


def test_a_moe_reads_its_chosen_experts_for_a_token_and_all_for_a_prompt() -> None:
    costs = costs_of(heads_of(backbone_of("mixtral-pico")))
    expert = 3 * 32 * 48 * 4  # bytes
    assert [whole - own for whole, own in zip(costs.whole_reads, costs.block_reads, strict=True)] == [2 * expert] * 4
    assert costs.head_reads[0] - costs.head_reads[-1] == 4 * (32 + 2 * 32 * 8)


@pytest.fixture(scope="module")
def measured(tokenizer: Path) -> Any:
    backbone = backbone_of("olmoe-pico", vocab_size=300)
    heads = heads_of(backbone)
    with torch.no_grad():
        backbone.head.weight *= 5  # sure of itself, rightly or not
    corpus = corpus_from_texts([f"{n} {line}" for n, line in enumerate(TEXT * 3)], "all", tokenizer)
    text = PackedText(corpus, REQUEST.prompt + REQUEST.made, seed=0)
    costs = costs_of(heads)
    found = measure(heads, text, REQUEST, costs, rows=24, batch_size=8, kind="entropy")
    return heads, text, costs, found, to_profile("tiny", found, costs, REQUEST)


def test_the_table_is_one_and_says_what_the_passes_say(measured: Any) -> None:
    heads, text, _, found, profile = measured
    assert list(profile.faults()) == []
    assert [row.sigma for row in found.rows] == list(SIGMAS)
    assert found.tokens == 24 * REQUEST.made
    assert found.moved < 0.05
    sigma, row = SIGMAS[2], found.rows[2]
    hits, counts, nll = 0, np.zeros(3), 0.0
    for step in range(3):
        batch = text.batch(step, 8)
        made_BT = REQUEST.positions(batch)
        assert made_BT.sum(1).tolist() == [REQUEST.made] * 8
        left = leave_early(heads, batch, made_BT, sigma, "entropy")
        hits += int((left.token_BT[:, :-1] == batch.input_ids_BT[:, 1:])[made_BT[:, :-1]].sum())
        nll += float(left.nll_BT[made_BT].sum())
        counts += np.bincount(left.exit_BT[made_BT].numpy(), minlength=3)
    assert row.accuracy == pytest.approx(hits / found.tokens)
    assert row.loss == pytest.approx(nll / found.tokens, rel=1e-5)
    assert row.exit_share == pytest.approx(tuple(counts / found.tokens), abs=found.moved + 1e-12)
    assert len({row.exit_share[:2] for row in found.rows}) == len(SIGMAS), "thresholds matter"
    assert profile.accuracy_change[-1] == 0
    assert found.rows[-1].accuracy == found.alone[-1][0]


@pytest.mark.parametrize("mode", ["expected", "worst"])
def test_the_checks_of_the_specification_hold_for_a_measured_table(measured: Any, mode: Mode) -> None:
    _, _, costs, _, profile = measured
    assert np.asarray(profile.exit_share).sum(1) == pytest.approx(1.0)
    for row in range(len(SIGMAS)):
        cuts, reach = profile.cuts(row, mode), profile.reach(row, mode)
        both = cuts.device_flops_S + cuts.edge_flops_S
        assert both == pytest.approx(np.full(len(both), both[0]), rel=1e-12)
        assert (cuts.edge_flops_S[-1], cuts.sent_S[-1], cuts.trips_S[-1]) == (0, 0, 0)
        assert bool((np.diff(reach) <= 0).all())
        assert row == 0 or bool((reach >= profile.reach(row - 1, mode)).all())
        # the prompt and every generated token cross between the blocks, whoever leaves, as long as anybody goes on
        inner = cuts.sent_S[1:-1]
        assert inner == pytest.approx(np.where(reach[1:-1] > 0, 15 * costs.state_bytes[1], 0.0))
        assert cuts.trips_S[1:-1] == pytest.approx(np.where(reach[1:-1] > 0, np.maximum(6 * reach[1:-1], 1), 0))
        assert cuts.sent_S[0] == 10 * 4


def test_the_work_of_a_sample_is_its_prompt_and_what_its_tokens_cost(measured: Any) -> None:
    _, _, costs, found, profile = measured
    pairs = [sum(range(1, 10)), sum(range(10, 16))]  # of nine positions of prompt, and of six after them
    prompt = sum(9 * flops + pairs[0] * costs.pair_flops for flops in costs.block_flops)
    going_on = [z for z, row in enumerate(found.rows) if row.exit_share[-1] > 0]
    assert len(going_on) >= 5
    for z in going_on:
        row = found.rows[z]
        tokens = sum(share * costs.of_token(m, pairs[1] / 6) for m, share in enumerate(row.exit_share))
        assert profile.cuts(z).edge_flops_S[0] == pytest.approx(prompt + 6 * tokens, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 20)] * 3), min_size=1, max_size=7))
def test_shares_become_monotone_and_never_cheaper(counts: list[tuple[int, ...]]) -> None:
    share_ZM = np.array([(*row, 60 - sum(row)) for row in counts]) / 60
    kept_ZM, moved = _monotone(share_ZM)
    before, after = share_ZM.cumsum(1), kept_ZM.cumsum(1)
    assert kept_ZM.min() >= -1e-15
    assert after[:, -1] == pytest.approx(1.0)
    assert bool((np.diff(after, axis=0) <= 1e-15).all())
    assert bool((after <= before + 1e-12).all())
    assert moved == pytest.approx(float((before - after).max()), abs=1e-12)
    assert moved > 1e-12 or np.allclose(kept_ZM, share_ZM)


# ------------------------------------------------------------------------------------------------ from folder to market


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deepfusion", "market", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


SMALL = ("--steps", 4, "--rows", 8, "--prompt-tokens", 8, "--made-tokens", 6, "--batch-size", 4)


def test_a_folder_becomes_a_workload_that_is_cleared_audited_and_simulated(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profiles"
    assert call(monkeypatch, "profile", model, "--data", text, "--out", out, *SMALL, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    profile = load_profiles(out, shipped_profiles())["tiny-moe"]
    assert (said["profile"], said["tokens"]) == (str(out / "tiny-moe.json"), 48)
    assert profile.exit_blocks == (1, 2)
    assert (out / "tiny-moe" / "profile.html").read_text().count("<svg") == 4
    bid = {
        "user": "ann",
        "model": "tiny-moe",
        "budget": 1e-3,
        "device_flops": 5e5,
        "rate": 3e7,
        "rtt": 0.02,
        "sigma": 0.8,
    }
    (tmp_path / "bids.jsonl").write_text(json.dumps({**bid, "latency": 1.0}))
    assert call(monkeypatch, "clear", tmp_path / "bids.jsonl", "--profiles", out, "--json", "--capacity", 1e9) == 0
    assert "ann" in json.loads(capsys.readouterr().out)["winners"]
    assert call(monkeypatch, "audit", tmp_path / "bids.ledger.json", "--profiles", out) == 0
    config = Path(__file__).parents[2] / "configs/market.toml"
    few = [part for value in ("slots=2", 'users.models={"tiny-moe"=1}') for part in ("--set", value)]
    assert call(monkeypatch, "simulate", config, "--out", tmp_path / "run", "--profiles", out, *few) == 0
    assert call(monkeypatch, "profile", model, "--data", text, "--out", out, *SMALL) == 78
    assert "exists already" in capsys.readouterr().err


def test_exits_can_be_measured_again_without_being_trained(tmp_path: Path, model: Path, text: Path) -> None:
    options = ProfileOptions(steps=4, rows=8, prompt=8, made=6)
    texts = read_text(str(model), [str(text)])
    first = make_profile(str(model), texts, tmp_path, "a", options)
    again = make_profile(str(model), texts, tmp_path, "b", options, heads_from=first.folder)
    assert again.measured == first.measured
    assert (len(first.history), again.history) == (4, [])
    plan = plan_profile(str(model), tmp_path, "c", options, first.folder)
    assert (plan.exit_blocks, plan.trained_tokens) == ((1, 2), 0)
    with pytest.raises(DeepFusionError, match="remove --exits"):
        plan_profile(str(model), tmp_path, "c", replace(options, exits=(1,)), first.folder)
    assert load_profile(again.path).exit_share == first.profile.exit_share
    assert "sigma" in headline(first)
    assert write_page(again).parent == again.folder


def test_text_is_trained_on_or_measured_on_and_never_both(model: Path, text: Path, tmp_path: Path) -> None:
    train, test = (set(corpus.texts()) for corpus in read_text(str(model), [str(text)]))
    assert not train & test
    assert len(train) > 2 * len(test) > 0
    (one := tmp_path / "one.txt").write_text("only this")
    with pytest.raises(DataError, match="ten or more"):
        read_text(str(model), [str(one)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--exits", "2,x"], "write --exits 2,4"), (["--exits", "3"], "last block, 2"), (["--exits", "0"], "ascend"),
        (["--rows", 0], "rows = 0"), (["--prompt-tokens", 120], "152 tokens: the model reaches 128"),
        (["--name", "a/b"], "plain one"),
        (["--learning-rate", 2], "learning_rate = 2"), (["--width", 0], "width = 0"), (["--made-tokens", 0], "made = 0"),
        (["--heads", "nowhere"], "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said_before_anything_is_done(
    tmp_path: Path, model: Path, arguments: list[object], words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert call(monkeypatch, "profile", model, "--out", tmp_path / "out", *arguments) == (
        2 if "--heads" in arguments else 78
    )
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "profile", model, "--out", tmp_path / "out", "--dry-run", "--json", "--exits", "1") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["exit_blocks"] == [1, 2]
    assert plan["head_numbers"] == 2 * 32 * 32
    assert not (tmp_path / "out").exists()
    assert plan_profile(str(model), tmp_path, "x", ProfileOptions()).exit_blocks == (1, 2)
    assert [ProfileOptions().exit_blocks(blocks) for blocks in (4, 12, 30)] == [
        (1, 2, 3, 4), (3, 6, 9, 12), (8, 15, 23, 30),
    ]  # fmt: skip


HOSTILE: dict[str, Any] = {
    "name": "evil\nname", "block_flops": [1e300, 1e300], "head_flops": [float("inf")], "prompt_flops": [1.0],
    "left_bytes": [-1.0, 0.0, 0.0], "left_flops": [float("nan"), 0.0], "sigmas": [0.5, float("nan"), 1.0],
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_a_table_with_numbers_that_cannot_be_is_refused(tmp_path: Path, key: str) -> None:
    good: dict[str, Any] = {
        "name": "a", "source": "", "block_flops": [1.0, 1.0], "exit_blocks": [2], "head_flops": [1.0], "sigmas": [0.1, 0.5, 1.0],
        "cut_bytes": [0.0, 0.0, 0.0], "exit_share": [[1.0]] * 3, "accuracy_change": [0.0] * 3,
    }  # fmt: skip
    (path := tmp_path / "a.json").write_text(json.dumps(good))
    assert load_profile(path).num_blocks == 2
    path.write_text(json.dumps({**good, key: HOSTILE[key]}))
    with pytest.raises(DeepFusionError, match="fault"):
        load_profile(path)


def test_a_table_without_the_later_fields_keeps_the_hash_that_stands_in_ledgers() -> None:
    vgg = shipped_profiles()["vgg16"]
    first = {name: value for name, value in asdict(vgg).items() if name[:6] != "prompt" and name[:4] != "left"}
    assert vgg.digest == key_of({**first, "prompt_bytes": ()})
    assert replace(vgg, left_flops=(1.0,) * vgg.num_blocks).digest != vgg.digest


def test_a_file_of_a_size_no_table_has_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DeepFusionError, match="more than a table of exits has"):
        load_profile(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"[" * 1_000_000)
    with pytest.raises(DeepFusionError, match="not a table of exits"):
        load_profile(tmp_path / "a.json")


def test_heads_of_a_profile_open_again(tmp_path: Path, model: Path, text: Path) -> None:
    made = make_profile(
        str(model), read_text(str(model), [str(text)]), tmp_path, "a", ProfileOptions(steps=1, rows=1, prompt=4, made=2)
    )
    other = backbone_of("qwen2-moe-pico", blocks=2, vocab_size=300)
    with pytest.raises(DeepFusionError, match="backbone = "):
        load_heads(made.folder, other)
