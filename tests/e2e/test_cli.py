# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: results, JSON for machines, help with examples, errors with a cure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import deepfusion
from deepfusion import cli
from deepfusion.record import Record
from small_world import small_tree, write_text


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_text(folder)
    (folder / "run.toml").write_text(tomli_w.dumps(small_tree(folder)))
    return folder / "run.toml"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`deepfusion <arguments>` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["deepfusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    folder = config.parent / "finished"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "run", config, "--out", folder, "--set", "evaluate.devices=false") == 0
    return folder


def test_a_run_ends_with_a_table_and_says_where_everything_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert call(monkeypatch, "run", config, "--out", folder, "--seed", "3", "--set", "tune.steps=2") == 0
    told, progress = capsys.readouterr()
    for words in ("fused MoE", "public text only", "harbour", str(folder / "moe"), str(folder / "report.html")):
        assert words in told
    assert "distill joint: 6 in" in progress, "not a terminal: one line for each finished job"
    assert "\r" not in progress
    assert Record.load(folder / "record.json").seed == 3


def test_run_stops_where_told_and_prints_json(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", config, "--out", tmp_path / "run", "--until", "clusters", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(tmp_path / "run"), "until": "clusters"}
    assert call(monkeypatch, "run", config, "--out", tmp_path / "run") == 2
    assert "--resume" in capsys.readouterr().err
    uploads = sorted((tmp_path / "run" / "uploads").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in uploads]
    assert before
    assert call(monkeypatch, "run", tmp_path / "run", "--resume", "--until", "clusters") == 0, (
        "a run folder says it all"
    )
    told = capsys.readouterr()
    assert "Changed since" not in told.err
    assert f"deepfusion run {tmp_path / 'run'} --resume" in told.out.replace("\n", "")
    assert [path.stat().st_mtime_ns for path in uploads] == before
    changes = ("--set", "tune.steps=3", "--until", "clusters")
    assert call(monkeypatch, "run", tmp_path / "run", "--resume", *changes) == 0
    assert "tune.steps = 3, was " in capsys.readouterr().err


def test_a_run_that_failed_before_it_began_is_no_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run", config, "--out", tmp_path / "run", "--until", "initial")
    assert call(monkeypatch, *arguments, "--set", "data.root=/nowhere") == 2
    assert "/nowhere" in capsys.readouterr().err
    assert call(monkeypatch, *arguments) == 0


def test_an_interrupted_command_says_how_to_go_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepfusion.app.launch", interrupted)
    assert call(monkeypatch, "run", config, "--out", tmp_path / "run") == 130
    assert "go on with --resume" in capsys.readouterr().err


def test_a_finished_run_prints_its_record_as_json(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--out", finished, "--set", "evaluate.devices=false", "--resume", "--json")
    assert call(monkeypatch, "run", config, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["perplexity"] > 1


def test_plan_predicts_without_training(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(config.parent.iterdir())
    assert call(monkeypatch, "plan", config) == 0
    assert "gpt2" in capsys.readouterr().out
    assert call(monkeypatch, "plan", config, "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing_text"] == []
    assert set(config.parent.iterdir()) == before


def test_plan_says_which_text_is_not_there_yet(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", config, "--set", "data.corpora.0.public=garden/pubic.jsonl") == 0
    said = capsys.readouterr().err
    assert "garden/pubic.jsonl: no such file" in said
    assert 'did you mean "public.jsonl"?' in said
    assert call(monkeypatch, "plan", config, "--set", "data.root=${NOT_SET_ANYWHERE}") == 0
    assert "NOT_SET_ANYWHERE is not set" in capsys.readouterr().err


def test_evaluate_and_generate_take_any_model_folder(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = next((finished / "proxies").glob("cluster-*"))
    for model in (finished / "moe", proxy):
        text = config.parent / "garden/test.jsonl"
        assert call(monkeypatch, "evaluate", model, "--data", text, "--text", "{text}", "--json") == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["documents"] == 8
        assert 1 < scores["perplexity"] < 1000
        assert call(monkeypatch, "generate", model, "The garden note:", "--tokens", "5", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["prompt"] == "The garden note:"
        assert call(monkeypatch, "generate", model, "The garden note:", "--tokens", "5", "--json") == 0
        assert json.loads(capsys.readouterr().out) == told, "the same seed writes the same"


def test_report_and_list(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", finished, finished, "--out", tmp_path / "both.html") == 0
    assert "<html" in (tmp_path / "both.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert call(monkeypatch, "list", "--json") == 0
    parts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"kmeans", "random"} <= parts["[cluster] type"].keys()
    assert {"tfidf", "encoder", "probe"} <= parts["[embed] type"].keys()
    assert call(monkeypatch, "list") == 0
    shown = capsys.readouterr().out
    assert "qwen2-moe-tiny" in shown
    assert "[cluster] type" in shown, "a section's brackets are no markup"
    assert "olmoe" in parts["family of MoE"]


def test_phases_two_and_three_stand_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxies = sorted(path for path in (finished / "proxies").iterdir() if path.is_dir())[:2]
    (tmp_path / "text.txt").write_text("\n".join(f"the {word} is near the end" for word in ("cat", "dog", "bird") * 20))
    for number, proxy in enumerate(proxies):
        arguments = (
            "distill", "--teacher", proxy, "--student", finished / "base", "--data", tmp_path / "text.txt",
            "--out", tmp_path / str(number), "--steps", 2, "--batch-size", 2, "--sequence-length", 16, "--json",
        )  # fmt: skip
        assert call(monkeypatch, *arguments) == 0
        assert json.loads(capsys.readouterr().out)["ce"] > 0
    students = (tmp_path / "0", tmp_path / "1")
    assert call(monkeypatch, "merge", *students, "--family", "qwen2_moe", "--out", tmp_path / "moe", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["experts"] == 2
    assert told["largest_logit_difference"] < 1e-5
    assert call(monkeypatch, "generate", tmp_path / "moe", "the cat", "--tokens", 4, "--json") == 0


@pytest.mark.parametrize("command", ["run", "plan", "evaluate", "generate", "distill", "merge", "report", "list"])
def test_help_explains_arguments_and_gives_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert call(monkeypatch, command, "--help") == 0
    told = capsys.readouterr().out
    assert "Examples" in told
    assert f"deepfusion {command}" in told.split("Examples")[1]
    explained = {
        "run": "A TOML file",
        "plan": "A TOML file",
        "evaluate": "Any causal LM",
        "generate": "The text to continue",
        "distill": "The model to start from",
        "merge": "Single-expert folders of one base model",
    }
    assert explained.get(command, "") in told


@pytest.mark.parametrize(("arguments", "says"), [
    (("run", "nowhere.toml"), "no such file"),
    (("report", "nowhere"), "nowhere"),
    (("evaluate", "nowhere", "--data", "x.jsonl"), "nowhere"),
    (("generate", "nowhere", "hello"), "nowhere"),
    (("generate", "/nowhere/model", "hello"), "/nowhere/model: no such folder"),
    (("generate", "tests/nowhere", "hello"), "tests/nowhere: no such folder"),
    (("generate", "./elsewhere/nowhere", "hello"), "./elsewhere/nowhere: no such folder"),
    (("generate", "nowhere", "hello", "--seed", f"{2**63}"), "is not in the range"),
    (("distill", "--student", "nowhere", "--data", "x.jsonl", "--out", "never"), "nowhere"),
    (("merge", "nowhere", "--family", "qwen2_moe", "--out", "never"), "nowhere"),
])  # fmt: skip
def test_mistakes_end_in_a_sentence_and_not_in_a_trace(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == (os.EX_CONFIG if "nowhere.toml" in arguments else 2)
    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told


def test_a_wrong_path_is_told_before_the_libraries_are_loaded() -> None:
    program = (
        "import sys\nfrom deepfusion import cli\ntry: cli.main()\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "nowhere.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no such file" in done.stderr


def test_a_run_folder_is_not_taken_for_its_model(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert call(monkeypatch, "generate", finished, "hello") == 2
    assert f"did you mean {finished / 'moe'}?" in capsys.readouterr().err


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"deepfusion {deepfusion.__version__}\n"


def test_an_unknown_method_hides_no_other_fault(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert call(monkeypatch, "run", config, "-s", "method=depfusion", "-s", "devices.cuont=3") == os.EX_CONFIG
    told = capsys.readouterr().err
    assert 'did you mean "deepfusion"' in told
    assert 'did you mean "count"' in told


def test_all_faults_of_a_configuration_are_told_at_once(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    changes = ("-s", "tune.steps=-1", "-s", "devices.cuont=3", "-s", "router.start=best", "-s", "distilation.steps=3")
    assert call(monkeypatch, "run", config, *changes) == os.EX_CONFIG
    told = capsys.readouterr().err
    for words in (
        "steps = -1",
        'did you mean "count"',
        "with --set",
        'did you mean "distillation"',
        'start = "best"',
    ):
        assert words in told
