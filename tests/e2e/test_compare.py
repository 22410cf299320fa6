# SPDX-License-Identifier: Apache-2.0
"""`deepfusion compare`: one budget for all, nothing done twice, a failed method named, claims only where they are shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepfusion.comparing import beside, compare, document_scores, uneven_budgets
from deepfusion.config import RunConfig, parse_config
from deepfusion.errors import ConfigError, DataError
from deepfusion.methods import Centralised, DeepFusion, FedAvg, FedMkt, OfaKd, methods
from deepfusion.methods.selective import SelectiveRounds
from deepfusion.record import Record
from deepfusion.report.comparison import Comparison, Gap, Run, compare_runs, comparison_table
from deepfusion.report.comparison_page import lead
from deepfusion.run import shapes_of
from deepfusion.stages.cluster.kmeans import KMeans
from small_world import small_tree, write_text

WARM = {"steps": 2, "training": {"batch_size": 4, "learning_rate": 3e-3}}
EVALUATED = ("public_only", "devices", "proxies", "students", "rounds")
NAMES = ("fedavg", "deepfusion", "ofa")


def tree_of(root: Path, **changes: Any) -> dict[str, Any]:
    tree = small_tree(root, warm_start=WARM, compare={"fedavg": {"rounds": 2, "tune": {"balance": 0.0}}}, **changes)
    tree["devices"]["max_steps"] = 4
    return tree


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    return parse_config(tree_of(root))


@pytest.fixture(scope="module")
def compared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compared")
    return out, compare(config, NAMES, [0, 1], out)


def test_every_rival_reads_as_many_public_tokens_on_the_server(config: RunConfig) -> None:
    shapes = shapes_of(config)
    due = sum(work.tokens for work in config.method.server_work(shapes))
    for name in set(methods) - {"deepfusion"}:
        settings = beside(config, name, 3)
        assert (settings.seed, settings.target, settings.data) == (3, config.target, config.data)
        read = sum(work.tokens for work in settings.method.server_work(shapes))
        assert abs(read - due) <= 4 * 32, f"{name}: within a batch of four rows"
    alone = beside(config, "fedavg", 0).method
    assert isinstance(alone, FedAvg)
    assert (alone.training.steps, alone.training.optimisation.batch_size) == (6, 4 * 3), "distillation of three domains"
    assert alone.tune.steps == config.method.tune.steps  # pyright: ignore[reportAttributeAccessIssue]
    told = beside(config, "fedmkt", 0).method
    assert isinstance(told, FedMkt)
    assert told.rounds * told.sequences == 6 * 4 * 3, "what the others read before their rounds is read in its rounds"
    assert (alone.rounds, alone.tune.balance) == (2, 0.0), "what the configuration gives it"
    together = beside(config, "centralised", 0).method
    assert isinstance(together, Centralised)
    assert together.training.optimisation.batch_size == 4 * 3
    other = beside(config, "ofa", 0).method
    assert isinstance(other, OfaKd)
    assert other.cluster == config.method.cluster  # pyright: ignore[reportAttributeAccessIssue]


def test_budgets_and_traffic_are_in_the_comparison(compared: tuple[Path, Comparison]) -> None:
    by_name = {method.name: method for method in compared[1].methods}
    assert set(by_name) == set(NAMES)
    assert len({method.server_tokens for method in by_name.values()}) == 1
    assert len({method.device_tokens for method in by_name.values()}) == 1
    assert by_name["ofa"].total_bytes == by_name["deepfusion"].total_bytes
    assert by_name["fedavg"].total_bytes > by_name["deepfusion"].total_bytes
    assert by_name["fedavg"].device_memory_bytes > by_name["deepfusion"].device_memory_bytes
    for method in by_name.values():
        assert sum(method.bytes_by_kind.values()) == method.total_bytes
        assert [len(rounds) for rounds in method.rounds] == ([2, 2] if method.name == "fedavg" else [])


def test_public_text_alone_teaches_the_same_to_all(compared: tuple[Path, Comparison]) -> None:
    for name in ("reference/start", "reference/merged"):
        paths = [compared[0] / method / "seed-0" / name / "model.safetensors" for method in NAMES]
        assert len({path.read_bytes() for path in paths}) == 1, name


def test_what_the_main_run_has_made_is_not_made_again(compared: tuple[Path, Comparison]) -> None:
    out = compared[0]
    for name in ("uploads/device-000.safetensors", "proxies"):
        ours, theirs = (out / method / "seed-0" / name for method in ("deepfusion", "ofa"))
        files = [ours] if ours.is_file() else sorted(ours.rglob("*.safetensors"))
        assert files
        for file in files:
            assert file.samefile(theirs / file.relative_to(ours) if ours.is_dir() else theirs)
    rows = (out / "fedavg" / "seed-0" / "ledger.jsonl").read_text().splitlines()
    assert {json.loads(row)["what"] for row in rows} == {"moe"}, "not the main run's bytes"


def test_a_budget_that_is_not_even_is_said(config: RunConfig, compared: tuple[Path, Comparison]) -> None:
    main = config.method
    assert isinstance(main, DeepFusion)
    cluster = KMeans(num_clusters="auto")
    uneven = replace(config, method=replace(main, cluster=cluster, continued=SelectiveRounds()))
    assert [sentence.partition(":")[0] for sentence in uneven_budgets(uneven)] == [
        "[continue]",
        '[cluster] num_clusters = "auto"',
    ]
    assert not list(uneven_budgets(config))


def test_a_second_comparison_reads_what_is_there(config: RunConfig, compared: tuple[Path, Comparison]) -> None:
    out, found = compared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    said: list[str] = []
    assert compare(config, NAMES, [0, 1], out, note=said.append) == found
    assert not said
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_on_text_that_has_changed_since_is_done_again(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    config = parse_config(tree_of(tmp_path / "text", evaluate=dict.fromkeys(EVALUATED, False)))
    first = compare(config, ["deepfusion"], [0], tmp_path / "out")
    test = tmp_path / "text" / "garden" / "test.jsonl"
    lines = test.read_text().splitlines()
    test.write_text("\n".join([lines[0].replace("The", "An"), *lines[1:]]) + "\n")
    said: list[str] = []
    second = compare(config, ["deepfusion"], [0], tmp_path / "out", note=said.append)
    assert said == [f"deepfusion, seed 0: {tmp_path / 'out' / 'deepfusion' / 'seed-0'}"]
    assert first.methods[0].log_perplexity != second.methods[0].log_perplexity
    test.unlink()
    assert compare(config, ["deepfusion"], [0], tmp_path / "out") == second, "read where the text is not at hand"


def test_unlike_test_text_is_not_paired(compared: tuple[Path, Comparison]) -> None:
    def run(method: str, seed: int) -> Run:
        folder = compared[0] / method / f"seed-{seed}"
        return Run(Record.load(folder / "record.json"), folder, document_scores(folder))

    runs = [run(method, seed) for method in ("deepfusion", "fedavg") for seed in (0, 1)]
    assert len({one.record.test_text for one in runs}) == 1
    compare_runs(runs, {}, main="deepfusion")
    last, (nats_U, tokens_U) = runs[-1], runs[-1].documents
    edited = replace(last, record=last.record.model_copy(update={"test_text": "of other words"}))
    longer = replace(last, documents=(nats_U, tokens_U + 1))
    fewer = replace(last, documents=(nats_U[1:], tokens_U[1:]))
    for other in (edited, longer, fewer):
        with pytest.raises(DataError, match=r"deepfusion/seed-0 and .*fedavg/seed-1 were scored on unlike test text"):
            compare_runs([*runs[:3], other], {}, main="deepfusion")
    old = replace(last, record=last.record.model_copy(update={"test_text": None}))
    compare_runs([*runs[:3], old], {}, main="deepfusion")


def test_results_from_before_records_named_their_test_text_still_load() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "comparison" / "share-0.1"
    found = json.loads((results / "deepfusion-seed-0.json").read_text())["record"]
    assert Record.model_validate({name: part for name, part in found.items() if name != "test_text"}).test_text is None


def test_the_gap_is_that_of_the_test_documents(compared: tuple[Path, Comparison]) -> None:
    out, found = compared
    gap = next(method.gap for method in found.methods if method.name == "fedavg")
    assert gap is not None
    means = []
    for seed in (0, 1):
        (ours, tokens), (theirs, _) = (
            document_scores(out / name / f"seed-{seed}") for name in ("fedavg", "deepfusion")
        )
        means.append((ours.sum() - theirs.sum()) / tokens.sum())
        record = Record.load(out / "fedavg" / f"seed-{seed}" / "record.json")
        assert record.metrics.log_perplexity == pytest.approx(ours.sum() / tokens.sum(), abs=1e-5)
    assert gap.mean == pytest.approx(float(np.mean(means)))
    assert gap.low <= gap.mean <= gap.high
    assert next(method.gap for method in found.methods if method.name == "deepfusion") is None


def test_a_claim_needs_an_interval_without_zero() -> None:
    verdicts = [
        Gap(mean=0, low=low, high=high, seeds=3).verdict for low, high in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1))
    ]
    assert verdicts == ["worse", "better", "no difference shown"]
    assert Gap(mean=0.2, low=0.1, high=0.3, seeds=1).verdict == "one seed"


def test_a_run_that_had_less_than_its_budget_is_named(compared: tuple[Path, Comparison]) -> None:
    runs = [
        Run(Record.load(folder / "record.json"), folder, document_scores(folder))
        for method in ("deepfusion", "fedavg") for seed in (0, 1) if (folder := compared[0] / method / f"seed-{seed}")
    ]  # fmt: skip
    assert "did not answer" not in compare_runs(runs, {}, main="deepfusion").caution
    first, *others = runs[-1].record.round_records
    rounds = [first.model_copy(update={"answered": first.answered - 2}), *others]
    short = replace(runs[-1], record=runs[-1].record.model_copy(update={"round_records": rounds}))
    found = compare_runs([*runs[:-1], short], {}, main="deepfusion")
    assert "in rounds of fedavg, seed 1 (2 answers missing): these runs had less than their budget" in found.caution
    again = Comparison.model_validate_json(found.model_dump_json())
    assert again == found


def test_what_one_seed_leaves_open_is_said(compared: tuple[Path, Comparison]) -> None:
    out, found = compared
    runs = [
        Run(Record.load(folder / "record.json"), folder, document_scores(folder))
        for folder in (out / "deepfusion" / "seed-0", out / "fedavg" / "seed-0")
    ]
    alone = compare_runs(runs, {}, main="deepfusion")
    assert "Only one seed of fedavg beside deepfusion: the interval is over test documents alone" in alone.caution
    assert [method.gap.verdict for method in alone.methods if method.gap] == ["one seed"]
    assert "better" not in lead(alone)
    assert "worse" not in lead(alone)
    assert "Only one seed" not in found.caution
    for said in (str(comparison_table(found).caption), (out / "compare.html").read_text(encoding="utf-8")):
        assert "the mean over seeds: where it would lie with other seeds and other test documents" in said


def test_the_page_stands_alone_and_shows_every_method(compared: tuple[Path, Comparison]) -> None:
    page = (compared[0] / "compare.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http://www.w3.org", "")
    for title in (
        "Quality against traffic",
        "Quality against device memory",
        "Quality by round",
        "Where the bytes went",
    ):
        assert title in page
    assert all("±" in method.perplexity.text(1) for method in compared[1].methods)
    for group in range(len(NAMES)):
        assert page.count(f'data-m="{group}"') >= 5, "two tables and three charts follow its checkbox"


def test_a_method_that_fails_is_named_and_the_others_go_on(config: RunConfig, tmp_path: Path) -> None:
    tree = tree_of(config.data.folder)
    tree["devices"]["memory_limit_gib"] = 0.0034  # enough for the devices' own models, not for the whole MoE
    found = compare(parse_config(tree), ["deepfusion", "fedavg"], [0], tmp_path)
    assert [method.name for method in found.methods] == ["deepfusion"]
    assert found.methods[0].perplexity.deviation is None, "one seed has no spread"
    assert "±" not in found.methods[0].perplexity.text(1)
    assert "Fewer than 3 seeds of deepfusion" in (tmp_path / "compare.html").read_text()
    assert "does not fit" in found.failures["fedavg, seed 0"] or "do not fit" in found.failures["fedavg, seed 0"]
    assert "Did not come to an end" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        (["fedavgg"], {}, r'--methods fedavgg: no such method \(did you mean "fedavg"\?\)'),
        ([], {}, "--methods: names none; choose from centralised, deepfusion"),
        (["ofa"], {"method": "fedavg"}, "given the budget of DeepFusion"),
        (["fedavg"], {"compare": {"fedavg": {"round": 3}}}, r"round = 3: unknown"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    names: list[str], changes: dict[str, Any], said: str, config: RunConfig, tmp_path: Path
) -> None:
    tree = {**tree_of(config.data.folder), **changes}
    if "method" in changes:
        tree = {k: v for k, v in tree.items() if k not in ("cluster", "distillation")}
    with pytest.raises(ConfigError, match=said):
        compare(parse_config(tree), names, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
