# SPDX-License-Identifier: Apache-2.0
"""Exit heads begin as the final norm, learn without touching the model, and are read back only if they are what they seem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exits_world import VOCABULARY, backbone_of, heads_of
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from deepfusion import fused
from deepfusion.devices.models import init_id
from deepfusion.errors import DeepFusionError
from deepfusion.market.exits.heads import ABOUT, TENSORS, ExitHeads, load_heads, save_heads
from deepfusion.market.exits.training import states_at, train_heads
from deepfusion.training import Optimisation
from deepfusion.types import Batch


class Rhyme:
    """Text of one rule: the next token is this one plus three."""

    def __init__(self, vocab_size: int = VOCABULARY, sequence_length: int = 16) -> None:
        self.vocab_size, self.sequence_length = vocab_size, sequence_length

    def batch(self, step: int, batch_size: int) -> Batch:
        first_B = torch.arange(batch_size)[:, None] + 7 * step
        ids_BT = (first_B + 3 * torch.arange(self.sequence_length)) % self.vocab_size
        valid_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        return Batch(ids_BT, valid_BT, valid_BT)


@pytest.mark.parametrize("name", ["gpt2-pico", "qwen2-moe-pico"])
def test_a_fresh_head_is_the_final_norm_and_the_models_own_matrix(name: str) -> None:
    backbone = backbone_of(name)
    heads, batch = ExitHeads(backbone, (2, 4), 8), Rhyme().batch(0, 2)
    state_BTH = states_at(heads, batch)[2]
    with torch.no_grad():
        wanted_BTV = backbone.head(backbone.norm(state_BTH))
        assert torch.allclose(heads.scores(2, state_BTH).logits(slice(None)), wanted_BTV, atol=1e-6)
    assert torch.equal(state_BTH, backbone.stop_before(3, batch))


@pytest.mark.parametrize("name", ["gpt2-pico", "olmo2-pico", "qwen2-moe-pico"])
def test_training_teaches_every_exit_and_leaves_the_model_as_it_was(name: str) -> None:
    backbone = backbone_of(name)
    before, heads = init_id(backbone.model), ExitHeads(backbone, (1, 3, 4), 16)
    history = train_heads(heads, Rhyme(), steps=60, optimisation=Optimisation(batch_size=4, learning_rate=1e-2))
    for block in (1, 3):
        assert history[-1][f"ce-{block}"] < 0.9 * history[0][f"ce-{block}"]
    weighed = sum(block / 4 * history[-1][f"ce-{block}"] for block in (1, 3))
    assert history[-1]["loss"] == pytest.approx(weighed, rel=1e-6)
    assert init_id(backbone.model) == before
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_training_again_gives_the_same_heads_and_a_model_without_early_exits_trains_nothing() -> None:
    options: dict[str, Any] = {"steps": 3, "optimisation": Optimisation(batch_size=2), "seed": 5}
    twice = [ExitHeads(backbone_of("llama-pico"), (2, 4), 8, seed=5) for _ in range(2)]
    histories = [train_heads(heads, Rhyme(), **options) for heads in twice]
    assert histories[0] == histories[1]
    assert all(torch.equal(a, b) for a, b in zip(twice[0].parameters(), twice[1].parameters(), strict=True))
    assert train_heads(ExitHeads(backbone_of("llama-pico"), (4,), 8), Rhyme(), **options) == []


def test_memory_of_training_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than the output matrix, where the batch's logits would be seven times as large."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
            found = function(*arguments, **(named or {}))
            largest.append(found.numel() if torch.is_tensor(found) else 0)
            return found

    vocab_size, text = 2048, Rhyme(2048, 56)
    monkeypatch.setitem(fused.CHUNK_ELEMENTS, "cpu", 8 * vocab_size)
    heads = ExitHeads(backbone_of("gpt2-pico", vocab_size=vocab_size), (2, 4), 8)
    with Watch():
        train_heads(heads, text, steps=1, optimisation=Optimisation(batch_size=4))
    assert max(largest) == heads.backbone.head.weight.numel() == vocab_size * 32
    assert vocab_size * 56 * 4 == 7 * max(largest)


def test_heads_survive_the_disk_and_hold_nothing_of_the_model(tmp_path: Path) -> None:
    heads = heads_of(backbone_of("qwen2-moe-pico"))
    save_heads(heads, tmp_path)
    again = load_heads(tmp_path, backbone_of("qwen2-moe-pico"))
    assert again.exit_blocks == (1, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / TENSORS).values())
    assert numbers == 2 * (32 + 2 * 32 * 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ABOUT, TENSORS]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exit_blocks": [1, 3, 5]}, "last block, 4"), ({"exit_blocks": [3, 1, 4]}, "must ascend"), ({"width": 0}, "width = 0"),
        ({"width": 10**9}, "width = 1000000000"), ({"hidden_size": 64}, "this model has 32"), ({"backbone": "x"}, "backbone = x"),
        ({"width": "8"}, "valid integer"), ({"more": 1}, "more"), ({"exit_blocks": [2, 3, 4]}, "heads.1.down.weight"),
        ({"width": 9}, "(8, 32)"), ({"exit_blocks": []}, "must ascend"),
    ],
)  # fmt: skip
def test_a_description_that_is_not_of_these_exits_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    backbone = backbone_of("qwen2-moe-pico")
    save_heads(heads_of(backbone), tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    (tmp_path / ABOUT).write_text(json.dumps(about | change))
    with pytest.raises(DeepFusionError) as found:
        load_heads(tmp_path, backbone)
    assert words in str(found.value)


def test_tensors_that_are_not_these_exits_are_refused(tmp_path: Path) -> None:
    backbone = backbone_of("qwen2-moe-pico")
    save_heads(heads_of(backbone), tmp_path)
    good, path = load_file(tmp_path / TENSORS), tmp_path / TENSORS
    name = "heads.1.up.weight"
    bad = {
        "NaN": {**good, name: torch.full_like(good[name], float("nan"))},
        "(8, 32)": {**good, name: good[name].T.contiguous()},
        "F64": {**good, name: good[name].double()},
        "missing": {key: tensor for key, tensor in good.items() if key != name},
        "nothing belongs": {**good, "zzz": torch.ones(1)},
    }
    for words, tensors in bad.items():
        save_file(tensors, path)
        with pytest.raises(DeepFusionError) as found:
            load_heads(tmp_path, backbone)
        assert words in str(found.value)
    for content in (b"", b"\x80\x04N.", path.read_bytes()[:-5], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(DeepFusionError, match="no readable safetensors"):
            load_heads(tmp_path, backbone)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 10_000, b"null"):
        (tmp_path / ABOUT).write_bytes(content)
        with pytest.raises(DeepFusionError, match="does not describe exits"):
            load_heads(tmp_path, backbone)
    with pytest.raises(DeepFusionError, match="cannot be read"):
        load_heads(tmp_path / "none", backbone)
    save_heads(heads_of(backbone), tmp_path)
    with pytest.raises(DeepFusionError, match="this model has"):
        load_heads(tmp_path, backbone_of("llama-pico"))
