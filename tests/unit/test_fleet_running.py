# SPDX-License-Identifier: Apache-2.0
"""One server at a time: the lock on a run folder, and what a command that waits reads of the run's end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepfusion import cli
from deepfusion.app import launch
from deepfusion.artifacts import hold, holder
from deepfusion.cli.shared import escape, out, say
from deepfusion.config import parse_config
from deepfusion.errors import BusyError, ConfigError, DeepFusionError, DiskError, FederationError, ResumeError
from deepfusion.fleet.outcome import Outcome
from deepfusion.run import open_folder
from small_world import small_tree

HOLD = """
import sys
from pathlib import Path
from deepfusion.artifacts import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[bytes]:
    """Another process at work on the run folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_run_folder_that_another_process_is_at_work_on_is_left_alone_until_that_one_has_died(
    tmp_path: Path, other: subprocess.Popen[bytes]
) -> None:
    config = parse_config(small_tree(tmp_path))
    said = rf"run: process {other.pid} on .* is at work on this run; .* \(kill {other.pid}\) and go on with --resume"
    for resume in (False, True):
        with pytest.raises(BusyError, match=said):
            launch(config, tmp_path / "run", resume=resume)
    note = holder(tmp_path / "run")
    assert note is not None
    assert note["pid"] == other.pid
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]
    other.kill()
    other.wait()
    assert holder(tmp_path / "run") is None
    with open_folder(config, tmp_path / "run", resume=False, token="t") as folder:
        assert holder(folder.path) == {**(holder(folder.path) or {}), "pid": os.getpid(), "token": "t"}
        with pytest.raises(BusyError, match=f"process {os.getpid()} on "), hold(folder.path):
            pass


def test_the_folder_is_free_again_after_an_error_in_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        raise ZeroDivisionError
    assert holder(tmp_path) is None
    assert holder(tmp_path / "nowhere") is None
    with hold(tmp_path):
        assert holder(tmp_path) is not None


def test_an_outcome_is_of_its_own_run_and_tells_who_is_at_work_and_how_it_ended(tmp_path: Path) -> None:
    first, second = (Outcome(tmp_path / "outcomes" / f"{name}.json") for name in "ab")
    first.reserve()
    with first.noted():
        assert (first.pid, first.is_good) == (os.getpid(), False)
    assert first.is_good
    second.reserve()
    assert (second.pid, second.is_good) == (None, False)
    second.check()
    with pytest.raises(KeyboardInterrupt), second.noted():
        raise KeyboardInterrupt
    assert (second.pid, second.is_good) == (os.getpid(), False)  # as after a kill: it never said that it had ended


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["[data] x = 1: no"]), 78), (FederationError("a"), 75), (DiskError("b"), 75), (BusyError("c"), 75),
        (ResumeError("d"), 2), (ValueError("e" * 9000), 75),
    ],
)  # fmt: skip
def test_what_ended_a_run_reaches_the_command_that_waits_and_its_exit_code(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(tmp_path / "a.json")
    outcome.reserve()
    with pytest.raises(type(error)), outcome.noted():
        raise error
    with pytest.raises(DeepFusionError) as told:
        outcome.check()
    assert str(error)[:1000] in str(told.value)
    monkeypatch.setattr(cli, "app", outcome.check)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code


def test_the_end_of_a_run_needs_no_more_room_than_its_beginning(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path / "a.json")
    outcome.reserve()
    size = outcome.path.stat().st_size
    with pytest.raises(ValueError, match="\n"), outcome.noted():
        raise ValueError("\n€" * 5000)
    assert outcome.path.stat().st_size == size
    for number in range(60):
        Outcome(tmp_path / f"{number}.json").reserve()
    assert len(list(tmp_path.glob("*.json"))) == 50


HOSTILE = "device a: \\[/x] [/red] \x1b[2J\x9b2J \u202e[red]gone\\"
"""What a device may say of its failure: markup that closes nothing, and what clears a screen or turns writing round."""
SHOWN = "device a: \\[/x] [/red]  [2J 2J  [red]gone\\"


def test_no_word_of_a_device_steers_the_terminal_or_breaks_the_report_of_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise FederationError(f"{HOSTILE}\nsecond line")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 75
    lines = [line.strip("│ ") for line in capsys.readouterr().err.splitlines()]
    assert lines[1:3] == [SHOWN, "second line"]
    say(HOSTILE, "dim")
    assert capsys.readouterr().err == SHOWN + "\n"
    out.print(f"[bold]{escape(HOSTILE)}[/bold]")
    assert capsys.readouterr().out == SHOWN + "\n"
