# SPDX-License-Identifier: Apache-2.0
"""The service over HTTP: routes, what each answers, and how it is started. Decisions are the desk's."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from deepfusion.errors import MarketError
from deepfusion.market.profiles import Profile
from deepfusion.market.service.book import Book, history, slot_record
from deepfusion.market.service.desk import Desk, RefusedError
from deepfusion.market.service.keys import own_key
from deepfusion.market.service.options import Clock, ServiceOptions
from deepfusion.market.service.page import page

LOG = logging.getLogger(__name__)
LONGEST_BODY = 4096
"""Bytes of a bid."""
SIGNATURE = "x-bid-signature"
KEPT = 8
"""So many results are kept in memory for those who ask for their verdict."""
HISTORY = 168


def make_app(desk: Desk, ledger: Path) -> FastAPI:
    """The routes around a desk, and the watch that closes slots also when nobody asks."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        watch = asyncio.create_task(_watch(desk))
        yield
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await desk.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RefusedError, _refused)
    _add_bidding(app, desk)
    _add_reading(app, desk, ledger)
    return app


async def _watch(desk: Desk) -> None:
    while True:
        try:
            await desk.tick()
        except Exception:  # a full disk may be emptied: the slot stays overdue and is tried again
            LOG.exception("the slot could not be closed")
        await asyncio.sleep(min(max(desk.opening.closes - desk.now(), 0.01), 1.0))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _json(json.dumps({"error": str(error)}), error.status)


def _json(text: str, status: int = 200) -> Response:
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(text, status, headers, "application/json")


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise RefusedError(413, f"longer than {LONGEST_BODY} bytes; send one bid")
    return body


def _add_bidding(app: FastAPI, desk: Desk) -> None:
    async def place(request: Request) -> Response:
        body = await _body(request)
        receipt, new = await desk.bid(request.path_params["slot"], body, request.headers.get(SIGNATURE, ""))
        return _json(receipt.model_dump_json(), 201 if new else 200)

    app.add_route("/slots/{slot}/bids", place, ["POST"])  # without FastAPI's injection, a fifth of a bid's time

    @app.post("/slots/{slot}/close")
    async def close(slot: str, request: Request) -> Response:
        return _json(json.dumps({"open": await desk.close(slot, request.headers.get(SIGNATURE, ""))}))


def _add_reading(app: FastAPI, desk: Desk, ledger: Path) -> None:
    @lru_cache(KEPT)
    def result(slot: str) -> dict[str, Any]:
        return slot_record(ledger, slot).closing.result

    @contextlib.contextmanager
    def closed(slot: str) -> Generator[None]:
        if slot == desk.opening.slot:
            raise RefusedError(409, f"{slot} is open; its bids and its seed are secret until it is closed")
        try:
            yield
        except MarketError as error:
            raise RefusedError(404, str(error)) from error

    @app.get("/slot")
    async def current() -> Response:
        await desk.tick()
        return _json(json.dumps({
            "slot": desk.opening.slot, "now": desk.now(), "closes": desk.opening.closes, "opening": desk.link,
            "previous": desk.previous, "terms": desk.terms, "service_key": desk.public,
        }))  # fmt: skip

    @app.get("/slots")
    def slots() -> Response:
        return _json(json.dumps(history(ledger, HISTORY)))

    @app.get("/slots/{slot}")
    def whole(slot: str) -> Response:
        with closed(slot):
            return _json(slot_record(ledger, slot).model_dump_json())

    @app.get("/slots/{slot}/verdicts/{user:path}")
    def verdict(slot: str, user: str) -> Response:
        with closed(slot):
            told = _verdict(result(slot), user)
        if told is None:
            raise RefusedError(404, f"{user} did not bid in {slot}")
        return _json(json.dumps({"slot": slot, "user": user, **told}))

    @lru_cache(1)
    def shown(slot: str) -> tuple[str, str]:
        del slot  # the page changes with the open slot, and then only
        return page(desk.opening, history(ledger, HISTORY))

    @app.get("/")
    async def home() -> Response:
        await desk.tick()
        text, policy = await asyncio.to_thread(shown, desk.opening.slot)
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-store"}
        return HTMLResponse(text, headers=headers)


def _verdict(result: dict[str, Any], user: str) -> dict[str, Any] | None:
    """What `clear_slot` says of one user."""
    if user in result["winners"]:
        return {"verdict": "won", **result["winners"][user]}
    for verdict, reasons in (("lost", result["losers"]), ("refused", result["refused"])):
        if user in reasons:
            return {"verdict": verdict, "why": reasons[user]}
    return {"verdict": "local", "why": "the device meets the deadline alone"} if user in result["local"] else None


def serve(
    options: ServiceOptions, profiles: Mapping[str, Profile], ledger: Path, host: str, port: int,
    started: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Serve until interrupted.

    Args:
        ledger: the SQLite file; the service's private key lies beside it.
        port: 0 takes a free one.
        started: is given the address and the service's public key.

    Raises:
        MarketError: the ledger or its key cannot be used, another service has it, or the address is taken.
    """
    key, held = own_key(ledger.with_suffix(".key"))
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise MarketError(f"{ledger}: another service has it open; end that one, or choose another --ledger") from error
    desk = Desk(options, profiles, Book(ledger), key, Clock())
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise MarketError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
    started(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}", desk.public)
    config = uvicorn.Config(make_app(desk, ledger), access_log=False, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
