# SPDX-License-Identifier: Apache-2.0
"""The token cache: documents are read, split and tokenised once, and then memory-mapped by everyone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepfusion.data.options import SPLITS, CorpusSource, DataOptions, Split
from deepfusion.data.sources import Document, first_by_hash, read_documents
from deepfusion.data.tokenizer import encode, end_id, make_tokenizer, open_tokenizer, vocabulary_of
from deepfusion.errors import ConfigError, DataError
from deepfusion.types import Corpus, Progress, silent

_ARRAYS = ("token_ids", "counted", "token_starts", "text_bytes", "text_starts", "domain_ids")


@dataclass(frozen=True, eq=False)
class PreparedData:
    """The run's text, tokenised and memory-mapped. All four corpora have the same `domains`.

    Attributes:
        tokenizer: a folder that AutoTokenizer opens.
        private: the devices' text.
        public: the server's text, without what `validation` holds.
        validation: public text that is never trained on.
        test: what results are measured on.
        vocab_size: one more than the largest token id; models need at least as many embeddings.
        eos_id: the token that ends each document.
    """

    tokenizer: Path
    private: Corpus
    public: Corpus
    validation: Corpus
    test: Corpus
    vocab_size: int
    eos_id: int


def prepare(options: DataOptions, folder: Path, *, progress: Progress = silent) -> None:
    """Read, split and tokenise all text of `options` into `folder`; `load_prepared` opens it.

    Which documents are held back or left out follows from a hash of their text alone, so the splits are the same for
    every seed.

    Raises:
        DataError: some text cannot be read, or a split has no document.
    """
    documents = _read(options, progress)
    public = documents["public"]
    make_tokenizer(options.tokenizer, (d.text for d in public), _root(options), folder / "tokenizer")
    domains = tuple(sorted({document.domain for part in documents.values() for document in part}))
    for name, part in documents.items():
        progress("tokenise", 0, len(part), name)
        write_corpus(tokenise(part, domains, folder / "tokenizer", counted=options.counted), folder / name)
        progress("tokenise", len(part), len(part), name)


def load_prepared(folder: Path) -> PreparedData:
    """Open what `prepare` wrote; nothing is read until it is used."""
    tokenizer = open_tokenizer(folder / "tokenizer")
    private, public, validation, test = (
        load_corpus(folder / name) for name in ("private", "public", "validation", "test")
    )
    size, end = vocabulary_of(tokenizer), end_id(tokenizer)
    return PreparedData(folder / "tokenizer", private, public, validation, test, size, end)


def tokenise(
    documents: Sequence[Document], domains: tuple[str, ...], tokenizer_folder: Path, *, counted: str = "answer"
) -> Corpus:
    """Documents as a corpus in memory, each ended by the end-of-text token.

    Args:
        domains: the names that the corpus knows; every document's domain is one of them.
        counted: "answer" counts no prompt tokens, "all" counts every token.
    """
    tokenizer = open_tokenizer(tokenizer_folder)
    texts = [document.text for document in documents]
    starts = [len(document.prompt or "") if counted == "answer" else 0 for document in documents]
    pairs = list(encode(tokenizer, texts, starts))
    encoded = [text.encode() for text in texts]
    small = vocabulary_of(tokenizer) <= 2**16
    return Corpus(
        token_ids=_join((ids for ids, _ in pairs), np.uint16 if small else np.uint32),
        counted=_join((flags for _, flags in pairs), np.bool_),
        token_starts=_offsets([len(ids) for ids, _ in pairs]),
        text_bytes=np.frombuffer(b"".join(encoded), np.uint8),
        text_starts=_offsets([len(data) for data in encoded]),
        domain_ids=np.asarray([domains.index(document.domain) for document in documents], np.int32),
        domains=domains,
        rows_U=np.arange(len(documents)),
    )


def corpus_from_texts(texts: Sequence[str], domain: str, tokenizer_folder: Path) -> Corpus:
    """Plain texts of one domain as a corpus in memory; every token is counted."""
    return tokenise([Document(domain, None, text) for text in texts], (domain,), tokenizer_folder)


def corpus_from_source(
    source: CorpusSource, split: Split, tokenizer_folder: Path, *, root: Path = Path(), counted: str = "answer"
) -> Corpus:
    """One split of one [[data.corpora]] row as a corpus in memory, e.g. files that a device names itself.

    Raises:
        DataError: the text or the tokenizer cannot be read.
    """
    documents = read_documents(source, split, root)
    return tokenise(documents, (source.domain,), tokenizer_folder, counted=counted)


def corpus_from_files(
    data: str | Sequence[str],
    split: Split,
    tokenizer_folder: Path,
    *,
    text: str | None,
    prompt: str | None,
    answer: str | None,
) -> Corpus:
    """Text file(s) and templates, as a user names them on the command line; without a template the field `text`.

    Raises:
        ConfigError: the templates cannot be meant.
        DataError: the text or the tokenizer cannot be read.
    """
    data = [data] if isinstance(data, str) else data
    return corpus_from_source(source_of_files(data, split, text, prompt, answer), split, tokenizer_folder)


def source_of_files(
    data: Sequence[str], split: Split, text: str | None, prompt: str | None, answer: str | None
) -> CorpusSource:
    """What `corpus_from_files` reads, as a row of [[data.corpora]].

    Raises:
        ConfigError: the templates cannot be meant; names the command's options.
    """
    source = CorpusSource(domain="text", text=text, prompt=prompt, answer=answer)
    if faults := [f"--{fault}" for fault in source.template_faults()]:
        raise ConfigError(faults, "command line")
    return replace(source, **{split: tuple(str(Path(path).absolute()) for path in data)})


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Write a whole store as `.npy` files. A view (`select`) is written with the documents that it leaves out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(corpus, name))
    (folder / "domains.json").write_text(json.dumps(corpus.domains), encoding="utf-8")


def load_corpus(folder: Path) -> Corpus:
    """Open what `write_corpus` wrote, memory-mapped."""
    arrays = {name: _map(folder / f"{name}.npy") for name in _ARRAYS}
    domains = tuple(json.loads((folder / "domains.json").read_text(encoding="utf-8")))
    return Corpus(**arrays, domains=domains, rows_U=np.arange(len(arrays["domain_ids"])))


def _root(options: DataOptions) -> Path:
    """The data root; a root that no row and no tokenizer needs may be anything."""
    needed = any(source.embedded is None for source in options.corpora)
    return options.folder if needed or options.tokenizer.file or options.tokenizer.folder else Path()


def _read(options: DataOptions, progress: Progress) -> dict[str, list[Document]]:
    """The documents of the four parts: private, public, validation, test."""
    root = _root(options)
    documents: dict[str, list[Document]] = {"private": [], "public": [], "validation": [], "test": []}
    for done, source in enumerate(options.corpora):
        progress("read text", done, len(options.corpora), source.domain)
        for split in SPLITS:
            documents[split] += read_documents(source, split, root)
    progress("read text", len(options.corpora), len(options.corpora), "")
    for split in SPLITS:
        if not documents[split] and split != "private":  # devices may have it all
            raise DataError(f'[data] no {split} text; add {split} = "..." to a row of [[data.corpora]]')
    test = _by_domain(documents["test"])
    documents["test"] = [d for part in test.values() for d in first_by_hash(part, options.test_documents)]
    public = _by_domain(documents["public"])
    held = {name: _held_back(part, options.validation_share) for name, part in public.items()}
    documents["public"] = [d for name, part in public.items() for d in part if d.order not in held[name]]
    documents["validation"] = [d for name, part in public.items() for d in part if d.order in held[name]]
    return documents


def _held_back(documents: Sequence[Document], share: float) -> set[bytes]:
    """Hashes of the `share` of the texts that hash smallest: at least one text, never all, equal texts together."""
    orders = sorted({document.order for document in documents})
    count = min(max(1, round(share * len(orders))), len(orders) - 1) if share > 0 else 0
    return set(orders[:count])


def _by_domain(documents: Iterable[Document]) -> dict[str, list[Document]]:
    parts: dict[str, list[Document]] = {}
    for document in documents:
        parts.setdefault(document.domain, []).append(document)
    return dict(sorted(parts.items()))


def _join(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(array.astype(dtype) for array in arrays)])


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def _map(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r")
    return np.asarray(array)
