# SPDX-License-Identifier: Apache-2.0
"""How the server's work grows: phase I with the number of devices, the distillation step with the number of domains.

Each fleet is measured in a process of its own, so that its peak memory is its own. Its uploads are copies of sixteen real files
under as many names as it has devices: read in full from the disk, and small to make. Ratios are to the first line.

python benchmarks/scaling.py [--devices 16 64 256 1024] [--domains 1 2 4 8] [--preset llama-tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from deepfusion.data.options import TokenizerOptions
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import corpus_from_texts
from deepfusion.data.tokenizer import make_tokenizer
from deepfusion.devices.configurations import make_config
from deepfusion.devices.models import from_config, init_id, save
from deepfusion.devices.presets import PRESETS
from deepfusion.moe import families
from deepfusion.stages.cluster import KMeans
from deepfusion.stages.distill import DistillOptions, Vaa, distill
from deepfusion.stages.proxy import MODEL, ProxyOptions, load_proxies, make_proxies
from deepfusion.state_dicts import distinct_state
from deepfusion.training import Optimisation
from deepfusion.types import Upload

FILES, WIDTH, DOMAINS, VOCABULARY, LENGTH = 16, 64, 8, 2048, 128
WORDS = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "dlmnrst"])


def texts(count: int, seed: int) -> list[str]:
    """Made-up text of skewed word frequencies."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(WORDS) + 1)
    return [" ".join(generator.choice(WORDS, size=120, p=share / share.sum())) for _ in range(count)]


def embeddings(count: int, domains: int) -> np.ndarray:
    """Unit vectors around as many directions at right angles as there are domains, (count, WIDTH)."""
    generator = np.random.default_rng(0)
    centre_KD = np.linalg.qr(generator.normal(size=(WIDTH, domains)))[0].T
    embedding_ND = centre_KD[np.arange(count) % domains] + 0.1 * generator.normal(size=(count, WIDTH))
    return embedding_ND / np.linalg.norm(embedding_ND, axis=1, keepdims=True)


def make_fleet(folder: Path, preset: str) -> None:
    """A tokenizer, the first weights, and sixteen uploads that were moved away from them."""
    make_tokenizer(TokenizerOptions(vocab_size=VOCABULARY), texts(400, 0), folder, folder / "tokenizer")
    config = make_config(PRESETS[preset].config, vocab_size=VOCABULARY, positions=LENGTH, eos_id=0)
    model = from_config(config, seed=0)
    save(model, folder / "initial", folder / "tokenizer")
    (folder / "init_id").write_text(init_id(model))
    for number in range(FILES):
        generator = torch.Generator().manual_seed(number)
        moved = {
            MODEL + name: (t + 0.02 * torch.randn(t.shape, generator=generator)).contiguous()
            for name, t in distinct_state(model).items()
        }
        save_file(moved, folder / f"upload-{number}.safetensors")


def phase_one(folder: Path, count: int) -> dict[str, float]:
    """Cluster `count` uploads and average their proxies; seconds, and the peak memory above what imports took."""
    embedding_ND = embeddings(count, DOMAINS)
    started_from = (folder / "init_id").read_text()
    uploads = [
        Upload(
            f"device-{n:04}", "model", started_from, folder / f"upload-{n % FILES}.safetensors", embedding_ND[n], 1000
        )
        for n in range(count)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    ids = tuple(upload.device_id for upload in uploads)
    clusters = KMeans(num_clusters=DOMAINS).assign(embedding_ND, ids, ("model",) * count, seed=0, note=lambda _: None)
    clustered = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as out:
        make_proxies(
            uploads, clusters, options=ProxyOptions(average="mean"), initials={"model": folder / "initial"},
            judge=lambda _domain, _model: 0.0, tokenizer_folder=folder / "tokenizer", out=Path(out),
        )  # fmt: skip
    averaged = time.perf_counter() - began - clustered
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cluster_seconds": clustered, "average_seconds": averaged, "extra_mib": (peak - before) / 2**10}


def step_seconds(folder: Path, domains: int, steps: int = 12) -> float:
    """Seconds of a joint step with one teacher a domain and four rows of each."""
    uploads = [
        Upload(f"device-{n}", "model", (folder / "init_id").read_text(), folder / f"upload-{n}.safetensors",
               np.eye(max(domains, 2))[n], 1000)
        for n in range(domains)
    ]  # fmt: skip
    ids = tuple(upload.device_id for upload in uploads)
    clusters = KMeans(num_clusters=domains).assign(
        np.stack([upload.embedding_D for upload in uploads]), ids, ("model",) * domains, seed=0, note=lambda _: None
    )
    family = families["qwen2_moe"]
    target = family.ready_target(
        make_config(
            {**PRESETS["qwen2-moe-tiny"].config, "num_experts": max(2, domains)},
            vocab_size=VOCABULARY,
            positions=LENGTH,
            eos_id=0,
        )
    )
    corpus = corpus_from_texts(texts(200, 1), "text", folder / "tokenizer")
    rows = [PackedText(corpus, LENGTH, seed) for seed in range(domains)]
    options = DistillOptions(steps=steps, optimisation=Optimisation(batch_size=4))
    with tempfile.TemporaryDirectory() as out:
        make_proxies(
            uploads, clusters, options=ProxyOptions(average="mean"), initials={"model": folder / "initial"},
            judge=lambda _domain, _model: 0.0, tokenizer_folder=folder / "tokenizer", out=Path(out) / "proxies",
        )  # fmt: skip
        proxies = load_proxies(Path(out) / "proxies")
        save(from_config(family.student_config(target), seed=0), Path(out) / "base", folder / "tokenizer")
        began = time.perf_counter()
        distill(
            Path(out) / "base", [[p for p in proxies if p.cluster == k] for k in range(domains)], rows, family=family,
            target=target, rule=Vaa(), recipe="joint", options=options, seed=0, tokenizer_folder=folder / "tokenizer",
            out=Path(out) / "students",
        )  # fmt: skip
        return (time.perf_counter() - began) / steps


def in_a_process(folder: Path, count: int) -> dict[str, float]:
    """`phase_one` in a process of its own."""
    command = [sys.executable, __file__, "--inside", str(folder), "--devices", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one line of JSON for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--domains", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--preset", default="llama-tiny")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if asked.inside:
        print(json.dumps(phase_one(asked.inside, asked.devices[0])))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_fleet(folder, asked.preset)
        size = (folder / "upload-0.safetensors").stat().st_size / 2**20
        first: dict[str, float] = {}
        for count in asked.devices:
            found = in_a_process(folder, count)
            first = first or {**found, "devices": count}
            print(json.dumps({
                "devices": count, "upload_mib": round(size, 1),
                "cluster_ms_per_device": round(1000 * found["cluster_seconds"] / count, 2),
                "average_ms_per_device": round(1000 * found["average_seconds"] / count, 2),
                "extra_mib": round(found["extra_mib"], 1),
                "devices_ratio": round(count / first["devices"], 1),
                "time_ratio": round(found["average_seconds"] / first["average_seconds"], 1),
                "memory_ratio": round(found["extra_mib"] / first["extra_mib"], 2),
            }))  # fmt: skip
        one = 0.0
        for domains in asked.domains:
            seconds = step_seconds(folder, domains)
            one = one or seconds
            tokens = domains * 4 * LENGTH
            print(json.dumps({
                "domains": domains, "tokens_per_second": round(tokens / seconds),
                "domains_ratio": domains / asked.domains[0], "time_ratio": round(seconds / one, 2),
            }))  # fmt: skip


if __name__ == "__main__":
    main()
