# SPDX-License-Identifier: Apache-2.0
"""Properties of the run folder: a stage's result is there whole or not at all, and is redone only when it must be."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import save_file

from deepfusion.artifacts import MANIFEST, RunFolder, SharedFolder, file_digest, key_of, write_atomic
from deepfusion.errors import DiskError


@dataclass(frozen=True)
class _Options:
    rate: float = 0.5
    inner: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class _OtherOptions:
    rate: float = 0.5
    inner: tuple[int, ...] = (1, 2)


class _Counted:
    """A stage that writes a text and counts how often it was made."""

    def __init__(self, text: str = "result") -> None:
        self.text = text
        self.made = 0

    def __call__(self, folder: Path) -> None:
        assert list(folder.iterdir()) == [], "the stage's folder is not empty"
        self.made += 1
        (folder / "out.txt").write_text(self.text)


def _fails(folder: Path) -> None:
    (folder / "out.txt").write_text("half")
    raise RuntimeError("the power went")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_stage_is_made_once_for_the_same_parts(run: RunFolder) -> None:
    stage = _Counted()
    folders = [run.keep("cluster", stage, _Options(), "input key", 3) for _ in range(3)]
    assert stage.made == 1
    assert folders == [run / "cluster"] * 3
    assert (run / "cluster" / "out.txt").read_text() == "result"
    assert RunFolder(run.path).keep("cluster", stage, _Options(), "input key", 3) == run / "cluster"
    assert stage.made == 1, "a new process must find the old result"


@pytest.mark.parametrize(
    "parts",
    [
        (_Options(rate=0.6), "input", 3),
        (_Options(), "other input", 3),
        (_Options(), "input"),
        (_OtherOptions(), "input", 3),
    ],
    ids=["option", "input", "fewer parts", "another class with equal fields"],
)
def test_any_changed_part_makes_the_stage_again(run: RunFolder, parts: tuple[object, ...]) -> None:
    run.keep("cluster", _Counted("old"), _Options(), "input", 3)
    stage = _Counted("new")
    run.keep("cluster", stage, *parts)
    assert stage.made == 1
    assert (run / "cluster" / "out.txt").read_text() == "new"


def test_nothing_of_an_older_result_is_left_in_a_new_one(run: RunFolder) -> None:
    run.keep("proxies", lambda folder: (folder / "old.bin").write_bytes(b"x"), 1)
    run.keep("proxies", _Counted(), 2)
    assert sorted(path.name for path in (run / "proxies").iterdir()) == [MANIFEST, "out.txt"]


def test_a_crash_in_the_middle_leaves_the_old_result_and_its_key(run: RunFolder) -> None:
    run.keep("cluster", _Counted("old"), 1)
    key = run.key("cluster")
    with pytest.raises(RuntimeError, match="the power went"):
        run.keep("cluster", _fails, 2)
    assert run.key("cluster") == key
    assert (run / "cluster" / "out.txt").read_text() == "old"
    untouched = _Counted()
    run.keep("cluster", untouched, 1)
    assert untouched.made == 0


def test_a_crash_of_a_first_stage_leaves_nothing_that_looks_done(run: RunFolder) -> None:
    with pytest.raises(RuntimeError):
        run.keep("cluster", _fails, 1)
    assert run.key("cluster") is None
    assert not (run / "cluster").exists()
    stage = _Counted()
    run.keep("cluster", stage, 1)
    assert (stage.made, (run / "cluster" / "out.txt").read_text()) == (1, "result")


@pytest.mark.parametrize(("parts", "found"), [(1, True), (2, False)], ids=["same inputs", "other inputs"])
def test_scratch_outlives_a_crash_for_the_same_inputs_only(run: RunFolder, parts: int, found: bool) -> None:
    def checkpoints(folder: Path) -> None:
        (run.scratch("expert") / "training.safetensors").write_bytes(b"half way")
        raise RuntimeError

    def resumes(folder: Path) -> None:
        assert (run.scratch("expert") / "training.safetensors").exists() is found

    with pytest.raises(RuntimeError):
        run.keep("expert", checkpoints, 1)
    run.keep("expert", resumes, parts)
    assert not (run.path / ".partial" / "expert.scratch").exists(), "scratch is gone once the result is safe"


def test_stages_in_folders_do_not_share_scratch_or_results(run: RunFolder) -> None:
    run.keep("reference/moe", _Counted("reference"), 1)
    run.keep("moe", _Counted("own"), 1)
    assert (run / "reference/moe" / "out.txt").read_text() == "reference"
    assert run.key("reference/moe") != run.key("moe")
    assert run.scratch("reference/moe") != run.scratch("moe")


def test_the_manifest_tells_stage_key_and_seconds(run: RunFolder) -> None:
    run.keep("tune", _Counted(), "a")
    manifest = json.loads((run / "tune" / MANIFEST).read_text())
    assert (manifest["stage"], manifest["key"]) == ("tune", key_of("tune", "a"))
    assert run.seconds("tune") == manifest["seconds"] >= 0


def test_keys_depend_on_values_and_on_nothing_else() -> None:
    parts = (_Options(), {"b": 1, "a": [2.5, None]}, Path("x"))
    assert key_of(*parts) == key_of(_Options(), {"a": [2.5, None], "b": 1}, Path("x"))
    assert len({key_of(1), key_of("1"), key_of(1.5), key_of([1]), key_of(True), key_of(), key_of(1, 1)}) == 7
    code = "from deepfusion.artifacts import key_of; print(key_of('a', {'b': 1, 'c': 2}))"
    salted = {**os.environ, "PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", code], env=salted, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == key_of("a", {"c": 2, "b": 1})


@pytest.mark.parametrize("part", [object(), {1, 2}, b"bytes", _Options], ids=["object", "set", "bytes", "class"])
def test_what_has_no_fixed_form_never_becomes_a_key(part: object) -> None:
    with pytest.raises(TypeError, match="cannot make a key of"):
        key_of(part)


def test_a_files_digest_follows_its_content_only(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b") != file_digest(tmp_path / "c")


def test_an_atomic_write_replaces_the_whole_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "record.json"
    write_atomic(path, "a long old content")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    write_atomic(path, "Größe 字")
    assert path.read_text(encoding="utf-8") == "Größe 字"
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(*_: object) -> Callable[..., None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(DiskError, match=r"it cannot be written \(No space left on device\); make room .*--resume"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_a_stage_that_finds_the_disk_full_says_so_whoever_wrote_and_is_done_again_later(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def full(out: Path) -> None:
        save_file({"x": torch.zeros(100_000)}, out / "model.safetensors")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DiskError, match=r"stage: this stage cannot be written \(.*File too large.*--resume"):
            folder.keep("stage", full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "stage").exists()
    assert (folder.keep("stage", full) / "model.safetensors").stat().st_size > 400_000


def test_runs_that_need_the_same_shared_stage_at_once_make_it_once_and_say_whom_they_wait_for(tmp_path: Path) -> None:
    stage, begun, waits, said = _Counted(), Event(), Event(), list[str]()

    def slow(folder: Path) -> None:
        begun.set()
        assert waits.wait(30), "the other one does not wait"
        stage(folder)

    def note(sentence: str) -> None:
        said.append(sentence)
        waits.set()

    with ThreadPoolExecutor() as pool:
        first = pool.submit(SharedFolder(tmp_path, note).keep, "initial/gpt2", slow, "key")
        assert begun.wait(30)
        second = pool.submit(SharedFolder(tmp_path, note).keep, "initial/gpt2", slow, "key")
        assert first.result(60) == second.result(60) == tmp_path / "initial" / "gpt2"
    assert stage.made == 1
    assert (tmp_path / "initial" / "gpt2" / "out.txt").read_text() == "result"
    assert said == [f"initial/gpt2: process {os.getpid()} is making it; waiting"]


def test_a_shared_stage_that_failed_in_one_run_is_made_by_the_next(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path, print)
    with pytest.raises(RuntimeError, match="the power went"):
        shared.keep("initial/gpt2", _fails, "key")
    assert (shared.keep("initial/gpt2", _Counted(), "key") / "out.txt").read_text() == "result"
