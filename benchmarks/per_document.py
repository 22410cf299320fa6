# SPDX-License-Identifier: Apache-2.0
"""Clipped gradients of single documents: read one by one, and by Opacus' hooks on one batch, against a plain step of that batch.

python benchmarks/per_document.py [--presets gpt2-tiny llama-small ...] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deepfusion.devices.configurations import config_of
from deepfusion.devices.models import from_config
from deepfusion.types import ModelSpec

ROWS = 8
SIZES = {"pico": (400, 32), "tiny": (2048, 128), "small": (8192, 128)}
"""Vocabulary and tokens of a row."""


@register_grad_sampler(Conv1D)
def _conv1d(layer: Any, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[Any, torch.Tensor]:
    weight = torch.einsum("nti,nto->nio", activations[0], backprops)
    return {layer.weight: weight, layer.bias: backprops.sum(1)}


def loss_of(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the rows' mean cross-entropies."""
    inputs = {"input_ids": ids_BT}
    if model.config.model_type == "gpt2":  # whose positions have one row for the batch otherwise
        inputs["position_ids"] = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    logits_BTV = model(**inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return losses.mean(1).sum()


def ways(model: PreTrainedModel, ids_BT: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The three steps, each with all that it needs; hooks are there from the third on."""

    def plain() -> None:
        model.zero_grad()
        loss_of(model, ids_BT).backward()

    def one_by_one() -> None:
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for row in ids_BT:
            model.zero_grad()
            loss_of(model, row[None]).backward()
            found = [p.grad for p in model.parameters() if p.grad is not None]
            scale = min(1.0, 1 / float(torch.nn.utils.get_total_norm(found)))
            for total, gradient in zip(sums, found, strict=True):
                total.add_(gradient, alpha=scale)

    def hooks() -> None:
        if not hasattr(model, "autograd_grad_sample_hooks"):
            GradSampleHooks(model, loss_reduction="sum", strict=False)
        for p in model.parameters():
            p.grad = p.grad_sample = None  # type: ignore[attr-defined]
        loss_of(model, ids_BT).backward()
        samples: list[torch.Tensor] = [p.grad_sample for p in model.parameters()]  # type: ignore[attr-defined]
        norm_B = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)
        for sample in samples:
            torch.einsum("b...,b->...", sample, (1 / norm_B).clamp(max=1))

    return {"plain": plain, "one by one": one_by_one, "hooks": hooks}


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Of the fastest repeat, after one to warm up."""
    step()
    taken: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    """Print a line for each preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=[f"{k}-{s}" for s in SIZES for k in ("gpt2", "llama", "olmo2")])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of hooks on inputs without a gradient
    for preset in args.presets:
        vocabulary, tokens = SIZES[preset.rsplit("-", 1)[1]]
        config = config_of(ModelSpec(name="m", preset=preset), vocab_size=vocabulary, positions=tokens)
        ids_BT = torch.randint(0, vocabulary, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
        taken = {
            name: seconds(step, args.repeats) for name, step in ways(from_config(config, 0).train(), ids_BT).items()
        }
        ratios = ", ".join(f"{name} {value / taken['plain']:.2f}x" for name, value in taken.items() if name != "plain")
        print(f"{preset}: plain {taken['plain'] * 1e3:.0f} ms; {ratios}", flush=True)


if __name__ == "__main__":
    main()
