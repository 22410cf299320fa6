# SPDX-License-Identifier: Apache-2.0
"""What the command line does with paths that are not what a command needs: it says so, and leaves what is there."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w

from deepfusion import cli
from small_world import small_tree


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`deepfusion <arguments>` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["deepfusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said, without the frame and the spaces, for a narrow terminal breaks it anywhere."""
    return "".join(capsys.readouterr().err.replace("│", "").split())


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(small_tree(root)))
    return tmp_path / "run.toml"


@pytest.mark.parametrize("resume", [(), ("--resume",)])
@pytest.mark.parametrize("theirs", ["data/mine.txt", "config.toml"])
def test_a_run_does_not_begin_among_other_things(
    theirs: str,
    resume: tuple[str, ...],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project = tmp_path / "project"
    (project / theirs).parent.mkdir(parents=True)
    (project / theirs).write_text("mine")
    for _ in range(2):  # the first leaves nothing that lets the second in
        assert call(monkeypatch, "run", config, "--out", project, "--until", "initial", *resume) == 2
        assert f"project:holds{theirs.split('/')[0]},butnorun" in told(capsys)
    assert [path for path in project.rglob("*") if path.is_file()] == [project / theirs]
    assert (project / theirs).read_text() == "mine"
    monkeypatch.chdir(project)
    assert call(monkeypatch, "run", config, "--out", "", "--until", "initial", *resume) == 2


def test_a_run_begins_in_an_empty_folder_and_goes_on_in_a_copy_of_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".gitignore").write_text("*")
    assert call(monkeypatch, "run", config, "--out", folder, "--until", "initial") == 0
    (folder / ".lock").unlink()  # as a copy without hidden files
    assert call(monkeypatch, "run", folder, "--resume", "--until", "initial") == 0


@pytest.mark.parametrize("command", [
    ("run", "{config}", "--out", "{file}/run"),
    ("market", "open", "slot", "--out", "{file}"),
    ("market", "open", "slot", "--out", "{file}/slot"),
    ("market", "clear", "{empty}", "--out", "{folder}"),
    ("fleet", "init", "{file}/trial", "--devices", "2"),
    ("fleet", "status", "{file}", "--once"),
])  # fmt: skip
def test_a_path_that_cannot_be_used_is_named_without_a_trace(
    command: tuple[str, ...],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"config": config, "file": tmp_path / "file", "empty": tmp_path / "empty", "folder": tmp_path}
    places["file"].write_text("mine")
    places["empty"].touch()
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, *(word.format(**places) for word in command)) == os.EX_IOERR
    said = told(capsys)
    assert str(tmp_path) in said
    assert "checkthepath" in said
    assert ".partial" not in said
    assert sorted(tmp_path.iterdir()) == before
    assert places["file"].read_text() == "mine"


def test_a_full_disk_behind_the_output_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", buffering=1) as full, suppress(OSError):
        monkeypatch.setattr("sys.stdout", full)
        assert call(monkeypatch, "list", "--json") == os.EX_IOERR
        assert "standardoutput:Nospaceleftondevice;makeroom" in told(capsys)
