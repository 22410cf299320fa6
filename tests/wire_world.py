# SPDX-License-Identifier: Apache-2.0
"""What crosses the door in a run, held against the closed forms (baselines, section 3), to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deepfusion.federation.door import Door
from deepfusion.federation.payload import encode
from deepfusion.types import Payload, State

Seen = dict[tuple[int, str, str, str], tuple[frozenset[str], Mapping[str, str | int | float | bool]]]
"""Names of the tensors and metadata of a message, by round, device, direction and kind."""
ASKED = {"architecture", "config", "init_id", "parts"}
"""What a round's request says beside its tensors, at least."""
TOLD = {"architecture", "device", "documents", "first_loss", "init_id", "last_loss", "parameters", "steps", "tokens"}
"""What an answer says of a training, at least."""


@contextmanager
def tapped() -> Generator[Seen]:
    """Listen at the door."""
    seen: Seen = {}
    through = Door.__call__

    def call(self: Door, requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
        for device, sent in requests.items():
            seen[sent.round, device, "down", sent.what] = (frozenset(sent.arrays), sent.metadata)
        for device, came in through(self, requests):
            seen[came.round, device, "up", came.what] = (frozenset(came.arrays), came.metadata)
            yield device, came

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Door, "__call__", call)
        yield seen


def check_ledger(
    folder: Path, seen: Seen, due: Callable[[dict[str, Any]], State], says: Mapping[tuple[str, str], Collection[str]]
) -> list[dict[str, Any]]:
    """Each row of a run's ledger has the bytes of the tensors that are due, and of no others; returns the rows.

    Names of devices, losses and the like have the length that they have, so their values are those that were sent.

    Args:
        due: the closed form: tensors of a row's message, of which only names, shapes and types count.
        says: names of the metadata of each direction and kind.
    """
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for row in rows:
        metadata = seen[row["round"], row["device"], row["direction"], row["what"]][1]
        assert metadata.keys() == set(says[row["direction"], row["what"]]), row
        assert row["bytes"] == len(encode(Payload(row["what"], due(row), metadata, row["round"]))), row
    return rows
