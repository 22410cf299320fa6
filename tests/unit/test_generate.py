# SPDX-License-Identifier: Apache-2.0
"""Properties of text that teachers write: as much as asked for, by weight, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from devices_world import byte_tokenizer

from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config, save
from deepfusion.devices.presets import PRESETS
from deepfusion.stages import generate
from deepfusion.stages.generate import GenerateOptions, sample
from deepfusion.types import Corpus, Proxy

T = 12
OPTIONS = GenerateOptions(share=0.5, sequences=10, batch_size=4)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Proxy]:
    folder = tmp_path_factory.mktemp("teachers")
    tokenizer = byte_tokenizer(folder / "tokenizer")
    found: list[Proxy] = []
    for preset, weight in (("gpt2-pico", 0.3), ("llama-pico", 0.7)):
        config = make_config(PRESETS[preset].config, vocab_size=300, positions=T, eos_id=0)
        save(from_config(config, seed=1), folder / preset, tokenizer)
        found.append(Proxy(0, preset, folder / preset, 100, ("d0",), weight))
    return found


def written(teachers: list[Proxy], *, seed: int = 0, domain: str = "domain-0", **changes: float) -> Corpus:
    return sample(
        teachers, domain=domain, options=replace(OPTIONS, **changes), sequence_length=T, seed=seed,
        tokenizer_folder=teachers[0].folder,
    )  # fmt: skip


def same(a: Corpus, b: Corpus) -> bool:
    return np.array_equal(a.token_ids, b.token_ids)


def test_it_is_as_much_as_asked_for_and_every_token_counts(teachers: list[Proxy]) -> None:
    corpus = written(teachers)
    assert 0 < len(corpus) <= OPTIONS.sequences
    assert corpus.counted.all()
    assert corpus.domains == ("domain-0",)
    assert int(corpus.lengths_U.max()) >= 2


def test_the_seed_and_the_domain_decide_and_no_other_random_stream_moves(teachers: list[Proxy]) -> None:
    before = torch.random.get_rng_state()
    first = written(teachers)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same(first, written(teachers))
    assert not same(first, written(teachers, seed=1))
    assert not same(first, written(teachers, domain="domain-1"))


def test_teachers_write_in_proportion_to_their_weight(teachers: list[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}
    load = generate.load

    def watched(folder: Path) -> object:
        model = load(folder)
        write = model.generate

        def counting(prompt: torch.Tensor, **options: object) -> object:
            asked[folder.name] = asked.get(folder.name, 0) + len(prompt)
            return write(prompt, **options)

        monkeypatch.setattr(model, "generate", counting, raising=False)
        return model

    monkeypatch.setattr(generate, "load", watched)
    written(teachers)
    assert asked == {"gpt2-pico": 3, "llama-pico": 7}


def test_a_cold_teacher_repeats_itself(teachers: list[Proxy]) -> None:
    """At temperature ~0 all sequences of one teacher are the same."""
    cold = written(teachers[:1], temperature=1e-4, sequences=3)
    texts = {cold.text(index) for index in range(len(cold))}
    assert len(texts) <= 1


@pytest.mark.parametrize(("changes", "says"), [
    ({"share": 1.5}, "share = 1.5"), ({"share": -0.1}, "share = -0.1"), ({"sequences": 0}, "sequences = 0"),
    ({"batch_size": 0}, "batch_size = 0"), ({"temperature": 0.0}, "temperature = 0.0"),
])  # fmt: skip
def test_impossible_options_are_named_with_their_cure(changes: dict[str, float], says: str) -> None:
    (fault,) = replace(OPTIONS, **changes).faults()
    assert fault.startswith(says)
    assert "; " in fault
    assert list(OPTIONS.faults()) == []
