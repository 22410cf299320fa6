# SPDX-License-Identifier: Apache-2.0
"""View-aligned attention: feature matching between unlike models (DeepFusion, eq. 7 to 9; after arXiv 2501.08885).

Letters: J stages, P patches of a stage, Q = J * P queries, l tokens of a patch's window, D width of the attention,
S and R hidden sizes of student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import layer_norm, normalize, pad
from transformers import PreTrainedConfig

from deepfusion.errors import ConfigError
from deepfusion.stages.distill.base import Adapter, rules

CONTRAST_TEMPERATURE = 0.1
"""tau_c of the InfoNCE extension."""
FARTHEST = 1e15
"""Beyond it a teacher's feature has a square that overflows: a row of text with such a feature is left out."""


@dataclass(frozen=True, kw_only=True)
class Vaa:
    """View-aligned attention: the student's stages, patched and mixed by attention, predict the teacher's stages.

    Attributes:
        num_stages: J, parts that both depths are divided into; by default 4, or the smaller depth if that is less.
        num_queries: Q, patches of all stages together; J must divide it when J is given.
        width: D, by default the student's hidden size, at most 256.
        heads: attention heads; must divide the width.
        attention: "causal" lets a patch see only patches that do not lie after it, of every stage.
        teacher_norm: "layernorm" removes the unlike norms of early and late layers from the target.
        fm_target: compare with the teacher's features pooled to "patches", or with every one of its "tokens" (paper).
        stage_mix: what mixes the stages: "attention" (VAA); "mean" of the stages; "layer_weighted", a learned mean of
            all blocks for each stage. The last two are ablations.
        info_nce: eta, weight of an InfoNCE term beside L_FM (not in the paper; 0 is off).
    """

    num_stages: int | None = None
    num_queries: int = 32
    width: int | None = None
    heads: int = 4
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    teacher_norm: Literal["layernorm", "none"] = "layernorm"
    fm_target: Literal["patches", "tokens"] = "patches"
    stage_mix: Literal["attention", "layer_weighted", "mean"] = "attention"
    info_nce: float = 0.0

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        for name, value in (("num_stages", self.num_stages), ("width", self.width)):
            if value is not None and value < 1:
                yield f"{name} = {value}: must be at least 1; leave it out for the default"
        for name, value in (("num_queries", self.num_queries), ("heads", self.heads)):
            if value < 1:
                yield f"{name} = {value}: must be at least 1; the default is {getattr(Vaa, name)}"
        if self.num_stages and self.num_stages > 0 and self.num_queries % self.num_stages:
            yield (
                f"num_queries = {self.num_queries}: not divisible by num_stages = {self.num_stages}; "
                f"choose a multiple such as {self.num_stages * max(1, self.num_queries // self.num_stages)}"
            )
        if self.width and self.width > 0 and self.heads > 0 and self.width % self.heads:
            yield f"heads = {self.heads}: does not divide width = {self.width}; choose a divisor of the width"
        if not 0 <= self.info_nce < math.inf:
            yield f"info_nce = {self.info_nce}: must be finite and not negative; 0 switches it off"

    def attach(
        self, student: PreTrainedConfig, teacher: PreTrainedConfig, *, sequence_length: int, seed: int
    ) -> VaaAdapter:
        """A fresh adapter for one teacher.

        Raises:
            ConfigError: more stages than the shallower model has blocks.
        """
        depths = (int(student.num_hidden_layers), int(teacher.num_hidden_layers))
        stages = self.num_stages or min(4, *depths, self.num_queries)
        if stages > min(depths):
            raise ConfigError(
                [
                    f"[distill] num_stages = {stages}: the student ({student.model_type}) has {depths[0]} blocks and the "
                    f"teacher ({teacher.model_type}) {depths[1]}; choose at most {min(depths)}"
                ]
            )
        width = self.width or max(1, min(256, int(student.hidden_size)) // self.heads) * self.heads
        with torch.device("meta"):
            adapter = VaaAdapter(
                self, stages, width, depths, (int(student.hidden_size), int(teacher.hidden_size)), sequence_length
            )
        return _initialise(adapter, seed)


rules.register("vaa")(Vaa)


class VaaAdapter(Adapter):
    """The network of one (student, teacher) pair; `forward` gives L_FM (eq. 9) plus eta times InfoNCE."""

    def __init__(
        self, options: Vaa, stages: int, width: int, depths: tuple[int, int], sizes: tuple[int, int], tokens: int
    ) -> None:
        super().__init__()
        self.options, self.stages, self.width = options, stages, width
        self.patches = options.num_queries // stages
        self.window = math.ceil(tokens / self.patches)
        by_layer = options.stage_mix == "layer_weighted"
        self.student_taps = tuple(range(1, depths[0] + 1)) if by_layer else stage_ends(stages, depths[0])
        self.teacher_taps = stage_ends(stages, depths[1])
        if by_layer:
            self.layer_logits_JL = nn.Parameter(torch.empty(stages, depths[0]))
            self.project_in = nn.Linear(sizes[0], width)
        else:  # a Conv1d whose stride is its kernel is a linear map of each window
            self.patch = nn.ModuleList(nn.Linear(self.window * sizes[0], width) for _ in range(stages))
        if options.stage_mix == "attention":
            self.norm = nn.LayerNorm(width)
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project_out = nn.ModuleList(nn.Linear(width, sizes[1]) for _ in range(stages))

    def forward(
        self,
        student_hidden: Sequence[torch.Tensor],
        teacher_hidden: Sequence[torch.Tensor],
        student_valid_BT: torch.Tensor,
        teacher_valid_BT: torch.Tensor,
    ) -> torch.Tensor:
        """L_FM: the sum over stages of the mean squared error over valid patches (or tokens) and dimensions."""
        predicted = [p_BPR.float() for p_BPR in self.predict(student_hidden, student_valid_BT)]
        own_BP = self._valid_patches(student_valid_BT)
        loss = predicted[0].new_zeros(())
        for p_BPR, hidden_BTR in zip(predicted, teacher_hidden, strict=True):
            target_BTR = hidden_BTR.detach().float()
            if self.options.teacher_norm == "layernorm":
                target_BTR = layer_norm(target_BTR, target_BTR.shape[-1:])
            target_BTR, there_BT = _bounded(target_BTR, teacher_valid_BT)
            if self.options.fm_target == "tokens":
                p_BTR = p_BPR.repeat_interleave(self.window, dim=1)[:, : target_BTR.shape[1]]
                loss = loss + _masked_error(p_BTR, target_BTR, there_BT)
            target_BPR, present_BP = self._pool(target_BTR, there_BT), own_BP & self._valid_patches(there_BT)
            if self.options.fm_target == "patches":
                loss = loss + _masked_error(p_BPR, target_BPR, present_BP)
            if self.options.info_nce:
                contrast = _info_nce(p_BPR[present_BP], target_BPR[present_BP])
                loss = loss + self.options.info_nce / self.stages * contrast
        return loss

    def predict(self, student_hidden: Sequence[torch.Tensor], valid_BT: torch.Tensor) -> list[torch.Tensor]:
        """O_j, the guess of the teacher's stage j out of the student's stages: J times [B, P, R]."""
        if self.options.stage_mix == "layer_weighted":
            pooled_LBPS = torch.stack([self._pool(hidden_BTS, valid_BT) for hidden_BTS in student_hidden])
            share_JL = self.layer_logits_JL.softmax(-1).to(pooled_LBPS.dtype)
            mixed = list(self.project_in(torch.einsum("jl,lbps->jbps", share_JL, pooled_LBPS)))
        else:
            patched = [p(self._windows(h, valid_BT)) for p, h in zip(self.patch, student_hidden, strict=True)]
            if self.options.stage_mix == "mean":
                mixed = [torch.stack(patched).mean(0)] * self.stages
            else:
                key_valid_BQ = self._valid_patches(valid_BT).repeat(1, self.stages)
                mixed_BQD, _ = self.attend(torch.cat(patched, dim=1), key_valid_BQ)
                mixed = list(mixed_BQD.split(self.patches, dim=1))
        return [out(mixed_BPD) for out, mixed_BPD in zip(self.project_out, mixed, strict=True)]

    def attend(self, features_BQD: torch.Tensor, key_valid_BQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. (8): attention over the patches of all stages. Returns its output and its weights [B, heads, Q, Q]."""
        batch, queries, width = features_BQD.shape
        normed_BQD = self.norm(features_BQD)
        place_QD = sinusoid(queries, width, features_BQD.device).to(normed_BQD.dtype)

        def by_head(x_BQD: torch.Tensor) -> torch.Tensor:
            return x_BQD.view(batch, queries, self.options.heads, -1).transpose(1, 2)

        query, key = by_head(self.query(normed_BQD) + place_QD), by_head(self.key(normed_BQD) + place_QD)
        score_BhQQ = (query @ key.transpose(-1, -2)).float() / math.sqrt(width / self.options.heads)
        allowed_BhQQ = key_valid_BQ[:, None, None, :]
        if self.options.attention == "causal":
            patch_Q = torch.arange(queries, device=features_BQD.device) % self.patches
            allowed_BhQQ = allowed_BhQQ & (patch_Q[None, :] <= patch_Q[:, None])
        allowed_BhQQ = allowed_BhQQ | ~allowed_BhQQ.any(-1, keepdim=True)  # a row of padding only: any finite value
        weight_BhQQ = score_BhQQ.masked_fill(~allowed_BhQQ, -math.inf).softmax(-1)
        mixed_BhQd = weight_BhQQ.to(normed_BQD.dtype) @ by_head(self.value(normed_BQD)).to(normed_BQD.dtype)
        return mixed_BhQd.transpose(1, 2).reshape(batch, queries, width), weight_BhQQ

    def _windows(self, hidden_BTS: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """[B, P, l * S]: padding set to 0, a partly filled window scaled up by l / (its valid tokens)."""
        clean_BTS = self._fill(_without_padding(hidden_BTS, valid_BT))
        count_BP1 = self._counts(valid_BT)[..., None]
        windows = clean_BTS.reshape(len(clean_BTS), self.patches, -1)
        return windows * (self.window / count_BP1.clamp(min=1)).to(windows.dtype)

    def _pool(self, hidden_BTH: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
        """[B, P, H]: the mean over each window's valid tokens, 0 for an empty window."""
        clean_BTH = self._fill(_without_padding(hidden_BTH, valid_BT))
        sum_BPH = clean_BTH.view(len(clean_BTH), self.patches, self.window, -1).sum(2)
        return sum_BPH / self._counts(valid_BT)[..., None].clamp(min=1).to(sum_BPH.dtype)

    def _fill(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Zeros behind the sequence, up to P whole windows."""
        missing = self.patches * self.window - values_BT.shape[1]
        return pad(values_BT, (0, 0) * (values_BT.ndim - 2) + (0, missing)) if missing else values_BT

    def _counts(self, valid_BT: torch.Tensor) -> torch.Tensor:
        """[B, P]: valid tokens of each window."""
        return self._fill(valid_BT.float()).view(len(valid_BT), self.patches, self.window).sum(-1)

    def _valid_patches(self, valid_BT: torch.Tensor) -> torch.Tensor:
        """[B, P] bool: windows with at least one valid token."""
        return self._counts(valid_BT) > 0


def stage_ends(stages: int, depth: int) -> tuple[int, ...]:
    """The 1-based block that ends each stage: floor(j * depth / stages + 1/2)."""
    return tuple((2 * j * depth + stages) // (2 * stages) for j in range(1, stages + 1))


def sinusoid(length: int, width: int, device: torch.device) -> torch.Tensor:
    """The fixed position code of the Transformer, [length, width]."""
    rate_D = 10_000 ** (-torch.arange(0, width, 2, device=device) / width)
    angle_LD = torch.arange(length, device=device)[:, None] * rate_D
    return torch.stack([angle_LD.sin(), angle_LD.cos()], dim=-1).flatten(1)[:, :width]


def _without_padding(hidden_BTH: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """Padding set to 0; packed text has none, and is not copied."""
    return hidden_BTH if bool(valid_BT.all()) else hidden_BTH.masked_fill(~valid_BT[..., None], 0.0)


def _bounded(target_BTR: torch.Tensor, valid_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a feature that is too large or no number are emptied, and as good as padding."""
    low_BT, high_BT = target_BTR.aminmax(dim=-1)  # NaN is both
    sound_B = (((low_BT > -FARTHEST) & (high_BT < FARTHEST)) | ~valid_BT).all(1)
    return target_BTR.where(sound_B[:, None, None], 0.0), valid_BT & sound_B[:, None]


def _masked_error(guess_BXR: torch.Tensor, target_BXR: torch.Tensor, mask_BX: torch.Tensor) -> torch.Tensor:
    error_BX = (guess_BXR - target_BXR).square().mean(-1)
    return (error_BX * mask_BX).sum() / mask_BX.sum().clamp(min=1)


def _info_nce(guess_NR: torch.Tensor, target_NR: torch.Tensor) -> torch.Tensor:
    """Mean over valid patches of -log softmax of the cosine to the own target among the targets of the whole batch."""
    if len(guess_NR) == 0:
        return guess_NR.sum()
    cosine_NN = normalize(guess_NR, dim=-1) @ normalize(target_NR, dim=-1).T
    return -(cosine_NN / CONTRAST_TEMPERATURE).log_softmax(-1).diagonal().mean()


def _initialise(adapter: VaaAdapter, seed: int) -> VaaAdapter:
    """Weights out of their own generator: uniform within 1/sqrt(fan-in), norms 1 and 0, layer shares equal."""
    adapter.to_empty(device=torch.get_default_device())
    generator = torch.Generator().manual_seed(seed)
    for module in adapter.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    if adapter.options.stage_mix == "layer_weighted":
        nn.init.zeros_(adapter.layer_logits_JL)
    return adapter
