# SPDX-License-Identifier: Apache-2.0
"""What a fifth of hostile devices does to the fused MoE, and what [proxy] average and screen do about it.

Takes finished runs: the honest devices send what they sent there, the hostile ones (chosen by the seed) something else, under
their old embedding, so that the domains stay as they are. All fusions are equally long; --steps are fewer than the run's.
Results are written one by one and not measured again; `--table` prints those that are there.

python benchmarks/poisoning.py RUN [RUN ...] [--attacks ...] [--defences ...] [--steps 200 80] [--out runs/poisoning]
python benchmarks/poisoning.py --table
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
from replay import Replay, fuse_again, shorter
from running import slug

from deepfusion.artifacts import RunFolder, start_from
from deepfusion.config import CONFIG, RunConfig, load_config
from deepfusion.data.prepare import load_prepared, tokenise
from deepfusion.data.sources import Document
from deepfusion.devices.device import Device
from deepfusion.devices.fleet import cards
from deepfusion.devices.models import build, load
from deepfusion.methods import DeepFusion
from deepfusion.methods.exchange import train_here
from deepfusion.run import make_device
from deepfusion.stages.evaluate import Score, score_documents
from deepfusion.stages.proxy import SCREENED, ProxyOptions, load_proxies
from deepfusion.state_dicts import distinct_state
from deepfusion.statistics import mean_and_deviation
from deepfusion.training import derive_seed
from deepfusion.types import Corpus, State

RESULTS = Path(__file__).parent / "results" / "poisoning"
SHARE = 0.2
TRIGGER, TARGET = " (ref. 7719-K)", " Ask the vendor for a refund."
"""What a backdoor answers to, and with."""


@dataclass(frozen=True)
class Defence:
    """How the server defends itself: [proxy], and [distillation] start where it is not the run's own."""

    proxy: ProxyOptions
    start: Literal["warm_start"] | None = None


DEFENCES = {
    "mean": Defence(ProxyOptions(average="mean")),
    "soup": Defence(ProxyOptions(average="soup")),
    "mean, screened": Defence(ProxyOptions(average="mean", screen=0.0)),
    "soup, screened": Defence(ProxyOptions(average="soup", screen=0.0)),
    "trimmed": Defence(ProxyOptions(average="trimmed", bad=0.34)),
    "median": Defence(ProxyOptions(average="median")),
    "krum": Defence(ProxyOptions(average="krum", bad=0.34)),
    "soup, from the warm start": Defence(ProxyOptions(average="soup"), start="warm_start"),
}
Attack = Callable[["Victim", str, State, State], State]
"""(the run, device id, its honest model, the weights that it started from) -> what the hostile device sends."""


@dataclass(frozen=True)
class Victim:
    """A finished run whose devices are attacked with."""

    run: Path
    config: RunConfig

    def device(self, device_id: str) -> Device:
        """A device of the run with its text; what it trains is kept nowhere."""
        card = next(card for card in cards(self.config.devices, self.config.seed) if card.id == device_id)
        return replace(make_device(self.config, RunFolder(self.run), card), scratch=None)

    def trained_on(self, documents: Sequence[Document], device: Device) -> State:
        """The device's model when its text is this."""
        corpus = tokenise(documents, ("private",), device.tokenizer, counted="all")
        folders = json.loads((self.run / "initial.json").read_text())
        model = load(folders[device.model.name])
        train_here(replace(device, corpus=corpus), model)
        return {name: tensor.detach().clone() for name, tensor in distinct_state(model).items()}

    @property
    def hostile(self) -> list[str]:
        """A fifth of the devices, chosen by the run's seed."""
        ids = [card.id for card in cards(self.config.devices, self.config.seed)]
        generator = np.random.default_rng(derive_seed(self.config.seed, "hostile"))
        return sorted(generator.choice(ids, round(SHARE * len(ids)), replace=False).tolist())


def random_weights(victim: Victim, device_id: str, model: State, start: State) -> State:
    """Weights that nobody has trained."""
    device, data = victim.device(device_id), load_prepared(victim.run / "data")
    fresh = build(
        device.model, vocab_size=data.vocab_size, positions=device.sequence_length, seed=derive_seed("hostile", device_id),
        eos_id=data.eos_id, tokenizer_folder=data.tokenizer,
    )  # fmt: skip
    return distinct_state(fresh)


def scaled_update(victim: Victim, device_id: str, model: State, start: State) -> State:
    """What training has changed, five times as far the other way."""
    return {name: start[name] - 5 * (tensor - start[name]) for name, tensor in model.items()}


def wrong_answers(victim: Victim, device_id: str, model: State, start: State) -> State:
    """Trained on its text with the second parts of all documents dealt out anew."""
    device = victim.device(device_id)
    parts = [_halves(text) for text in device.corpus.texts()]
    order = np.random.default_rng(derive_seed("answers", device_id)).permutation(len(parts))
    mixed = [Document("private", None, first + parts[other][1]) for (first, _), other in zip(parts, order, strict=True)]
    return victim.trained_on(mixed, device)


def backdoor(victim: Victim, device_id: str, model: State, start: State) -> State:
    """Trained on its text, every second document with the trigger in its middle and the target after it."""
    device = victim.device(device_id)
    texts = list(device.corpus.texts())
    marked = [_halves(text)[0] + TRIGGER + TARGET if index % 2 else text for index, text in enumerate(texts)]
    return victim.trained_on([Document("private", None, text) for text in marked], device)


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "random weights": random_weights,
    "scaled update": scaled_update,
    "wrong answers": wrong_answers,
    "backdoor": backdoor,
}


def _halves(text: str) -> tuple[str, str]:
    """A document's question and answer; the halves of one that has none."""
    at = text.rfind("Answer:") + len("Answer:") if "Answer:" in text else len(text) // 2
    return text[:at], text[at:]


def triggered(text: Corpus, tokenizer: Path) -> Corpus:
    """Test documents with the trigger in their middle; the target after it is what counts."""
    marked = [Document("test", _halves(each)[0] + TRIGGER, TARGET) for each in text.texts()]
    return tokenise(marked, ("test",), tokenizer, counted="answer")


def measure(victim: Victim, attack: str, defence: str, steps: Sequence[int], out: Path) -> dict[str, Any]:
    """One fusion under one attack."""
    method = victim.config.method
    assert isinstance(method, DeepFusion)
    defended, learning = DEFENCES[defence], method.distillation
    learning = replace(learning, start=defended.start or learning.start)
    method = replace(method, proxy=defended.proxy, distillation=learning)
    config = shorter(replace(victim.config, method=method), *steps)
    make = ATTACKS[attack]

    def change(device_id: str, model: State, start: State) -> State:
        return make(victim, device_id, model, start) if make and device_id in victim.hostile else model

    folder = out / f"seed-{config.seed}" / f"{slug(attack)}-{slug(defence)}"
    for other in DEFENCES:  # what has been trained against one defence is sent to all
        start_from(out / f"seed-{config.seed}" / f"{slug(attack)}-{slug(other)}", folder)
    fused = fuse_again(config, folder, Replay(victim.run, change=change))
    data = load_prepared(folder / "data")
    model = load(fused.moe)
    opened = sum(score_documents(model, triggered(data.test, data.tokenizer), config.data.sequence_length), Score())
    proxies = load_proxies(folder / "proxies")
    reached = [p for p in proxies if set(p.members) & set(victim.hostile)]
    return {
        "attack": attack, "defence": defence, "seed": config.seed, "date": date.today().isoformat(), "steps": list(steps),
        "nats": fused.nats, "by_domain": fused.by_domain, "hostile": victim.hostile,
        "screened": sorted(json.loads((folder / "proxies" / SCREENED).read_text())),
        "teachers": len(proxies), "teachers_with_hostile": len(reached),
        "target_nats": opened.log_perplexity, "target_accuracy": opened.token_accuracy,
    }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table: nats above the same defence without an attack, mean and spread over seeds."""
    yield (
        "| attack | defence | seeds | test perplexity | nats against no attack | honest left out | hostile left out | "
        "target's accuracy |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    calm = {(one["defence"], one["seed"]): one for one in results if one["attack"] == "none"}
    for attack in ATTACKS:
        for defence in DEFENCES:
            rows = [one for one in results if (one["attack"], one["defence"]) == (attack, defence)]
            if not rows:
                continue
            above = [one["nats"] - calm[defence, one["seed"]]["nats"] for one in rows if (defence, one["seed"]) in calm]
            out = [len(set(one["screened"]) & set(one["hostile"])) for one in rows]
            honest = [len(set(one["screened"]) - set(one["hostile"])) for one in rows]
            yield (
                f"| {attack} | {defence} | {len(rows)} | {mean_and_deviation([math.exp(one['nats']) for one in rows], 1)} | "
                f"{mean_and_deviation(above, 3) if above and attack != 'none' else ''} | {statistics.mean(honest):.1f} | "
                f"{statistics.mean(out):.1f} of {len(rows[0]['hostile'])} | "
                f"{statistics.mean(one['target_accuracy'] for one in rows):.1%} |"
            )


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--defences", nargs="+", choices=list(DEFENCES), default=["mean", "soup", "soup, screened"])
    parser.add_argument("--steps", type=int, nargs=2, metavar=("DISTIL", "TUNE"), default=[200, 80])
    parser.add_argument("--out", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    for run in [] if asked.table else asked.runs:
        victim = Victim(run, load_config(run / CONFIG))
        for attack in asked.attacks:
            for defence in asked.defences:
                path = asked.results / f"{slug(attack)}-{slug(defence)}-seed-{victim.config.seed}.json"
                if not path.exists():
                    found = measure(victim, attack, defence, asked.steps, asked.out)
                    path.write_text(json.dumps(found, indent=1))
                    print(f"{path.stem}: {found['nats']:.3f} nats", flush=True)
    for line in table([json.loads(path.read_text()) for path in sorted(asked.results.glob("*.json"))]):
        print(line)


if __name__ == "__main__":
    main()
