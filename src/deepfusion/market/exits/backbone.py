# SPDX-License-Identifier: Apache-2.0
"""A causal LM whose blocks can be watched, skipped and left one by one, through the model's own forward pass.

Positions, masks and rotary angles are made by transformers for every family in its own way. Nothing of that is written
again: the model's forward runs as it is, and only what happens at each block is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from deepfusion.devices.features import HEAD_TOLERANCE, blocks
from deepfusion.errors import ModelError
from deepfusion.scores import Scores
from deepfusion.types import Batch

Run = Callable[[torch.Tensor], torch.Tensor]
"""A block on a hidden state BTH, with whatever else the model's forward hands it."""
Step = Callable[[int, torch.Tensor, Run], torch.Tensor]
"""`step(l, hidden_BTH, run)`: what takes the place of block l = 1..L; usually it calls `run`, but need not."""


def plain(_number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
    """The step that changes nothing."""
    return run(hidden_BTH)


class _StopError(Exception):
    """Ends a forward pass; carries the state that it ended with."""

    def __init__(self, state_BTH: torch.Tensor) -> None:
        super().__init__()
        self.state_BTH = state_BTH


class Backbone:
    """A model in evaluation mode, and what exits need of it.

    Attributes:
        model: the causal LM, which is not changed.
        blocks: its decoder blocks.
        norm: its final norm.
        head: its output matrix.

    Raises:
        ModelError: the logits are more than the output matrix times the normed state, or there is no final norm.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.blocks = list(blocks(model))
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ModelError(f"{type(model).__name__}: has no output matrix to share with exits; use a plain causal LM")
        self.head = head
        self._tuples = False
        self.norm = self._probe()

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.head.in_features)

    def scores(self, state_BTH: torch.Tensor) -> Scores:
        """Scores of a normed state, by the model's own output matrix; no gradient flows into the matrix."""
        bias_V = cast("torch.Tensor | None", self.head.bias)
        return Scores(state_BTH, self.head.weight.detach(), None if bias_V is None else bias_V.detach())

    def run(
        self,
        step: Step,
        *,
        input_ids_BT: torch.Tensor | None = None,
        state_BTH: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """One forward pass in which `step` stands in the place of every block; returns the normed last state BTH.

        One pass at a time: the blocks themselves are steered until it ends.

        Args:
            input_ids_BT: the tokens; or
            state_BTH: what takes the place of their embeddings.
            valid_BT: False on padding; None without any.
            cache: keys and values of earlier positions, which the pass adds its own to.
        """
        mask_BT = None if valid_BT is None or bool(valid_BT.all()) else valid_BT.long()
        with self._steered(step):
            result = self.model.base_model(
                input_ids=input_ids_BT, inputs_embeds=state_BTH, attention_mask=mask_BT,
                past_key_values=cache, use_cache=cache is not None,
            )  # fmt: skip
        return result.last_hidden_state

    def stop_before(self, block: int, batch: Batch, step: Step = plain) -> torch.Tensor:
        """The state BTH that block 1..L is given; neither that block nor a later one is run."""

        def until(number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
            if number == block:
                raise _StopError(hidden_BTH)
            return step(number, hidden_BTH, run)

        try:
            self.run(until, input_ids_BT=batch.input_ids_BT, valid_BT=batch.valid_BT)
        except _StopError as stopped:
            return stopped.state_BTH
        raise ModelError(f"{type(self.model).__name__}: its forward pass does not reach its block {block}; use another")

    @contextmanager
    def _steered(self, step: Step) -> Generator[None]:
        for number, block in enumerate(self.blocks, start=1):
            block.forward = self._guided(number, block.forward, step)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward  # the class's own is there again

    def _guided(self, number: int, own: Callable[..., Any], step: Step) -> Callable[..., Any]:
        def forward(hidden_BTH: torch.Tensor, *rest: Any, **named: Any) -> Any:
            def run(state_BTH: torch.Tensor) -> torch.Tensor:
                output = own(state_BTH, *rest, **named)
                return output[0] if isinstance(output, tuple) else output

            found_BTH = step(number, hidden_BTH, run)
            return (found_BTH, None) if self._tuples else found_BTH

        return forward

    @torch.no_grad()
    def _probe(self) -> nn.Module:
        """Run one token: what blocks return, which module is the final norm, and whether the head is a mere product."""
        seen: list[tuple[nn.Module, Any]] = []
        inside = {id(part) for block in self.blocks for part in block.modules()}
        outside = [part for part in self.model.base_model.modules() if id(part) not in inside]
        watched = [*(part for part in outside if not any(part.children())), self.blocks[-1]]
        handles = [part.register_forward_hook(lambda part, _i, output: seen.append((part, output))) for part in watched]
        token_BT = torch.zeros(1, 1, dtype=torch.long, device=self.head.weight.device)
        try:
            whole: Any = self.model(input_ids=token_BT, use_cache=False)
            seen.clear()
            last_BTH = self.model.base_model(input_ids=token_BT, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        self._tuples = any(part is self.blocks[-1] and isinstance(output, tuple) for part, output in seen)
        # by memory, as some models reshape what the norm gives; dropout after it, which does nothing here, comes later
        norms = [part for part, output in seen if torch.is_tensor(output) and output.data_ptr() == last_BTH.data_ptr()]
        gap = float((self.head(last_BTH) - whole.logits).abs().max())
        if not norms or not gap <= HEAD_TOLERANCE * float(whole.logits.abs().max()):
            raise ModelError(
                f"{type(self.model).__name__}: its logits are not its output matrix times its normed last state; exits need that"
            )
        return norms[0]
