# SPDX-License-Identifier: Apache-2.0
"""What a multi-exit model costs at each cut between device and edge: a table on disk (aeria, section 3).

Shapes: L blocks, S = L + 1 cuts (cut s: the device runs blocks 1 to s), M exits, Z rows of exit thresholds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from deepfusion.artifacts import key_of, write_atomic
from deepfusion.errors import MarketError
from deepfusion.schema import misfits

LATER = ("prompt_flops", "prompt_reads", "left_flops", "left_bytes")
"""Fields that tables of the first version did not have."""
NOBODY = 1e-12
"""A share of samples up to which nobody is said to be there."""
LARGEST = 1e30
"""No FLOPs, bytes or crossings of a table are more: sums and products of them stay finite."""
LARGEST_FILE = 1 << 24
"""Bytes of a table on disk at most: thousands of blocks."""
Mode = Literal["expected", "worst"]
"""Which latency Phase I promises: the mean over samples, or that of a sample that leaves nowhere early."""


@dataclass(frozen=True, eq=False)
class Cuts:
    """What a sample costs at each cut s, for one threshold; each of shape (S,).

    Attributes:
        device_flops_S: FLOPs on the device, F_dev(s).
        edge_flops_S: FLOPs on the edge, F_edge(s).
        device_reads_S: bytes of weights that the device reads.
        edge_reads_S: bytes of weights that the edge reads.
        sent_S: bytes over the network.
        trips_S: round trips over the network.
    """

    device_flops_S: np.ndarray
    edge_flops_S: np.ndarray
    device_reads_S: np.ndarray
    edge_reads_S: np.ndarray
    sent_S: np.ndarray
    trips_S: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A multi-exit model as numbers. Empty optional fields are zeros (`crossings`: ones).

    Attributes:
        name: what bids call the model.
        source: where each kind of number comes from, for people.
        block_flops: F_l of each block.
        exit_blocks: x_m, the block after which exit m stands, ascending; the last is L.
        head_flops: H_m of each exit's head.
        cut_bytes: b_s, what crosses each cut once: the input at 0, a hidden state between, nothing at L.
        crossings: how often `cut_bytes` crosses when nobody leaves early: 1, or the generated tokens of a language model.
        prompt_bytes: what crosses in addition once, as long as anybody reaches the edge.
        block_reads: bytes of weights read by each block, for `roofline`.
        head_reads: the same of each head.
        prompt_flops: FLOPs of each block that are spent in addition once, as long as anybody gets there: a prompt runs whole.
        prompt_reads: the same of bytes of weights.
        left_flops: FLOPs of each block for a sample that has left before it: its keys and values, which later tokens need.
        left_bytes: what crosses each cut, `crossings` times, for a sample that has left before it; it goes with the next one
            that has not, so it makes no round trip of its own.
        sigmas: exit thresholds, ascending; the last is 1, at which nobody leaves early.
        exit_share: P_m, a row for each sigma: share of samples that leave at each exit.
        accuracy_change: for each sigma, accuracy minus that of the whole model, as a fraction.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    name: str
    source: str
    block_flops: tuple[float, ...]
    exit_blocks: tuple[int, ...]
    head_flops: tuple[float, ...]
    cut_bytes: tuple[float, ...]
    crossings: tuple[float, ...] = ()
    prompt_bytes: tuple[float, ...] = ()
    block_reads: tuple[float, ...] = ()
    head_reads: tuple[float, ...] = ()
    prompt_flops: tuple[float, ...] = ()
    prompt_reads: tuple[float, ...] = ()
    left_flops: tuple[float, ...] = ()
    left_bytes: tuple[float, ...] = ()
    sigmas: tuple[float, ...]
    exit_share: tuple[tuple[float, ...], ...]
    accuracy_change: tuple[float, ...]

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.block_flops)

    @cached_property
    def digest(self) -> str:
        """Hash of all numbers: 32 hex digits. Fields of later versions count where they are used, so old ledgers stay right."""
        return key_of({name: value for name, value in asdict(self).items() if value or name not in LATER})

    def faults(self) -> Iterator[str]:
        """What cannot be, and the cure (the checks of aeria, section 3)."""
        if not 0 < len(self.name) <= 200 or not self.name.isprintable():
            yield f"name = {self.name[:200]!r}: must be one line of 1 to 200 characters; rename the model"
        yield from self._shape_faults()
        numbers = [
            *self.block_flops, *self.head_flops, *self.cut_bytes, *self.crossings, *self.prompt_bytes,
            *self.block_reads, *self.head_reads, *self.prompt_flops, *self.prompt_reads, *self.left_flops, *self.left_bytes,
        ]  # fmt: skip
        if not all(0 <= number < LARGEST for number in numbers):
            yield f"FLOPs, bytes and crossings: must be finite, below {LARGEST:.0e}, and not negative; measure again"
        if not all(-1 <= change <= 1 for change in self.accuracy_change):
            yield f"accuracy_change = {self.accuracy_change}: each lies between -1 and 1; give fractions, not per cent"
        if any(low >= high for low, high in zip(self.sigmas, self.sigmas[1:], strict=False)):
            yield f"sigmas = {self.sigmas}: must ascend; sort the rows"
        if not self.sigmas or not all(0 <= sigma <= 1 for sigma in self.sigmas) or self.sigmas[-1] != 1:
            yield f"sigmas = {self.sigmas}: must lie in [0, 1] and end with 1, the row of the whole model"

    def _shape_faults(self) -> Iterator[str]:
        blocks, exits = self.num_blocks, len(self.exit_blocks)
        lengths: dict[str, tuple[int, set[int]]] = {
            "head_flops": (len(self.head_flops), {exits}),
            "cut_bytes": (len(self.cut_bytes), {blocks + 1}),
            "crossings": (len(self.crossings), {0, blocks + 1}),
            "prompt_bytes": (len(self.prompt_bytes), {0, blocks + 1}),
            "block_reads": (len(self.block_reads), {0, blocks}),
            "head_reads": (len(self.head_reads), {0, exits}),
            "prompt_flops": (len(self.prompt_flops), {0, blocks}),
            "prompt_reads": (len(self.prompt_reads), {0, blocks}),
            "left_flops": (len(self.left_flops), {0, blocks}),
            "left_bytes": (len(self.left_bytes), {0, blocks + 1}),
            "exit_share": (len(self.exit_share), {len(self.sigmas)}),
            "accuracy_change": (len(self.accuracy_change), {len(self.sigmas)}),
        }
        for name, (found, wanted) in lengths.items():
            if found not in wanted:
                yield f"{name}: {found} numbers where {max(wanted)} belong; one for each block, cut, exit or sigma"
        ascending = all(low < high for low, high in zip(self.exit_blocks, self.exit_blocks[1:], strict=False))
        if not exits or not ascending or self.exit_blocks[0] < 1 or self.exit_blocks[-1] != blocks:
            yield f"exit_blocks = {self.exit_blocks}: must ascend from 1 or more to the last block, {blocks}"
        if any(len(row) != exits for row in self.exit_share):
            yield f"exit_share: each row has one share for each of {exits} exits; mend the rows"
            return
        shares = np.asarray(self.exit_share, dtype=np.float64)
        if not np.isfinite(shares).all() or (shares < 0).any() or (abs(shares.sum(-1) - 1) > 1e-9).any():
            yield "exit_share: each row must be finite, not negative and sum to 1; measure again"
        elif len(shares):
            if (np.diff(np.cumsum(shares, axis=1), axis=0) > 1e-9).any():
                yield "exit_share: a higher sigma lets more samples leave early somewhere; measure with one model"
            if shares[-1, -1] != 1:
                yield f"exit_share: at sigma 1 all samples reach the last exit, not {shares[-1, -1]}; mend the last row"

    def row_of(self, sigma: float) -> int:
        """The row for a threshold: that of the smallest tabulated sigma that is not below it."""
        return int(np.searchsorted(np.asarray(self.sigmas), sigma - 1e-12))

    def row_for_accuracy(self, change: float) -> int:
        """The row with the smallest sigma whose accuracy is not below `change` against the whole model.

        Raises:
            MarketError: none reaches it.
        """
        reaching = [row for row, found in enumerate(self.accuracy_change) if found >= change - 1e-12]
        if not reaching:
            best = max(self.accuracy_change) + 0.0  # no minus before a zero
            raise MarketError(f"accuracy = {change:+g}: {self.name} reaches {best:+g} at best; ask for that or less")
        return reaching[0]

    def reach(self, row: int, mode: Mode = "expected") -> np.ndarray:
        """Share of samples still running at blocks 1 to L + 1; the last is 0. Shape (L + 1,)."""
        before = np.ones(self.num_blocks + 1)
        if mode == "expected":
            for block, share in zip(self.exit_blocks, self.exit_share[row], strict=True):
                before[block:] -= share
        before[-1] = 0.0
        return np.clip(before, 0.0, 1.0)

    def cuts(self, row: int, mode: Mode = "expected") -> Cuts:
        """What a sample costs at each cut, at the threshold of this row."""
        reach = self.reach(row, mode)
        device_flops, edge_flops = self._split(
            self.block_flops, self.head_flops, self.prompt_flops, self.left_flops, reach
        )
        device_reads, edge_reads = self._split(self.block_reads, self.head_reads, self.prompt_reads, (), reach)
        crossings = np.asarray(self.crossings or [1.0] * len(reach))
        often = reach * crossings
        none = [0.0] * len(reach)
        once = np.asarray(self.prompt_bytes or none) + (crossings - often) * np.asarray(self.left_bytes or none)
        offloads = reach > NOBODY
        sent = np.where(offloads, often * np.asarray(self.cut_bytes) + once, 0.0)
        trips = np.where(offloads, np.maximum(often, 1.0), 0.0)
        return Cuts(device_flops, edge_flops, device_reads, edge_reads, sent, trips)

    def _split(
        self,
        blocks: tuple[float, ...],
        heads: tuple[float, ...],
        prompt: tuple[float, ...],
        left: tuple[float, ...],
        reach: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums over what stands before each cut, and behind it."""
        none, running = [0.0] * self.num_blocks, reach[:-1]
        work = np.asarray(blocks or none) * running
        work += np.where(running > NOBODY, np.asarray(prompt or none) + (1 - running) * np.asarray(left or none), 0.0)
        for block, head in zip(self.exit_blocks, heads, strict=bool(heads)):
            work[block - 1] += reach[block - 1] * head
        done = np.concatenate([[0.0], np.cumsum(work)])
        behind = np.concatenate([np.cumsum(work[::-1])[::-1], [0.0]])  # not a difference: exactly 0 at the end
        return done, behind

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_atomic(path, json.dumps(asdict(self), indent=1))


def load_profile(path: Path) -> Profile:
    """Read a table that `Profile.save` wrote, and check it.

    Raises:
        MarketError: it is no such table, or its numbers cannot be; all faults at once.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise MarketError(f"{path}: {path.stat().st_size} bytes, more than a table of exits has; give another file")
        found = TypeAdapter(Profile).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise MarketError(f"{path}: cannot be read ({error.strerror}); give a table of exits in JSON") from error
    except ValidationError as error:
        raise MarketError(f"{path}: not a table of exits; " + "; ".join(misfits(error)[:8])) from error
    faults = list(found.faults())
    if faults:
        raise MarketError(f"{path}: {len(faults)} fault(s)\n" + "\n".join(f"  {fault}" for fault in faults))
    return found


def load_profiles(folder: Path | None, shipped: Mapping[str, Profile]) -> dict[str, Profile]:
    """The shipped tables and those of a folder, by name; a folder's table takes the place of a shipped one.

    Raises:
        MarketError: there is no such folder, a table in it is faulty, or two have one name.
    """
    found = dict(shipped)
    if folder is None:
        return found
    if not folder.is_dir():
        raise MarketError(f"{folder}: no such folder; give one with tables of exits (*.json)")
    own: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        profile = load_profile(path)
        if profile.name in own:
            raise MarketError(f"{path}: named {profile.name} like {own[profile.name]}; rename one")
        own[profile.name] = path
        found[profile.name] = profile
    return found
