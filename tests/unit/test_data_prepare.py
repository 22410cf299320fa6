# SPDX-License-Identifier: Apache-2.0
"""The token cache: what is read comes back, masks and splits are exact, the same bytes in every process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepfusion.data.options import CorpusSource, DataOptions, TokenizerOptions
from deepfusion.data.prepare import (
    corpus_from_files,
    corpus_from_source,
    corpus_from_texts,
    load_prepared,
    prepare,
    tokenise,
)
from deepfusion.data.sources import Document
from deepfusion.data.tokenizer import make_tokenizer
from deepfusion.errors import ConfigError, DataError

WORDS = ["heart", "lung", "kidney", "share", "bond", "market", "loop", "string", "matrix", "proof", "group", "ring"]


def _line(number: int) -> str:
    generator = np.random.default_rng(number)
    return " ".join(generator.choice(WORDS, 12)) + f" naïve café {number}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for part, (name, count) in enumerate({"private": 60, "public": 100, "test": 30}.items()):
        records = [{"q": f"{_line(1000 * part + n)}?", "a": _line(5000 + n)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _options(root: Path, **values: object) -> DataOptions:
    parts = {name: f"{name}.jsonl" for name in ("private", "public", "test")}
    rows = (
        CorpusSource(domain="qa", prompt="Q: {q}\nA:", answer=" {a}", **parts),
        CorpusSource(domain="extra", public="public.jsonl", text="{a}", limit=40),
    )
    return DataOptions(**{"root": str(root), "corpora": rows, "tokenizer": TokenizerOptions(vocab_size=400), **values})


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_token_decodes_to_the_text_and_prompts_do_not_count(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "out")
    data = load_prepared(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    assert len(data.private) == 60
    for index in range(len(data.private)):
        ids, counted = data.private.document(index)
        text = data.private.text(index)
        assert ids[-1] == data.eos_id
        assert tokenizer.decode(ids[:-1]) == text
        assert tokenizer.decode(ids[counted][:-1]) == text[text.index("\nA:") + 3 :]
    assert data.public.domains == ("extra", "qa")
    assert data.public.of_domain("extra").document(0)[1].all()


def test_a_trained_tokenizer_ends_texts_with_id_0_and_stays_in_its_size(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "out")
    data = load_prepared(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    assert (data.eos_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert data.vocab_size == len(tokenizer) == 400
    assert int(data.test.token_ids.max()) < 400
    assert data.test.token_ids.dtype == np.uint16
    assert tokenizer.decode(tokenizer("日本 \t\x00🙂")["input_ids"]) == "日本 \t\x00🙂"


def test_counted_all_counts_every_token(root: Path, tmp_path: Path):
    prepare(_options(root, counted="all"), tmp_path / "out")
    assert load_prepared(tmp_path / "out").private.counted.all()


def test_validation_is_public_text_that_is_not_in_public(root: Path, tmp_path: Path):
    prepare(_options(root, validation_share=0.1), tmp_path / "out")
    data = load_prepared(tmp_path / "out")
    public, validation = set(data.public.texts()), set(data.validation.texts())
    assert not public & validation
    assert len(data.validation.of_domain("qa")) == 10
    assert len(data.validation.of_domain("extra")) == 4
    assert len(data.public) + len(data.validation) == 140
    prepare(_options(root, validation_share=0.0), tmp_path / "none")
    assert len(load_prepared(tmp_path / "none").validation) == 0


def test_test_documents_caps_every_domain(root: Path, tmp_path: Path):
    prepare(_options(root, test_documents=7), tmp_path / "out")
    assert len(load_prepared(tmp_path / "out").test) == 7


def test_a_text_that_spells_the_end_of_text_does_not_end_there(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "out")
    corpus = corpus_from_texts(["a <|endoftext|> b", ""], "d", tmp_path / "out" / "tokenizer")
    assert (corpus.document(0)[0] == 0).sum() == 1
    assert corpus.document(1)[0].tolist() == [0]
    assert list(corpus.texts()) == ["a <|endoftext|> b", ""]
    assert corpus.domains == ("d",)


def test_files_named_later_are_tokenised_like_those_of_the_run(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "out")
    row = _options(root).corpora[0]
    prepared = load_prepared(tmp_path / "out").private
    named = corpus_from_source(row, "private", tmp_path / "out" / "tokenizer", root=root)
    assert np.array_equal(named.token_ids, prepared.token_ids)
    assert np.array_equal(named.counted, prepared.counted)
    assert named.domains == ("qa",)


def test_a_folder_without_an_end_of_text_token_is_refused(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "out")
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="names no eos_token"):
        corpus_from_texts(["a"], "d", tmp_path / "bare")


def test_views_and_domains_agree_with_the_documents(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "out")
    corpus = tokenise(
        [Document("b", "p", " x"), Document("a", None, "yy"), Document("b", None, "zzz")],
        ("a", "b"), tmp_path / "out" / "tokenizer",
    )  # fmt: skip
    assert list(corpus.of_domain("b").texts()) == ["p x", "zzz"]
    assert corpus.select(np.array([2, 0])).text(0) == "zzz"
    assert corpus.num_tokens == corpus.lengths_U.sum() == len(corpus.token_ids)


def test_every_process_writes_the_same_bytes_whatever_its_hash_seed(root: Path, tmp_path: Path):
    prepare(_options(root), tmp_path / "here")
    script = (
        "import sys; from pathlib import Path; from deepfusion.data.prepare import prepare\n"
        "from deepfusion.data.options import CorpusSource, DataOptions, TokenizerOptions\n"
        f"prepare({_options(root)!r}, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True, env=environment)
    assert _digests(tmp_path / "here") == _digests(tmp_path / "there")


def _foreign_tokenizer(path: Path, tokens: list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))


@pytest.mark.parametrize(("tokens", "end", "size"), [(["[UNK]", "a", "</s>"], 2, 3), (["[UNK]", "a"], 2, 3)])
def test_a_tokenizer_file_keeps_its_end_or_gets_one_and_neither_cuts_nor_pads(
    tmp_path: Path, tokens: list[str], end: int, size: int
):
    _foreign_tokenizer(tmp_path / "tokenizer.json", tokens)
    make_tokenizer(TokenizerOptions(file="tokenizer.json"), [], tmp_path, tmp_path / "kept")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "kept")) == size
    corpus = corpus_from_texts(["a a a a a a"], "d", tmp_path / "kept")
    assert corpus.token_ids.tolist() == [1] * 6 + [end]
    make_tokenizer(TokenizerOptions(folder="kept"), [], tmp_path, tmp_path / "again")
    assert corpus_from_texts(["a a"], "d", tmp_path / "again").token_ids.tolist() == [1, 1, end]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TokenizerOptions(file="none.json"), r"file: there is no .*none.json"),
        (TokenizerOptions(file="broken.json"), r"broken.json: not a tokenizer.json"),
        (TokenizerOptions(folder="none"), r"folder: there is no"),
        (TokenizerOptions(folder="empty"), r'folder = ".*empty": .*save_pretrained'),
    ],
)
def test_a_tokenizer_that_cannot_be_opened_is_named(tmp_path: Path, options: TokenizerOptions, message: str):
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        make_tokenizer(options, [], tmp_path, tmp_path / "out")


def test_a_run_without_public_text_is_refused(root: Path, tmp_path: Path):
    options = _options(
        root, corpora=(CorpusSource(domain="d", private="private.jsonl", test="test.jsonl", text="{q}"),)
    )
    with pytest.raises(DataError, match=r"\[data\] no public text; add public"):
        prepare(options, tmp_path / "out")


@pytest.mark.parametrize(("templates", "says"), [
    ({"answer": "{a}"}, "--answer = '{a}': has no prompt; give both, or text alone"),
    ({"prompt": "{q}"}, "--prompt = '{q}': has no answer; give both, or text alone"),
    ({"text": "{a}", "prompt": "{q}", "answer": "{a}"}, "--text = '{a}': excludes prompt and answer"),
    ({"text": "a"}, "--text = 'a': names no field"),
])  # fmt: skip
def test_templates_of_a_command_that_cannot_be_meant_are_refused(root: Path, templates: dict[str, str], says: str):
    given = dict.fromkeys(("text", "prompt", "answer")) | templates
    with pytest.raises(ConfigError) as refused:
        corpus_from_files(str(root / "test.jsonl"), "test", root, **given)
    assert says in str(refused.value)
