# SPDX-License-Identifier: Apache-2.0
"""What fewer bits cost: bytes of real uploads in each [upload] format against fp16, and what they do to the models.

Reads the uploads of finished runs. Every model is written in each format, read back, and scored on validation text. With
--fuse the rest of the run, from the proxies on, is made again from what the server then has, in a folder beside the run.

python benchmarks/uploads.py RUN [RUN ...] [--documents 200] [--fuse int8 nf4 nf4:1] [--steps 200 80]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from replay import Fused, Replay, first_weights, fuse_again, shorter

from deepfusion.config import CONFIG, load_config
from deepfusion.data.packing import Corpus
from deepfusion.data.prepare import load_corpus
from deepfusion.devices.models import load
from deepfusion.federation.formats import Format, restore
from deepfusion.federation.payload import encode
from deepfusion.methods.exchange import with_prefix
from deepfusion.methods.gathering import UploadOptions
from deepfusion.stages.evaluate import Score, score_documents
from deepfusion.stages.proxy import MODEL, read_model
from deepfusion.state_dicts import load_distinct

FORMATS: tuple[Format, ...] = get_args(Format)


def measure(run: Path, documents: int) -> dict[str, tuple[float, float]]:
    """By format: bytes as a share of the same models in fp16, and their mean log-perplexity on validation text."""
    validation = load_corpus(run / "data" / "validation")
    rows = list(range(0, len(validation), max(1, len(validation) // documents)))
    text: Corpus = validation.select(rows)
    length = load_config(run / CONFIG).data.sequence_length
    initials = {name: Path(path) for name, path in json.loads((run / "initial.json").read_text()).items()}
    found: dict[str, tuple[float, float]] = {}
    for form in FORMATS:
        replay, sent, nats = Replay(run, UploadOptions(format=form)), 0, list[float]()
        for path in sorted((run / "uploads").glob("*.safetensors")):
            answer = replay.answer(path.stem, MODEL)
            architecture = str(answer.metadata["architecture"])
            start, model = first_weights(run, architecture), load(initials[architecture])
            sent += len(encode(answer))
            load_distinct(model, restore(with_prefix(answer, MODEL), start, form, start, path.stem))
            nats.append(sum(score_documents(model, text, length), Score()).log_perplexity)
        found[form] = sent / fp16_bytes(run), statistics.mean(nats)
    return found


def fuse(run: Path, form: Format, medoids: int | None, steps: Sequence[int] | None) -> Fused:
    """The MoE from uploads in this format.

    Args:
        medoids: models that are asked for of each domain and architecture; those of all devices when left out.
        steps: of distillation and tuning, in place of the run's.
    """
    config = load_config(run / CONFIG)
    if steps:
        config = shorter(config, *steps)
    select = UploadOptions(format=form, select="medoids", medoids=medoids) if medoids else UploadOptions(format=form)
    name = "-".join(str(part) for part in (run.name, form, medoids, *(steps or ())) if part)
    return fuse_again(config, run.with_name(name), Replay(run, select))


def fp16_bytes(run: Path) -> int:
    """What all models of a run weigh in fp16, 2 bytes a number: the paper's upload."""
    paths = (run / "uploads").glob("*.safetensors")
    return sum(2 * tensor.numel() for path in paths for tensor in read_model(path).values())


def main() -> None:
    """Print one line for each format, and one for each way that is fused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--documents", type=int, default=200, help="of validation text; 0 goes on to --fuse at once")
    parser.add_argument(
        "--fuse", nargs="*", default=[], metavar="WAY", help='a format, or a format and medoids: "nf4:1"'
    )
    parser.add_argument("--steps", type=int, nargs=2, metavar=("DISTIL", "TUNE"), help="in place of the runs' own")
    asked = parser.parse_args()
    print(f"{len(asked.runs)} runs; changes of log-perplexity against fp32, mean over runs (and each run's)\n")
    if asked.documents:
        print("| format | bytes up, of fp16 | devices' models |\n|---|---|---|")
        found = [measure(run, asked.documents) for run in asked.runs]
        for form in FORMATS:
            share = statistics.mean(rows[form][0] for rows in found)
            changes = [rows[form][1] / rows["fp32"][1] - 1 for rows in found]
            print(f"| {form} | {share:.1%} | {told(changes)} |", flush=True)
    if not asked.fuse:
        return
    print("\n| uploads | bytes up, of fp16 | up and down, of fp16 up | fused MoE, test text |\n|---|---|---|---|")
    half = [fp16_bytes(run) for run in asked.runs]
    first: list[float] = []
    for way in dict.fromkeys(["fp32", *asked.fuse]):
        form, _, medoids = way.partition(":")
        again = [fuse(run, form, int(medoids) if medoids else None, asked.steps) for run in asked.runs]
        first = first or [one.nats for one in again]
        up, both = (statistics.mean(n / h for n, h in zip(sizes, half, strict=True)) for sizes in (
            [one.up for one in again], [one.up + one.down for one in again]))  # fmt: skip
        change = told([one.nats / before - 1 for one, before in zip(again, first, strict=True)])
        what = form + (f", {medoids} of each domain and architecture" if medoids else ", all devices")
        print(f"| {what} | {up:.1%} | {both:.1%} | {change} |", flush=True)


def told(changes: list[float]) -> str:
    """A mean, and what it is the mean of."""
    return f"{statistics.mean(changes):+.3%} ({', '.join(f'{change:+.3%}' for change in changes)})"


if __name__ == "__main__":
    main()
