# SPDX-License-Identifier: Apache-2.0
"""The memory estimate against what trainings really take, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc"),
]

TRAIN = """
import json, sys
import torch
from contextlib import nullcontext
import numpy as np
from deepfusion.devices.configurations import config_of
from deepfusion.devices.models import from_config
from deepfusion.devices.noise import Noise as Secret
from deepfusion.devices.releases import Draws
from deepfusion.methods.base import Training
from deepfusion.methods.learning import Adapters, Everything, learning_on
from deepfusion.stages.local import train_causal_lm
from deepfusion.devices.documents import PrivateDocuments
from deepfusion.state_dicts import distinct_state
from deepfusion.training import Optimisation
from deepfusion.types import Batch, Corpus, ModelSpec

torch.set_num_threads(1)

class Noise:
    def __init__(self, vocab_size, sequence_length):
        self.vocab_size, self.sequence_length = vocab_size, sequence_length

    def batch(self, step, batch_size):
        ids_BT = torch.randint(0, self.vocab_size, (batch_size, self.sequence_length))
        all_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        return Batch(ids_BT, all_BT, all_BT)

def documents(vocab_size, tokens):
    ids, starts = np.random.default_rng(0).integers(0, vocab_size, 8 * tokens), np.arange(9) * tokens
    counted, none = np.ones(len(ids), bool), np.zeros(9, int)
    corpus = Corpus(ids, counted, starts, np.zeros(0, np.uint8), none, none, ("own",), np.arange(8))
    return PrivateDocuments(corpus, tokens, Draws(1.0, 1.0, 3), 1.0, Secret(bytes(32)))

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def train(preset, vocab_size, tokens, learns=None, private=False, **options):
    config = config_of(ModelSpec(name="m", preset=preset), vocab_size=vocab_size, positions=tokens, eos_id=0)
    optimisation = Optimisation(**options)
    noise = Noise(vocab_size, tokens)
    model, pieces, training = from_config(config, 0), nullcontext(), Training(config)
    if learns is not None:
        learning = Adapters(learns, 0) if learns else Everything()
        frozen = dict(distinct_state(model)) if learns else {}
        state = learning.state(model, "", "")
        pieces = learning_on(model, state, {n: t for n, t in frozen.items() if n not in state})
        training = Training(
            config, learns=learning.num_parameters(config) if learns else None, remade=learning.num_remade(config)
        )
    with pieces:
        text = documents(vocab_size, tokens) if private else noise
        train_causal_lm(model, text, steps=3, optimisation=optimisation, seed=0, label="m")
    return training.memory(optimisation, tokens, private=private)

preset, vocab_size, tokens, options = json.loads(sys.argv[1])
train(preset.rsplit("-", 1)[0] + "-pico", 64, 16, **{**options, "batch_size": 2})  # so that all libraries are there
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
estimate = train(preset, vocab_size, tokens, **options)
print(estimate / (memory("VmHWM") - before))
"""

TRAININGS = [
    ("gpt2-tiny", 2048, 128, {"batch_size": 8, "precision": "fp32"}),
    ("bloom-tiny", 2048, 128, {"batch_size": 8, "precision": "fp32"}),
    ("olmo2-small", 8192, 128, {"batch_size": 4, "precision": "fp32"}),
    ("llama-small", 8192, 256, {"batch_size": 8, "precision": "fp32"}),
    ("llama-small", 8192, 256, {"batch_size": 8, "precision": "fp32", "gradient_checkpointing": True}),
    ("llama-small", 8192, 64, {"batch_size": 2, "precision": "fp32", "accumulate": 4}),
    ("gpt2-small", 8192, 256, {"batch_size": 8, "precision": "bf16"}),
    ("gpt2-small", 8192, 256, {"batch_size": 8, "precision": "fp32", "private": True}),
    ("llama-tiny", 2048, 128, {"batch_size": 8, "precision": "fp32", "private": True}),
    ("qwen2-moe-tiny", 2048, 128, {"batch_size": 8, "precision": "fp32"}),
    (
        "qwen2-moe-small",
        2048,
        128,
        {"batch_size": 2, "precision": "fp32", "learns": 0},
    ),  # HFedMoE: each expert by itself
    ("qwen2-moe-small", 2048, 128, {"batch_size": 2, "precision": "fp32", "learns": 8}),  # adapters of rank 8
]


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training[0])
def test_the_estimate_is_never_far_under_nor_far_over_the_measured_peak(training: tuple[object, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(training)], capture_output=True, text=True, check=True
    )
    # A measured peak moves by 10% between runs: what the allocator wastes depends on the order of its calls.
    assert 0.85 <= float(done.stdout.split()[-1]) <= 1.35
