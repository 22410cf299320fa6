# SPDX-License-Identifier: Apache-2.0
"""Exit heads: a norm and a small residual adapter before the model's own output matrix, which all exits share.

An output matrix has V * H numbers, a head of ours 2 * H * W and a norm's. With an output matrix of its own, every exit of
a small model would weigh as much as several blocks, and the device would have to hold all of those before the cut; the
model's own is there anyway where it is tied to the embeddings. What an exit's state lacks is not a vocabulary but the
later blocks' rotation of it, which norm and adapter learn. FLOPs are those of any head, 2 V H, and 4 H W more.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from deepfusion.artifacts import write_atomic
from deepfusion.devices.models import init_id
from deepfusion.errors import MarketError
from deepfusion.market.exits.backbone import Backbone
from deepfusion.schema import misfits
from deepfusion.scores import Scores
from deepfusion.state_dicts import check_finite
from deepfusion.types import State

TENSORS, ABOUT = "exits.safetensors", "exits.json"


class ExitHead(nn.Module):
    """Norm and adapter of one exit: z = norm(h); z + up(silu(down(z))), which begins as the norm alone."""

    def __init__(self, norm: nn.Module, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm).requires_grad_()
        self.down = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """A block's output to what the output matrix reads."""
        normed_BTH = self.norm(state_BTH)
        return normed_BTH + self.up(functional.silu(self.down(normed_BTH)))


class ExitHeads(nn.Module):
    """The heads of all exits but the last, which is the model's own.

    Attributes:
        exit_blocks: x_1 < .. < x_M = L.
        width: W, of the adapters.
    """

    def __init__(self, backbone: Backbone, exit_blocks: Sequence[int], width: int, *, seed: int = 0) -> None:
        super().__init__()
        self.exit_blocks = tuple(exit_blocks)
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {str(x): ExitHead(backbone.norm, backbone.hidden_size, width) for x in self.exit_blocks[:-1]}
        self.heads = nn.ModuleDict(heads).to(backbone.head.weight.device)
        self._backbone = (backbone,)  # in a tuple, or its weights would be taken for ours

    @property
    def backbone(self) -> Backbone:
        """The model that the heads are made for."""
        return self._backbone[0]

    @property
    def early(self) -> tuple[int, ...]:
        """x_1 .. x_{M-1}."""
        return self.exit_blocks[:-1]

    def scores(self, block: int, state_BTH: torch.Tensor) -> Scores:
        """Next-token scores of the exit after `block`, out of that block's output."""
        return self.backbone.scores(self.heads[str(block)](state_BTH))


@dataclass(frozen=True, kw_only=True)
class _About:
    """What `ABOUT` holds: enough to build the heads, and to know the model that they belong to."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    exit_blocks: tuple[int, ...]
    width: int
    hidden_size: int
    num_blocks: int
    backbone: str


def _about(backbone: Backbone, exit_blocks: tuple[int, ...], width: int) -> _About:
    return _About(
        exit_blocks=exit_blocks, width=width, hidden_size=backbone.hidden_size, num_blocks=backbone.num_blocks,
        backbone=init_id(backbone.model),
    )  # fmt: skip


def save_heads(heads: ExitHeads, folder: Path) -> None:
    """Write `exits.safetensors` and `exits.json`: the heads' own tensors, and nothing of the model."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    write_atomic(folder / TENSORS, save(tensors))
    write_atomic(folder / ABOUT, json.dumps(asdict(_about(heads.backbone, heads.exit_blocks, heads.width)), indent=1))


def saved_exits(folder: Path) -> tuple[int, ...]:
    """The blocks after which the exits of a folder stand. Raises MarketError as `load_heads` does."""
    return _described(folder).exit_blocks


def _described(folder: Path) -> _About:
    try:
        return TypeAdapter(_About).validate_json((folder / ABOUT).read_bytes(), strict=True)
    except OSError as error:
        raise MarketError(f"{folder / ABOUT}: cannot be read ({error.strerror}); train exits for this model") from error
    except ValidationError as error:
        raise MarketError(f"{folder / ABOUT}: does not describe exits; " + "; ".join(misfits(error)[:8])) from error


def load_heads(folder: Path, backbone: Backbone) -> ExitHeads:
    """Read what `save_heads` wrote, for the same model. Names, shapes and types are checked before any number is read.

    Raises:
        MarketError: the files are not such, or belong to another model.
        ModelError: they hold numbers that are not finite.
    """
    found = _described(folder)
    faults = exit_faults(found.exit_blocks, backbone.num_blocks)
    if not 1 <= found.width <= 4 * backbone.hidden_size:
        faults.append(f"width = {found.width}: not between 1 and {4 * backbone.hidden_size}; train exits again")
    expected = _about(backbone, found.exit_blocks, found.width)
    faults += [
        f"{name} = {value}: this model has {asdict(expected)[name]}; give the model that the exits were trained for"
        for name, value in asdict(found).items()
        if value != asdict(expected)[name]
    ]
    if faults:
        raise MarketError(f"{folder / ABOUT}: {len(faults)} fault(s)\n" + "\n".join(f"  {fault}" for fault in faults))
    heads = ExitHeads(backbone, found.exit_blocks, found.width)
    heads.load_state_dict(_read(folder / TENSORS, heads.state_dict()))
    return heads.eval()


def exit_faults(exit_blocks: Sequence[int], num_blocks: int) -> list[str]:
    """What is wrong with the places of exits, and the cure."""
    ascending = all(low < high for low, high in pairwise(exit_blocks))
    if not exit_blocks or not ascending or exit_blocks[0] < 1 or exit_blocks[-1] != num_blocks:
        return [f"exits = {list(exit_blocks)}: must ascend from 1 or more to the model's last block, {num_blocks}"]
    return []


def _read(path: Path, like: State) -> State:
    """Tensors of the names, shapes and types of `like`."""
    types = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name in file.keys() if (s := file.get_slice(name))}  # noqa: SIM118
            expected = {name: (tuple(tensor.shape), types[tensor.dtype]) for name, tensor in like.items()}
            if found != expected:
                name = next(n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n))
                shown, wanted = found.get(name, "missing"), expected.get(name, "nothing")
                raise MarketError(f"{path}: tensor {name!r} is {shown} where {wanted} belongs; train exits again")
            state = {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise MarketError(f"{path}: no readable safetensors file ({error}); train exits again") from error
    check_finite(state, str(path))
    return state
