# SPDX-License-Identifier: Apache-2.0
"""A device's training of some experts: all are used, but on each batch only the chosen ones learn (HFedMoE, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from deepfusion.errors import ModelError
from deepfusion.moe import families
from deepfusion.moe.routing import Penalty, Routing
from deepfusion.stages.selective.importance import SelectOptions, choose, importance
from deepfusion.stages.selective.pieces import Pieces


class ExpertSelection:
    """Chooses the experts of each batch, drops the gradients of the others, and counts what was used.

    It is a `Penalty` for `train_causal_lm`: called with how the batch was routed, before the backward pass. A parameter whose
    gradient is dropped has none, so that AdamW leaves it, its moments and its count of steps as they are. Gradients of
    earlier layers still flow through experts that do not learn, so those of all others are exact.

    Where the model has only some of the MoE's experts, probabilities are still over all of them, by the whole routers.

    Attributes:
        count_LE: batches on which an expert of the model was trained.
        routed_LE: whether any token was sent to it.
    """

    def __init__(
        self, model: PreTrainedModel, pieces: Pieces, options: SelectOptions, budget: int, balance: Penalty | None,
        whole: Sequence[tuple[torch.Tensor, Sequence[int]]] | None = None,
    ) -> None:  # fmt: skip
        """Watch the experts of `pieces`.

        Args:
            whole: each MoE layer's whole router weight, (E, H), and which of its rows the model's experts are; None where the
                model has all experts.
        """
        self._family = families[model.config.model_type]
        self._options, self._budget, self._balance, self._whole = options, budget, balance, whole
        shape = (len(pieces), len(pieces[0]))
        self._active_LE = torch.ones(shape, dtype=torch.bool)
        whole_shape = (len(pieces), len(whole[0][0])) if whole else shape
        self._usage_LE, self._score_LE = (torch.zeros(whole_shape, dtype=torch.float64) for _ in range(2))
        self._tokens = self._batches = 0
        self.count_LE = torch.zeros(shape, dtype=torch.int32)
        self.routed_LE = torch.zeros(shape, dtype=torch.bool)
        for layer, experts in enumerate(pieces):
            for index, parameters in enumerate(experts):
                for parameter in parameters:
                    parameter.register_post_accumulate_grad_hook(self._dropper(layer, index))

    def _dropper(self, layer: int, index: int) -> Any:
        def drop(parameter: torch.Tensor) -> None:
            if not self._active_LE[layer, index]:
                parameter.grad = None

        return drop

    @property
    def usage_LE(self) -> torch.Tensor:
        """u, float32 (L, E): each expert's mean probability over all tokens; sums to 1 in a layer (eq. 16)."""
        return (self._usage_LE / max(1, self._tokens)).float()

    @property
    def score_LE(self) -> torch.Tensor:
        """Mean importance over the batches, float32 (L, E)."""
        return (self._score_LE / max(1, self._batches)).float()

    def _over_all_experts(self, routing: Routing, layer: int) -> tuple[torch.Tensor, slice | list[int]]:
        """Probabilities over all of the MoE's experts, (B*T, E) in float64, and which columns are the model's."""
        logits_RE = routing.logits[layer].double()
        if self._whole is None:
            return self._family.probabilities(logits_RE), slice(None)
        gate_EH, hosted = self._whole[layer]
        all_RE = routing.inputs[layer].double() @ gate_EH.to(logits_RE.device).double().T
        all_RE[:, list(hosted)] = logits_RE
        return self._family.probabilities(all_RE), list(hosted)

    def __call__(self, routing: Routing) -> torch.Tensor:
        """Choose for this batch; the balance loss, if there is one.

        Raises:
            ModelError: a router gives NaN; names the layer.
        """
        self._choose(routing)
        return self._balance(routing) if self._balance is not None else torch.zeros(())

    @torch.no_grad()
    def _choose(self, routing: Routing) -> None:
        valid_R = routing.valid_BT.flatten()
        if not bool(valid_R.any()):
            return
        values: list[torch.Tensor] = []
        used_LE = torch.zeros_like(self._active_LE)
        for layer, chosen_Rk in enumerate(routing.chosen):
            all_RE, mine = self._over_all_experts(routing, layer)
            probability_RE = all_RE[valid_R]
            if bool(probability_RE.isnan().any()):
                raise ModelError(f"the router of MoE layer {layer} gives NaN; lower the learning rate")
            unit_XE = probability_RE
            if self._options.unit == "row":
                unit_XE = _row_means(all_RE, routing.valid_BT)
            score_E = importance(unit_XE, self._options.mixture)
            values.append(self._options.value(unit_XE[:, mine], score_E[mine]).cpu())
            used_LE[layer, chosen_Rk[valid_R].unique().cpu()] = True
            self._usage_LE[layer] += probability_RE.sum(0).cpu()
            self._score_LE[layer] += score_E.cpu()
        self._active_LE = choose(torch.stack(values), used_LE, self._budget, self._options.scope)
        self._tokens += int(valid_R.sum())
        self._batches += 1
        self.count_LE += self._active_LE
        self.routed_LE |= used_LE


def _row_means(probability_RE: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """Mean distribution of each row that has a token, (B', E)."""
    valid_BT1 = valid_BT[..., None].to(probability_RE)
    sum_BE = (probability_RE.view(*valid_BT.shape, -1) * valid_BT1).sum(1)
    tokens_B1 = valid_BT1.sum(1)
    return (sum_BE / tokens_B1.clamp(min=1))[tokens_B1[:, 0] > 0]
