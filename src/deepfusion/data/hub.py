# SPDX-License-Identifier: Apache-2.0
"""Records of Hugging Face data sets, by name on the hub or out of a folder, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deepfusion.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def hub_records(
    name: str, subset: str | None, splits: Sequence[str], root: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) pairs of a data set's splits, e.g. "train[:90%]"; the place says data set and row in errors.

    A folder of this name below `root` goes before the hub. It may hold data files or what `save_to_disk` wrote.

    Raises:
        DataError: no such data set, subset or split, or no network; says what to do.
    """
    folder = root / name
    for split in splits:
        data = _from_folder(folder, split) if _saved(folder) else _load(name, folder, subset, split)
        for row, record in enumerate(data):
            yield f"data set {name}, {split}, row {row}", cast(Mapping[str, Any], record)


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _from_folder(folder: Path, split: str) -> Dataset:
    # two seconds to import: only when a run needs it
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    saved = load_from_disk(str(folder))
    parts = saved if isinstance(saved, DatasetDict) else {"train": saved}
    lengths = {str(name): len(part) for name, part in parts.items()}
    try:
        pieces = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        known = ", ".join(lengths)
        raise DataError(f'data set {folder}: no split "{split}" ({_first_line(error)}); it has {known}') from error
    return concatenate_datasets([parts[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces])


def _load(name: str, folder: Path, subset: str | None, split: str) -> Dataset:
    import datasets.exceptions  # two seconds: only when a run needs it

    datasets.disable_progress_bars()  # the run shows its own
    try:
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, subset, split=split)
    except ConnectionError as error:
        raise DataError(
            f"data set {name}: the Hugging Face hub cannot be reached ({_first_line(error)}); connect, "
            f'or where there is a network run datasets.load_dataset("{name}").save_to_disk("FOLDER"), '
            'put FOLDER below [data] root and give hub = "FOLDER"'
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f'data set {name}, split "{split}": {_first_line(error)}; '
            "check the name, `subset` and the split on the hub, or log in (hf auth login) if it is private"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
