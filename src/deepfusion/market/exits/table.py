# SPDX-License-Identifier: Apache-2.0
"""The exit table of a real model: who leaves where at each threshold, and what it costs in accuracy (aeria, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from deepfusion.data.packing import PackedText
from deepfusion.errors import DataError
from deepfusion.market.architectures import SIGMAS
from deepfusion.market.exits.costs import Costs
from deepfusion.market.exits.heads import ExitHeads
from deepfusion.market.exits.leaving import Confidence, judge, leave_early
from deepfusion.market.exits.training import states_at
from deepfusion.market.profiles import Profile
from deepfusion.training import accelerator
from deepfusion.types import Batch, Progress, silent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One threshold, over the generated positions of held-out text.

    Attributes:
        sigma: the threshold; 1 is the whole model.
        exit_share: P_m, share that leaves at each exit.
        accuracy: share of next tokens that stand first at the exit taken.
        loss: mean negative log-likelihood there, nats.
        flops: FLOPs of a generated token over those of the same model without exits.
    """

    sigma: float
    exit_share: tuple[float, ...]
    accuracy: float
    loss: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured.

    Attributes:
        rows: one for each threshold, ascending.
        alone: (accuracy, loss) of each exit on all positions, as if all took it.
        tokens: positions that were generated.
        moved: largest change that made shares monotone in sigma (`_monotone`).
    """

    rows: tuple[Row, ...]
    alone: tuple[tuple[float, float], ...]
    tokens: int
    moved: float


@dataclass(frozen=True)
class Request:
    """What one sample of a table is: a prompt, and the tokens generated after it."""

    prompt: int
    made: int

    def positions(self, batch: Batch) -> torch.Tensor:
        """Which positions of rows of `prompt + made` tokens predict a token that counts after the prompt, BT."""
        made_BT = torch.zeros_like(batch.valid_BT)
        made_BT[:, :-1] = batch.counted_BT[:, 1:] & batch.valid_BT[:, 1:]
        made_BT[:, : self.prompt - 1] = False
        return made_BT


def measure(
    heads: ExitHeads,
    text: PackedText,
    request: Request,
    costs: Costs,
    *,
    rows: int,
    batch_size: int = 8,
    kind: Confidence = "probability",
    progress: Progress = silent,
) -> Measured:
    """Read `rows` rows of held-out text once for each threshold.

    Raises:
        DataError: no token after a prompt counts.
    """
    batches = list(_batches(heads, text, rows, batch_size))
    total, done = len(SIGMAS) * len(batches), 0
    counts, hits, nll = (np.zeros((len(SIGMAS), len(heads.exit_blocks))) for _ in range(3))
    for z, sigma in enumerate(SIGMAS):
        for batch in batches:
            made_BT = request.positions(batch)
            with accelerator().autocast():
                found = leave_early(heads, batch, made_BT, sigma, kind)
            right_BT = found.token_BT == batch.input_ids_BT.roll(-1, dims=1)
            for m in range(len(heads.exit_blocks)):
                here_BT = made_BT & (found.exit_BT == m)
                counts[z, m] += int(here_BT.sum())
                hits[z, m] += int(right_BT[here_BT].sum())
                nll[z, m] += float(found.nll_BT[here_BT].double().sum())
            done += 1
            progress("measure exits", done, total, f"sigma {sigma}")
    tokens = int(counts[0].sum())
    if not tokens:
        raise DataError("no token of the held-out text counts after a prompt; give longer text, or a shorter prompt")
    share_ZM, moved = _monotone(counts / tokens)
    keys = request.prompt + (request.made - 1) / 2  # the mean over the generated tokens
    cost_M = np.array([costs.of_token(m, keys) for m in range(len(heads.exit_blocks))])
    measured = [
        Row(
            sigma=sigma, exit_share=tuple(share_ZM[z].tolist()), accuracy=float(hits[z].sum() / tokens),
            loss=float(nll[z].sum() / tokens),
            flops=float(share_ZM[z] @ cost_M / costs.of_model(keys)) if sigma < 1 else 1.0,
        )
        for z, sigma in enumerate(SIGMAS)
    ]  # fmt: skip
    alone = (*_alone(heads, batches, request, kind), (measured[-1].accuracy, measured[-1].loss))
    return Measured(rows=tuple(measured), alone=alone, tokens=tokens, moved=moved)


def to_profile(name: str, measured: Measured, costs: Costs, request: Request) -> Profile:
    """The table that the market reads; one sample is a prompt and the tokens made after it.

    All of the prompt but its last token runs whole, and crosses whole. A generated token runs the blocks up to its exit;
    the later blocks make its keys and values, for which its state crosses the cut along with that of a later token.
    """
    read, made = request.prompt - 1, request.made
    read_pairs = read * (read + 1) / 2
    made_pairs = (read + made) * (read + made + 1) / 2 - read_pairs
    inner = len(costs.block_flops) - 1
    whole = measured.rows[-1].accuracy
    return Profile(
        name=name,
        source=f"exits, accuracy and shares measured on {measured.tokens} held-out tokens; FLOPs counted, bytes measured; "
        f"{request.prompt} tokens of prompt, {request.made} generated",
        block_flops=tuple(made * flops + made_pairs * costs.pair_flops for flops in costs.block_flops),
        exit_blocks=costs.exit_blocks,
        head_flops=tuple(made * flops for flops in costs.head_flops),
        cut_bytes=(0.0, *costs.state_bytes[1:]),
        crossings=(1.0, *[float(made)] * inner, 0.0),
        prompt_bytes=(request.prompt * costs.state_bytes[0], *(read * b for b in costs.state_bytes[1:])),
        block_reads=tuple(made * nbytes for nbytes in costs.block_reads),
        head_reads=tuple(made * nbytes for nbytes in costs.head_reads),
        prompt_flops=tuple(read * flops + read_pairs * costs.pair_flops for flops in costs.block_flops),
        prompt_reads=costs.whole_reads,
        left_flops=tuple(made * flops for flops in costs.state_flops),
        left_bytes=(0.0, *costs.state_bytes[1:]),
        sigmas=tuple(row.sigma for row in measured.rows),
        exit_share=tuple(row.exit_share for row in measured.rows),
        accuracy_change=tuple(row.accuracy - whole for row in measured.rows),
    )


def _batches(heads: ExitHeads, text: PackedText, rows: int, batch_size: int) -> Iterator[Batch]:
    device = heads.backbone.head.weight.device
    for step in range(-(-rows // batch_size)):
        yield text.batch(step, batch_size).to(device)


@torch.no_grad()
def _alone(
    heads: ExitHeads, batches: list[Batch], request: Request, kind: Confidence
) -> tuple[tuple[float, float], ...]:
    """(accuracy, loss) of each early exit on all positions."""
    sums = np.zeros((len(heads.early), 3))
    for batch in batches:
        made_BT, target_BT = request.positions(batch), batch.input_ids_BT.roll(-1, dims=1)
        for m, (block, state_BTH) in enumerate(states_at(heads, batch).items()):
            verdict = judge(heads.scores(block, state_BTH[made_BT]), kind, target_BT[made_BT])
            hits = int((verdict.token_R == target_BT[made_BT]).sum())
            sums[m] += hits, float(verdict.nll_R.double().sum()), int(made_BT.sum())
    return tuple((hits / count, nll / count) for hits, nll, count in sums.tolist())


def _monotone(share_ZM: np.ndarray) -> tuple[np.ndarray, float]:
    """Shares that do not leave earlier at a higher sigma, and the largest change that this took.

    At the first exit they are so by themselves. Further on, a token's state depends a little on where the tokens before
    it left, so a share may rise by a few tokens where sigma does; the table then takes the later exit, which costs more.
    """
    before_ZM = np.cumsum(share_ZM, axis=1)
    before_ZM[:, -1] = 1.0
    kept_ZM = np.minimum.accumulate(before_ZM, axis=0)
    share = np.diff(kept_ZM, axis=1, prepend=0.0)
    return share, float(np.abs(kept_ZM - before_ZM).max())
