# SPDX-License-Identifier: Apache-2.0
"""Text that a causal LM writes, drawn from its next-token distribution as it is."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def write(
    model: PreTrainedModel, prompt_BT: torch.Tensor, *, tokens: int, temperature: float, pad_id: int
) -> torch.Tensor:
    """Continue prompts of one length by up to `tokens` tokens each; returns prompts and continuations, padded at the end.

    Beside the temperature nothing bends the distribution: no top-k (50 in transformers unless told otherwise), and nothing
    that a published model's `generation_config.json` may ask for (top-p, penalties, suppressed tokens, beams). Of that
    file the model, which is changed so, keeps the tokens that end a text.

    Args:
        temperature: of the sampling, out of torch's own generator; 0 takes the most likely token each time.
        pad_id: follows a text that ends early.
    """
    # on the model: what a configuration given to `generate` leaves open would come out of the model's own
    end: int | list[int] | None = cast(Any, model.generation_config).eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad_id)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    made_BT = cast(Any, model).generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=tokens, **drawn
    )
    return cast(torch.Tensor, made_BT)
