# SPDX-License-Identifier: Apache-2.0
"""Forty bad configurations, each answered by what is wrong, where, and what to do; and what good ones mean."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from deepfusion.config import load_config, parse_config, to_toml
from deepfusion.errors import ConfigError
from small_world import small_tree

CONFIGS = Path(__file__).parents[2] / "configs"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The small configuration with one value set, or removed where `value` is None."""
    tree = copy.deepcopy(small_tree(Path("/nowhere")))
    node: Any = tree
    *inner, last = path.split(".")
    for key in inner:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


BAD: list[tuple[str, Any, tuple[str, ...]]] = [
    # what, value, words that the answer must hold: the place, the value, the cure
    ("method", "deepfussion", ('method = "deepfussion"', "did you mean", "deepfusion")),
    ("recipe", "both", ("recipe", '"both"', '"joint"', '"paper"')),
    ("seed", -1, ("seed = -1", "choose 0 or more")),
    ("seed", 1.5, ("seed = 1.5", "whole number")),
    ("name", "../../x", ('name = "../../x"', "leave it plain", "--out")),
    ("name", 7, ("name = 7", "text in quotes")),
    ("clusters", {}, ("[clusters]", "did you mean", '"cluster"')),
    ("data.sequence_lenght", 64, ("[data] sequence_lenght = 64", "did you mean", "sequence_length")),
    ("data.sequence_length", 1, ("[data] sequence_length = 1", "choose 2 or more")),
    ("data.sequence_length", "long", ("[data] sequence_length", '"long"', "whole number")),
    ("data.validation_share", 0.9, ("[data] validation_share = 0.9", "0.05 is usual")),
    ("data.tokenizer.file", "t.json", ("[data.tokenizer]", "exclude each other", "exactly one")),
    ("data.tokenizer.vocab_size", 100, ("[data.tokenizer] vocab_size = 100", "257 or more")),
    ("data.corpora", None, ("[[data.corpora]]", "is missing", "add")),
    ("data.corpora.0.embedded", "medicin", ("[data.corpora.0]", '"medicin"', "medicine")),
    ("data.corpora.1.prompt", "Q: {q}", ("[data.corpora.1]", "prompt", "give both")),
    ("data.corpora.1.text", "no field", ("[data.corpora.1]", "no field", "braces")),
    ("data.corpora.2.test", "garden.doc", ("[data.corpora.2]", "garden.doc", ".jsonl")),
    ("devices.count", 0, ("[devices] count = 0", "raise count")),
    ("devices.count", 10**12, ("[devices] count = 1000000000000", "choose 1000000 at most")),
    ("devices.alpha", 0.0, ("[devices] alpha = 0.0", "must be positive")),
    ("devices.epochs", -1.0, ("[devices] epochs = -1.0", "positive")),
    ("devices.max_steps", 0, ("[devices] max_steps = 0", "at least 1")),
    ("devices.threads", 0, ("[devices] threads = 0", "choose 1 or more")),
    ("devices.memory_limit_gib", -2.0, ("[devices] memory_limit_gib = -2.0", "remove it")),
    ("devices.models", [], ("[devices] models", "[[devices.models]]")),
    ("devices.models.0.preset", "gpt-2-pico", ("[devices]", '"gpt-2-pico"', "gpt2-pico")),
    ("devices.models.0.hub", "a/b", ("[devices]", "exclude each other", "exactly one")),
    ("devices.models.1.name", "gpt2", ("[devices]", '"gpt2"', "another name")),
    ("devices.models.1.name", "../gpt", ("[devices]", '"../gpt"', "another name")),
    ("devices.models.1.share", 0.0, ("[devices]", "share = 0.0", "positive")),
    ("devices.models.1.size", 3, ("[devices.models.1] size = 3", "unknown key")),
    ("devices.training.batch_size", 0, ("[devices.training] batch_size = 0", "at least 1")),
    ("devices.training.batch_size", 10**8, ("[devices.training] batch_size = 100000000", "choose 65536 at most")),
    ("devices.training.learning_rate", "fast", ("[devices.training] learning_rate", '"fast"', "a number")),
    ("devices.training.precision", "fp8", ("[devices.training] precision", '"fp8"', '"bf16"')),
    ("tune.optimisation.precision", "bf16", ("precision", "bf16", "give all the same")),
    ("federation.engine", "threads", ("[federation] engine", '"threads"', '"inline"')),
    ("federation.workers", 0, ("[federation] workers = 0", "at least 1")),
    ("cluster.type", "kmean", ('[cluster] type = "kmean"', "did you mean", "kmeans")),
    ("cluster.type", None, ("[cluster]", "needs type", "kmeans")),
    ("cluster.num_clusters", 0, ("[cluster] num_clusters = 0", "at least 1")),
    ("cluster.num_clusters", 7, ("[cluster] num_clusters = 7", "6 devices", "lower num_clusters")),
    ("cluster.num_clusters", 5, ("[cluster] num_clusters = 5", "4 experts", "lower num_clusters to 4")),
    ("target.preset", "qwen2-pico", ('[target] preset = "qwen2-pico"', "qwen2-moe-pico")),
    ("target.config", {"num_expert": 4}, ("[target]", "num_expert", "num_experts")),
    ("target.config", {"num_experts_per_tok": 9}, ("[target] num_experts_per_tok = 9", "num_experts = 4")),
    ("distill", {"type": "vaa", "num_stages": 0}, ("[distill]", "num_stages = 0")),
    ("distill", {"type": "vaa", "width": 30, "heads": 4}, ("[distill]", "heads", "30")),
    ("distillation.steps", 0, ("[distillation] steps = 0", "at least 1")),
    ("distillation.temperature", 0.0, ("[distillation] temperature = 0.0", "above 0")),
    ("distillation.alpha", -1.0, ("[distillation] alpha = -1.0", "0 to switch")),
    ("distillation.start", "warm_start", ('[distillation] start = "warm_start"', "[warm_start] steps", '"proxy"')),
    ("distillation", None, ("[distillation] is missing", "add the section")),
    ("tune.experts", "thaw", ("[tune] experts", '"thaw"', '"freeze"')),
    ("merge", {"noise": -0.1}, ("[merge] noise = -0.1", "0 makes exact copies")),
    ("router", {"start": "zero"}, ("[router] start", '"zero"', '"prototype"')),
    ("generate", {"share": 2.0}, ("[generate] share = 2.0", "from 0 to 1")),
    ("embed", {"type": "tfidf", "epsilon": 3.0}, ("[embed] epsilon = 3.0", "0 to 1")),
    ("warm_start", {"steps": -5}, ("[warm_start] steps = -5", "0 starts")),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "words"), BAD, ids=[f"{path}={value}"[:60] for path, value, _ in BAD])
def test_a_bad_value_is_answered_by_place_value_and_cure(path: str, value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(path, value))
    assert len(caught.value.faults) >= 1
    for word in words:
        assert word in str(caught.value)


def test_only_a_fleet_whose_devices_all_have_files_needs_no_private_text() -> None:
    tree = small_tree(Path("/nowhere"))
    for row in tree["data"]["corpora"]:
        del row["private"]
    with pytest.raises(ConfigError, match="no row has private text: devices have nothing to train on"):
        parse_config(tree)
    tree["devices"] |= {"count": 0, "named": [{"id": f"device-00{i}", "model": "gpt2"} for i in range(3)]}
    assert parse_config(tree).devices.named[0].files == ()


def test_a_quorum_is_not_larger_than_the_fleet() -> None:
    with pytest.raises(ConfigError, match=r"\[federation\] minimum_devices = 7: the fleet has 6; lower it"):
        parse_config(small_tree(Path("/nowhere"), federation={"minimum_devices": 7}))


def test_all_faults_are_reported_at_once() -> None:
    tree = changed("devices.count", 0)
    tree["tune"]["experts"] = "thaw"
    tree["data"]["sequence_length"] = "long"
    tree["wrong"] = 1
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    assert all(word in text for word in ("4 faults", "count = 0", "experts", "sequence_length", "wrong = 1"))


RUNS = sorted(set(CONFIGS.glob("*.toml")) - set(CONFIGS.glob("market*.toml")))
"""What configures a run; the market has configurations of its own."""


@pytest.mark.parametrize("name", [path.name for path in RUNS])
def test_a_resolved_configuration_reads_back_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LlamaConfig().save_pretrained(tmp_path / "models" / "smollm2")  # where smollm2.toml finds its base
    config = load_config(CONFIGS / name)
    assert parse_config(tomllib.loads(to_toml(config))) == config


def test_one_value_can_be_overridden_from_outside() -> None:
    config = load_config(CONFIGS / "quickstart.toml", [
        "devices.count=5", "devices.models.1.config.num_hidden_layers=2", "name=mine", "devices.alpha=inf",
    ], seed=9)  # fmt: skip
    assert (config.devices.count, config.name, config.seed, config.devices.alpha) == (5, "mine", 9, float("inf"))
    assert config.devices.models[1].config == {"num_hidden_layers": 2}


@pytest.mark.parametrize(("override", "words"), [
    ("devices.count", "not of the form section.key=value"),
    ("devices.models.9.name=x", "devices.models has items 0 to 2"),
    ("seed.more=1", "seed is a value, not a section"),
    ("=3", "not of the form"),
])  # fmt: skip
def test_a_bad_override_says_what_is_wrong_with_it(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "quickstart.toml", [override])


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + (CONFIGS / "quickstart.toml").read_bytes())
    assert load_config(marked) == load_config(CONFIGS / "quickstart.toml")


def test_a_run_folder_stands_for_the_configuration_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((CONFIGS / "quickstart.toml").read_bytes())
    assert load_config(tmp_path) == load_config(CONFIGS / "quickstart.toml")


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match=r"broken\.toml.*\n.*not valid TOML"):
        load_config(tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.toml")
