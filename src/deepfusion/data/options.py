# SPDX-License-Identifier: Apache-2.0
"""The [data] section: which text, how it becomes documents, which tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Literal, cast

from deepfusion.data.embedded import EMBEDDED
from deepfusion.errors import DataError
from deepfusion.registry import did_you_mean

Split = Literal["private", "public", "test"]
SPLITS: tuple[Split, ...] = ("private", "public", "test")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def template_fields(template: str) -> tuple[str, ...]:
    """Names of the record fields in a template such as `"Question: {question}"`.

    Raises:
        ValueError: braces do not match, or a field is not a plain name; says which.
    """
    names: list[str] = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name or re.search(r"[.\[\]]", name) or form or conversion:
            raise ValueError(f"{{{name}}} is not a plain field name")
        names.append(name)
    return tuple(names)


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """[data.tokenizer]: exactly one of the four; left out, a byte-level BPE of 4,096 tokens is trained on the public text.

    Attributes:
        vocab_size: train a byte-level BPE of this many tokens on the public text.
        file: a `tokenizer.json`, relative to the data root.
        folder: a folder that `save_pretrained` made, relative to the data root.
        hub: a model's name on the Hugging Face hub.
    """

    vocab_size: int | None = None
    file: str | None = None
    folder: str | None = None
    hub: str | None = None

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        given = [name for name in ("vocab_size", "file", "folder", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            what = "nothing given" if not given else f"{' and '.join(given)} exclude each other"
            yield f"vocab_size, file, folder, hub: {what}; give exactly one of them, e.g. vocab_size = 4096"
        if self.vocab_size is not None and self.vocab_size < 257:
            yield f"vocab_size = {self.vocab_size}: fewer than 256 bytes and the end-of-text token; choose 257 or more"


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """[[data.corpora]]: text of one domain; a domain may have several rows, a row may lack a split.

    With neither `hub` nor `embedded`, `private`, `public` and `test` are paths or patterns (`law/*.jsonl`) below the
    data root. In .jsonl, .json, .csv and .parquet a record is a document; in .txt blank lines part the documents.

    Attributes:
        domain: name of the domain in all results.
        private: what the devices train on, divided among them.
        public: what the server may read.
        test: what results are measured on.
        hub: a Hugging Face data set by name, or its folder below the data root; `private`, `public` and `test` are then
            split expressions such as "train[:90%]".
        subset: the configuration's name of a `hub` data set that has several.
        embedded: a domain of the embedded set, whose three splits are fixed.
        text: template of a document without a prompt; "{text}" when there is no `prompt` either.
        prompt: template of what a document's answer is conditioned on.
        answer: template of what follows the prompt; begin it with a space or a line break.
        where: only records whose fields have these values, e.g. { domain = "law" }.
        limit: at most this many documents of each split, chosen by a hash of their text.
    """

    domain: str
    private: str | tuple[str, ...] | None = None
    public: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    hub: str | None = None
    subset: str | None = None
    embedded: str | None = None
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    where: dict[str, str] = field(default_factory=dict[str, str])
    limit: int | None = None

    def of(self, split: Split) -> tuple[str, ...]:
        """Paths, patterns or split expressions of one split; the split's own name for an embedded set."""
        if self.embedded is not None:
            return (split,)
        value = cast("str | tuple[str, ...] | None", getattr(self, split))
        return () if value is None else (value,) if isinstance(value, str) else value

    @property
    def templates(self) -> tuple[str | None, str]:
        """Prompt template (None without a prompt) and the template of what follows."""
        return (None, self.text or "{text}") if self.prompt is None else (self.prompt, self.answer or "")

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if not self.domain.strip():
            yield f'domain = "{self.domain}": empty; give the name that results should show'
        if self.limit is not None and self.limit < 1:
            yield f"limit = {self.limit}: leaves no document; choose 1 or more, or remove it"
        yield from self._source_faults()
        yield from self.template_faults()

    def _source_faults(self) -> Iterator[str]:
        given = [name for name in SPLITS if getattr(self, name) is not None]
        if self.hub is not None and self.embedded is not None:
            yield f'hub = "{self.hub}": embedded = "{self.embedded}" is given too; keep one of them'
        if self.subset is not None and self.hub is None:
            yield f'subset = "{self.subset}": only a hub data set has subsets; remove it or add hub = "..."'
        if self.embedded is None and not given:
            yield "private, public, test: none is given; give at least one of them, or embedded = one of " + _names()
        if self.embedded is not None:
            if self.embedded not in EMBEDDED:
                hint = did_you_mean(self.embedded, tuple(EMBEDDED))
                yield f'embedded = "{self.embedded}": not in the embedded set{hint}; choose one of {_names()}'
            for name in given:
                yield f"{name} = {getattr(self, name)!r}: the embedded set's splits are fixed; remove it"
            for name in ("text", "prompt", "answer", "where"):
                if getattr(self, name):
                    yield f"{name} = {getattr(self, name)!r}: the embedded set is plain text without fields; remove it"
        if self.embedded is None and self.hub is None:
            for name in SPLITS:
                for path in self.of(name):
                    if not path.lower().endswith(SUFFIXES):
                        yield f'{name} = "{path}": unknown kind of file; use one of {", ".join(SUFFIXES)}'

    def template_faults(self) -> Iterator[str]:
        """What is wrong with `text`, `prompt` and `answer`, and the cure."""
        if self.text is not None and (self.prompt is not None or self.answer is not None):
            yield f"text = {self.text!r}: excludes prompt and answer; keep text, or prompt with answer"
        if (self.prompt is None) != (self.answer is None):
            have, lack = ("answer", "prompt") if self.prompt is None else ("prompt", "answer")
            yield f"{have} = {getattr(self, have)!r}: has no {lack}; give both, or text alone"
        for name in ("text", "prompt", "answer"):
            template = getattr(self, name)
            try:
                if template is not None and not template_fields(template):
                    yield f"{name} = {template!r}: names no field; write one in braces, e.g. {{question}}"
            except ValueError as error:
                yield f"{name} = {template!r}: {error}; write fields as {{name}} and a literal brace as {{{{ or }}}}"


def _names() -> str:
    return ", ".join(EMBEDDED)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """[data]: the run's text.

    Attributes:
        root: folder that paths are relative to; `~` and `${VARIABLE}` are filled in.
        sequence_length: tokens of a training sequence.
        counted: which tokens the loss and the scores count where a document has a prompt: its "answer" or "all".
        validation_share: share of each domain's public documents that is held back for validation curves.
        test_documents: at most this many test documents a domain, chosen by a hash of their text.
        tokenizer: [data.tokenizer].
        corpora: [[data.corpora]].
    """

    root: str = "."
    sequence_length: int = 128
    counted: Literal["answer", "all"] = "answer"
    validation_share: float = 0.05
    test_documents: int | None = None
    tokenizer: TokenizerOptions = field(default_factory=lambda: TokenizerOptions(vocab_size=4096))
    corpora: tuple[CorpusSource, ...]

    @property
    def folder(self) -> Path:
        """The root with its variables filled in.

        Raises:
            DataError: a variable is not set, or the folder does not exist and some source needs it.
        """
        return resolve_root(self.root)

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        if self.sequence_length < 2:
            yield f"sequence_length = {self.sequence_length}: a token needs one before it; choose 2 or more"
        if not 0 <= self.validation_share <= 0.5:
            yield f"validation_share = {self.validation_share}: not a share from 0 to 0.5; 0.05 is usual"
        if self.test_documents is not None and self.test_documents < 1:
            yield f"test_documents = {self.test_documents}: leaves nothing to measure on; choose 1 or more"
        reasons = {
            "public": "the server needs public text to distil and to tune",
            "test": "there is nothing to measure on",
        }
        for split, why in reasons.items():
            if not any(source.of(cast(Split, split)) for source in self.corpora):
                yield f"corpora: no row has {split} text: {why}; add {split} = ... to a [[data.corpora]] row"


def resolve_root(root: str) -> Path:
    """The data root as a path, with `~` and `${VARIABLE}` filled in.

    Raises:
        DataError: a variable is not set, or there is no such folder.
    """
    unset = [name for name in re.findall(r"\$\{(\w+)\}", root) if name not in os.environ]
    if unset:
        names = ", ".join(unset)
        raise DataError(
            f'[data] root = "{root}": the environment variable {names} is not set; '
            f"export {unset[0]}=/path/to/data, or give --set data.root=/path/to/data"
        )
    folder = Path(os.path.expandvars(os.path.expanduser(root)))
    if not folder.is_dir():
        raise DataError(f'[data] root = "{root}": no folder {folder.absolute()}; give --set data.root=/path/to/data')
    return folder
