# SPDX-License-Identifier: Apache-2.0
"""Models in fewer bits: how far numbers may move, how many bytes they take, and what is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.errors import UploadError
from deepfusion.federation.formats import CODES, NF4, SCALES, Format, Plain, as_read, restore, shrink, wire_bytes
from deepfusion.types import State

FORMATS: tuple[Format, ...] = get_args(Format)
PLAIN: tuple[Plain, ...] = get_args(Plain)


def state_of(seed: int, *shapes: tuple[int, ...], size: float = 1.0) -> State:
    torch.manual_seed(seed)
    return {f"layer.{index}.weight": size * torch.randn(shape) for index, shape in enumerate(shapes)}


def nbytes(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 70)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(FORMATS), st.integers(0, 99), st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_what_comes_back_is_near_in_the_same_shape_and_never_more_bytes_than_planned(
    shapes: list[tuple[int, ...]], form: Format, seed: int, size: float
) -> None:
    state, start = state_of(seed, *shapes, size=size), state_of(seed + 1, *shapes, size=size)
    wire = shrink(state, form, start)
    found = restore(wire, {n: t.to("meta") for n, t in state.items()}, form, start, "device d")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == torch.float32
        sent = tensor - start[name] if form == "delta-int8" else tensor
        most = sent.abs().amax(-1, keepdim=True) if tensor.numel() else sent
        share = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.51 / 127 + 2**-8, "delta-int8": 0.51 / 127 + 2**-8}.get(
            form, 0.17
        )
        if form == "nf4":  # a block runs over rows
            most = sent.abs().amax() if tensor.numel() else sent
        assert bool(((found[name] - tensor).abs() <= share * most + 1e-6 * tensor.abs()).all()), name
    incompressible = 64 * len(state)  # zstd's frames
    assert nbytes(wire) <= wire_bytes(state, form) + incompressible


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(PLAIN), st.integers(0, 99), st.sampled_from([1e-38, 1e-3, 1.0, 1e6]))
def test_what_was_read_once_reads_the_same_when_it_is_sent_again(
    shapes: list[tuple[int, ...]], form: Plain, seed: int, size: float
) -> None:
    once = as_read(state_of(seed, *shapes, size=size), form)
    again = as_read(once, form)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_eight_bits_are_a_quarter_and_four_an_eighth_of_float32() -> None:
    state = state_of(0, (256, 512))
    assert wire_bytes(state, "fp32") == nbytes(state)
    assert wire_bytes(state, "bf16") == nbytes(state) // 2
    assert wire_bytes(state, "int8") == nbytes(state) // 4 + 2 * 256
    assert wire_bytes(state, "nf4") == nbytes(state) // 8 + 2 * 256 * 512 // 64


def test_the_values_of_nf4_come_back_exactly() -> None:
    """At a scale that bf16 holds exactly, each of the sixteen values is its own nearest."""
    state = {"w": (4.0 * NF4).repeat(8).reshape(2, 64)}
    assert torch.equal(restore(shrink(state, "nf4", {}), state, "nf4", {}, "d")["w"], state["w"])


def test_what_training_has_not_changed_is_exact_as_a_step() -> None:
    start = state_of(0, (4, 64))
    wire = shrink(start, "delta-int8", start)
    assert torch.equal(restore(wire, start, "delta-int8", start, "d")["layer.0.weight"], start["layer.0.weight"])
    assert len(wire[CODES + "layer.0.weight"]) < 40, "256 zeros take no place"


def test_small_steps_are_finer_than_whole_numbers() -> None:
    start = state_of(0, (8, 128))
    state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in start.items()}

    def error(form: Format) -> float:
        found = restore(shrink(state, form, start), state, form, start, "d")["layer.0.weight"]
        return float((found - state["layer.0.weight"]).abs().max())

    assert error("delta-int8") < error("int8") / 30


@pytest.mark.parametrize("form", FORMATS)
def test_vectors_and_whole_numbers_are_sent_as_they_are(form: Format) -> None:
    state = {"norm.weight": torch.randn(7), "mask": torch.ones(2, 2, dtype=torch.bool), "count": torch.tensor(3)}
    found = restore(shrink(state, form, state), state, form, state, "d")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def hostile(form: Format) -> list[tuple[State, str]]:
    wire = shrink(state_of(0, (4, 64)), form, state_of(1, (4, 64)))
    name = "layer.0.weight"
    codes, scales = wire[CODES + name], wire[SCALES + name]
    bomb = shrink(state_of(0, (4000, 64)), form, state_of(1, (4000, 64)))[CODES + name]
    return [
        ({CODES + name: codes[:-3], SCALES + name: scales}, "do not unpack to"),
        ({CODES + name: torch.cat([codes, codes]), SCALES + name: scales}, "do not unpack to"),
        ({CODES + name: bomb, SCALES + name: scales}, "do not unpack to"),
        ({CODES + name: torch.zeros(0, dtype=torch.uint8), SCALES + name: scales}, "do not unpack to"),
        ({CODES + name: codes.float(), SCALES + name: scales}, "not a row of bytes"),
        ({CODES + name: codes[None], SCALES + name: scales}, "not a row of bytes"),
        ({CODES + name: codes, SCALES + name: scales[:-1]}, "not a row of bytes"),
        ({CODES + name: codes, SCALES + name: scales.float()}, "not a row of bytes"),
        (state_of(0, (4, 64)), "is sent whole"),
        ({CODES + name: codes, SCALES + name: torch.full_like(scales, float("inf"))}, "not finite"),
    ]


@pytest.mark.parametrize("form", ["int8", "nf4", "delta-int8"])
@pytest.mark.parametrize("case", range(10))
def test_codes_that_cannot_be_those_of_the_tensor_are_refused(form: Format, case: int) -> None:
    wire, said = hostile(form)[case]
    with pytest.raises(UploadError, match=f"device d.*{said}"):
        restore(wire, state_of(0, (4, 64)), form, state_of(1, (4, 64)), "device d")


def test_another_dtype_in_place_of_bf16_is_refused() -> None:
    with pytest.raises(UploadError, match=r"device d: tensor layer.0.weight has dtype torch.float32, not bf16"):
        restore(state_of(0, (4, 64)), state_of(0, (4, 64)), "bf16", {}, "device d")


def test_what_is_missing_or_extra_is_left_for_the_check_of_the_architecture() -> None:
    wire = {"stranger": torch.zeros(3), CODES + "layer.0.weight": torch.zeros(3, dtype=torch.uint8)}
    assert restore(wire, state_of(0, (4, 64)), "int8", {}, "d").keys() == wire.keys()
