# SPDX-License-Identifier: Apache-2.0
"""Greedy generation with early exits: a token that leaves hands its state to the later blocks' caches (aeria, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from deepfusion.errors import MarketError
from deepfusion.market.exits.backbone import Run, plain
from deepfusion.market.exits.heads import ExitHeads
from deepfusion.market.exits.leaving import Confidence, judge, leaves


class _KeptError(Exception):
    """Ends a block as soon as the keys and values are in the cache."""


class StateCache(DynamicCache):
    """A cache for which a block can be asked for keys and values only."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._keys_only = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Cache.update`; within `propagate` it also ends the block."""
        kept = super().update(*args, **kwargs)
        if self._keys_only:
            raise _KeptError
        return kept

    def propagate(self, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
        """Put a block's keys and values of a state into the cache: its projections run, and nothing behind them."""
        self._keys_only = True
        try:
            run(hidden_BTH)
        except _KeptError:
            return hidden_BTH
        finally:
            self._keys_only = False
        raise MarketError("a block of this model keeps no keys and values; its tokens cannot leave early")


@dataclass(frozen=True)
class Generated:
    """What was generated, token by token.

    Attributes:
        tokens: ids, the prompt's not among them.
        exits: the block after which each left.
    """

    tokens: tuple[int, ...]
    exits: tuple[int, ...]


@torch.no_grad()
def generate(
    heads: ExitHeads,
    prompt: Sequence[int],
    tokens: int,
    sigma: float,
    *,
    kind: Confidence = "probability",
    end: int | None = None,
) -> Generated:
    """Continue `prompt` by up to `tokens` tokens, each the most likely one at the first exit that is sure enough.

    All of the prompt but its last token runs through all blocks; the last one's prediction is the first generated token.

    Args:
        end: the token after which nothing more is generated.

    Raises:
        MarketError: the prompt is empty, or the model keeps no keys and values.
    """
    if not prompt:
        raise MarketError("the prompt has no token; begin with the end-of-text token")
    backbone = heads.backbone
    cache = StateCache(backbone.model.config)
    ids_1T = torch.tensor([list(prompt)], device=backbone.head.weight.device)
    if len(prompt) > 1:
        backbone.run(plain, input_ids_BT=ids_1T[:, :-1], cache=cache)
    token, made, exits = ids_1T[:, -1:], [], []
    while len(made) < tokens and (not made or made[-1] != end):
        taken: list[tuple[int, int]] = []

        def step(number: int, hidden_BTH: torch.Tensor, run: Run, taken: list[tuple[int, int]] = taken) -> torch.Tensor:
            if taken:
                return cache.propagate(hidden_BTH, run)
            out_BTH = run(hidden_BTH)
            if number in heads.early and sigma < 1:
                verdict = judge(heads.scores(number, out_BTH[:, -1]), kind)
                if bool(leaves(verdict, sigma)):
                    taken.append((int(verdict.token_R), number))
            return out_BTH

        last_BTH = backbone.run(step, input_ids_BT=token, cache=cache)
        if not taken:
            taken.append((int(judge(backbone.scores(last_BTH[:, -1]), kind).token_R), backbone.num_blocks))
        made.append(taken[0][0])
        exits.append(taken[0][1])
        token = torch.full_like(token, made[-1])
    return Generated(tuple(made), tuple(exits))
