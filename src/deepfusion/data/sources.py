# SPDX-License-Identifier: Apache-2.0
"""From the rows of [[data.corpora]] to documents: files, hub data sets and the embedded set behind one function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deepfusion.data.embedded import embedded_documents, embedded_version
from deepfusion.data.files import Record, file_records, find_files
from deepfusion.data.hub import hub_records
from deepfusion.data.options import SPLITS, CorpusSource, DataOptions, Split, template_fields
from deepfusion.errors import DataError
from deepfusion.registry import did_you_mean


@dataclass(frozen=True)
class Document:
    """One document: a prompt (None for plain text) and the text that follows it."""

    domain: str
    prompt: str | None
    answer: str

    @property
    def text(self) -> str:
        """Prompt and answer together."""
        return (self.prompt or "") + self.answer

    @property
    def order(self) -> bytes:
        """A hash of the text: the order in which documents are chosen or held back, whatever their order in a file."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).digest()


def read_documents(source: CorpusSource, split: Split, root: Path) -> list[Document]:
    """The documents of one split of one row, in the source's order; blank ones are left out.

    Raises:
        DataError: a file, record or field cannot be used, or nothing is left; names the place and the cure.
    """
    if not source.of(split):
        return []
    documents = list(_embedded(source, split) if source.embedded else _recorded(source, split, root))
    if not documents:
        where = ", ".join(source.of(split))
        raise DataError(
            f'[[data.corpora]] domain = "{source.domain}", {split} = "{where}": no document with text in it; '
            "check the file, the templates and `where`"
        )
    return first_by_hash(documents, source.limit)


def first_by_hash(documents: Sequence[Document], limit: int | None) -> list[Document]:
    """At most `limit` documents, those with the smallest hashes, in their old order."""
    if limit is None or len(documents) <= limit:
        return list(documents)
    chosen = sorted(range(len(documents)), key=lambda index: documents[index].order)[:limit]
    return [documents[index] for index in sorted(chosen)]


def fingerprint(options: DataOptions) -> str:
    """Hash of the text behind `options`: 32 hex digits.

    Files count by their content, the embedded set by its packages' versions, data sets on the hub not at all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for source in options.corpora:
        if source.embedded is not None:
            digest.update(embedded_version(source.embedded).encode())
        elif source.hub is None:
            for path in find_files([path for split in SPLITS for path in source.of(split)], options.folder):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def missing_files(options: DataOptions) -> list[str]:
    """What is not there of the text's files, a sentence with its cure for each; nothing is read."""
    try:
        root = options.folder
    except DataError as error:
        return [str(error)]
    missing: list[str] = []
    for source in options.corpora:
        patterns = [] if source.embedded or source.hub else [path for split in SPLITS for path in source.of(split)]
        for pattern in patterns:
            try:
                find_files([pattern], root)
            except DataError as error:
                missing.append(str(error))
    return list(dict.fromkeys(missing))


def _embedded(source: CorpusSource, split: Split) -> Iterator[Document]:
    for text in embedded_documents(source.embedded or "", split):
        yield Document(source.domain, None, text)


def _recorded(source: CorpusSource, split: Split, root: Path) -> Iterator[Document]:
    prompt_template, answer_template = source.templates
    seen: dict[str, set[str]] = {key: set() for key in source.where}
    for place, record in _records(source, split, root):
        if not _wanted(record, source.where, place, seen):
            continue
        prompt = None if prompt_template is None else _fill(prompt_template, record, place)
        document = Document(source.domain, prompt, _fill(answer_template, record, place))
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: half a surrogate pair is no character; write it as UTF-8") from error
        if document.answer.strip():
            yield document
    for key, values in seen.items():
        if source.where[key] not in values:
            shown = ", ".join(f'"{value}"' for value in sorted(values)[:20])
            hint = did_you_mean(source.where[key], tuple(values))
            raise DataError(
                f'[[data.corpora]] domain = "{source.domain}", where {key} = "{source.where[key]}": '
                f"no {split} record has it{hint}; there are {shown}"
            )


def _records(source: CorpusSource, split: Split, root: Path) -> Iterator[tuple[str, Record]]:
    """(place, record) pairs; the place says file and line in errors."""
    if source.hub is not None:
        yield from hub_records(source.hub, source.subset, source.of(split), root)
        return
    for path in find_files(source.of(split), root):
        yield from file_records(path)


def _wanted(record: Record, where: Mapping[str, str], place: str, seen: dict[str, set[str]]) -> bool:
    for key, value in where.items():
        found = _render(_field(record, key, place))
        seen[key].add(found)
        if found != value:
            return False
    return True


def _fill(template: str, record: Record, place: str) -> str:
    return template.format_map({name: _render(_field(record, name, place)) for name in template_fields(template)})


def _field(record: Record, name: str, place: str) -> Any:
    if name not in record:
        known = ", ".join(str(key) for key in record)
        hint = did_you_mean(name, tuple(str(key) for key in record))
        raise DataError(f'{place}: no field "{name}"{hint}; it has {known}; mend the template or `where`')
    return record[name]


def _render(value: Any) -> str:
    """A field as text: lists and tables of options become `A) x B) y`, null becomes nothing."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        return " ".join(f"{_letter(index)}) {_render(item)}" for index, item in enumerate(items))
    if isinstance(value, dict):
        return " ".join(f"{key}) {_render(item)}" for key, item in cast(dict[str, Any], value).items())
    return str(value)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)
