# SPDX-License-Identifier: Apache-2.0
"""Averages of models as a stream, and checks of what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from deepfusion.errors import ModelError
from deepfusion.types import State


def check_finite(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise ModelError naming `source` and the tensor when a number in `state` is not finite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{source}: tensor {name} holds NaN or infinity; train that model again with a lower rate")


def average(states: Iterable[tuple[str, Mapping[str, torch.Tensor], float]]) -> State:
    """Weighted mean of models that come one after another; one accumulator is held, whatever their number.

    Sums are taken in float64, so that equal models give that very model, bit for bit, and the order does not matter
    beyond the last digit. Integer buffers are copied from the first model.

    Args:
        states: (name for messages, state, weight) of each model; no weight is negative, and not all are zero.

    Raises:
        ModelError: no model, numbers that are not finite, or names, shapes or types that differ.
    """
    first: dict[str, tuple[torch.Size, torch.dtype]] = {}
    reference, total = "", 0.0

    def alike() -> Iterator[tuple[str, Mapping[str, torch.Tensor], float]]:
        nonlocal first, reference, total
        for source, state, weight in states:
            found = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
            if not first:
                first, reference = found, source
            elif found != first:
                raise ModelError(_difference(found, first, source, reference))
            total += weight
            yield source, state, weight
            del state  # before the next one is read

    mean = average_present(alike())
    if not first:
        raise ModelError("no model to average; at least one is needed")
    assert total > 0, "all weights are zero"
    return mean


def average_present(states: Iterable[tuple[str, Mapping[str, torch.Tensor], float]]) -> State:
    """Like `average`, for models that hold different tensors: each tensor's mean over the models that have it.

    The weights of a tensor's holders are normalised to sum to 1; a tensor that nobody holds is not in the result. Sums are
    taken in float64; integer buffers are copied from the first holder.

    Raises:
        ModelError: numbers that are not finite, or a tensor of two shapes.
    """
    sums: State = {}
    totals: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}
    for source, state, weight in states:
        check_finite(state, source)
        for name, tensor in state.items():
            if name not in sums:
                sums[name] = tensor.double() * weight if tensor.is_floating_point() else tensor.clone()
                totals[name], dtypes[name] = weight, tensor.dtype
                continue
            if sums[name].shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, elsewhere {list(sums[name].shape)}"
                raise ModelError(f"{source}: tensor {name} is {shapes}; average only tensors of one shape")
            if tensor.is_floating_point():
                sums[name].add_(tensor, alpha=weight)
            totals[name] += weight
        del state  # before the next one is read
    for name in list(sums):  # one after the other: the result takes the place of the sums
        mean = sums.pop(name)
        sums[name] = (mean.div_(totals[name]) if mean.is_floating_point() else mean).to(dtypes[name])
    return sums


def _difference(found: Mapping[str, object], first: Mapping[str, object], source: str, reference: str) -> str:
    name = next(n for n in sorted({*found, *first}) if found.get(n) != first.get(n))
    return (
        f"{source} cannot be averaged with {reference}: tensor {name} is {found.get(name, 'missing')} in the one and "
        f"{first.get(name, 'missing')} in the other; average only models of one architecture"
    )


def distinct_state(model: torch.nn.Module) -> State:
    """The state dict with tied tensors once, under their first name: what is sent, and what is counted."""
    seen: set[int] = set()
    state: State = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # by object, not by address: all empty and all "meta" tensors share address 0
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def load_distinct(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors of `distinct_state` into a model of the same architecture; what is tied to them follows."""
    expected = distinct_state(model)
    assert expected.keys() == state.keys(), sorted(expected.keys() ^ state.keys())
    model.load_state_dict(dict(state), strict=False)
