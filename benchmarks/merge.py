# SPDX-License-Identifier: Apache-2.0
"""Merging students on disk: time against reading all and writing the MoE, memory against the models' size.

`ours`, `limit` and `in_memory` run in a process of their own after all imports, and their memory is counted from there on.
`command` is what a user runs, `deepfusion merge` with its self-check, and `mergekit-moe` its peer, when it is on the path
(`pip install mergekit` in another environment): both cold, imports and all their memory included; what the imports alone
take is said for each. One line of JSON for each way, ratios in the last.

python benchmarks/merge.py [--students 4] [--hidden 768] [--layers 8] [--vocabulary 32000] [--repeats 3]
    [--family qwen3_moe] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepfusion.devices.configurations import make_config
from deepfusion.devices.memory import num_parameters
from deepfusion.devices.models import from_config, load
from deepfusion.devices.presets import PRESETS
from deepfusion.moe import families
from deepfusion.moe.stream import merged_tensors
from deepfusion.moe.tensor_files import BUFFER, Reader, stored_tensors, write_folder
from deepfusion.stages.merge import MergeOptions, merge, open_students
from deepfusion.stages.router import random_router

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DENSE: dict[str, dict[str, Any]] = {"qwen3_moe": {"model_type": "qwen3", "head_dim": 64}}
"""What mergekit-moe makes a family of, without a tokenizer; the other families are measured against the limit alone."""


def target(options: argparse.Namespace) -> Any:
    """The family's MoE of as many experts as students."""
    family, wide = families[options.family], 4 * options.hidden
    preset = next(p for n, p in PRESETS.items() if n.endswith("-tiny") and p.config["model_type"] == options.family)
    heads = options.hidden // 64
    values = {
        **preset.config, "hidden_size": options.hidden, "num_hidden_layers": options.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, family.num_experts_key: options.students, "num_experts_per_tok": 2,
    }  # fmt: skip
    if family.student == "dense":  # the shared expert is as wide as a routed one
        values |= {"intermediate_size": 2 * wide, "kv_lora_rank": options.hidden // 2}
    values |= {family.width_key: wide}
    return family.ready_target(make_config(values, vocab_size=options.vocabulary, positions=64))


def make_students(folder: Path, options: argparse.Namespace) -> list[Path]:
    """Students of the asked type, one after the other."""
    made: list[Path] = []
    for number in range(options.students):
        student = from_config(families[options.family].student_config(target(options)), seed=number)
        student.to(dtype=DTYPES[options.dtype]).save_pretrained(folder / f"student-{number}")
        made.append(folder / f"student-{number}")
    return made


def make_dense(folder: Path, options: argparse.Namespace) -> None:
    """Dense models of the students' shapes, which mergekit-moe takes in their place."""
    heads = options.hidden // 64
    values = {
        **DENSE[options.family], "hidden_size": options.hidden, "num_hidden_layers": options.layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": 4 * options.hidden,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = make_config(values, vocab_size=options.vocabulary, positions=64)
    for number in range(options.students):
        from_config(config, seed=number).to(dtype=DTYPES[options.dtype]).save_pretrained(folder / f"dense-{number}")


def stored_as(folder: Path) -> str:
    """The type of a folder's weights."""
    found = next(iter(stored_tensors(folder).values())).spec.dtype
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[found]


def limit(students: list[Path], out: Path, moe: Any) -> None:
    """Read every byte of the students and write as many as the MoE has, in buffers as large as ours."""
    left = num_parameters(moe) * DTYPES[stored_as(students[0])].itemsize
    buffer = memoryview(bytearray(BUFFER))
    for folder in students:
        with (folder / "model.safetensors").open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    out.mkdir()
    with (out / "model.safetensors").open("wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(buffer[: min(left, BUFFER)])
        os.fsync(stream.fileno())


def ours(students: list[Path], out: Path, moe: Any) -> None:
    """Tensor by tensor, from disk to disk."""
    out.mkdir()
    with Reader() as reader:
        write_folder(out, merged_tensors(students, families[moe.model_type], moe, reader, 0), lambda _spec: None)


def in_memory(students: list[Path], out: Path, moe: Any) -> None:
    """Load, stack, save: what a run does with small models."""
    parts = open_students(students, family=families[moe.model_type], target=moe, slices=1)
    start = random_router(moe, family=families[moe.model_type], seed=0)
    model = merge(parts, start, family=families[moe.model_type], target=moe, options=MergeOptions(), seed=0)
    model.to(dtype=DTYPES[stored_as(students[0])]).save_pretrained(out)


def command(students: list[Path], out: Path, moe: Any) -> int:
    """`deepfusion merge`, which opens what it has written and compares it with each student."""
    moe.save_pretrained(target := students[0].parent / "target")
    what = ("--family", str(moe.model_type), "--target", str(target), "--out", str(out))
    return program(sys.executable, "-m", "deepfusion", "merge", *map(str, students), *what)


def command_imports(*_: Any) -> int:
    """What `command` takes before it begins."""
    return program(sys.executable, "-c", "import deepfusion.cli, deepfusion.merging")


def mergekit_imports(*_: Any) -> int:
    """What `mergekit` takes before it begins."""
    found = shutil.which("mergekit-moe")
    assert found is not None
    python = Path(found).read_text().splitlines()[0].removeprefix("#!")
    return program(python, "-c", "import mergekit.scripts.moe")


def mergekit(students: list[Path], out: Path, _target: Any) -> int:
    """mergekit-moe on dense models of the same shapes. It does not average what the experts share."""
    config, folders = out.with_suffix(".yml"), sorted(students[0].parent.glob("dense-*"))
    rows = "".join(f"  - source_model: {folder}\n    positive_prompts: [x]\n" for folder in folders)
    dtype = stored_as(folders[0])
    head = f"base_model: {folders[0]}\ngate_mode: random\ndtype: {dtype}\narchitecture: qwen3\nexperts:\n"
    config.write_text(head + rows)
    return program("mergekit-moe", str(config), str(out))


COLD = (command, command_imports, mergekit, mergekit_imports)
"""Ways that begin with a program."""
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def program(*command: str) -> int:
    """Run a program; its peak in KiB. A process counts its parent's memory as its own: a small one starts it."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def measure(way: Callable[..., int | None], *arguments: Any) -> tuple[float, float]:
    """Seconds, and peak memory in MiB: of a program all of it, else what is above that of the process before."""
    queue: Any = multiprocessing.get_context("fork").SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        whole = way(*arguments)
        taken = time.perf_counter() - began
        peak = whole if way in COLD else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        queue.put((taken, peak / 1024))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{way.__name__} failed")
    return queue.get()


def main() -> None:
    """Print one line of JSON for each way, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("students", 4), ("hidden", 768), ("layers", 8), ("vocabulary", 32_000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--family", choices=sorted(families), default="qwen3_moe")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    options = parser.parse_args()
    peer = shutil.which("mergekit-moe") and options.family in DENSE
    ways = [limit, ours, in_memory, command, command_imports, *([mergekit, mergekit_imports] if peer else [])]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        students, moe = make_students(folder, options), target(options)
        num_parameters(moe)  # remembered, so that its time is in no measurement
        if mergekit in ways:
            make_dense(folder, options)
        read = sum((student / "model.safetensors").stat().st_size for student in students)
        taken: dict[str, list[tuple[float, float]]] = {way.__name__: [] for way in ways}
        for repeat in range(options.repeats):  # in turn: the machine's moods meet all alike
            for way in ways:
                out = folder / f"{way.__name__}-{repeat}"
                taken[way.__name__].append(measure(way, students, out, moe))
                if way is ours and not repeat:
                    load_check(out, moe)
                shutil.rmtree(out, ignore_errors=True)
        for way, rows in taken.items():
            found[way] = {"seconds": statistics.median(s for s, _ in rows), "peak_mib": max(m for _, m in rows)}
            print(json.dumps({"way": way, "read_mib": read >> 20, **{k: round(v, 2) for k, v in found[way].items()}}))
    ratios = {
        f"{way}: seconds over limit": round(found[way]["seconds"] / found["limit"]["seconds"], 2)
        for way in ("ours", "in_memory", "command")
    }
    pairs = [("in_memory", "ours"), ("mergekit", "command")][: 1 + bool(peer)]
    for way, other in pairs:
        for what in ("seconds", "peak_mib"):
            ratios[f"{way}: {what} over {other}"] = round(found[way][what] / found[other][what], 1)
    if peer:
        above = {
            way: {what: found[way][what] - found[f"{way}_imports"][what] for what in found[way]} for way in pairs[1]
        }
        for what in ("seconds", "peak_mib"):
            ratios[f"mergekit: {what} over command, without imports"] = round(
                above["mergekit"][what] / above["command"][what], 1
            )
    print(json.dumps(ratios))


def load_check(out: Path, moe: Any) -> None:
    """What was written is a model."""
    moe.save_pretrained(out)
    experts = families[moe.model_type].num_experts
    assert experts(load(out).config) == experts(moe)


if __name__ == "__main__":
    main()
