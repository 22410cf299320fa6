# SPDX-License-Identifier: Apache-2.0
"""The faults of docs/fleet.md, each many times at moments drawn at random, on a fleet of three small devices on loopback.

Counted are uploads that were lost (gone, or sent again, once they lay in the spool), devices that finished a training twice, and
results that are not the bytes of the undisturbed run. A run that a fault has stopped, or that went on without a device, is taken
up with --resume once the fault is mended. What has been counted is kept in --out: a run that is cut off goes on.

python benchmarks/faults.py [--repeats 10] [--jobs 3] [--seed 0] [--only NAME ...] [--out benchmarks/results/faults]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty

from fault_kinds import FAULTS, World

from deepfusion.artifacts import file_digest, holder, write_atomic
from deepfusion.errors import DeepFusionError
from deepfusion.fleet.faults import Trainings, clients
from deepfusion.fleet.layout import Layout, init_fleet
from deepfusion.fleet.running import run_here
from deepfusion.fleet.supervise import Fleet, fleet_on_this_machine
from deepfusion.fleet.trial import trial_config

SHORT = ("devices.max_steps=10", "distillation.steps=6", "tune.steps=4", "evaluate.public_only=false")
LONGEST = 900.0
"""Seconds after which a run counts as stuck."""
ATTEMPTS = 3
"""To hit a run: a moment comes after its end where the machine has got faster since the spans were measured."""


@dataclass
class Row:
    """What one fault did: devices by what happened to them, and whether the result is that of the undisturbed run."""

    fault: str
    number: int
    injected: bool = False
    resumed: int = 0
    lost: list[str] = field(default_factory=list[str])
    twice: list[str] = field(default_factory=list[str])
    wrong: bool = False
    seconds: float = 0.0
    said: list[str] = field(default_factory=list[str])


Found = tuple[Row, dict[str, float]]
"""What a fault did, and the spans of the undisturbed run that its moment was drawn from."""


class Watch:
    """What is seen while a run goes on: arrivals in the spool, trainings, and how long it takes."""

    def __init__(self, layout: Layout) -> None:
        self._spool, self.trained, self.lost = layout.server / "run" / "uploads", Trainings(layout), set[str]()
        self._arrived: dict[str, int] = {}
        self._ends = time.monotonic() + LONGEST

    def __call__(self) -> None:
        self.trained.look()
        there = {path.stem: path.stat().st_ino for path in self._spool.glob("*.safetensors")}
        self.lost |= {id_ for id_, inode in self._arrived.items() if there.get(id_) != inode}
        self._arrived |= there
        if time.monotonic() > self._ends:
            raise DeepFusionError(f"no end within {LONGEST:g} s")


def attempt(fleet: Fleet, watch: Watch, *, resume: bool) -> list[str]:
    """Run; what it said where it did not come to an end with all devices."""
    try:
        run_here(fleet, resume=resume, tick=watch)
        watch()
    except DeepFusionError as error:
        return [f"{type(error).__name__}: {error}"]
    told = json.loads((fleet.server.path(fleet.server.file.run) / "record.json").read_text())
    return [f"{device}: {reason.splitlines()[0][:300]}" for device, reason in told["failures"].items()]


def clear(layout: Layout) -> None:
    """Forget all runs, on the server and on the devices."""
    shutil.rmtree(layout.server / "run", ignore_errors=True)
    for device in layout.devices():
        for name in ("jobs", "runs"):
            shutil.rmtree(layout.device(device) / "place" / name, ignore_errors=True)


def result(layout: Layout) -> dict[str, str]:
    """Hashes of the final MoE's files."""
    moe = layout.server / "run" / "moe"
    return {path.name: file_digest(path) for path in sorted(moe.glob("*")) if path.name != ".stage.json"}


def inject(name: str, number: int, world: World, expected: dict[str, str]) -> Row:
    """One fault, and the run through it."""
    row, began = Row(name, number), time.monotonic()
    clear(world.layout)
    fault, watch = FAULTS[name](world), Watch(world.layout)
    with fault.when.watching():
        said = attempt(world.fleet, watch, resume=False)
    row.injected = fault.when.done
    row.said += said
    while said and row.resumed < 3:
        fault.mend()
        row.resumed += 1
        said = attempt(world.fleet, watch, resume=True)
        row.said += said
    fault.after()
    row.said = [line.replace(str(world.layout.folder), "FLEET") for line in row.said]
    row.lost = sorted(watch.lost)
    row.twice = [device for device, count in watch.trained.counts.items() if count > 1]
    row.wrong = bool(said) or result(world.layout) != expected
    row.seconds = round(time.monotonic() - began, 1)
    return row


def undisturbed(layout: Layout, fleet: Fleet) -> tuple[dict[str, str], dict[str, float]]:
    """The result that all others are compared with; and seconds that the server and a client are at work."""
    clear(layout)
    watch, seen = Watch(layout), dict.fromkeys(("server", "client"), 0.0)
    last = time.monotonic()

    def tick() -> None:
        nonlocal last
        now, last = time.monotonic() - last, time.monotonic()
        seen["server"] += now if holder(layout.server / "run") else 0.0
        seen["client"] += now if clients(layout, "device-000") else 0.0
        watch()

    run_here(fleet, resume=False, tick=tick)
    assert set(watch.trained.counts.values()) == {1}
    return result(layout), seen


def table(rows: list[Row]) -> str:
    """Counts by fault, for docs and people."""
    lines = [
        "| fault | times | taken up with --resume | uploads lost | devices trained twice | wrong results |",
        "|---|---|---|---|---|---|",
    ]
    for name in FAULTS:
        own = [row for row in rows if row.fault == name and row.injected]
        if own:
            sums = (sum(bool(row.resumed) for row in own), sum(len(row.lost) for row in own),
                    sum(len(row.twice) for row in own), sum(row.wrong for row in own))  # fmt: skip
            lines.append(f"| {name} | {len(own)} | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines) + "\n"


def serve_faults(port: int, seed: int, tasks: Queue[tuple[int, str]], found: Queue[Found]) -> None:
    """A fleet of its own that takes up one fault after another, until there are no more."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        layout = init_fleet(trial_config(SHORT, seed=0), Path(folder) / "fleet", port=port)
        with fleet_on_this_machine(layout) as fleet:
            expected, spans = undisturbed(layout, fleet)
            with contextlib.suppress(Empty):
                while True:
                    number, name = tasks.get(timeout=1)
                    for _ in range(ATTEMPTS):
                        draw = random.Random(f"{seed}-{name}-{number}")
                        row = inject(name, number, World(layout, fleet, draw, spans), expected)
                        if row.injected:
                            break
                        spans = undisturbed(layout, fleet)[1]
                    found.put((row, spans))


def main() -> None:
    """Inject what has not been injected yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="fleets side by side; most of a fault is waiting")
    parser.add_argument("--port", type=int, default=18543, help="of the first fleet; each takes five")
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults")
    asked = parser.parse_args()
    kept = asked.out / "faults.json"
    rows = [Row(**row) for row in json.loads(kept.read_text())["rows"]] if kept.exists() else []
    done = {(row.number, row.fault) for row in rows if row.injected}
    due = [task for task in product(range(asked.repeats), asked.only) if task not in done]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path[1:]))  # the fleet imports what this imports
    context = multiprocessing.get_context("spawn")
    tasks: Queue[tuple[int, str]] = context.Queue()
    found: Queue[Found] = context.Queue()
    for task in due:
        tasks.put(task)
    fleets = [
        context.Process(target=serve_faults, args=(asked.port + 5 * place, asked.seed, tasks, found))
        for place in range(min(asked.jobs, len(due)))
    ]
    for fleet in fleets:
        fleet.start()
    while any(fleet.is_alive() for fleet in fleets) or not found.empty():
        with contextlib.suppress(Empty):
            row, spans = found.get(timeout=1)
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
            document = {"seed": asked.seed, "spans": spans, "rows": [asdict(row) for row in rows]}
            write_atomic(kept, json.dumps(document, indent=1))
            write_atomic(asked.out / "faults.md", table(rows))
    print(table(rows))
    if any(fleet.exitcode for fleet in fleets):
        sys.exit("a fleet has failed, see above; start again to go on with what is missing")


if __name__ == "__main__":
    main()
