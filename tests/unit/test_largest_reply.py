# SPDX-License-Identifier: Apache-2.0
"""What one answer of a device may weigh: more than any that an honest device sends, and not much more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from deepfusion.config import parse_config
from deepfusion.devices.configurations import config_of
from deepfusion.devices.memory import num_parameters
from deepfusion.devices.models import from_config
from deepfusion.federation.formats import Format, shrink
from deepfusion.federation.header import LARGEST_HEADER
from deepfusion.run import largest_reply, shapes_of
from deepfusion.state_dicts import distinct_state
from small_world import rounds_tree, small_tree


def limit(tree: dict[str, Any], vocabulary: int = 400) -> int:
    """The limit without what it leaves for a header."""
    largest = largest_reply(parse_config(tree), SimpleNamespace(vocab_size=vocabulary))  # type: ignore[arg-type]
    assert largest is not None
    return largest - LARGEST_HEADER


@pytest.mark.parametrize("vocabulary", [400, 5000], ids=["trained", "from a file"])
@pytest.mark.parametrize("form", get_args(Format))
def test_every_devices_model_fits_in_every_format_with_the_vocabulary_that_the_run_has(
    form: Format, vocabulary: int, tmp_path: Path
) -> None:
    tokenizer = {"vocab_size": 400} if vocabulary == 400 else {"file": "tokenizer.json"}
    tree = small_tree(tmp_path, upload={"format": form})
    tree["data"]["tokenizer"] = tokenizer
    sizes: list[int] = []
    for spec in parse_config(tree).devices.models:
        state = distinct_state(from_config(config_of(spec, vocab_size=vocabulary, positions=32, eos_id=0), seed=0))
        sizes.append(sum(tensor.nbytes for tensor in shrink(state, form, state).values()))
    assert max(sizes) < limit(tree, vocabulary) / 2
    if form in ("fp32", "bf16"):  # others are compressed, and nobody knows how far
        assert limit(tree, vocabulary) < 2.1 * max(sizes)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_method_of_rounds_may_send_its_whole_moe(rounds: int, tmp_path: Path) -> None:
    tree = rounds_tree(tmp_path, "fedavg", rounds=rounds)
    assert limit(tree) >= 2 * 4 * num_parameters(shapes_of(parse_config(tree)).target)


def test_nobody_knows_beforehand_how_large_a_text_is(tmp_path: Path) -> None:
    training = {"steps": 5, "optimisation": {"batch_size": 8, "learning_rate": 3e-3}}
    tree = small_tree(tmp_path, method="centralised", training=training)
    del tree["cluster"], tree["distillation"]
    assert largest_reply(parse_config(tree), SimpleNamespace(vocab_size=400)) is None  # type: ignore[arg-type]
