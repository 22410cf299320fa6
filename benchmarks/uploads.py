# SPDX-License-Identifier: Apache-2.0
"""What fewer bits cost: bytes of real uploads in each [upload] format against fp16, and what they do to the models.

Reads the uploads of finished runs. Every model is written in each format, read back, and scored on validation text. With
--fuse the rest of the run, from the proxies on, is made again from the models that came back, in a folder beside the run.

python benchmarks/uploads.py RUN [RUN ...] [--documents 200] [--fuse int8 nf4]
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import get_args

from safetensors.torch import load_file

from deepfusion.app import launch
from deepfusion.artifacts import RunFolder, start_from
from deepfusion.config import RunConfig, load_config
from deepfusion.data.packing import Corpus
from deepfusion.data.prepare import load_corpus, load_prepared
from deepfusion.devices.models import load
from deepfusion.federation.formats import Format, restore, shrink
from deepfusion.federation.payload import encode, read_file
from deepfusion.federation.spool import Spool
from deepfusion.methods import DeepFusion
from deepfusion.run import CONFIG, make_site
from deepfusion.stages.evaluate import Score, score_documents
from deepfusion.stages.proxy import MODEL
from deepfusion.state_dicts import distinct_state, load_distinct
from deepfusion.types import Payload, State

FORMATS: tuple[Format, ...] = get_args(Format)


def wire_of(payload: Payload, form: Format, start: State) -> Payload:
    """The payload as a device of this format sends it."""
    model = {name.removeprefix(MODEL): t for name, t in payload.arrays.items() if name.startswith(MODEL)}
    rest = {name: t for name, t in payload.arrays.items() if not name.startswith(MODEL)}
    return replace(payload, arrays={**rest, **{MODEL + n: t for n, t in shrink(model, form, start).items()}})


def model_of(wire: Payload, form: Format, start: State) -> State:
    """The model that the server reads out of it."""
    model = {name.removeprefix(MODEL): t for name, t in wire.arrays.items() if name.startswith(MODEL)}
    return restore(model, start, form, start, "a device")


def measure(run: Path, documents: int) -> dict[str, tuple[float, float]]:
    """By format: bytes as a share of the same models in fp16, and their mean log-perplexity on validation text."""
    validation = load_corpus(run / "data" / "validation")
    rows = list(range(0, len(validation), max(1, len(validation) // documents)))
    text: Corpus = validation.select(rows)
    length = load_config(run / CONFIG).data.sequence_length
    initials = {name: Path(path) for name, path in json.loads((run / "initial.json").read_text()).items()}
    found: dict[str, tuple[float, float]] = {}
    for form in FORMATS:
        sent = half = 0
        nats: list[float] = []
        for path in sorted((run / "uploads").glob("*.safetensors")):
            payload = read_file(path, source=path.stem)
            model = load(initials[str(payload.metadata["architecture"])])
            start = {name: tensor.clone() for name, tensor in distinct_state(model).items()}
            wire = wire_of(payload, form, start)
            sent += len(encode(wire))
            half += 2 * sum(tensor.numel() for tensor in start.values())
            load_distinct(model, model_of(wire, form, start))
            nats.append(sum(score_documents(model, text, length), Score()).log_perplexity)
        found[form] = sent / half, statistics.mean(nats)
    return found


def fuse(run: Path, form: Format) -> float:
    """Log-perplexity on test text of the MoE that is fused from uploads in this format."""
    config: RunConfig = load_config(run / CONFIG)
    method = config.method
    assert isinstance(method, DeepFusion)
    config = replace(config, method=replace(method, upload=replace(method.upload, format=form)))
    folder = run.with_name(f"{run.name}-{form}")
    start_from(run, folder, only=("data", "initial.json"))
    assert isinstance(config.method, DeepFusion)
    site = make_site(config, RunFolder(folder), load_prepared(folder / "data"))
    initials = {name: Path(path) for name, path in json.loads((run / "initial.json").read_text()).items()}
    spool = Spool(folder / "uploads", config.method.upload_key(site))
    for path in sorted((run / "uploads").glob("*.safetensors")):
        payload = read_file(path, source=path.stem)
        start = load_file(initials[str(payload.metadata["architecture"])] / "model.safetensors")
        start = {name: tensor for name, tensor in start.items() if MODEL + name in payload.arrays}
        state = model_of(wire_of(payload, form, start), form, start)
        rest = {name: t for name, t in payload.arrays.items() if not name.startswith(MODEL)}
        spool.put(path.stem, replace(payload, arrays={**rest, **{MODEL + name: t for name, t in state.items()}}))
    record = launch(config, folder, resume=True)
    assert record is not None
    return record.metrics.log_perplexity


def main() -> None:
    """Print one line for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--documents", type=int, default=200, help="of validation text")
    parser.add_argument("--fuse", nargs="*", choices=FORMATS, default=[], metavar="FORMAT")
    asked = parser.parse_args()
    found = [measure(run, asked.documents) for run in asked.runs]
    print(f"{len(found)} runs; changes of log-perplexity against fp32, mean over runs (and each run's)\n")
    print("| format | bytes, of fp16 | devices' models | fused MoE |\n|---|---|---|---|")
    whole = [json.loads((run / "record.json").read_text())["metrics"]["log_perplexity"] for run in asked.runs]
    for form in FORMATS:
        share = statistics.mean(rows[form][0] for rows in found)
        changes = [rows[form][1] / rows["fp32"][1] - 1 for rows in found]
        fused = ""
        if form in asked.fuse:
            fused = told([fuse(run, form) / before - 1 for run, before in zip(asked.runs, whole, strict=True)])
        print(f"| {form} | {share:.1%} | {told(changes)} | {fused} |", flush=True)


def told(changes: list[float]) -> str:
    """A mean, and what it is the mean of."""
    return f"{statistics.mean(changes):+.3%} ({', '.join(f'{change:+.3%}' for change in changes)})"


if __name__ == "__main__":
    main()
