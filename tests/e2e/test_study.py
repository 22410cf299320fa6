# SPDX-License-Identifier: Apache-2.0
"""The study's script from rows to table, on a tiny federation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import study
import tomli_w

from deepfusion.config import parse_config
from small_world import small_tree, write_text


def test_every_row_is_a_valid_change_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFUSION_DATA", "/data")
    rows = study.read_rows([0, 1], [])
    assert [row.name for row in rows[:2]] == ["main", "main"], "the others start from the mains' folders"
    assert len({(row.slug, row.seed) for row in rows}) == len(rows)
    configs = [parse_config(row.config(study.CONFIG)) for row in rows]
    assert {config.seed for config in configs} == {0, 1}
    main, *others = (config for config, row in zip(configs, rows, strict=True) if row.seed == 0)
    assert all((other.method, other.devices) != (main.method, main.devices) for other in others)


def result_of(seed: int, nats: dict[str, float]) -> dict[str, Any]:
    """A result as the study writes it: two documents, every token of which costs so many nats."""
    metrics = {"log_perplexity": nats["moe"]}
    return {
        "row": "main", "seed": seed, "about": "", "validation": 1.0, "metrics": metrics,
        "baselines": {"public_only": {"log_perplexity": nats["public-only"]}, "merged": {"log_perplexity": nats["merged"]}},
        "documents": {name: [[value * 10, 10], [value * 30, 30]] for name, value in nats.items()},
    }  # fmt: skip


def test_what_main_is_compared_with_has_intervals_too(tmp_path: Path) -> None:
    def lines() -> dict[str, str]:
        return {line.split(" | ")[0]: line for line in study.table(tmp_path, ["main"]).splitlines()}

    for seed, public in enumerate((3.3, 3.4, 3.5)):
        nats = {"moe": 3.0, "public-only": public, "merged": 3.0 + 0.1 * (seed - 1)}
        (tmp_path / f"main-seed-{seed}.json").write_text(json.dumps(result_of(seed, nats)))
        if not seed:
            assert ", -0.300 (-0.300 to -0.300) |" in lines()["| main"], "of one seed, not bold"
    margin = 4.302653 * 0.1 / 3**0.5  # documents are alike: seeds alone differ
    low, high = 0.4 - margin, 0.4 + margin
    assert f"**+0.400** ({low:+.3f} to {high:+.3f})" in lines()["| *public text only*"]
    assert f"better, **-0.400** ({-high:+.3f} to {-low:+.3f})" in lines()["| main"]
    assert f"| +0.000 ({-margin:+.3f} to {margin:+.3f})" in lines()["| *merged*"].replace("-0.000", "+0.000")
    assert "with one seed, with other test documents alone" in study.table(tmp_path, ["main"])


@pytest.mark.slow
def test_rows_are_measured_once_and_compared_with_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "text")
    config = tmp_path / "small.toml"
    config.write_text(tomli_w.dumps(small_tree(tmp_path / "text")))
    monkeypatch.setattr(study, "CONFIG", config)
    arguments = [
        "study.py", "--seeds", "0", "--rows", "main", "no KL", "--out", str(tmp_path / "runs"),
        "--results", str(tmp_path / "results"), "--jobs", "1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    main, without = (
        json.loads((tmp_path / "results" / f"{name}-seed-0.json").read_text()) for name in ("main", "no-kl")
    )
    uploads = [tmp_path / "runs" / "seed-0" / row / "uploads" / "device-000.safetensors" for row in ("main", "no-kl")]
    assert uploads[0].samefile(uploads[1]), "devices are trained once"
    assert main["documents"]["moe"] != without["documents"]["moe"]
    tokens = sum(tokens for _, tokens in main["documents"]["moe"])
    nats = sum(nll for nll, _ in main["documents"]["moe"]) / tokens
    assert nats == pytest.approx(main["metrics"]["log_perplexity"], abs=1e-3)
    table = capsys.readouterr().out
    assert "| main | 1 |" in table
    assert "*public text only*" in table
    row = next(line for line in table.splitlines() if line.startswith("| no KL"))
    difference = without["metrics"]["log_perplexity"] - main["metrics"]["log_perplexity"]
    assert f"{difference:+.3f}" in row

    study.main()
    assert "no KL, seed 0:" not in capsys.readouterr().out, "what is measured is not measured again"
