# SPDX-License-Identifier: Apache-2.0
"""Early exits of the student (OFA-KD): what they predict, what they learn, and that nothing of them stays."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from deepfusion.devices.features import Reading, read
from deepfusion.devices.models import from_config
from deepfusion.errors import ConfigError
from deepfusion.stages.distill import DistillOptions, Exits, Ofa
from deepfusion.stages.distill.objective import Teacher, domain_losses
from deepfusion.types import Batch

STUDENT = LlamaConfig(
    vocab_size=23, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, tie_word_embeddings=True
)  # fmt: skip
TEACHER = LlamaConfig(vocab_size=23, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def batch() -> Batch:
    ids_BT = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.ones_like(ids_BT, dtype=torch.bool))


def losses_of(exits: Exits | None, **options: float) -> dict[str, torch.Tensor]:
    student, teacher = from_config(STUDENT, 1), from_config(TEACHER, 2).requires_grad_(False)
    text = batch()
    with torch.no_grad():
        heard: Reading = read(teacher, text)
    settings = DistillOptions(trust="all", **options)  # pyright: ignore[reportArgumentType]
    (found,) = domain_losses(student, [[Teacher(teacher, 1.0, exits)]], [[heard]], [text], settings)
    return found


def test_the_exits_add_the_soft_cross_entropy_of_each_with_the_students_own_head() -> None:
    exits = Ofa(num_stages=2).attach(STUDENT, TEACHER, sequence_length=9, seed=3)
    assert exits.student_taps == (2, 4)
    student, teacher, text = from_config(STUDENT, 1), from_config(TEACHER, 2), batch()
    with torch.no_grad():
        hidden = read(student, text, taps=exits.student_taps).taps
        q_BTV = teacher(text.input_ids_BT).logits.softmax(-1)
        expected = torch.zeros(())
        for exit_BTH in exits(hidden):
            logp_BTV = student.get_output_embeddings()(exit_BTH).log_softmax(-1)
            expected += (q_BTV * (q_BTV.log() - logp_BTV)).sum(-1).mean()
    found = losses_of(exits, alpha=0.5, beta=1.0)
    torch.testing.assert_close(found["features"], expected)
    torch.testing.assert_close(found["loss"], found["ce"] + found["kl"] + 0.5 * expected)


def test_exits_need_no_weight_on_the_final_prediction() -> None:
    exits = Ofa().attach(STUDENT, TEACHER, sequence_length=9, seed=3)
    with_final, without = losses_of(exits, beta=1.0), losses_of(exits, beta=0.0)
    assert float(without["kl"]) == 0.0 < float(with_final["kl"])
    torch.testing.assert_close(with_final["features"], without["features"])


def test_gradients_reach_the_student_and_the_exits_but_not_the_teacher() -> None:
    exits, text = Ofa().attach(STUDENT, TEACHER, sequence_length=9, seed=3), batch()
    student, teacher = from_config(STUDENT, 1), from_config(TEACHER, 2)  # which would learn, if it were let
    heard = read(teacher, text)
    (found,) = domain_losses(
        student, [[Teacher(teacher, 1.0, exits)]], [[heard]], [text], DistillOptions(trust="all", exponent=1.5)
    )
    found["loss"].backward()
    for learner in (student, exits):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_exits_depend_on_their_seed_alone_and_disturb_no_random_stream() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (Ofa().attach(STUDENT, TEACHER, sequence_length=9, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert any(not torch.equal(tensor, other.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_more_exits_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="has 4 blocks; choose at most 4"):
        Ofa(num_stages=5).attach(STUDENT, TEACHER, sequence_length=9, seed=0)
