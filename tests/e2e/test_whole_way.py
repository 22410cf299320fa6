# SPDX-License-Identifier: Apache-2.0
"""From private text to one checkpoint, on a tiny federation: what comes out, and that it is always the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from deepfusion.app import launch
from deepfusion.config import parse_config
from deepfusion.devices import models
from deepfusion.errors import ConfigError, MemoryLimitError, ResumeError
from deepfusion.methods import DeepFusion
from deepfusion.record import Record
from deepfusion.stages.embed import HashedTfidf
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state
from deepfusion.types import State
from small_world import small_tree
from wire_world import TOLD, Seen, check_ledger, tapped

RESULTS = ("uploads", "proxies", "experts", "merged", "moe", "reference/moe")
"""What must be the same bytes in every run of one configuration."""


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with tapped() as found:
        yield found


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory, seen: Seen) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("runs") / "small"
    record = launch(parse_config(small_tree(root)), folder)
    assert record is not None
    return folder, record


def digests(folder: Path) -> dict[str, str]:
    """Hash of every result file of a run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in RESULTS for path in sorted((folder / part).rglob("*"))
        if path.is_file() and path.name != ".stage.json"
    }  # fmt: skip


def in_a_process_of_its_own(tree: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """The command line, as a user calls it."""
    config = folder.with_suffix(".toml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(tomli_w.dumps(tree))
    command = [sys.executable, "-m", "deepfusion", "run", str(config), "--out", str(folder), "--json", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_the_checkpoint_opens_and_generates_without_deepfusion(run: tuple[Path, Record]) -> None:
    script = """
import sys
sys.modules["deepfusion"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The harbour note:", return_tensors="pt")
print(model.config.model_type, model.config.num_experts, len(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0])))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(run[0] / "moe")], capture_output=True, text=True, check=True
    )
    family, experts, characters = result.stdout.split()
    assert (family, int(experts)) == ("qwen2_moe", 4)
    assert int(characters) > len("The harbour note:")


def test_the_record_holds_what_users_compare(run: tuple[Path, Record]) -> None:
    folder, record = run
    written = json.loads((folder / "record.json").read_text())
    assert Record.load(folder / "record.json") == record
    assert (written["method"], written["recipe"], written["seed"]) == ("deepfusion", "joint", 0)
    assert set(written["metrics"]["domains"]) == {"harbour", "kitchen", "garden"}
    for name in ("public_only", "proxies", "students", "devices", "oracle", "merged"):
        assert written["baselines"][name] is not None, name
    assert {"id", "architecture", "parameters", "estimated_memory_bytes", "upload_bytes", "cluster"} <= set(
        written["devices"][0]
    )
    assert all(device["peak_memory_bytes"] > 0 and device["seconds"] > 0 for device in written["devices"])
    assert {"data", "proxies", "experts", "merged", "moe"} <= set(written["seconds"])
    assert record.merge_check is not None
    assert record.merge_check <= 1e-5


def test_the_ledger_counts_the_bytes_that_lie_in_the_spool(run: tuple[Path, Record]) -> None:
    folder, record = run
    on_disk = {p.stem: p.stat().st_size for p in (folder / "uploads").glob("*.safetensors")}
    assert on_disk == {device.id: device.upload_bytes for device in record.devices}
    ledger = record.ledger
    assert ledger.upload_bytes == sum(on_disk.values())
    assert ledger.total_bytes == ledger.upload_bytes + ledger.download_bytes + ledger.init_bytes


def test_the_ledger_is_the_closed_form(run: tuple[Path, Record], seen: Seen) -> None:
    """The statistics of the public text down; up one model A and 64 numbers, once."""
    folder, record = run
    first = {name: models.load(Path(path)) for name, path in json.loads((folder / "initial.json").read_text()).items()}
    architecture = {device.id: device.architecture for device in record.devices}
    statistics = torch.zeros(2 ** HashedTfidf().hash_bits, dtype=torch.float16)

    def due(row: dict[str, Any]) -> State:
        if row["direction"] == "down":
            return {f"published/{name}": statistics for name in ("idf", "mean")}
        model = distinct_state(first[architecture[row["device"]]])
        return {MODEL + n: t for n, t in model.items()} | {"embedding": torch.zeros(64, dtype=torch.float16)}

    says = {("down", "statistics"): {"eos_id", "run_seed", "seed", "vocab_size"}, ("up", "model"): TOLD}
    rows = check_ledger(folder, seen, due, says)
    assert len(rows) == 2 * len(record.devices)
    assert sum(row["bytes"] for row in rows) == record.ledger.total_bytes


def test_unlike_domains_are_found(run: tuple[Path, Record]) -> None:
    record = run[1]
    main = {d.id: max(d.domains, key=lambda name: d.domains[name]) for d in record.devices}
    found = {d.id: d.cluster for d in record.devices}
    pairs = [(a, b) for a in main for b in main if a < b]
    agree = sum((main[a] == main[b]) == (found[a] == found[b]) for a, b in pairs)
    assert agree / len(pairs) >= 0.8


def test_a_finished_run_is_not_done_again(run: tuple[Path, Record], root: Path) -> None:
    folder, record = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = launch(parse_config(small_tree(root)), folder, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert again is not None
    assert (again.metrics, again.baselines, again.ledger) == (record.metrics, record.baselines, record.ledger)


def test_only_what_depends_on_a_change_is_done_again(root: Path, tmp_path: Path) -> None:
    first = small_tree(root, evaluate=dict.fromkeys(("public_only", "devices", "proxies", "students"), False))
    launch(parse_config(first), tmp_path / "run")
    before = {part: digests_of(tmp_path / "run" / part) for part in ("uploads", "experts", "moe")}
    launch(parse_config({**first, "tune": {"steps": 5}}), tmp_path / "run", resume=True)
    after = {part: digests_of(tmp_path / "run" / part) for part in ("uploads", "experts", "moe")}
    assert after["uploads"] == before["uploads"]
    assert after["experts"] == before["experts"]
    assert after["moe"] != before["moe"]


def digests_of(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        p.name: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.rglob("*.safetensors")
    }


def test_processes_and_one_process_give_the_same_bytes(run: tuple[Path, Record], root: Path, tmp_path: Path) -> None:
    process = in_a_process_of_its_own(small_tree(root, federation={"engine": "forkserver"}), tmp_path / "run")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()
    assert json.loads(out)["metrics"]["tokens"] > 0
    assert digests(tmp_path / "run") == digests(run[0])


@pytest.mark.parametrize("changes", [
    {"recipe": "paper"},
    {"target": {"preset": "deepseek-v2-pico"}},
    {"target": {"preset": "deepseek-v3-pico"}},
    {"target": {"preset": "qwen2-moe-pico", "config": {"num_experts": 6}}, "merge": {"fill": "split"}},
    {"generate": {"share": 0.5, "sequences": 6}, "cluster": {"type": "kmeans", "num_clusters": "auto", "max_clusters": 4}},
    {"warm_start": {"steps": 2}, "distill": {"type": "logits"}, "router": {"start": "random"}},
    {"cluster": {"type": "kmeans", "num_clusters": 4, "groups": "pure"}, "tune": {"steps": 2, "experts": "freeze", "beta": 0.0}},
    {"embed": {"type": "probe", "documents": 16}},
], ids=["paper", "deepseek-v2", "deepseek-v3", "split", "generated", "warm-start", "pure", "probe"])  # fmt: skip
def test_every_way_ends_in_a_checked_checkpoint(changes: dict[str, Any], root: Path, tmp_path: Path) -> None:
    quick = dict.fromkeys(("devices", "proxies", "students"), False)
    record = launch(parse_config(small_tree(root, evaluate=quick, **changes)), tmp_path / "run")
    assert record is not None
    assert record.merge_check is not None
    assert record.merge_check <= 1e-4
    assert 0 < record.metrics.log_perplexity < 7
    assert record.baselines.public_only is not None
    if "warm_start" in changes:
        assert record.ledger.init_bytes > record.ledger.download_bytes == 0


def test_a_device_with_its_own_files_takes_part(root: Path, tmp_path: Path) -> None:
    tree = small_tree(root)
    tree["devices"]["named"] = [
        {"id": "clinic-a", "model": "gpt2", "files": ["garden/private.jsonl"], "domain": "garden"}
    ]
    record = launch(parse_config(tree), tmp_path / "run")
    assert record is not None
    own = next(device for device in record.devices if device.id == "clinic-a")
    assert own.documents == 60
    assert set(own.domains) == {"garden"}


def test_until_stops_and_resume_goes_on(run: tuple[Path, Record], root: Path, tmp_path: Path) -> None:
    config = parse_config(small_tree(root))
    assert launch(config, tmp_path / "run", until="clusters") is None
    assert (tmp_path / "run" / "clusters.json").exists()
    assert not (tmp_path / "run" / "moe").exists()
    with pytest.raises(ResumeError, match="add --resume"):
        launch(config, tmp_path / "run")
    assert launch(config, tmp_path / "run", resume=True) is not None
    assert digests(tmp_path / "run") == digests(run[0])


def test_an_unknown_stage_is_named_with_those_there_are(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--until clustrs: no such stage; choose one of .*clusters"):
        launch(parse_config(small_tree(root)), tmp_path / "run", until="clustrs")


def test_a_device_that_cannot_hold_its_training_is_refused_before_any(root: Path, tmp_path: Path) -> None:
    tree = small_tree(root)
    tree["devices"]["memory_limit_gib"] = 0.001
    with pytest.raises(MemoryLimitError, match=r"device-000 .* needs .* of .*"):
        launch(parse_config(tree), tmp_path / "run")
    assert not (tmp_path / "run" / "uploads").exists()


def killed_and_resumed(root: Path, folder: Path, kills: int, seed: int) -> None:
    """Run, `kill -9` the whole process group at random moments, resume; the last attempt may finish."""
    tree, rng = small_tree(root, federation={"engine": "forkserver"}), random.Random(seed)
    for _ in range(kills):
        process = in_a_process_of_its_own(tree, folder, "--resume")
        deadline = time.monotonic() + rng.uniform(2.0, 16.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = in_a_process_of_its_own(tree, folder, "--resume")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def test_a_killed_run_goes_on_to_the_same_bytes(run: tuple[Path, Record], root: Path, tmp_path: Path) -> None:
    killed_and_resumed(root, tmp_path / "run", kills=1, seed=1)
    assert digests(tmp_path / "run") == digests(run[0])


KILLED_AFTER_EACH_STAGE = """
import os, signal, sys
from pathlib import Path
import deepfusion.app, deepfusion.run
from deepfusion.config import load_config
from deepfusion.methods.base import Site

config, folder, *stages = sys.argv[1:]
reached, settings = Site.reached, load_config(Path(config))
for stage in stages:  # a process each, forked from this one, which has imported everything

    def dies(site, name):
        reached(site, name)
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        Site.reached = dies
        deepfusion.app.launch(settings, folder, resume=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (stage, status)
deepfusion.app.launch(settings, folder, resume=True)
"""


def test_a_run_that_is_killed_after_each_of_its_stages_ends_with_the_same_bytes_and_asks_nobody_twice(
    run: tuple[Path, Record], root: Path, tmp_path: Path
) -> None:
    stages = [
        stage for stage in DeepFusion.stages if stage not in ("generated", "tuned", "rounds")
    ]  # of other configurations
    quick = dict.fromkeys(("public_only", "devices", "proxies", "students"), False)
    (config := tmp_path / "run.toml").write_text(tomli_w.dumps(small_tree(root, evaluate=quick)))
    command = [sys.executable, "-c", KILLED_AFTER_EACH_STAGE, str(config), str(tmp_path / "run"), *stages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    due = {name: digest for name, digest in digests(run[0]).items() if not name.startswith("reference")}
    assert digests(tmp_path / "run") == due
    assert Record.load(tmp_path / "run/record.json").ledger == run[1].ledger


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(run: tuple[Path, Record], root: Path, tmp_path: Path) -> None:
    killed_and_resumed(root, tmp_path / "run", kills=20, seed=2)
    assert digests(tmp_path / "run") == digests(run[0])


def test_tensors_of_an_upload_are_the_device_s_model(run: tuple[Path, Record]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(run[0] / "uploads" / "device-000.safetensors")
    assert tensors["embedding"].dtype == torch.float16
    assert abs(float(tensors["embedding"].float().norm()) - 1) < 1e-2
    assert any(name.startswith("model/") for name in tensors)
