# SPDX-License-Identifier: Apache-2.0
"""What a token costs at each block, exit and cut (aeria, section 3): FLOPs of the active experts, bytes read and sent.

FLOPs are 2 a multiply-add; norms, activations, rotary angles and softmaxes are left out, as in the shipped tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from deepfusion.devices.memory import count_active
from deepfusion.market.exits.backbone import Backbone, Run
from deepfusion.market.exits.generation import StateCache
from deepfusion.market.exits.heads import ExitHeads
from deepfusion.market.exits.split import device_half
from deepfusion.types import Batch


@dataclass(frozen=True)
class Costs:
    """Of one token. Tuples of L blocks, M exits or S = L + 1 cuts.

    Attributes:
        exit_blocks: x_1 .. x_M.
        block_flops: all matrices of a block, of experts the chosen ones; without attention between tokens.
        pair_flops: one query with one key, in one block: score and weighted value.
        state_flops: what a block does for a token that has left before: up to its keys and values.
        head_flops: H_m; the last is the model's own output matrix.
        block_reads: bytes of the weights behind `block_flops`.
        whole_reads: bytes of all weights of a block: a prompt of many tokens uses all experts.
        head_reads: bytes of each head's weights, the shared matrix in each.
        state_bytes: b_s for one token, as measured: its id at cut 0, its hidden state between, nothing at L.
    """

    exit_blocks: tuple[int, ...]
    block_flops: tuple[float, ...]
    pair_flops: float
    state_flops: tuple[float, ...]
    head_flops: tuple[float, ...]
    block_reads: tuple[float, ...]
    whole_reads: tuple[float, ...]
    head_reads: tuple[float, ...]
    state_bytes: tuple[float, ...]

    def of_token(self, exit_index: int, keys: float) -> float:
        """FLOPs of a token that looks at `keys` positions and leaves at exit 0..M-1, with state propagation."""
        last = self.exit_blocks[exit_index]
        ran = sum(self.block_flops[:last]) + last * keys * self.pair_flops
        return ran + sum(self.state_flops[last:]) + sum(self.head_flops[: exit_index + 1])

    def of_model(self, keys: float) -> float:
        """FLOPs of a token of the model without exits."""
        return sum(self.block_flops) + len(self.block_flops) * keys * self.pair_flops + self.head_flops[-1]

    def spent(self, exits: Sequence[int], prompt: int) -> tuple[float, float]:
        """FLOPs of generated tokens that left after these blocks, and of the same tokens without exits."""
        keys = range(prompt, prompt + len(exits))
        own = sum(self.of_token(self.exit_blocks.index(x), k) for x, k in zip(exits, keys, strict=True))
        return own, sum(self.of_model(k) for k in keys)


def costs_of(heads: ExitHeads) -> Costs:
    """Count weights, and run one token to measure what crosses and what state propagation does."""
    backbone = heads.backbone
    config, matrix = backbone.model.config, backbone.head.weight
    matrices = [[(name, p) for name, p in b.named_parameters() if p.ndim >= 2] for b in backbone.blocks]
    active = [count_active(named, config) for named in matrices]
    reads = [count_active(b.named_parameters(), config) * matrix.itemsize for b in backbone.blocks]
    adapters = [2 * backbone.hidden_size * heads.width] * len(heads.early)
    own = [sum(p.nbytes for p in heads.heads[str(x)].parameters()) for x in heads.early]
    return Costs(
        exit_blocks=heads.exit_blocks,
        block_flops=tuple(2.0 * count for count in active),
        pair_flops=pair_flops(config),
        state_flops=_propagation(backbone),
        head_flops=tuple(2.0 * (matrix.numel() + adapter) for adapter in [*adapters, 0]),
        block_reads=tuple(map(float, reads)),
        whole_reads=tuple(float(sum(p.nbytes for p in b.parameters())) for b in backbone.blocks),
        head_reads=tuple(float(matrix.nbytes + beside) for beside in [*own, 0]),
        state_bytes=_crossings(backbone),
    )


def pair_flops(config: PreTrainedConfig) -> float:
    """FLOPs of one query with one key and its value, over all heads of a block."""
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    rotated = int(getattr(config, "qk_rope_head_dim", None) or 0)
    key = int(config.qk_nope_head_dim) + rotated if rotated else head
    value = int(getattr(config, "v_head_dim", None) or head)
    return 2.0 * heads * (key + value)


def _token(backbone: Backbone) -> Batch:
    one_BT = torch.zeros(1, 1, dtype=torch.long, device=backbone.head.weight.device)
    return Batch(one_BT, one_BT.bool(), torch.ones_like(one_BT, dtype=torch.bool))


def _crossings(backbone: Backbone) -> tuple[float, ...]:
    batch = _token(backbone)
    return (*(float(device_half(backbone, batch, cut).nbytes) for cut in range(backbone.num_blocks)), 0.0)


@torch.no_grad()
def _propagation(backbone: Backbone) -> tuple[float, ...]:
    """FLOPs of each block for a token that has left: counted while it is done, since every family projects in its own way."""
    cache, counted = StateCache(backbone.model.config), []

    def step(_number: int, hidden_BTH: torch.Tensor, run: Run) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            cache.propagate(hidden_BTH, run)
        counted.append(float(counter.get_total_flops()))
        return hidden_BTH

    backbone.run(step, input_ids_BT=_token(backbone).input_ids_BT, cache=cache)
    return tuple(counted)
