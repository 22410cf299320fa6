# SPDX-License-Identifier: Apache-2.0
"""The one training loop: AdamW with warm-up and cosine decay on `accelerate`, exact to resume after a crash."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from deepfusion.errors import ConfigError
from deepfusion.sharding import agreed, average_gradients, clip, divided, like, number, whole
from deepfusion.types import Progress, State, silent

Precision = Literal["auto", "fp32", "bf16"]
MOST_SEQUENCES = 65_536
"""Of one micro-batch, and micro-batches of one step."""


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63) that depends on every part and on nothing else (never on the process's hash salt)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a model is optimised: AdamW, linear warm-up, cosine decay.

    Attributes:
        batch_size: sequences of one micro-batch.
        accumulate: micro-batches of one optimiser step.
        learning_rate: the highest rate, reached after the warm-up.
        final_rate: share of the highest rate that is left at the end.
        warmup: share of the steps that the warm-up takes.
        weight_decay: decoupled weight decay, on matrices only.
        betas: decay of the running means of gradient and squared gradient.
        clip: largest L2 norm of all gradients together.
        precision: "auto" is bf16 autocast on a GPU and fp32 on a CPU.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
    """

    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    final_rate: float = 0.1
    warmup: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: nothing would be trained on; choose at least 1"
            if getattr(self, name) > MOST_SEQUENCES:
                yield f"{name} = {getattr(self, name)}: no machine holds so many; choose {MOST_SEQUENCES} at most"
        if not 0 < self.learning_rate < 1:
            yield f"learning_rate = {self.learning_rate}: not between 0 and 1; 3e-4 is usual"
        for name in ("final_rate", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name} = {getattr(self, name)}: not a share; choose a number from 0 to 1"
        if self.weight_decay < 0:
            yield f"weight_decay = {self.weight_decay}: must not be negative; 0 switches it off"
        if self.clip <= 0:
            yield f"clip = {self.clip}: would stop all training; 1.0 is usual"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas = {list(self.betas)}: both must be at least 0 and below 1; [0.9, 0.95] is usual"

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0..steps-1."""
        warmup_steps = max(1, round(self.warmup * steps))
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


def mixed_precision(precision: Precision) -> str:
    """What accelerate calls a precision on this machine: "auto" is bf16 on a GPU and none on a CPU."""
    return "bf16" if precision == "bf16" or (precision == "auto" and torch.cuda.is_available()) else "no"


_accelerators: list[Accelerator] = []


def accelerator(precision: Precision | None = None) -> Accelerator:
    """The process's one Accelerator: on a GPU if there is one, bf16 there and fp32 on a CPU unless told otherwise.

    Args:
        precision: None takes whatever the process uses already.

    Raises:
        ConfigError: the process uses another precision already; accelerate knows one for each process.
    """
    mixed = mixed_precision(precision or "auto")
    if not _accelerators:
        _accelerators.append(Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed))
    used = _accelerators[0]
    if precision is not None and used.mixed_precision != mixed:
        raise ConfigError([f'precision = "{precision}": this process computes in "{used.mixed_precision}" already; '
                           "give all sections of a run the same precision"], "training")  # fmt: skip
    return used


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps what it needs to go on after a crash, and how often it writes it.

    Attributes:
        path: a safetensors file; replaced atomically, removed by the caller once the result is safe.
        every_seconds: least time between two writes.
    """

    path: Path
    every_seconds: float = 60.0

    def save(self, step: int, parameters: Mapping[str, torch.Tensor], optimiser: torch.optim.Optimizer,
             history: list[dict[str, float]]) -> None:  # fmt: skip
        """Write parameters, AdamW's moments and the history so far, after `step` steps."""
        tensors: State = {f"parameter/{n}": whole(p.detach()).cpu().contiguous() for n, p in parameters.items()}
        for name, p in parameters.items():
            for key, value in optimiser.state[p].items():
                tensors[f"{key}/{name}"] = whole(value.detach()).cpu().contiguous()
        if number():
            return  # the first of several processes writes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, metadata={"step": str(step), "history": json.dumps(history)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    @torch.no_grad()
    def load(self, parameters: Mapping[str, torch.Tensor], optimiser: torch.optim.Optimizer) -> tuple[int, list[Any]]:
        """Restore what `save` wrote, in place. Returns the steps done and the history; (0, []) without a file."""
        if not self.path.exists():
            return 0, []
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
            for name, p in parameters.items():
                p.copy_(like(file.get_tensor(f"parameter/{name}"), p))
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                kind, name = key.split("/", 1)
                if kind != "parameter":
                    moment = file.get_tensor(key)
                    p = parameters[name]
                    optimiser.state[p][kind] = moment.to(p.device) if kind == "step" else like(moment, p)
        return int(metadata["step"]), json.loads(metadata["history"])


def to_device(model: PreTrainedModel, optimisation: Optimisation) -> PreTrainedModel:
    """The model on the accelerator's device."""
    return model.to(accelerator(optimisation.precision).device)  # pyright: ignore[reportArgumentType, reportReturnType]


def fit(
    parameters: Mapping[str, torch.Tensor],
    backward: Callable[[int], Mapping[str, float]],
    *,
    steps: int,
    optimisation: Optimisation,
    seed: int,
    rates: Mapping[str, float] | None = None,
    label: str = "train",
    tokens_per_step: int = 0,
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Train `parameters` for `steps` steps and return the history, one row of metrics a step.

    The same seed and inputs give the same bytes, also across a crash and a resume: everything random must come out
    of torch's generator (seeded here for each step) or out of the step's number.

    Args:
        parameters: what is trained, by name; leaf tensors that require gradients.
        backward: called with the step's number; computes the losses, calls backward on them (gradients are zero
            when it is called) and returns metrics to log.
        rates: factor on the learning rate by parameter name; 1 where absent.
        tokens_per_step: for the rate that the progress shows.

    Raises:
        FloatingPointError: the gradient is not finite; names label and step.
    """
    groups: dict[tuple[float, float, bool], list[torch.Tensor]] = {}
    for name, p in parameters.items():
        decay = optimisation.weight_decay if p.ndim >= 2 else 0.0
        groups.setdefault(((rates or {}).get(name, 1.0), decay, divided(p)), []).append(p)
    optimiser = torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "factor": factor} for (factor, decay, _), ps in groups.items()],
        lr=optimisation.learning_rate, betas=optimisation.betas, fused=True,
    )  # fmt: skip
    done, history = checkpoint.load(parameters, optimiser) if checkpoint else (0, [])
    last_write = last_report = time.monotonic()
    for step in range(done, steps):
        torch.manual_seed(derive_seed(seed, "step", step))
        rate = optimisation.rate_at(step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        optimiser.zero_grad(set_to_none=True)
        metrics = dict(backward(step))
        average_gradients(parameters.values())
        norm = clip(parameters.values(), optimisation.clip)
        if not math.isfinite(norm):
            raise FloatingPointError(f"{label}: gradient norm {norm} at step {step}; lower the learning rate")
        optimiser.step()
        history.append({"step": step, "learning_rate": rate, "gradient_norm": norm, **metrics})
        now = time.monotonic()
        rate_note = f"{tokens_per_step / max(now - last_report, 1e-9):,.0f} tokens/s" if tokens_per_step else ""
        last_report = now
        progress(label, step + 1, steps, f"loss {metrics.get('loss', math.nan):.3f} {rate_note}")
        if checkpoint and step + 1 < steps and agreed(now - last_write >= checkpoint.every_seconds):
            checkpoint.save(step + 1, parameters, optimiser, history)
            last_write = time.monotonic()
    return history
