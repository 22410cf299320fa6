# SPDX-License-Identifier: Apache-2.0
"""One thread (tiny models are slower with two), no network, a cache of the test run's own, quiet Flower, no waiting for disks."""

from __future__ import annotations

import os
import tempfile

os.environ.update({
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "DEEPFUSION_CACHE": tempfile.mkdtemp(prefix="deepfusion-test-cache-"),
})  # fmt: skip

import torch

torch.set_num_threads(1)
os.fsync = lambda fd: None  # the power stays on; tests of what a crash may lose put their own in its place
