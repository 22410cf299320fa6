# SPDX-License-Identifier: Apache-2.0
"""Phase II from end to end on pico models: both recipes, their invariants, and crashes (method, sections 7, 10b, 14)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_world import Rows, T, V, World, config, file_bytes, make_world, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepfusion.devices import features
from deepfusion.devices.features import forward, read
from deepfusion.devices.models import from_config, load, save
from deepfusion.errors import ModelError
from deepfusion.losses import next_token_losses
from deepfusion.moe import families
from deepfusion.moe.single import compute_as_mlp
from deepfusion.scores import Scores
from deepfusion.stages import merge, router
from deepfusion.stages.distill import DistillOptions, Logits, Rule, Vaa, distill, loop, rules
from deepfusion.stages.distill.align import Alignment, same_tokens
from deepfusion.stages.distill.loop import holding
from deepfusion.stages.distill.objective import Teacher, domain_losses
from deepfusion.training import Checkpoint, Optimisation, derive_seed, fit
from deepfusion.types import Batch, Proxy

FAMILIES = ("qwen2_moe", "deepseek_v2", "deepseek_v3")
FAST = Optimisation(batch_size=4, learning_rate=3e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def options(**changes: Any) -> DistillOptions:
    return DistillOptions(**{"steps": 3, "branch": 0.4, "optimisation": FAST, **changes})


def run(
    world: World, out: Path, *, recipe: str = "joint", domains: Sequence[int] = (0, 1), teachers: Any = None,
    rule: Rule | None = None, padded: bool = False, progress: Any = None, scratch: Path | None = None, **changes: Any,
) -> loop.History:  # fmt: skip
    extra = {} if progress is None else {"progress": progress}
    return distill(
        world.base, [world.teachers[k] for k in domains] if teachers is None else teachers,
        [Rows(k, padded=padded) for k in domains], rule=rule or Vaa(), recipe=recipe, options=options(**changes), seed=7,  # type: ignore[arg-type]
        scratch=scratch, out=out, **world.arguments, **extra,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["joint", "paper"])
def test_students_are_ordinary_folders_and_learn(world: World, tmp_path: Path, recipe: str) -> None:
    history = run(world, tmp_path, recipe=recipe, steps=12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "history.json"]
    assert json.loads((tmp_path / "history.json").read_text()) == history
    for rows in history.values():
        assert len(rows) == 12
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert {"loss", "ce", "kl", "features", "gradient_norm"} < set(rows[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    assert model.config.num_experts == 1
    assert model(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4)).logits.shape == (1, 4, V)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_with_one_domain_both_recipes_give_the_same_bytes(model_type: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", model_type, domains=1)
    joint = run(world, tmp_path / "joint", recipe="joint", domains=[0])
    paper = run(world, tmp_path / "paper", recipe="paper", domains=[0])
    assert file_bytes(tmp_path / "joint" / "0") == file_bytes(tmp_path / "paper" / "0")
    assert joint["joint"] == paper["0"]


def test_the_same_seed_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "once", padded=True)
    run(world, tmp_path / "again", padded=True)
    assert file_bytes(tmp_path / "once") == file_bytes(tmp_path / "again")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_joint_students_share_everything_but_their_experts(model_type: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", model_type)
    run(world, tmp_path / "out")
    states = [load(tmp_path / "out" / str(k)).state_dict() for k in range(2)]
    (shared, expert), (other_shared, other_expert) = (families[model_type].split(s, world.target) for s in states)
    assert all(torch.equal(shared[name], other_shared[name]) for name in shared)
    assert not any(torch.equal(expert[name], other_expert[name]) for name in expert)
    base = load(world.base).state_dict()
    assert not torch.equal(states[0]["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_joint_students_merge_exactly(model_type: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", model_type)
    run(world, tmp_path / "out", steps=2)
    folders = [tmp_path / "out" / str(k) for k in range(2)]
    students = merge.open_students(folders, family=world.family, target=world.target, slices=1)
    shared, _ = world.family.split(load(folders[1]).state_dict(), world.target)
    assert all(torch.equal(students.shared[name], tensor) for name, tensor in shared.items())
    start = router.random_router(world.target, family=world.family, seed=0)
    options = merge.MergeOptions(noise=0.0)
    model = merge.merge(students, start, family=world.family, target=world.target, options=options, seed=0)
    assert merge.check_merge(model, students, Rows(0).batch(0, 4), family=world.family, options=options) < 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_made_a_piece_at_a_time_teach_the_same(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path / "world", model_type)
    whole = run(world, tmp_path / "whole", padded=True)
    monkeypatch.setattr(features, "LOGITS_HELD", 1)
    pieces = run(world, tmp_path / "pieces", padded=True)
    for row, other in zip(whole["joint"], pieces["joint"], strict=True):
        assert other == pytest.approx(row, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_reading_together_is_reading_one_after_the_other(model_type: str, tmp_path: Path) -> None:
    world = make_world(tmp_path, model_type, domains=2)
    at_once, in_turn = (run(world, tmp_path / str(together), steps=3, together=together) for together in (True, False))
    for first, second in zip(at_once["joint"], in_turn["joint"], strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    for k in ("0", "1"):
        states = [load(tmp_path / str(together) / k).state_dict() for together in (True, False)]
        for name, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=2e-5, msg=name)


def test_paper_students_share_nothing(world: World, tmp_path: Path) -> None:
    run(world, tmp_path, recipe="paper")
    first, second = (load(tmp_path / str(k)).state_dict() for k in range(2))
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])


def plain_language_model(world: World, steps: int, optimisation: Optimisation) -> dict[str, torch.Tensor]:
    """The base trained by cross-entropy, with nothing of the distillation stage."""
    model = load(world.base).train()
    compute_as_mlp(model)  # grouped products round differently
    trained = {n: p for n, p in model.named_parameters() if not n.endswith("mlp.gate.weight")}

    def backward(step: int) -> dict[str, float]:
        batch = Rows(0).batch(step, optimisation.batch_size)
        loss, _ = next_token_losses(read(model, batch).scores, [], batch, 1.0)
        loss.backward()
        return {}

    fit(trained, backward, steps=steps, optimisation=optimisation, seed=derive_seed(7, "distill", 0))
    return model.state_dict()


def test_without_alpha_and_beta_it_is_plain_language_modelling_to_the_last_bit(world: World, tmp_path: Path) -> None:
    unclipped = replace(FAST, clip=1e9)  # the norm is summed in another order, so only without clipping are bits equal
    run(world, tmp_path / "off", domains=[0], alpha=0.0, beta=0.0, optimisation=unclipped)
    run(world, tmp_path / "alone", domains=[0], teachers=[[]], optimisation=unclipped)
    assert file_bytes(tmp_path / "off" / "0") == file_bytes(tmp_path / "alone" / "0")
    ours, plain = load(tmp_path / "off" / "0").state_dict(), plain_language_model(world, 3, unclipped)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_logits_rule_is_vaa_without_features(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "logits", rule=Logits())
    run(world, tmp_path / "vaa", rule=Vaa(), alpha=0.0)
    assert file_bytes(tmp_path / "logits") == file_bytes(tmp_path / "vaa")
    assert list(rules) == ["logits", "ofa", "vaa"]


def teachers_at_work(world: World, rule: Rule, *, seed: int = 0) -> list[Teacher]:
    student = load(world.base)
    made = []
    for proxy in world.teachers[0]:
        model = load(proxy.folder).requires_grad_(False)
        adapter = rule.attach(student.config, model.config, sequence_length=T, seed=seed)
        made.append(Teacher(model, proxy.weight, adapter))
    return made


def losses_of(
    student: PreTrainedModel, teachers: list[Teacher], batch: Batch, options: DistillOptions
) -> dict[str, torch.Tensor]:
    """Eq. (11) of one domain."""
    with torch.no_grad():
        reads = [read(t.model, batch, taps=t.adapter.teacher_taps if t.adapter else ()) for t in teachers]
    (losses,) = domain_losses(student, [teachers], [reads], [batch], options)
    return losses


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_reaches_every_block_of_the_student_and_nothing_of_the_teachers(
    model_type: str, tmp_path: Path
) -> None:
    world = make_world(tmp_path, model_type, domains=1)
    student, teachers = load(world.base), teachers_at_work(world, Vaa())
    features_only = options(alpha=1.0, beta=0.0)
    losses = losses_of(student, teachers, Rows(0, padded=True).batch(0, 4), features_only)
    losses["features"].backward()
    router = ".mlp.gate.weight"  # of a single expert: its gradient is exactly zero
    for name, parameter in student.named_parameters():
        if ".layers." in name and not name.endswith(router):
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
    assert all(p.grad is None for teacher in teachers for p in teacher.model.parameters())


def test_what_padding_holds_never_changes_any_part_of_the_loss(world: World) -> None:
    student, teachers = load(world.base), teachers_at_work(world, Vaa(info_nce=0.1))
    clean = Rows(0, padded=True).batch(0, 4)
    dirty = Batch(torch.where(clean.valid_BT, clean.input_ids_BT, V - 1), clean.counted_BT, clean.valid_BT)
    first, second = (losses_of(student, teachers, each, options(temperature=2.0)) for each in (clean, dirty))
    assert set(first) == {"loss", "ce", "kl", "features"}
    for part, value in first.items():
        assert torch.equal(value, second[part]), part


def test_a_teacher_like_the_student_teaches_nothing(world: World) -> None:
    student = load(world.base)
    twin = Teacher(load(world.base).requires_grad_(False), 1.0, None)
    batch = Rows(0).batch(0, 4)
    uncounted = Batch(batch.input_ids_BT, torch.zeros_like(batch.counted_BT), batch.valid_BT)
    losses = losses_of(student, [twin], uncounted, options(alpha=0.0))
    losses["loss"].backward()
    assert float(losses["kl"]) == pytest.approx(0, abs=1e-7)
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-7


@pytest.mark.parametrize("recipe", ["joint", "paper"])
def test_a_crash_in_the_middle_changes_no_byte(
    world: World, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Checkpoint", functools.partial(Checkpoint, every_seconds=0.0))
    calls: list[str] = []

    def fail_late(label: str, done: int, total: int, note: str) -> None:
        calls.append(label)
        if len(calls) == (3 if recipe == "joint" else 7):  # paper: in the second domain
            raise KeyboardInterrupt

    run(world, tmp_path / "whole", recipe=recipe, steps=5)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "broken", recipe=recipe, steps=5, progress=fail_late, scratch=tmp_path / "scratch")
    calls.clear()
    run(world, tmp_path / "resumed", recipe=recipe, steps=5, scratch=tmp_path / "scratch",
        progress=lambda label, *_: calls.append(label))  # fmt: skip
    assert file_bytes(tmp_path / "resumed") == file_bytes(tmp_path / "whole")
    assert len(calls) == 3 if recipe == "joint" else calls == ["distill domain 1"] * 4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recomputing_activations_changes_nothing(model_type: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", model_type)
    plain = run(world, tmp_path / "plain")
    saving = run(world, tmp_path / "saving", optimisation=replace(FAST, gradient_checkpointing=True))
    for row, other in zip(plain["joint"], saving["joint"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_accumulated_micro_batches_equal_one_batch_when_all_tokens_count(world: World, tmp_path: Path) -> None:
    class Full(Rows):
        def batch(self, step: int, batch_size: int) -> Batch:
            parts = [super(Full, self).batch(step * batch_size + row, 1) for row in range(batch_size)]
            ids_BT = torch.cat([part.input_ids_BT for part in parts])
            return Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.ones_like(ids_BT, dtype=torch.bool))

    def train(out: str, optimisation: Optimisation) -> list[dict[str, float]]:
        return distill(
            world.base, [world.teachers[0]], [Full(0)], rule=Vaa(), recipe="joint", seed=1, out=tmp_path / out,
            options=options(optimisation=optimisation), **world.arguments,  # type: ignore[arg-type]
        )["joint"]  # fmt: skip

    whole = train("whole", replace(FAST, batch_size=4))
    parts = train("parts", replace(FAST, batch_size=2, accumulate=2))
    for row, other in zip(whole, parts, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_expert_gradients_are_multiplied_by_the_number_of_domains(world: World, tmp_path: Path) -> None:
    """Two domains with the same text and teachers move their experts as one domain does."""
    twice = distill(
        world.base, [world.teachers[0]] * 2, [Rows(0)] * 2, rule=Logits(), recipe="joint",
        options=options(steps=1, branch=0.0), seed=0, out=tmp_path / "twice", **world.arguments,  # type: ignore[arg-type]
    )  # fmt: skip
    run(world, tmp_path / "once", domains=[0], rule=Logits(), steps=1)
    once, first, second = (
        load(p).state_dict() for p in (tmp_path / "once/0", tmp_path / "twice/0", tmp_path / "twice/1")
    )
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-5)
    assert twice["joint"][0]["loss/0"] == twice["joint"][0]["loss/1"]


def test_holding_swaps_tied_tensors_together_and_puts_them_back(world: World) -> None:
    model = load(world.base)
    own = model.get_parameter("model.embed_tokens.weight")
    other = torch.zeros_like(own, requires_grad=True)
    with holding(model, {"model.embed_tokens.weight": other}):
        assert float(forward(model, Rows(0).batch(0, 2)).logits_BTV.detach().abs().max()) == 0
        assert model.get_input_embeddings().weight is other
    assert model.get_input_embeddings().weight is own
    assert model.get_output_embeddings().weight is own


def test_a_teacher_with_another_vocabulary_is_refused_by_name(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    save(from_config(config("gpt2-pico"), 0), folder, write_tokenizer(tmp_path / "tokenizer", V - 1))
    stranger = Proxy(0, "stranger", folder, 1, ("d",), 1.0)
    with pytest.raises(ModelError, match=r'teacher stranger of domain 0 has another vocabulary .* align = "none"'):
        run(world, tmp_path / "out", domains=[0], teachers=[[stranger]])
    run(world, tmp_path / "out", domains=[0], teachers=[[stranger]], align="none")
    rows = json.loads((tmp_path / "out" / "history.json").read_text())["joint"]
    assert all(row["kl"] == 0 and row["features"] > 0 for row in rows)


def test_an_alignment_brings_teacher_logits_to_the_student() -> None:
    batch = Rows(0).batch(0, 2)
    logits_BTV = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4)
    assert torch.equal(same_tokens(batch).on_student(Scores(logits_BTV)).hidden_BTH, logits_BTV)
    position_BT = torch.tensor([[2, 0], [1, 1]])
    alignment = Alignment(batch, batch.valid_BT, position_BT, torch.tensor([3, 0, 1]))
    moved = alignment.on_student(Scores(logits_BTV)).hidden_BTH
    made = alignment.on_student(Scores(logits_BTV, torch.eye(4), torch.zeros(4)))
    torch.testing.assert_close(made.logits(slice(None)), moved)
    for b in range(2):
        for t in range(2):
            assert torch.equal(moved[b, t], logits_BTV[b, position_BT[b, t]][[3, 0, 1]])


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"alpha": -1.0}, "alpha = -1.0: must be finite and not negative"),
        ({"beta": float("inf")}, "beta = inf: must be finite and not negative"),
        ({"temperature": 0.0}, "temperature = 0.0: must be finite and above 0"),
        ({"branch": 1.5}, "branch = 1.5: not a share of the steps"),
        ({"text_temperature": 0.0}, "text_temperature = 0.0: must be finite and at least 0.01"),
    ],
)
def test_impossible_options_are_faults_with_a_cure(changes: dict[str, Any], fault: str) -> None:
    (text,) = options(**changes).faults()
    assert text.startswith(fault)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_are_one_until_they_branch(model_type: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", model_type)

    def experts(**changes: Any) -> list[dict[str, torch.Tensor]]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run(world, out, steps=4, **changes)
        return [world.family.split(load(out / str(k)).state_dict(), world.target)[1] for k in (0, 1)]

    one, other = experts(branch=1.0)
    assert all(torch.equal(one[name], other[name]) for name in one), "K copies of one expert, to the last bit"
    apart = experts(branch=0.5)
    assert all(not torch.equal(apart[0][name], apart[1][name]) for name in one)


def test_before_it_branches_an_expert_learns_from_every_domain(world: World, tmp_path: Path) -> None:
    teachers = [world.teachers[0], world.teachers[0]]
    with_both = run(world, tmp_path / "both", steps=3, branch=1.0, teachers=teachers, domains=(0, 1))
    alone = run(world, tmp_path / "alone", steps=3, branch=0.0, teachers=teachers, domains=(0, 1))
    first = {name: value for name, value in with_both["joint"][0].items() if name.startswith("loss")}
    assert first == {name: alone["joint"][0][name] for name in first}, "the first step has nothing to share yet"
    name = "model.layers.0.mlp.experts.gate_up_proj"
    one, other = (load(tmp_path / place / "0").get_parameter(name) for place in ("both", "alone"))
    assert not torch.equal(one, other)
