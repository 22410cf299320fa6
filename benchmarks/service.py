# SPDX-License-Identifier: Apache-2.0
"""The market's service under load: signed bids at a steady rate, a kill -9 in the middle, and whether any receipt is broken.

python benchmarks/service.py [--rate 1000] [--seconds 60] [--connections 64] [--out benchmarks/results/market]

Client and server share the machine. Beside it, in the same run: the same bids as fast as they are taken; an endpoint that
does nothing; SQLite inserts of rows of the same length with one durable commit each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI, Request, Response

from deepfusion.market.architectures import shipped_profiles
from deepfusion.market.ledger import audit
from deepfusion.market.service.audit import audited
from deepfusion.market.service.keys import public_text, sign
from deepfusion.market.service.records import Receipt, bid_message, close_message

RETRY = 0.1
"""Seconds until a client that was cut off tries again."""


class Connection(asyncio.Protocol):
    """One kept connection that sends a request and waits for the answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if found:
            length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE).group(1))  # type: ignore[union-attr]
            if len(body) >= length and self.answer is not None and not self.answer.done():
                self.buffer = b""
                self.answer.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError("cut off"))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and body of the answer."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionError("closed")
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


@dataclass
class Load:
    """Requests to be sent, and what came of them."""

    requests: list[bytes]
    port: int
    connections: int
    rate: float | None
    done: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    late: dict[int, float] = field(default_factory=dict)
    when: dict[int, float] = field(default_factory=dict)
    cut: set[int] = field(default_factory=set)

    async def run(self, beside: Callable[[], Any] | None = None) -> float:
        """Send all, each at its time or as soon as a connection is free; the seconds that it took."""
        queue: deque[tuple[int, float]] = deque()
        began = time.perf_counter()
        workers = [asyncio.create_task(self._work(queue)) for _ in range(self.connections)]
        other = asyncio.create_task(beside()) if beside else None
        sent = 0
        while sent < len(self.requests):
            passed = time.perf_counter() - began
            due = len(self.requests) if self.rate is None else min(len(self.requests), int(passed * self.rate) + 1)
            queue.extend((n, began + (n / self.rate if self.rate else 0.0)) for n in range(sent, due))
            sent = due
            await asyncio.sleep(0.002)
        while len(self.done) < len(self.requests):
            await asyncio.sleep(0.002)
        seconds = time.perf_counter() - began
        for worker in workers:
            worker.cancel()
        if other:
            await other
        return seconds

    async def _work(self, queue: deque[tuple[int, float]]) -> None:
        loop, link = asyncio.get_running_loop(), None
        while True:
            if not queue:
                await asyncio.sleep(0.001)
                continue
            number, due = queue.popleft()
            due = due if self.rate else time.perf_counter()
            try:
                if link is None:
                    _, link = await loop.create_connection(Connection, "127.0.0.1", self.port)
                self.done[number] = await link.ask(self.requests[number])
            except OSError:
                link = None
                self.cut.add(number)
                queue.appendleft((number, due))
                await asyncio.sleep(RETRY)
                continue
            self.when[number] = time.perf_counter()
            self.late[number] = self.when[number] - due


class Server:
    """The service in a process of its own."""

    def __init__(self, folder: Path, keys: dict[str, Ed25519PrivateKey], port: int) -> None:
        self.folder, self.port = folder, port
        self.operator = Ed25519PrivateKey.generate()
        lines = [f'{name} = "{public_text(key.public_key())}"' for name, key in keys.items()]
        head = f'operator = "{public_text(self.operator.public_key())}"\n[provider]\nhours = 240.0\n[users]\n'
        (folder / "market-service.toml").write_text(head + "\n".join(lines) + "\n")
        self.start()

    def start(self) -> float:
        """Start it; the seconds until it answers."""
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "deepfusion",
            "market",
            "serve",
            "market-service.toml",
            "--port",
            str(self.port),
        ]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError):
                self.slot = self.get("/slot")
                return time.perf_counter() - began
            time.sleep(0.02)

    def get(self, path: str) -> Any:
        """An answer as JSON."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=600) as answer:
            return json.loads(answer.read())

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def kill(self) -> None:
        """End it without a warning."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def requests(self, keys: dict[str, Ed25519PrivateKey]) -> list[bytes]:
        """A signed bid of each user for the open slot."""
        made: list[bytes] = []
        for number, (name, key) in enumerate(keys.items()):
            bid = {"user": name, "model": ["vgg16", "resnet34", "bart"][number % 3], "budget": 0.01 + number % 97 / 2000,
                   "latency": 0.8 + number % 11 / 20, "device_flops": 1e10, "rate": 3e7, "rtt": 0.03, "sigma": 0.8}  # fmt: skip
            body = json.dumps(bid)
            signature = sign(key, bid_message(self.slot["opening"], body))
            made.append(post(f"/slots/{self.slot['slot']}/bids", body, signature))
        return made

    def close(self) -> float:
        """Close the slot as its operator; the seconds that it took."""
        began = time.perf_counter()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/slots/{self.slot['slot']}/close", method="POST",
            headers={"x-bid-signature": sign(self.operator, close_message(self.slot["opening"]))},
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=600).read()
        return time.perf_counter() - began


def post(path: str, body: str, signature: str) -> bytes:
    """A request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-bid-signature: {signature}\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def make_keys(count: int) -> dict[str, Ed25519PrivateKey]:
    """Users."""
    return {f"user-{n:06d}": Ed25519PrivateKey.generate() for n in range(count)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    cuts = statistics.quantiles(seconds, n=1000)
    return {"p50": cuts[499] * 1e3, "p95": cuts[949] * 1e3, "p99": cuts[989] * 1e3, "max": max(seconds) * 1e3}


def bare_inserts(folder: Path, length: int, seconds: float = 3.0) -> float:
    """Rows a second that SQLite takes with one durable commit each."""
    with contextlib.closing(sqlite3.connect(folder / "bare.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE rows (position INTEGER PRIMARY KEY, text TEXT)")
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            db.execute("INSERT INTO rows (text) VALUES (?)", ("x" * length,))
            count += 1
        return count / (time.perf_counter() - began)


def nothing(port: int) -> None:
    """Serve an endpoint that reads a body and answers."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/slots/{slot}/bids")
    async def place(slot: str, request: Request) -> Response:
        await request.body()
        return Response(b"{}" + b" " * 360, 201, media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


def nothing_rate(requests: list[bytes], connections: int) -> float:
    """Requests a second that the endpoint that does nothing answers."""
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--nothing", str(port)])
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        load = Load(requests, port, connections, None)
        return len(requests) / uvloop.run(load.run())
    finally:
        process.terminate()
        process.wait()


def fastest(folder: Path, count: int, connections: int) -> tuple[dict[str, float], list[bytes]]:
    """The service with as many bids as it takes, nobody killed; and the requests, for its peer."""
    folder.mkdir()
    keys = make_keys(count)
    server = Server(folder, keys, free_port())
    try:
        load = Load(server.requests(keys), server.port, connections, None)
        before = server.cpu()
        seconds = uvloop.run(load.run())
        spent = server.cpu() - before
    finally:
        server.kill()
    assert Counter(status for status, _ in load.done.values()) == {201: count}
    found = {"bids": count, "rate": count / seconds, "server_cpu_ms_per_bid": 1e3 * spent / count}
    return found | percentiles(list(load.late.values())), load.requests


def with_a_crash(folder: Path, rate: float, seconds: float, connections: int) -> dict[str, Any]:
    """A steady rate, a kill -9 in the middle, and the count of what is lost or counted twice."""
    folder.mkdir()
    keys = make_keys(int(rate * seconds))
    server = Server(folder, keys, free_port())
    load = Load(server.requests(keys), server.port, connections, rate)
    times: dict[str, float] = {}

    async def crash() -> None:
        await asyncio.sleep(seconds / 2)
        times["killed"] = time.perf_counter()
        server.kill()
        times["outage"] = await asyncio.to_thread(server.start)

    try:
        before = time.perf_counter()
        took = uvloop.run(load.run(crash))
        clearing = server.close()
        record = server.get(f"/slots/{server.slot['slot']}")
    finally:
        server.kill()
    (folder / "slot.json").write_text(json.dumps(record))
    up = times["killed"] - before
    recovered = times["killed"] + times["outage"]
    calm = [s for n, s in load.late.items() if load.when[n] < times["killed"]]
    caught = max(
        (load.when[n] for n, s in load.late.items() if load.when[n] > recovered and s > 0.1), default=recovered
    )
    steady = sorted(w for w in load.when.values())
    first_half = sum(w < times["killed"] for w in steady)
    return {
        "bids": len(keys), "asked_rate": rate, "rate": len(keys) / took, "rate_before_the_kill": first_half / up,
        "seconds": took, "outage_seconds": times["outage"], "caught_up_seconds": caught - recovered,
        "cut_off": len(load.cut), "statuses": dict(Counter(str(s) for s, _ in load.done.values())),
        "latency_before_the_kill_ms": percentiles(calm), "latency_all_ms": percentiles(list(load.late.values())),
        "clearing_seconds": clearing, **check(folder / "slot.json", load, len(keys)),
    }  # fmt: skip


def check(path: Path, load: Load, users: int) -> dict[str, Any]:
    """Hold the receipts against the published slot."""
    receipts = [Receipt.model_validate_json(body) for status, body in load.done.values() if status in (200, 201)]
    began = time.perf_counter()
    [(ledger, _, wrong)] = audited(path, receipts=receipts)
    wrong += audit(ledger, shipped_profiles())
    counted = Counter(bid.user for bid in ledger.bids)
    return {
        "receipts": len(receipts), "booked": len(ledger.bids),
        "lost": len({r.user for r in receipts} - counted.keys()), "twice": sum(n > 1 for n in counted.values()),
        "without_receipt": users - len(receipts), "audit_faults": wrong[:8], "audit_seconds": time.perf_counter() - began,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """What was found, for people."""
    crash, peak = found["steady_with_kill"], found["as_fast_as_taken"]
    before, whole = crash["latency_before_the_kill_ms"], crash["latency_all_ms"]
    rows = [
        ("bids sent, one a user", f"{crash['bids']:,}"), ("asked rate", f"{crash['asked_rate']:,.0f}/s"),
        ("rate before the kill", f"{crash['rate_before_the_kill']:,.0f}/s"),
        ("latency before the kill, p50, p95, p99", ", ".join(f"{before[p]:,.0f}" for p in ("p50", "p95", "p99")) + " ms"),
        ("killed with -9; until it answered again", f"{crash['outage_seconds']:.1f} s"),
        ("until the bids of the outage were caught up with", f"{crash['caught_up_seconds']:.1f} s"),
        ("latency with the outage, p50, p99, max", ", ".join(f"{whole[p]:,.0f}" for p in ("p50", "p99", "max")) + " ms"),
        ("cut off without an answer, sent again", f"{crash['cut_off']:,}"),
        ("answered: new, booked before", f"{crash['statuses'].get('201', 0):,}, {crash['statuses'].get('200', 0):,}"),
        ("receipts; booked; **lost; counted twice**",
         f"{crash['receipts']:,}; {crash['booked']:,}; **{crash['lost']}; {crash['twice']}**"),
        ("clearing the slot; audit of it, all signatures", f"{crash['clearing_seconds']:.1f} s; {crash['audit_seconds']:.1f} s"),
        ("faults that the audit found", str(len(crash["audit_faults"]))),
        ("as many bids as are taken", f"{peak['rate']:,.0f}/s, p50 {peak['p50']:.0f} ms, p99 {peak['p99']:.0f} ms"),
        ("processor time of the server for a bid", f"{peak['server_cpu_ms_per_bid']:.2f} ms"),
        ("an endpoint that does nothing", f"{found['endpoint_that_does_nothing']:,.0f}/s"),
        ("SQLite, one durable commit a row", f"{found['bare_durable_inserts']:,.0f}/s"),
        ("**service over the endpoint that does nothing**", f"**{found['peak_over_nothing']:.2f}**"),
        ("**service over bare durable inserts**", f"**{found['peak_over_bare_inserts']:.2f}**"),
    ]  # fmt: skip
    where = f"{found['date']}, {found['machine']}, load average {found['load_average']:.1f}, Python {found['python']}, "
    shared = f"{found['connections']} connections; client and server share the cores"
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["# benchmarks/service.py", "", where + shared, "", "| | |", "|---|---|", *lines, ""])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--nothing", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.nothing:
        return nothing(options.nothing)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peak, requests = fastest(folder / "peak", int(10 * options.rate), options.connections)
        idle = nothing_rate(requests, options.connections)
        bare = bare_inserts(folder, 560)
        crash = with_a_crash(folder / "crash", options.rate, options.seconds, options.connections)
    found = {
        "date": str(datetime.date.today()), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0], "python": platform.python_version(), "connections": options.connections,
        "steady_with_kill": crash, "as_fast_as_taken": peak, "endpoint_that_does_nothing": idle, "bare_durable_inserts": bare,
        "peak_over_nothing": peak["rate"] / idle, "peak_over_bare_inserts": peak["rate"] / bare,
        "steady_over_bare_inserts": crash["rate_before_the_kill"] / bare,
    }  # fmt: skip
    print(table(found))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "service.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "service.md").write_text(table(found))
    return None


if __name__ == "__main__":
    main()
