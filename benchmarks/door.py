# SPDX-License-Identifier: Apache-2.0
"""What the door costs: uploads and small answers through each engine, against plain function calls without Flower.

python benchmarks/door.py [--megabytes 50] [--devices 8] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from deepfusion.federation.door import Door, answer
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.local_grid import LocalGrid
from deepfusion.federation.payload import decode, encode
from deepfusion.federation.spool import Spool, collect
from deepfusion.types import Call, Payload

client_app = ClientApp()
__all__ = ["client_app"]


def device_work(request: Payload) -> Payload:
    """An upload of as many megabytes as asked for, or a small answer after a millisecond."""
    megabytes = int(request.metadata["megabytes"])
    if not megabytes:
        time.sleep(0.001)
        return Payload("echo", metadata={"n": 1})
    generator = torch.Generator().manual_seed(0)
    return Payload("model", {f"layer/{i}": torch.rand(2**18, generator=generator) for i in range(megabytes)})


@client_app.train()
def _train(message: Message, context: Context) -> Message:
    return answer(message, str(context.node_config["device-id"]), device_work)


def without_flower(requests: Mapping[str, Payload]) -> Iterator[tuple[str, Payload]]:
    """The same work, encoded and decoded, by plain function calls."""
    for device_id, request in requests.items():
        asked = decode(encode(request), source=device_id)
        yield device_id, decode(encode(device_work(asked)), source=device_id)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(call: Call, devices: int, megabytes: int, repeats: int) -> dict[str, float]:
    """Seconds of the uploads, and milliseconds of a small answer above its millisecond of work."""
    uploads = {f"d{i}": Payload("init", metadata={"megabytes": megabytes}) for i in range(devices)}
    small = {f"d{i}": Payload("init", metadata={"megabytes": 0}) for i in range(64)}
    list(call({"d0": small["d0"]}))  # start what has to be started
    taken: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            spool = Spool(Path(folder))
            taken.append(seconds(lambda spool=spool: collect(call, uploads, spool)))
    overhead = min(seconds(lambda: list(call(small))) for _ in range(repeats)) / len(small)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "upload_seconds": round(statistics.median(taken), 3),
        "milliseconds_per_small_answer": round(1000 * overhead, 3),
        "peak_megabytes": peak // 1024,
    }


def through(
    engine: Literal["forkserver", "inline"], workers: int, devices: int, megabytes: int, repeats: int
) -> dict[str, float]:
    """Measure one engine behind the door."""
    results: dict[str, float] = {}
    app = ServerApp()
    ids = [f"d{i}" for i in range(max(64, devices))]
    grid = LocalGrid("door:client_app", ids, engine=engine, workers=workers)

    @app.main()
    def main(_grid: Grid, context: Context) -> None:
        with tempfile.TemporaryDirectory() as folder:
            door = Door(grid, grid.nodes, Ledger(Path(folder) / "ledger.jsonl"), in_flight=grid.in_flight)
            results["start_seconds"] = round(
                seconds(lambda: list(door({"d0": Payload("x", metadata={"megabytes": 0})}))), 2
            )
            results.update(measure(door, devices, megabytes, repeats))

    with grid:
        grid.serve(app)
    return results


def main() -> None:
    """Print one line of JSON for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("megabytes", 50), ("devices", 8), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sizes = (options.devices, options.megabytes, options.repeats)
    torch.set_num_threads(1)
    print(json.dumps({"way": "no Flower", **measure(without_flower, *sizes)}))
    print(json.dumps({"way": "inline", **through("inline", 1, *sizes)}))
    for workers in (1, 2):
        print(json.dumps({"way": f"forkserver, {workers} workers", **through("forkserver", workers, *sizes)}))


if __name__ == "__main__":
    main()
