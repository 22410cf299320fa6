# SPDX-License-Identifier: Apache-2.0
"""Options of [data]: every impossible combination is named with its value and a cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepfusion.data.options import CorpusSource, DataOptions, TokenizerOptions, resolve_root, template_fields
from deepfusion.errors import DataError

FILES = {"private": "a.jsonl", "public": "b.jsonl", "test": "c.jsonl"}


def test_a_plain_configuration_has_no_fault():
    source = CorpusSource(
        domain="law", prompt="Q: {question}\nA:", answer=" {answer}", where={"domain": "law"}, **FILES
    )
    embedded = CorpusSource(domain="medicine", embedded="medicine", limit=10)
    options = DataOptions(corpora=(source, embedded))
    assert [*options.faults(), *source.faults(), *embedded.faults(), *options.tokenizer.faults()] == []


@pytest.mark.parametrize(
    ("values", "key", "cure"),
    [
        ({"domain": " ", **FILES}, "domain", "give the name"),
        ({"limit": 0, **FILES}, "limit = 0", "choose 1 or more"),
        ({"hub": "x/y", "embedded": "medicine"}, 'hub = "x/y"', "keep one"),
        ({"subset": "en", **FILES}, 'subset = "en"', 'add hub = "..."'),
        ({}, "private, public, test", "embedded = one of finance"),
        ({"embedded": "medecine"}, 'embedded = "medecine"', 'did you mean "medicine"'),
        ({"embedded": "medicine", "test": "x.txt"}, "test = 'x.txt'", "remove it"),
        ({"embedded": "medicine", "text": "{text}"}, "text = '{text}'", "remove it"),
        ({"embedded": "medicine", "where": {"a": "b"}}, "where", "remove it"),
        ({"private": "notes.docx"}, 'private = "notes.docx"', ".jsonl"),
        ({"text": "{text}", "prompt": "{a}", "answer": "{b}", **FILES}, "text", "keep text"),
        ({"prompt": "{a}", **FILES}, "prompt = '{a}'", "give both"),
        ({"answer": "{a}", **FILES}, "answer = '{a}'", "give both"),
        ({"text": "no field", **FILES}, "text = 'no field'", "in braces"),
        ({"text": "{text", **FILES}, "text = '{text'", "literal brace"),
        ({"text": "{}", **FILES}, "text = '{}'", "not a plain field name"),
        ({"text": "{a.__class__}", **FILES}, "text", "not a plain field name"),
        ({"text": "{a!r}", **FILES}, "text", "not a plain field name"),
    ],
)
def test_a_bad_corpus_row_is_named_with_its_cure(values: dict[str, object], key: str, cure: str):
    faults = list(CorpusSource(**{"domain": "d", **values}).faults())
    assert any(fault.startswith(key) and cure in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({}, "nothing given"),
        ({"vocab_size": 300, "hub": "gpt2"}, "exclude each other"),
        ({"vocab_size": 256}, "257 or more"),
    ],
)
def test_a_tokenizer_comes_from_exactly_one_place(values: dict[str, object], what: str):
    (fault,) = TokenizerOptions(**values).faults()
    assert what in fault


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"sequence_length": 1}, "sequence_length = 1"),
        ({"validation_share": 0.7}, "validation_share = 0.7"),
        ({"test_documents": 0}, "test_documents = 0"),
        ({"corpora": (CorpusSource(domain="d", private="a.txt", test="b.txt"),)}, "no row has public text"),
        ({"corpora": (CorpusSource(domain="d", private="a.txt", public="b.txt"),)}, "no row has test text"),
    ],
)
def test_a_bad_data_section_is_named(values: dict[str, object], what: str):
    (fault,) = DataOptions(**{"corpora": (CorpusSource(domain="d", **FILES),), **values}).faults()
    assert what in fault


def test_the_root_fills_in_variables_and_says_how_to_set_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA_HERE", str(tmp_path))
    assert resolve_root("${DATA_HERE}") == tmp_path
    monkeypatch.delenv("DATA_HERE")
    with pytest.raises(DataError, match=r"DATA_HERE is not set; export DATA_HERE=.*--set data.root="):
        resolve_root("${DATA_HERE}/x")
    with pytest.raises(DataError, match=r"no folder .*nowhere; give --set data.root="):
        resolve_root(str(tmp_path / "nowhere"))


def test_template_fields_are_the_names_in_braces():
    assert template_fields("{a}: {{literal}} {b c}") == ("a", "b c")
