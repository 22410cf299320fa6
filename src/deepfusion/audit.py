# SPDX-License-Identifier: Apache-2.0
"""`deepfusion audit`: can one tell from a run's models which documents its devices trained on (membership inference)?

Two attacks on each document's mean loss a token. "loss": it is low (Yeom et al. 2018). "reference": it is lower than that of a
model which has not seen the text, so that easy documents do not look like known ones (Watson et al. 2022).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from deepfusion.artifacts import write_atomic
from deepfusion.config import CONFIG, RunConfig, load_config
from deepfusion.data.prepare import PreparedData, load_prepared
from deepfusion.devices import models
from deepfusion.devices.fleet import cards
from deepfusion.errors import DataError
from deepfusion.membership import area, caught, matched, mean_area
from deepfusion.methods.rounds import read_round, round_folders
from deepfusion.run import private_corpus, text_is_here
from deepfusion.stages.evaluate import score_documents
from deepfusion.stages.proxy import load_proxies, load_upload
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, Progress, silent

FALSE_RATE = 0.01
CONTROL = "public text only"
LENGTHS = 8
"""Groups of length, by the quantiles of the test documents of a domain."""
FEWEST = 10
"""Members, and others, below which a model is not attacked."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Attack(_Part):
    """What an attack finds out.

    Attributes:
        auc: chance that a member looks more like one than another document does; 0.5 is guessing.
        low, high: 95% interval of `auc`, by resampling documents.
        caught: share of the members that it finds while it takes 1% of the others for members.
    """

    auc: float
    low: float
    high: float
    caught: float


class ModelAudit(_Part):
    """The attacks on one model; of a kind's row, their mean over the kind's models.

    Attributes:
        kind: "devices", "proxies", "fused MoE", or the control that has seen none of the text.
        members, others: documents of each.
    """

    kind: str
    name: str
    members: int
    others: int
    attacks: dict[str, Attack]


class Audit(_Part):
    """What `audit.json` holds."""

    name: str
    seed: int
    kinds: list[ModelAudit]
    models: list[ModelAudit]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Suspect:
    """A model and the text that it may have been trained on, by the devices that this is of."""

    kind: str
    name: str
    open: Callable[[], PreTrainedModel]
    devices: tuple[str, ...]


def audit_run(path: Path, *, most: int = 500, seed: int = 0, progress: Progress = silent) -> Audit:
    """Attack the models of a finished run, and write `audit.json` beside them.

    Members are documents of the private text of the devices that a model has learnt from. Others are test documents, which
    nobody has trained on: of the same domains and groups of length, equally many of each side, drawn once for each model. A
    test text that stands in any training text is left out.

    Args:
        path: a run folder.
        most: documents of each side at most, for one model.

    Raises:
        DataError: there is no finished run, or no text of its devices on this machine.
    """
    if not (path / CONFIG).exists() or not (path / "moe").exists():
        raise DataError(f"{path}: no finished run; give a run folder, after `deepfusion run`")
    config, data = load_config(path / CONFIG), load_prepared(path / "data")
    texts = {card.id: private_corpus(config, data, card.id) for card in cards(config.devices, config.seed)
             if text_is_here(config, card.id)}  # fmt: skip
    if not texts:
        raise DataError(
            f"{path}: the devices' text is not on this machine, so nothing can be compared; audit a `deepfusion run`"
        )
    others, notes = _unseen(data, texts.values()), list[str]()
    control = path / "reference" / "moe"
    reference = models.load(control) if control.exists() else None
    if reference is None:
        notes.append("no attack by reference: the run has no model from public text alone ([evaluate] public_only)")
    found: list[tuple[ModelAudit, dict[str, tuple[np.ndarray, np.ndarray]]]] = []
    suspects, strata = list(_suspects(path, config, tuple(texts))), _Strata(others)
    for done, suspect in enumerate(suspects):
        progress("audit", done, len(suspects), suspect.name)
        members = _Side([texts[device] for device in suspect.devices])
        rows = matched(strata.of(members.corpora), strata.of([others]), derive_seed(seed, suspect.name), most)
        if len(rows[0]) < FEWEST:
            notes.append(f"{suspect.name}: {len(rows[0])} matched documents are too few; it is left out")
            continue
        sides = (members.select(rows[0]), _Side([others]).select(rows[1]))
        found.append(_attacked(suspect, sides, reference, config.data.sequence_length))
    progress("audit", len(suspects), len(suspects), "")
    kinds = [
        _kind(kind, [one for one in found if one[0].kind == kind]) for kind in dict.fromkeys(m.kind for m, _ in found)
    ]
    result = Audit(name=config.name, seed=config.seed, kinds=kinds, models=[model for model, _ in found], notes=notes)
    write_atomic(path / "audit.json", result.model_dump_json(indent=1))
    return result


def audit_table(found: Audit) -> Table:
    """A row for each kind of model."""
    table = Table(title="Membership inference: AUC, its 95% interval, and members caught at 1% false alarms",
                  title_justify="left", box=SIMPLE_HEAD)  # fmt: skip
    attacks = list(dict.fromkeys(name for kind in found.kinds for name in kind.attacks))
    for column in (
        "models of",
        "number",
        "members",
        *(f"{name}: {what}" for name in attacks for what in ("AUC", "caught")),
    ):
        table.add_column(column, justify="left" if column == "models of" else "right")
    for kind in found.kinds:
        number = sum(model.kind == kind.kind for model in found.models)
        cells: list[str] = []
        for attack in (kind.attacks.get(name) for name in attacks):
            cells += (
                [f"{attack.auc:.3f} ({attack.low:.3f} to {attack.high:.3f})", f"{attack.caught:.1%}"]
                if attack
                else ["", ""]
            )
        table.add_row(kind.kind, str(number), str(kind.members), *cells)
    table.caption, table.caption_justify = (
        "\n".join(["0.5 is guessing, 1 certainty.", *map(escape, found.notes)]),
        "left",
    )
    return table


class _Side:
    """The documents of several stores, as one list."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = list(corpora)

    def select(self, rows: np.ndarray) -> list[Corpus]:
        """Those at the given places of the list, as views."""
        starts = np.concatenate([[0], np.cumsum([len(corpus) for corpus in self.corpora])])
        return [
            corpus.select(rows[(rows >= begin) & (rows < begin + len(corpus))] - begin)
            for corpus, begin in zip(self.corpora, starts[:-1], strict=True)
        ]


class _Strata:
    """A document's domain and group of length. Documents of a domain without a test text have a group of their own."""

    def __init__(self, others: Corpus) -> None:
        self._edges = {
            name: np.quantile(part.lengths_U, np.arange(1, LENGTHS) / LENGTHS)
            for name in others.domains
            if len(part := others.of_domain(name))
        }

    def of(self, corpora: Sequence[Corpus]) -> list[tuple[str, int]]:
        """Of each document of several corpora."""
        return [
            (name := corpus.domains[domain], int(np.searchsorted(self._edges.get(name, np.zeros(0)), length)))
            for corpus in corpora
            for domain, length in zip(corpus.domain_U.tolist(), corpus.lengths_U.tolist(), strict=True)
        ]


def _unseen(data: PreparedData, private: Iterable[Corpus]) -> Corpus:
    """Test documents whose text is in nobody's training text."""
    seen = {text for corpus in (data.public, *private) for text in corpus.texts()}
    return data.test.select(np.asarray([i for i, text in enumerate(data.test.texts()) if text not in seen], np.int64))


def _suspects(path: Path, config: RunConfig, here: tuple[str, ...]) -> Iterator[_Suspect]:
    sent = path / "initial.json"  # of a method whose devices upload models
    starts = {name: Path(at) for name, at in json.loads(sent.read_text()).items()} if sent.exists() else {}
    for card in cards(config.devices, config.seed) if starts else ():
        upload, start = path / "uploads" / f"{card.id}.safetensors", starts[card.model.name]
        if card.id in here and upload.exists():
            yield _Suspect("devices", card.id, partial(load_upload, upload, start), (card.id,))
    for proxy in load_proxies(path / "proxies") if (path / "proxies" / "proxies.json").exists() else ():
        if set(proxy.members) <= set(here):
            yield _Suspect("proxies", f"proxy {proxy.folder.name}", partial(models.load, proxy.folder), proxy.members)
    taught = _taught(path, config, here)
    for kind, folder in (("fused MoE", path / "moe"), (CONTROL, path / "reference" / "moe")):
        if folder.exists():
            yield _Suspect(kind, kind, partial(models.load, folder), taught)


def _taught(path: Path, config: RunConfig, here: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that the MoE has learnt from, by proxies or in rounds; all that are here where there is neither.

    Who was not asked, failed or was left out is no member: its text would pull the attacks towards guessing.
    """
    proxies = load_proxies(path / "proxies") if (path / "proxies" / "proxies.json").exists() else []
    rounds = round_folders(path, config.method)
    if not proxies and not rounds:
        return here
    said = {device for proxy in proxies for device in proxy.members}
    said |= {device for folder in rounds for device in read_round(folder)["answered"]}
    return tuple(device for device in here if device in said)


def _attacked(
    suspect: _Suspect, sides: tuple[list[Corpus], list[Corpus]], reference: PreTrainedModel | None, length: int
) -> tuple[ModelAudit, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The attacks on a model, and the scores of members and others that they go by: high for a member."""
    model = suspect.open()
    losses = [_losses(model, side, length) for side in sides]
    there = [np.isfinite(side) for side in losses]
    scores = {"loss": (-losses[0][there[0]], -losses[1][there[1]])}
    if reference is not None and suspect.kind != CONTROL:
        members_U, others_V = ((_losses(reference, side, length) - own)[kept]
                               for side, own, kept in zip(sides, losses, there, strict=True))  # fmt: skip
        scores["reference"] = (members_U, others_V)
    audit = ModelAudit(
        kind=suspect.kind, name=suspect.name, members=int(there[0].sum()), others=int(there[1].sum()),
        attacks={name: _attack([pair]) for name, pair in scores.items()},
    )  # fmt: skip
    return audit, scores


def _attack(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Attack:
    interval = mean_area(pairs)
    share = float(np.mean([caught(*pair, FALSE_RATE) for pair in pairs]))
    return Attack(
        auc=float(np.mean([area(*pair) for pair in pairs])), low=interval.low, high=interval.high, caught=share
    )


def _kind(kind: str, found: Sequence[tuple[ModelAudit, dict[str, tuple[np.ndarray, np.ndarray]]]]) -> ModelAudit:
    attacks = {name: _attack([scores[name] for _, scores in found]) for name in found[0][1]}
    members, others = (sum(getattr(model, side) for model, _ in found) for side in ("members", "others"))
    return ModelAudit(kind=kind, name=f"mean of {len(found)}", members=members, others=others, attacks=attacks)


def _losses(model: PreTrainedModel, corpora: Sequence[Corpus], length: int) -> np.ndarray:
    """Mean loss a token of each document, in nats; infinite where no token counts."""
    scores = [score for corpus in corpora if len(corpus) for score in score_documents(model, corpus, length)]
    return np.asarray([score.nll / score.tokens if score.tokens else np.inf for score in scores])
