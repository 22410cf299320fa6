# SPDX-License-Identifier: Apache-2.0
"""Properties of `deepfusion distill`: any folders, any text; what it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_world import V, config, file_bytes, write_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import corpus_from_files
from deepfusion.devices.configurations import reach_of, read_config
from deepfusion.devices.models import from_config, load, save
from deepfusion.distilling import DistillOptions, distill_folders
from deepfusion.errors import ConfigError, ModelError
from deepfusion.moe import families
from deepfusion.training import Checkpoint, Optimisation, derive_seed

FAST = Optimisation(batch_size=4, learning_rate=3e-3)
STUDENTS = ("gpt2-pico", "llama-pico", "qwen2-moe-pico", "deepseek-v3-pico", "one expert")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, students of every kind, and text."""
    folder = tmp_path_factory.mktemp("distilling")
    tokenizer = write_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("llama-pico", "gpt2-pico"), 10):
        save(from_config(config(name), seed), folder / f"teacher-{name}", tokenizer)
    for name in STUDENTS[:-1]:
        save(from_config(config(name), 1), folder / name, tokenizer)
    target = families["qwen2_moe"].ready_target(config("qwen2-moe-pico"))
    save(from_config(families["qwen2_moe"].student_config(target), 1), folder / STUDENTS[-1], tokenizer)
    with (folder / "text.jsonl").open("w") as lines:
        for row in range(40):
            lines.write(json.dumps({"text": " ".join(f"w{(row * 7 + i * i) % 30}" for i in range(20))}) + "\n")
    return folder


def run(world: Path, out: Path, student: str, **changes: Any) -> list[dict[str, float]]:
    arguments: dict[str, Any] = {
        "teachers": [world / "teacher-llama-pico", world / "teacher-gpt2-pico"], "sequence_length": 16,
        "options": DistillOptions(steps=8, optimisation=FAST),
    } | changes  # fmt: skip
    return distill_folders(student=world / student, data=str(world / "text.jsonl"), out=out, **arguments)


@pytest.mark.parametrize("student", STUDENTS)
def test_any_student_learns_and_opens_with_transformers_alone(student: str, world: Path, tmp_path: Path) -> None:
    history = run(world, tmp_path / "taught", student)
    assert len(history) == 8
    assert {"loss", "ce", "kl", "features"} < set(history[0])
    assert history[-1]["loss"] < history[0]["loss"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taught"]
    assert json.loads((tmp_path / "taught" / "history.json").read_text()) == history
    model, before = AutoModelForCausalLM.from_pretrained(tmp_path / "taught"), load(world / student)
    assert type(model) is type(before)
    assert not torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "taught").encode("w3") == [3]


def test_without_features_or_teachers_it_is_plainer(world: Path, tmp_path: Path) -> None:
    no_features = run(world, tmp_path / "a", "gpt2-pico", options=DistillOptions(steps=2, alpha=0.0, optimisation=FAST))
    assert "features" not in no_features[0]
    assert no_features[0]["kl"] > 0
    alone = run(world, tmp_path / "b", "gpt2-pico", teachers=[])
    assert alone[0]["loss"] == alone[0]["ce"]


def test_the_same_seed_gives_the_same_bytes_also_after_a_crash(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "whole", "llama-pico")

    def crash(label: str, done: int, total: int, note: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "again", "llama-pico", progress=crash)
    with pytest.raises(ConfigError, match=r"was begun before; add --resume to go on, or remove .*again.partial"):
        run(world, tmp_path / "again", "llama-pico")
    run(world, tmp_path / "again", "llama-pico", resume=True)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "whole")
    assert not (tmp_path / "again.partial").exists()


def test_a_training_goes_on_only_with_its_teachers_in_their_order(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are known by their teacher's place, so what was trained under another order is of no use."""
    ordered = [world / "teacher-llama-pico", world / "teacher-gpt2-pico"]
    run(world, tmp_path / "whole", "llama-pico", teachers=ordered[::-1])

    def crash(label: str, done: int, total: int, note: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint.__init__, "__defaults__", (0.0,))
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "again", "llama-pico", teachers=ordered, progress=crash)
    assert list((tmp_path / "again.partial").rglob("*.safetensors"))
    run(world, tmp_path / "again", "llama-pico", teachers=ordered[::-1], resume=True)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "whole")


def test_what_cannot_be_done_says_why(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exists already; choose another folder, or remove it"):
        run(world, world / "text.jsonl", "gpt2-pico")
    with pytest.raises(ConfigError, match=r"steps = 0: must be at least 1"):
        run(world, tmp_path / "x", "gpt2-pico", options=DistillOptions(steps=0))
    with pytest.raises(ModelError, match=r"nobody: no such folder; check the path"):
        run(world, tmp_path / "x", "nobody")


def test_a_teacher_of_another_tokenizer_is_refused_with_a_cure_that_this_command_has(
    world: Path, tmp_path: Path
) -> None:
    save(from_config(config("llama-pico"), 1), tmp_path / "stranger", write_tokenizer(tmp_path / "other", 40))
    with pytest.raises(
        ModelError, match=r"teacher stranger .* has another vocabulary than the student .*, or --beta 0$"
    ):
        run(world, tmp_path / "x", "gpt2-pico", teachers=[tmp_path / "stranger"])
    options = DistillOptions(steps=1, beta=0.0, optimisation=FAST)
    history = run(world, tmp_path / "x", "gpt2-pico", teachers=[tmp_path / "stranger"], options=options)
    assert history[0]["features"] > 0


def test_a_teacher_that_is_not_there_is_missed_before_anything_is_begun(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        run(world, tmp_path / "taught", "gpt2-pico", teachers=[world / "nobody"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("changes", "error"), [
    ({"sequence_length": 1}, ConfigError), ({"sequence_length": 0}, ConfigError), ({"teachers": "stranger"}, ModelError),
    ({"answer": "{text}"}, ConfigError),
])  # fmt: skip
def test_what_is_refused_may_be_mended_and_begun(
    changes: dict[str, Any], error: type[Exception], world: Path, tmp_path: Path
) -> None:
    if "teachers" in changes:
        other = write_tokenizer(tmp_path / "other", 40)
        save(from_config(config("llama-pico"), 1), tmp_path / "stranger", other)
        changes = {"teachers": [tmp_path / "stranger"]}
    with pytest.raises(error, match=r"choose 2 or more|stranger|has no prompt"):
        run(world, tmp_path / "taught", "gpt2-pico", **changes)
    assert not (tmp_path / "taught.partial").exists()


def padded(source: Path, out: Path, rows: int = 20) -> Path:
    """The same model with rows beyond its tokenizer in its embedding and output matrix, which look like any other."""
    model = load(source)
    model.resize_token_embeddings(V + rows, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[V:] = 0.5
    save(model, out, source)
    return out


def test_a_teacher_with_padding_teaches_as_it_does_without(world: Path, tmp_path: Path) -> None:
    plain = world / "teacher-llama-pico"
    run(world, tmp_path / "a", "gpt2-pico", teachers=[plain])
    run(world, tmp_path / "b", "gpt2-pico", teachers=[padded(plain, tmp_path / "padded")])
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_student_with_padding_is_compared_without_it_and_scored_with_it(
    tau: float, world: Path, tmp_path: Path
) -> None:
    student, teacher = padded(world / "gpt2-pico", tmp_path / "padded"), world / "teacher-llama-pico"
    options = DistillOptions(steps=1, alpha=0.0, temperature=tau, trust="all", optimisation=FAST)
    (row,) = distill_folders(
        [teacher], student, str(world / "text.jsonl"), tmp_path / "out", sequence_length=16, options=options
    )
    corpus = corpus_from_files(str(world / "text.jsonl"), "public", student, text=None, prompt=None, answer=None)
    batch = PackedText(corpus, 16, derive_seed(0, "text")).batch(0, FAST.batch_size)
    with torch.no_grad():
        ours, theirs = (load(folder)(batch.input_ids_BT).logits for folder in (student, teacher))
    ce = functional.cross_entropy(ours[:, :-1].flatten(0, 1), batch.input_ids_BT[:, 1:].flatten())
    log_p, log_q = ((logits[..., :V] / tau).log_softmax(-1).flatten(0, 1) for logits in (ours, theirs))
    kl = tau**2 * functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert (row["ce"], row["kl"]) == pytest.approx((float(ce), float(kl)), rel=1e-4)
    assert row["loss"] == pytest.approx(row["ce"] + row["kl"], rel=1e-6)


def test_a_model_without_an_embedding_for_each_token_is_refused(world: Path, tmp_path: Path) -> None:
    small = load(world / "teacher-llama-pico")
    small.resize_token_embeddings(V - 40)
    save(small, tmp_path / "small", world / "gpt2-pico")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "w9"}))
    with pytest.raises(ModelError, match=r"small: its vocab_size is 8, .* token 9; give models of one tokenizer"):
        distill_folders(
            [tmp_path / "small"], world / "gpt2-pico", str(text), tmp_path / "out", options=DistillOptions()
        )
    assert not (tmp_path / "out.partial").exists()


def test_sequences_are_as_long_as_every_model_reads(world: Path, tmp_path: Path) -> None:
    reach = reach_of(read_config(world / "teacher-gpt2-pico"))
    assert reach is not None
    with pytest.raises(ConfigError, match=rf"--sequence-length {reach + 1}: .*teacher-gpt2-pico reads {reach} tokens"):
        run(world, tmp_path / "t", "llama-pico", sequence_length=reach + 1)
    assert run(
        world, tmp_path / "t", "llama-pico", sequence_length=None, options=DistillOptions(steps=1, optimisation=FAST)
    )
