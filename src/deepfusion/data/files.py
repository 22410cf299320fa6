# SPDX-License-Identifier: Apache-2.0
"""Records out of JSON Lines, JSON, CSV, Parquet and text files; every fault names file and line."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as arrow
import pyarrow.parquet as parquet

from deepfusion.data.options import SUFFIXES
from deepfusion.errors import DataError
from deepfusion.registry import did_you_mean

Record = Mapping[str, Any]


def file_records(path: Path) -> Iterator[tuple[str, Record]]:
    """(place, record) pairs of one file, by its suffix; in .txt files a passage between blank lines is a record.

    Raises:
        DataError: not UTF-8, malformed, or not a table of records; names the place and the cure.
    """
    return _READERS[path.suffix.lower()](path)


def find_files(patterns: Sequence[str], root: Path) -> list[Path]:
    """The files that paths and patterns name, each pattern's in alphabetical order.

    Raises:
        DataError: a pattern names no file that can be read; shows what lies beside it.
    """
    paths: list[Path] = []
    for pattern in patterns:
        full = os.path.join(root, pattern)
        found = sorted(Path(name) for name in glob.glob(full, recursive=True) if os.path.isfile(name))
        if os.path.isfile(full):
            found = [Path(full)]  # a name with brackets in it is still a name
        found = [path for path in found if path.suffix.lower() in SUFFIXES]
        if not found:
            cure = "mend the path" if os.path.isabs(pattern) else "mend the path or [data] root"
            raise DataError(_not_found(full, cure))
        paths += found
    return paths


def _not_found(full: str, cure: str) -> str:
    if os.path.isdir(full):
        return f"{full}: is a folder; name its files, e.g. {os.path.join(full, '*.jsonl')}"
    if os.path.exists(full):
        return f"{full}: not a kind of file that can be read; make it one of {', '.join(SUFFIXES)}"
    folder = Path(full).parent
    there = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
    hint = did_you_mean(Path(full).name, tuple(there))
    beside = f"; {folder} has {', '.join(there[:10])}" if there else ""
    return f"{full}: no such file{hint}{beside}; {cure}"


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
                        f"convert it: iconv -f latin1 -t utf-8 {path.name}") from error  # fmt: skip


def _jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _object(_parse(line, place, "write one JSON object a line, or name the file .json"), place)


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    content = _parse(_text_of(path), str(path), "write a list of JSON objects, or name the file .jsonl for one a line")
    if not isinstance(content, list):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a list; write [{{...}}, {{...}}]")
    for index, record in enumerate(cast(list[Any], content)):
        place = f"{path}, record {index}"
        yield place, _object(record, place)


def _parse(text: str, place: str, cure: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}, {where}); {cure}") from error
    except RecursionError as error:
        raise DataError(f"{place}: lists in lists, too many to read; {cure}") from error


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f'{place}: holds a {type(value).__name__}, not an object; write {{"text": ...}}')
    return cast(Record, value)


def _csv(path: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True)
    try:
        for record in reader:
            place = f"{path}, line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{place}: not as many cells as the {len(reader.fieldnames or ())} columns of line 1; "
                                'put cells with commas or line breaks in "quotes"')  # fmt: skip
            yield place, record
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.reader.line_num}: not valid CSV ({error}); mend the quotes there"
        ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        row = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except arrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _plain(path: Path) -> Iterator[tuple[str, Record]]:
    for index, passage in enumerate(re.split(r"\n[ \t\r]*\n\s*", _text_of(path))):
        if passage.strip():
            yield f"{path}, passage {index}", {"text": passage.strip("\r\n")}


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _plain}
