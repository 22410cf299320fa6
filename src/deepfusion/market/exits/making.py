# SPDX-License-Identifier: Apache-2.0
"""From a model folder and text to a table on disk: train exits, measure them, save (`deepfusion market profile`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deepfusion.artifacts import write_atomic
from deepfusion.data.embedded import EMBEDDED, embedded_documents
from deepfusion.data.packing import PackedText
from deepfusion.data.prepare import source_of_files, tokenise
from deepfusion.data.sources import Document, read_documents
from deepfusion.devices.configurations import reach_of, read_config
from deepfusion.devices.features import num_blocks
from deepfusion.devices.models import load
from deepfusion.errors import ConfigError, DataError
from deepfusion.market.exits.backbone import Backbone
from deepfusion.market.exits.costs import Costs, costs_of
from deepfusion.market.exits.heads import TENSORS, ExitHeads, exit_faults, load_heads, save_heads, saved_exits
from deepfusion.market.exits.leaving import Confidence
from deepfusion.market.exits.table import Measured, Request, measure, to_profile
from deepfusion.market.exits.training import train_heads
from deepfusion.market.profiles import Profile
from deepfusion.training import Optimisation, derive_seed, to_device
from deepfusion.types import Corpus, Progress, silent

HELD_OUT = 5
"""One document out of so many is measured on, and never trained on."""
RECORD = "measured.json"


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How a profile is made.

    Attributes:
        exits: blocks after which exits stand; the last block is added. Empty: after each quarter of the blocks.
        width: of an exit's adapter; None is the model's own width.
        steps: training steps of the exits.
        prompt: tokens of a sample's prompt.
        made: tokens that are generated after it.
        rows: samples of held-out text that are measured.
        confidence: "probability" (the largest) or "entropy" (1 - entropy / log V).
        seed: of the adapters and of the text's order.
        optimisation: of the exits.
    """

    exits: tuple[int, ...] = ()
    width: int | None = None
    steps: int = 400
    prompt: int = 64
    made: int = 32
    rows: int = 256
    confidence: Confidence = "probability"
    seed: int = 0
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(learning_rate=1e-3))

    def faults(self) -> Iterator[str]:
        """What is wrong with the values, and the cure."""
        for name, least in (("prompt", 1), ("made", 1), ("rows", 1), ("steps", 0), ("seed", 0)):
            if getattr(self, name) < least:
                yield f"{name} = {getattr(self, name)}: choose {least} or more"
        if self.width is not None and self.width < 1:
            yield f"width = {self.width}: an adapter needs a width of 1 or more; leave it out for the model's own"

    def exit_blocks(self, blocks: int) -> tuple[int, ...]:
        """x_1 .. x_M of a model of so many blocks."""
        if self.exits:
            return tuple(sorted({*self.exits, blocks}))
        return tuple(sorted({-(-blocks * quarter // 4) for quarter in (1, 2, 3, 4)}))


@dataclass(frozen=True)
class Plan:
    """What `make_profile` would do, without the model's weights having been read.

    Attributes:
        exit_blocks: x_1 .. x_M.
        head_numbers: numbers that are trained.
        shared_numbers: numbers of the output matrix that all exits share.
        trained_tokens: tokens that the training reads.
        files: what would be written.
    """

    exit_blocks: tuple[int, ...]
    head_numbers: int
    shared_numbers: int
    trained_tokens: int
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Made:
    """A profile, what it was made of, and where it lies."""

    profile: Profile
    measured: Measured
    costs: Costs
    history: list[dict[str, float]]
    path: Path
    folder: Path


def plan_profile(model: str, out: Path, name: str, options: ProfileOptions, heads_from: Path | None = None) -> Plan:
    """Check everything that can be checked before the model is opened; arguments are those of `make_profile`.

    Raises:
        ConfigError: options cannot be meant, or the profile is there already; all faults at once.
        ModelError: there is no such model.
    """
    config = read_config(model)
    table, folder, hidden = out / f"{name}.json", out / name, int(config.hidden_size)
    exits = saved_exits(heads_from) if heads_from else options.exit_blocks(num_blocks(config))
    sample, reach = options.prompt + options.made, reach_of(config)
    faults = [*options.faults(), *options.optimisation.faults(), *exit_faults(exits, num_blocks(config))]
    if reach is not None and sample > reach:
        faults.append(f"prompt + made = {sample} tokens: the model reaches {reach}; give shorter ones")
    if heads_from and (options.exits or options.width):
        faults.append(f"--heads {heads_from}: its exits stand where they stand; remove --exits and --width")
    if Path(name).name != name or name.startswith(".") or not name.isprintable() or len(name) > 200:
        faults.append(f"--name {name!r}: becomes a file's name; choose a plain one")
    elif table.exists():
        faults.append(f"{table}: exists already; choose another --out or --name, or remove it")
    if faults:
        raise ConfigError(faults, "command line")
    return Plan(
        exits,
        0 if heads_from else (len(exits) - 1) * 2 * hidden * (options.width or hidden),
        hidden * int(config.vocab_size),
        0 if heads_from else options.steps * options.optimisation.batch_size * sample,
        (table, folder / TENSORS, folder / RECORD),
    )


def read_text(
    model: str, data: Sequence[str], *, text: str | None = None, prompt: str | None = None, answer: str | None = None
) -> tuple[Corpus, Corpus]:
    """Text to train on, and text to measure on: a fifth of the documents by a hash of their text, so never the same.

    Without `data` both come out of the embedded set, as far as its packages are installed.

    Raises:
        ConfigError: the templates cannot be meant.
        DataError: the text cannot be read, or there is too little of it to hold any back.
    """
    if data:
        documents = read_documents(source_of_files(data, "test", text, prompt, answer), "test", Path())
        held = [int.from_bytes(document.order[:4]) % HELD_OUT == 0 for document in documents]
        parts = [[d for d, is_held in zip(documents, held, strict=True) if is_held == kept] for kept in (False, True)]
    else:
        parts = [_embedded("public"), _embedded("test")]
    if not all(parts):
        raise DataError("--data: too few documents to hold some back for measuring; give ten or more")
    domains = tuple(sorted({document.domain for part in parts for document in part}))
    train, test = (tokenise(part, domains, Path(model)) for part in parts)
    return train, test


def make_profile(
    model: str,
    texts: tuple[Corpus, Corpus],
    out: Path,
    name: str,
    options: ProfileOptions,
    *,
    heads_from: Path | None = None,
    progress: Progress = silent,
) -> Made:
    """Train exits on the first text, measure them on the second, and write `<out>/<name>.json` and `<out>/<name>/`.

    Args:
        heads_from: a folder of exits trained before for this very model; nothing is trained then.

    Raises:
        DeepFusionError: whatever the user can mend, with its cure.
    """
    exits = plan_profile(model, out, name, options, heads_from).exit_blocks
    out.mkdir(parents=True, exist_ok=True)  # if it cannot be, nobody has trained for nothing
    backbone = Backbone(to_device(load(model), options.optimisation))
    train, test = (
        PackedText(text, options.prompt + options.made, derive_seed(options.seed, "exits")) for text in texts
    )
    history: list[dict[str, float]] = []
    if heads_from is None:
        heads = ExitHeads(backbone, exits, options.width or backbone.hidden_size, seed=options.seed)
        history = train_heads(
            heads, train, steps=options.steps, optimisation=options.optimisation, seed=options.seed, progress=progress
        )
    else:
        heads = load_heads(heads_from, backbone)
    save_heads(heads, out / name)  # before anything is measured: they can be measured again
    costs, request = costs_of(heads), Request(options.prompt, options.made)
    measured = measure(
        heads, test, request, costs, rows=min(options.rows, test.num_rows),
        batch_size=options.optimisation.batch_size, kind=options.confidence, progress=progress,
    )  # fmt: skip
    profile = to_profile(name, measured, costs, request)
    made = Made(profile, measured, costs, history, out / f"{name}.json", out / name)
    record = {"options": asdict(options), "measured": asdict(measured), "costs": asdict(costs), "history": history}
    write_atomic(made.folder / RECORD, json.dumps(record, indent=1))
    profile.save(made.path)  # last: a table that is there is whole
    return made


def _embedded(split: str) -> list[Document]:
    found: list[Document] = []
    for domain in EMBEDDED:
        try:
            found += [Document(domain, None, text) for text in embedded_documents(domain, split)]
        except DataError:
            continue  # its package is not installed; two of the domains always are
    return found
