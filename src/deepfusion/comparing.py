# SPDX-License-Identifier: Apache-2.0
"""Several methods, several seeds, one budget: what is missing is run, the rest is read from the run folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from deepfusion.app import launch
from deepfusion.artifacts import RunFolder, start_from, write_atomic
from deepfusion.config import RunConfig, parse_config, tree_of
from deepfusion.errors import ConfigError, DataError, DeepFusionError
from deepfusion.methods import DeepFusion, methods
from deepfusion.methods.budget import Rival
from deepfusion.record import Record
from deepfusion.registry import did_you_mean
from deepfusion.report.comparison import Comparison, Run, compare_runs
from deepfusion.report.comparison_page import write_comparison
from deepfusion.run import has_this_text, shapes_of
from deepfusion.types import Progress, silent

MAIN = "deepfusion"
"""The method that the others are compared with, and whose budget they get."""


def compare(
    config: RunConfig,
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda sentence: None,
) -> Comparison:
    """Run each method with each seed in `out/<method>/seed-<seed>`, unless it is there, and compare what came out.

    A method that fails is left out and named; the others go on. Leaves `compare.json` and `compare.html` in `out`.

    Args:
        config: of DeepFusion; its rivals share all of its sections that they know, and its budget.
        names: methods; DeepFusion need not be among them, but then no differences to it are shown.
        note: told of each run before it begins, and of each that failed.

    Raises:
        ConfigError: there is no name, one is no method, or the configuration is not DeepFusion's.
        DeepFusionError: no run came to its end; says why the first one failed.
        DataError: runs were scored on unlike test text.
    """
    if not names:
        raise ConfigError([f"--methods: names none; choose from {', '.join(methods)}"], "command line")
    plans = [(name, seed, beside(config, name, seed)) for seed in seeds for name in _main_first(names)]
    for sentence in uneven_budgets(config):
        note(sentence)
    runs: list[Run] = []
    failures: dict[str, str] = {}
    for name, seed, settings in plans:
        folder = out / name / f"seed-{seed}"
        try:
            record = _finished(folder, settings)
            if record is None:
                note(f"{name}, seed {seed}: {folder}")
                # those of one exchange have the same uploads, and the same bytes in the ledger
                alike = isinstance(settings.method, DeepFusion)
                start_from(out / MAIN / f"seed-{seed}", folder, only=() if alike else ("data",))
                record = launch(settings, folder, resume=True, progress=progress)
            assert record is not None
        except DeepFusionError as error:
            failures[f"{name}, seed {seed}"] = str(error)
            note(f"{name}, seed {seed} failed: {error}")
            continue
        runs.append(Run(record, folder, document_scores(folder)))
    if not runs:
        name, reason = next(iter(failures.items()))
        raise DeepFusionError(f"no run came to its end; {name}: {reason}")
    found = compare_runs(runs, failures, main=MAIN)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "compare.json", found.model_dump_json(indent=1))
    write_comparison(found, out / "compare.html")
    return found


def beside(config: RunConfig, name: str, seed: int) -> RunConfig:
    """The configuration of a method with DeepFusion's budget, and with the options of [compare.<name>].

    Raises:
        ConfigError: there is no such method, `config` is not DeepFusion's, or the options do not fit.
    """
    main = config.method
    if methods.name_of(type(main)) != MAIN:
        said = f'method = "{methods.name_of(type(main))}": rivals are given the budget of DeepFusion'
        raise ConfigError([f'{said}; compare a configuration with method = "{MAIN}"'], "compare")
    assert isinstance(main, DeepFusion)
    if name not in methods:
        hint = did_you_mean(name, tuple(methods))
        raise ConfigError([f"--methods {name}: no such method{hint}; choose from {', '.join(methods)}"], "command line")
    cls = methods[name]
    if name == MAIN:
        method = main
    elif issubclass(cls, DeepFusion):  # but for its rule
        same = {f.name: getattr(main, f.name) for f in dataclasses.fields(cls) if f.name != "distill"}
        method = cls(**same)
    else:
        method = cast(type[Rival], cls).beside(main.budget(shapes_of(config).domains))
    evaluate = config.evaluate
    if name != MAIN:  # what the devices' models and proxies are worth, DeepFusion's own run tells
        evaluate = dataclasses.replace(evaluate, devices=False, proxies=False, students=False)
    devices = dataclasses.replace(config.devices, unfit="leave out")
    shared = dataclasses.replace(
        config, method=method, seed=seed, devices=devices, evaluate=evaluate, compare={}, name=f"{config.name}-{name}"
    )
    return parse_config(_merged(tree_of(shared), config.compare.get(name, {})), source=f"[compare.{name}]")


def document_scores(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of the MoE of a finished run: each test document's negative log-likelihood in nats, and its counted tokens."""
    rows = json.loads((folder / "scores" / "moe" / "scores.json").read_text())["documents"]
    return np.asarray([row[0] for row in rows]), np.asarray([row[2] for row in rows])


def uneven_budgets(config: RunConfig) -> Iterator[str]:
    """In what DeepFusion has another budget than its rivals, as it is configured."""
    main = config.method
    assert isinstance(main, DeepFusion)
    if main.continued:
        yield "[continue]: DeepFusion's devices read their text a second time, its rivals' do not"
    if getattr(main.cluster, "num_clusters", None) == "auto":
        yield f'[cluster] num_clusters = "auto": rivals read what DeepFusion would with {shapes_of(config).domains} domains'


def _main_first(names: Sequence[str]) -> Iterator[str]:
    """Each name once; the main method first, because the others start from what it has made."""
    yield from sorted(dict.fromkeys(names), key=lambda name: name != MAIN)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with `changes`, table by table; a section that is given a new `type` is replaced."""
    result = dict(tree)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and "type" not in value:
            result[key] = _merged(cast(dict[str, Any], old), cast(dict[str, Any], value))
        else:
            result[key] = value
    return result


def _finished(folder: Path, config: RunConfig) -> Record | None:
    """The record of a run that has ended with this very configuration, on the text that is there now."""
    path = folder / "record.json"
    if not path.exists():
        return None
    try:
        record = Record.load(path)
    except DataError:  # of another version
        return None
    same = record.config == json.loads(json.dumps(tree_of(config))) and has_this_text(config, RunFolder(folder))
    return record if same else None
