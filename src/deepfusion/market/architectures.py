# SPDX-License-Identifier: Apache-2.0
"""Exit tables of known architectures, computed from their lists of layers (aeria, sections 3 and 8).

Computed: FLOPs of convolutions and matrices (2 a multiply-add; norms, activations and pooling are left out), bytes of
activations and weights in float32. Cited (arXiv 2503.04521): the change of accuracy at the lowest threshold, -1.97 %
AlexNet, -2.47 % ResNet34, -3.77 % VGG16, +1.10 % BART, and that 18 to 48 % of BART's samples leave early, depending on
sigma. Chosen: where exits stand, the early share of the other models, that it falls evenly between its two ends and
spreads evenly over the early exits, that accuracy changes in proportion to it, and the lengths of prompts and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from deepfusion.market.profiles import Profile

SIGMAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
FLOAT = 4
CLASSES = 1000
IMAGE = 3 * 224 * 224
"""Bytes of an input image: one a colour and pixel."""


@dataclass(frozen=True)
class Layer:
    """Weights, and the FLOPs of one use on one sample."""

    weights: float
    flops: float


@dataclass(frozen=True)
class Block:
    """What no cut divides: its layers, and the elements of the activation that it hands on."""

    layers: tuple[Layer, ...]
    elements: int

    @property
    def flops(self) -> float:
        """FLOPs of all layers."""
        return sum(layer.flops for layer in self.layers)

    @property
    def nbytes(self) -> float:
        """Bytes of all weights."""
        return FLOAT * sum(layer.weights for layer in self.layers)


def conv(fed: int, made: int, kernel: int, side: int) -> Layer:
    """A convolution onto side * side positions."""
    weights = kernel * kernel * fed * made
    return Layer(weights, 2.0 * weights * side * side)


def linear(fed: int, made: int, tokens: int = 1) -> Layer:
    """A matrix, used on `tokens` vectors."""
    return Layer(fed * made, 2.0 * fed * made * tokens)


def attention(width: int, queries: int, keys: int, *, causal: bool = False) -> Layer:
    """Scores of queries with keys and the sum of the values; half of that under a causal mask."""
    return Layer(0, 4.0 * width * queries * keys / (2 if causal else 1))


def alexnet() -> list[Block]:
    """Five convolutions and two of the three matrices; the third is the last exit's head."""
    rows = (
        (3, 64, 11, 55, 27),
        (64, 192, 5, 27, 13),
        (192, 384, 3, 13, 13),
        (384, 256, 3, 13, 13),
        (256, 256, 3, 13, 6),
    )
    blocks = [Block((conv(fed, made, kernel, side),), made * out * out) for fed, made, kernel, side, out in rows]
    return [*blocks, Block((linear(256 * 36, 4096),), 4096), Block((linear(4096, 4096),), 4096)]


def vgg16() -> list[Block]:
    """Thirteen convolutions, of which the last of each group is followed by pooling, and two matrices."""
    groups = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    blocks: list[Block] = []
    fed, side = 3, 224
    for made, count in groups:
        for number in range(count):
            out = side // 2 if number == count - 1 else side
            blocks.append(Block((conv(fed, made, 3, side),), made * out * out))
            fed = made
        side //= 2
    return [*blocks, Block((linear(512 * 49, 4096),), 4096), Block((linear(4096, 4096),), 4096)]


def resnet34() -> list[Block]:
    """The stem and sixteen residual blocks; where the width grows, a projection stands beside them."""
    blocks = [Block((conv(3, 64, 7, 112),), 64 * 56 * 56)]
    fed, side = 64, 56
    for made, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        side = 56 * 64 // made
        for _ in range(count):
            beside = (conv(fed, made, 1, side),) if fed != made else ()
            blocks.append(Block((conv(fed, made, 3, side), conv(made, made, 3, side), *beside), made * side * side))
            fed = made
    return blocks


def early_rows(exits: int, most: float, least: float) -> tuple[tuple[float, ...], ...]:
    """Exit shares: `most` leave early at the lowest sigma, `least` at the last but one, nobody at 1."""
    rows: list[tuple[float, ...]] = []
    for sigma in SIGMAS[:-1]:
        early = most + (least - most) * (sigma - SIGMAS[0]) / (SIGMAS[-2] - SIGMAS[0])
        rows.append((*([early / (exits - 1)] * (exits - 1)), 1 - early))
    return (*rows, (*([0.0] * (exits - 1)), 1.0))


def _shares(exits: int, most: float, least: float, change: float) -> dict[str, tuple[object, ...]]:
    rows = early_rows(exits, most, least)
    return {
        "sigmas": SIGMAS, "exit_share": rows,
        "accuracy_change": tuple(change * (1 - row[-1]) / most for row in rows),
    }  # fmt: skip


def image_model(
    name: str, blocks: Sequence[Block], head_widths: Sequence[int], exit_blocks: Sequence[int], change: float
) -> Profile:
    """A classifier of images; a head is global pooling and one matrix, the last head the model's own matrix."""
    heads = [linear(width, CLASSES) for width in head_widths]
    return Profile(
        name=name,
        source="FLOPs and bytes computed; accuracy change at sigma 0.5 cited from arXiv 2503.04521; exit shares chosen",
        block_flops=tuple(block.flops for block in blocks),
        exit_blocks=tuple(exit_blocks),
        head_flops=tuple(head.flops for head in heads),
        cut_bytes=(IMAGE, *(float(FLOAT * block.elements) for block in blocks[:-1]), 0.0),
        block_reads=tuple(block.nbytes for block in blocks),
        head_reads=tuple(FLOAT * head.weights for head in heads),
        **_shares(len(exit_blocks), 0.7, 0.3, change),  # pyright: ignore[reportArgumentType]
    )


def decoder_layer(width: int, matrices: Sequence[Layer], prompt: int, made: int) -> Layer:
    """One layer of a decoder that reads a prompt and then makes tokens (aeria, section 3: F_l)."""
    tokens = prompt + made
    scores = attention(width, tokens, tokens, causal=True)
    return Layer(sum(m.weights for m in matrices), sum(m.flops for m in matrices) * tokens + scores.flops)


def language_model(
    name: str, *, layers: int, width: int, matrices: Sequence[Layer], vocabulary: int, prompt: int, made: int
) -> Profile:
    """A decoder-only model; exits after each quarter, with the model's own output matrix as their heads."""
    layer, head = decoder_layer(width, matrices, prompt, made), linear(width, vocabulary, made)
    exits = sorted({-(-layers * quarter // 4) for quarter in (1, 2, 3, 4)})
    return Profile(
        name=name,
        source="FLOPs and bytes computed; exit shares and accuracy change chosen",
        block_flops=(layer.flops,) * layers,
        exit_blocks=tuple(exits),
        head_flops=(head.flops,) * len(exits),
        cut_bytes=(0.0, *[float(FLOAT * width)] * (layers - 1), 0.0),
        crossings=(1.0, *[float(made)] * (layers - 1), 0.0),
        prompt_bytes=(float(FLOAT * prompt), *[float(FLOAT * width * prompt)] * (layers - 1), 0.0),
        block_reads=(FLOAT * layer.weights * (1 + made),) * layers,  # once for the prompt, once for each token
        head_reads=(FLOAT * head.weights * made,) * len(exits),
        **_shares(len(exits), 0.48, 0.18, -0.02),  # pyright: ignore[reportArgumentType]
    )


def bart(prompt: int = 32, made: int = 32) -> Profile:
    """BART base (6 + 6 layers of width 768) as a translator; exits after every second layer of the decoder.

    Above the encoder's cuts only its states cross, once; from the first layer of the decoder on each generated token
    crosses too, with the encoder's states before it.
    """
    width, wide, vocabulary, half = 768, 3072, 50265, 6
    read = [*[linear(width, width, prompt)] * 4, *[linear(width, wide, prompt)] * 2, attention(width, prompt, prompt)]
    write = [
        *[linear(width, width, made)] * 6, *[linear(width, width, prompt)] * 2, *[linear(width, wide, made)] * 2,
        attention(width, made, made, causal=True), attention(width, made, prompt),
    ]  # fmt: skip
    blocks = [Block(tuple(read), prompt * width)] * half + [Block(tuple(write), width)] * half
    head = linear(width, vocabulary, made)
    state, token = float(FLOAT * width * prompt), float(FLOAT * width)
    return Profile(
        name="bart",
        source="FLOPs and bytes computed; accuracy change at sigma 0.5 and shares that leave early (18 to 48 %) cited from "
        "arXiv 2503.04521; lengths chosen",
        block_flops=tuple(block.flops for block in blocks),
        exit_blocks=(8, 10, 12),
        head_flops=(head.flops,) * 3,
        cut_bytes=(0.0,) * (half + 1) + (token,) * (half - 1) + (0.0,),
        crossings=(1.0,) * (half + 1) + (float(made),) * (half - 1) + (0.0,),
        prompt_bytes=(float(FLOAT * prompt), *[state] * (2 * half - 1), 0.0),
        block_reads=tuple(block.nbytes for block in blocks[:half]) + tuple(b.nbytes * made for b in blocks[half:]),
        head_reads=(FLOAT * head.weights * made,) * 3,
        **_shares(3, 0.48, 0.18, 0.0110),  # pyright: ignore[reportArgumentType]
    )


@cache
def shipped_profiles() -> dict[str, Profile]:
    """The tables that need no measuring, by name; the images of section 8, BART, and two small language models."""
    gpt = [*[linear(768, 768)] * 4, *[linear(768, 3072)] * 2]
    smol = [*[linear(576, 576)] * 2, *[linear(576, 192)] * 2, *[linear(576, 1536)] * 3]
    found = (
        image_model("alexnet", alexnet(), (192, 256, 4096), (2, 5, 7), -0.0197),
        image_model("resnet34", resnet34(), (64, 128, 256, 512), (4, 8, 14, 17), -0.0247),
        image_model("vgg16", vgg16(), (128, 256, 512, 4096), (4, 7, 10, 15), -0.0377),
        bart(),
        language_model("gpt2", layers=12, width=768, matrices=gpt, vocabulary=50257, prompt=64, made=32),
        language_model("smollm2-135m", layers=30, width=576, matrices=smol, vocabulary=49152, prompt=64, made=32),
    )
    assert not [fault for profile in found for fault in profile.faults()]
    return {profile.name: profile for profile in found}
