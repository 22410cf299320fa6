# SPDX-License-Identifier: Apache-2.0
"""Distil any causal LM folders into another on any text: `deepfusion distill`, without a fleet and without a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from deepfusion.artifacts import key_of, write_atomic
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import corpus_from_files
from deepfusion.devices.configurations import reach_of, read_config
from deepfusion.errors import ConfigError, DeepFusionError, ModelError
from deepfusion.inference import check_length
from deepfusion.moe import Family, families
from deepfusion.stages.distill import DistillOptions, Logits, Vaa, distill
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, Progress, Proxy, State, silent

USUAL_LENGTH = 512
"""Tokens of a sequence where nobody asks for another number and all models reach that far."""


@dataclass(frozen=True, kw_only=True)
class _Whole(Family):
    """A student of which nothing becomes an expert: any causal LM."""

    def split(self, student: Mapping[str, torch.Tensor], target: object, *, slices: int = 1) -> tuple[State, State]:
        """All of it is shared."""
        return dict(student), {}


def distill_folders(
    teachers: Sequence[Path],
    student: Path,
    data: str | Sequence[str],
    out: Path,
    *,
    text: str | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    sequence_length: int | None = None,
    options: DistillOptions,
    seed: int = 0,
    resume: bool = False,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Train a student under one or more teachers (DeepFusion, eq. 11), all of one tokenizer, and save it to `out`.

    Output matrices may be padded to unlike heights: the KL is over the rows that all models have.
    Killed and started again with `resume` and the same arguments, it ends with the same bytes.

    Args:
        teachers: Hugging Face folders; all weigh alike.
        student: folder of the model to start from, which is not changed; its tokenizer reads the text.
        data: .jsonl, .csv, .parquet or .txt file(s).
        text, prompt, answer: templates as in `evaluate_model`; alpha = 0 in `options` leaves VAA out.
        sequence_length: tokens; as many as all models read, 512 at most, when left out.

    Returns:
        What was logged of each step: `loss`, `ce`, `kl`, `features`.

    Raises:
        ConfigError: an option that cannot be meant, or `out` exists.
        ModelError: a model cannot be opened, or a teacher has another vocabulary, or one too small for the text.
        DataError: the text cannot be read.
    """
    partial = out.parent / f"{out.name}.partial"
    _check(out, partial, options, resume=resume)
    config = read_config(student)
    configs = {student: config, **{folder: read_config(folder) for folder in teachers}}
    length = _length(sequence_length, configs)
    corpus = corpus_from_files(data, "public", student, text=text, prompt=prompt, answer=answer)
    _check_reads(configs, corpus)
    arguments = [str(folder) for folder in teachers], str(student), data, text, prompt, answer, length
    scratch = partial / key_of(*arguments, asdict(options), seed)[:12]
    proxies = [Proxy(0, folder.name, folder, 0, (), 1 / len(teachers)) for folder in teachers]
    partial.mkdir(parents=True, exist_ok=True)
    try:
        history = distill(
            student, [proxies], [PackedText(corpus, length, derive_seed(seed, "text"))], family=_family(config),
            target=config, rule=Vaa() if options.alpha else Logits(), recipe="joint",
            options=replace(options, beta=options.beta if teachers else 0.0), seed=seed, tokenizer_folder=student,
            scratch=scratch, progress=progress, out=partial,
        )  # fmt: skip
    except DeepFusionError:
        with suppress(OSError):  # there is something in it
            partial.rmdir()  # or the mended command would be told that it was begun before
        raise
    write_atomic(partial / "0" / "history.json", json.dumps(history["joint"]))
    os.replace(partial / "0", out)
    shutil.rmtree(partial, ignore_errors=True)
    return history["joint"]


def _check(out: Path, partial: Path, options: DistillOptions, *, resume: bool) -> None:
    """Raise ConfigError where the command cannot be meant."""
    faults = [*options.faults(), *options.optimisation.faults()]
    if out.exists():
        faults.append(f"--out {out}: exists already; choose another folder, or remove it")
    if partial.exists() and not resume:
        faults.append(f"--out {out}: was begun before; add --resume to go on, or remove {partial}")
    if faults:
        raise ConfigError(faults, "command line")


def _length(asked: int | None, configs: Mapping[Path, PreTrainedConfig]) -> int:
    """Tokens of a sequence that every model can read."""
    reaches = {folder: reach for folder, config in configs.items() if (reach := reach_of(config)) is not None}
    if asked is None:
        return min([USUAL_LENGTH, *reaches.values()])
    check_length(asked)
    if short := [f"{folder} reads {reach} tokens" for folder, reach in reaches.items() if reach < asked]:
        cure = f"choose {min(reaches.values())} or less"
        raise ConfigError([f"--sequence-length {asked}: {', '.join(short)} at most; {cure}"], "command line")
    return asked


def _check_reads(configs: Mapping[Path, PreTrainedConfig], corpus: Corpus) -> None:
    """Raise ModelError where a model has no embedding for a token of the text."""
    last = int(corpus.token_ids.max())
    for folder, config in configs.items():
        if (size := int(config.get_text_config().vocab_size)) <= last:
            raise ModelError(
                f"{folder}: its vocab_size is {size}, but the student's tokenizer gives the text token {last}; "
                "give models of one tokenizer, with an embedding for each token"
            )


def _family(config: PreTrainedConfig) -> Family:
    """A student of one routed expert is trained as the plain MLP that it is, any other as transformers has it."""
    family = families.get(config.model_type)
    if family is not None and family.student == "single" and family.num_experts(config) == 1:
        return family
    return _Whole(model_type=config.model_type, num_experts_key="", layers="all", student="dense")
