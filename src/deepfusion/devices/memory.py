# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters, memory to train it, bytes to send it, FLOPs of a token (method, section 13).

Nothing here is guessed from widths and depths: the model is made on devices that hold no numbers (torch's meta device,
and its fake tensors), so shapes of any architecture and size are exact and cost neither memory nor a download.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # pyright: ignore[reportPrivateUsage]
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deepfusion.devices.features import num_blocks
from deepfusion.errors import MemoryLimitError
from deepfusion.state_dicts import distinct_state
from deepfusion.training import Optimisation
from deepfusion.types import State

EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
LOGIT_COPIES = 3
"""Arrays of B*T*V numbers alive at the loss: the logits, their gradient, and those of the step before."""
CPU_ALLOCATOR = 1.55
"""What the C library's allocator takes for each byte that comes and goes within a step, because it keeps freed blocks in
pieces. Estimates then stand at 0.90 to 1.28 of the measured peaks (tests/numerics/test_memory_estimate.py). On a GPU
there is no such factor: what is compared there is what torch has allocated."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training needs, by kind, beside what the interpreter and its libraries take anyway (about 0.4 GiB).

    Attributes:
        weights: parameters, float32, and what is made of them anew in each forward pass.
        gradients: of all parameters that learn; of a private training, also the sum of the documents' clipped ones.
        optimiser: AdamW's two moments of these.
        activations: what a forward pass keeps for its backward pass.
        logits: `LOGIT_COPIES` arrays over the vocabulary.
        total: the peak, with what the allocator wastes; not the sum, as gradients appear while activations disappear.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    total: int


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model, tied ones counted once."""
    return sum(p.numel() for p in _skeleton(config).parameters())


def skeleton_state(config: PreTrainedConfig) -> State:
    """The model's distinct tensors as meta tensors: names and shapes without numbers."""
    return distinct_state(_skeleton(config))


def num_active_parameters(config: PreTrainedConfig) -> int:
    """Parameters that take part in one token's forward pass: of routed experts only the `num_experts_per_tok` chosen."""
    return count_active(_skeleton(config).named_parameters(), config)


def count_active(named: Iterable[tuple[str, torch.Tensor]], config: PreTrainedConfig) -> int:
    """How many numbers of these parameters of a model, or of a block of it, take part in one token's forward pass."""
    experts = next((int(getattr(config, key)) for key in EXPERT_KEYS if getattr(config, key, None)), 0)
    top = int(getattr(config, "num_experts_per_tok", 0) or 0)
    return sum(p.numel() * top // experts if experts and ".experts." in name else p.numel() for name, p in named)


def forward_flops_per_token(config: PreTrainedConfig) -> int:
    """2 x the active parameters that are multiplied: no embedding look-up, but the output head.

    Attention scores are left out, as in the paper's cost model; they matter from about 6 H tokens of context on.
    """
    model = _skeleton(config)
    tables = [cast(Any, model.get_input_embeddings()).weight]
    tables += [p for name, p in model.named_parameters() if name.endswith("wpe.weight")]
    head = cast(Any, model.get_output_embeddings()).weight
    return 2 * (num_active_parameters(config) - sum(table.numel() for table in tables if table is not head))


def upload_bytes(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the model's distinct tensors on the wire, without the header (method, eq. 5)."""
    return num_parameters(config) * dtype.itemsize


def training_memory(
    config: PreTrainedConfig,
    optimisation: Optimisation,
    sequence_length: int,
    *,
    learns: int | None = None,
    remade: int = 0,
    private: bool = False,
) -> MemoryEstimate:
    """Peak memory of AdamW training in float32, with activations in bf16 where `optimisation` asks for that.

    The peak is either where the loss is taken (activations and logits are all there) or where the backward pass ends
    (all gradients are there, and for tied embeddings two more of their size, until autograd has added them up).

    Args:
        learns: how many numbers learn; None for all parameters. Where it is given, the embeddings are not among them.
        remade: how many weights are made anew in each forward pass and kept until its backward pass is over.
        private: by DP-SGD, which reads one document at a time and adds up their clipped gradients.
    """
    if private:
        optimisation = replace(optimisation, batch_size=1, accumulate=1)
    parameters = num_parameters(config)
    on_gpu = torch.cuda.is_available()
    bf16 = optimisation.precision == "bf16" or (optimisation.precision == "auto" and on_gpu)
    activations = _activations(
        config.to_json_string(use_diff=False), type(config), optimisation.batch_size, sequence_length, bf16,
        optimisation.gradient_checkpointing,
    )  # fmt: skip
    vocabulary = int(config.vocab_size)
    one_array = optimisation.batch_size * sequence_length * vocabulary * (2 if bf16 else 4)
    tied = 2 * 4 * vocabulary * int(config.hidden_size) if config.tie_word_embeddings and learns is None else 0
    learning, beside = (
        (parameters, 0) if learns is None else (learns, learns)
    )  # adapters are there beside the parameters
    weights, gradients, optimiser = 4 * (parameters + beside + remade), 4 * learning, 8 * learning
    sums = gradients if private else 0
    at_the_loss = activations + LOGIT_COPIES * one_array + (gradients if optimisation.accumulate > 1 else sums)
    at_the_end = gradients + sums + tied + 2 * one_array
    total = weights + optimiser + int(max(at_the_loss, at_the_end) * (1.0 if on_gpu else CPU_ALLOCATOR))
    return MemoryEstimate(weights, gradients + sums, optimiser, activations, LOGIT_COPIES * one_array, total)


def check_fits(
    device_id: str,
    config: PreTrainedConfig,
    optimisation: Optimisation,
    sequence_length: int,
    limit: int | None,
    others: Sequence[tuple[str, PreTrainedConfig]] = (),
) -> None:
    """Refuse a device whose training would not fit its memory, before any training.

    Args:
        limit: bytes, None for no limit.
        others: the fleet's architectures by name, to suggest one that fits.

    Raises:
        MemoryLimitError: says device, estimate, limit and what would fit.
    """
    need = training_memory(config, optimisation, sequence_length).total
    if limit is not None and need > limit:
        cure = what_would_fit(config, optimisation, sequence_length, limit, others)
        raise MemoryLimitError(f"{device_id}: its training needs {gib(need)}, its limit is {gib(limit)}; {cure}")


def what_would_fit(
    config: PreTrainedConfig,
    optimisation: Optimisation,
    sequence_length: int,
    limit: int,
    others: Sequence[tuple[str, PreTrainedConfig]],
    *,
    learns: int | None = None,
    remade: int = 0,
    private: bool = False,
) -> str:
    """A sentence on how to stay below `limit` bytes: checkpointing, a smaller batch, another of the fleet's architectures."""
    ways = [
        name
        for name, other in others
        if training_memory(other, optimisation, sequence_length, private=private).total <= limit
    ]
    candidates = (
        replace(optimisation, batch_size=batch, gradient_checkpointing=checkpointing)
        for batch in sorted({optimisation.batch_size, 4, 2, 1}, reverse=True)
        if batch <= optimisation.batch_size
        for checkpointing in (optimisation.gradient_checkpointing, True)
    )
    for candidate in candidates:
        need = training_memory(config, candidate, sequence_length, learns=learns, remade=remade, private=private).total
        if need <= limit:
            also = " with gradient_checkpointing = true" if candidate.gradient_checkpointing else ""
            ways.insert(0, f"batch_size = {candidate.batch_size}{also} ({gib(need)})")
            break
    return f"{' or '.join(ways)} would fit" if ways else "none of the fleet's architectures fits; raise the limit"


def gib(size: float) -> str:
    """Bytes for people: 1.50 GiB, or MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def peak_memory_bytes() -> int:
    """Highest memory that this process has used: on the GPU if there is one, else resident, libraries included."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    return _skeleton_of(config.to_json_string(use_diff=False), type(config))


@lru_cache(maxsize=64)
def _skeleton_of(config_json: str, config_class: type[PreTrainedConfig]) -> PreTrainedModel:
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config_class.from_dict(json.loads(config_json))))


@lru_cache(maxsize=256)
def _activations(
    config_json: str, config_class: type[PreTrainedConfig], batch_size: int, sequence_length: int, bf16: bool,
    checkpointing: bool,
) -> int:  # fmt: skip
    """Bytes that autograd keeps in one forward pass, found by running it on fake tensors: shapes without numbers."""
    config = config_class.from_dict(json.loads(config_json))
    sparse = any(getattr(config, key, None) for key in EXPERT_KEYS)
    # Sparse layers have a shape rule in bf16 only, so they are run in it and their bytes are doubled for float32.
    dtype = torch.bfloat16 if sparse else torch.float32
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # pyright: ignore[reportPrivateUsage]
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not sparse)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kernels = {"experts_implementation": "grouped_mm"} if sparse else {}
        model = cast(Any, AutoModelForCausalLM.from_config(config, dtype=dtype, **kernels)).train()
        tokens_BT = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(input_ids=tokens_BT, use_cache=False)
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
    kept = sum(storage.nbytes() for storage in storages.values()) * (2 if sparse and not bf16 else 1)
    if not checkpointing:
        return kept
    block_inputs = num_blocks(config) * tokens_BT.numel() * int(config.hidden_size) * (2 if bf16 else 4)
    return block_inputs + kept // num_blocks(config)
