# SPDX-License-Identifier: Apache-2.0
"""The service as a process: killed in the midst of bids it loses no receipt, and a person can bid in a real browser."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import chromium
import httpx
import pytest
from chromium import Page, browser, wait_for
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from service_world import GOOD, KEYS, OPTIONS, PROFILES, text_of

from deepfusion.errors import MarketError
from deepfusion.market.ledger import audit
from deepfusion.market.service.audit import audited
from deepfusion.market.service.keys import own_key, public_text, sign
from deepfusion.market.service.records import Receipt, bid_message, close_message
from deepfusion.market.service.web import serve

USERS = {f"user-{n:03d}": Ed25519PrivateKey.from_private_bytes(f"{n}".encode().ljust(32)) for n in range(120)} | KEYS


def configuration(folder: Path) -> Path:
    lines = [f'{name} = "{public_text(key.public_key())}"' for name, key in USERS.items()]
    hours = max((240, 250), key=lambda hours: -time.time() % (hours * 3600))  # no slot ends while a test runs
    head = f'name = "edge"\noperator = "{public_text(KEYS["operator"].public_key())}"\n[provider]\nhours = {hours}\n'
    (folder / "market-service.toml").write_text(head + "[users]\n" + "\n".join(lines) + "\n")
    return folder / "market-service.toml"


@contextmanager
def served(folder: Path, port: int = 0) -> Generator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and where it listens."""
    command = [
        sys.executable,
        "-m",
        "deepfusion",
        "market",
        "serve",
        "market-service.toml",
        "--port",
        str(port),
        "--ledger",
        "m.sqlite",
    ]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            wait_for(lambda: answers(found[0]), "an answer")
            yield process, found[0]
        finally:
            process.kill()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/slot").status_code == 200
    except httpx.TransportError:
        return False


def close(address: str) -> None:
    slot = httpx.get(f"{address}/slot").json()
    signature = sign(KEYS["operator"], close_message(slot["opening"]))
    assert (
        httpx.post(f"{address}/slots/{slot['slot']}/close", headers={"x-bid-signature": signature}).status_code == 200
    )


def send(client: httpx.Client, slot: dict[str, Any], user: str) -> httpx.Response:
    body = text_of(replace(GOOD, user=user, budget=0.01))
    headers = {"x-bid-signature": sign(USERS[user], bid_message(slot["opening"], body))}
    return client.post(f"/slots/{slot['slot']}/bids", content=body, headers=headers)


@pytest.mark.slow
def test_a_kill_in_the_midst_of_bids_loses_no_receipt_and_counts_none_twice(tmp_path: Path) -> None:
    configuration(tmp_path)
    receipts: dict[str, Receipt] = {}
    half = threading.Event()

    def bid(address: str, slot: dict[str, Any], users: list[str]) -> None:
        with httpx.Client(base_url=address) as client:
            for user in users:
                try:
                    answer = send(client, slot, user)
                except httpx.TransportError:
                    return
                receipts[user] = Receipt.model_validate_json(answer.content)
                if len(receipts) >= len(USERS) // 2:
                    half.set()

    with served(tmp_path) as (process, address):
        slot, names = httpx.get(f"{address}/slot").json(), list(USERS)
        names.remove("operator")
        threads = [threading.Thread(target=bid, args=(address, slot, names[n::6])) for n in range(6)]
        for thread in threads:
            thread.start()
        assert half.wait(chromium.PATIENCE)
        os.kill(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        port = int(address.rsplit(":", 1)[1])
    given = dict(receipts)
    assert len(given) >= len(USERS) // 2
    with served(tmp_path, port) as (_, address), httpx.Client(base_url=address) as client:
        assert client.get("/slot").json()["opening"] == slot["opening"]
        for name in names:
            answer = send(client, slot, name)
            assert answer.status_code == (200 if name in given else answer.status_code)
            assert answer.status_code in (200, 201)
            receipts[name] = Receipt.model_validate_json(answer.content)
        close(address)
    assert given == {name: receipts[name] for name in given}
    [(ledger, _, wrong)] = audited(tmp_path / "m.sqlite", receipts=list(receipts.values()))
    assert wrong + audit(ledger, PROFILES) == []
    assert sorted(found.user for found in ledger.bids) == sorted(names)


def test_two_services_cannot_have_one_ledger(tmp_path: Path) -> None:
    _, held = own_key(tmp_path / "m.key")
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(MarketError, match="another service has it open"):
        serve(OPTIONS, PROFILES, tmp_path / "m.sqlite", "127.0.0.1", 0, lambda *_: None)
    os.close(held)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MarketError, match="choose another"):
        serve(OPTIONS, PROFILES, tmp_path / "n.sqlite", "127.0.0.1", taken.getsockname()[1], lambda *_: None)


# ------------------------------------------------------------------------------------------------ the page


def fill(page: Page, key: Path, **values: object) -> None:
    for name, value in values.items():
        page.js(f"document.forms[0].elements.{name}.value = {json.dumps(str(value))}")
    page.choose_file("input[type=file]", key)
    page.js("document.forms[0].requestSubmit()")


def said(page: Page, place: str, words: str) -> str:
    text = f"document.getElementById('{place}')?.textContent ?? ''"
    return wait_for(lambda: words in (found := page.js(text)) and found, words)


def show(page: Page, receipt: str) -> None:
    """Load the page again as it is for who has this receipt."""
    page.js(f"sessionStorage.setItem('receipt', {json.dumps(receipt)})")
    page.do("Page.reload")


CONTRAST = """(() => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    const color = getComputedStyle(e).backgroundColor;
    return /, 0\\)$/.test(color) && e.parentElement ? behind(e.parentElement) : color;
  };
  const told = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const shown = [...document.querySelectorAll("main *")].filter(
    e => e.checkVisibility() && told(e) && !e.closest("svg, script, style, noscript"));
  return Math.min(...shown.map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  }));
})()"""
"""The least contrast of any text with what is behind it, by the formula of WCAG 2."""


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on this machine")
def test_a_person_bids_in_a_browser_and_sees_what_became_of_it(tmp_path: Path) -> None:
    configuration(tmp_path)
    for name in ("ann", "bob"):
        pem = KEYS[name].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.pem").write_bytes(pem)
    with served(tmp_path) as (_, address), browser() as page:
        page.do("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.open(address)
        left = "/^\\d+:\\d\\d:\\d\\d$/.test(document.getElementById('left').textContent)"
        wait_for(lambda: page.js(left), "hours, minutes and seconds left")
        fill(page, tmp_path / "bob.pem", user="ann", model="vgg16", budget=0.05)
        assert "not signed by ann" in said(page, "receipt", "Not taken")
        fill(page, tmp_path / "ann.pem", user="ann", model="vgg16", budget=5.0)
        told = said(page, "receipt", "Booked: ann in edge-1.")
        receipt = Receipt.model_validate_json(told[told.index("{") :])
        fill(page, tmp_path / "bob.pem", user="bob", model="vgg16", budget=0.00001)
        said(page, "receipt", "Booked: bob in edge-1.")
        show(page, receipt.model_dump_json())
        said(page, "receipt", "Booked: ann in edge-1.")
        page.complaints.clear()  # the refusal above is one
        close(address)
        assert "edge-1: won" in said(page, "verdict", "millionths of $ a GFLOP/s")
        wait_for(lambda: page.js("document.getElementById('slot').textContent") == "edge-2", "the next slot")
        wait_for(lambda: page.js("document.querySelectorAll('#history td').length") == 7, "a row of the history")
        assert page.js("document.querySelectorAll('#history svg polyline').length") == 2
        assert page.js("document.documentElement.scrollWidth") <= 360
        assert page.js("[...document.querySelectorAll('input, select')].every(field => field.labels.length === 1)")
        for scheme in ("light", "dark"):
            page.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert page.js(CONTRAST) >= 4.5, scheme
        page.js("sessionStorage.setItem('receipt', JSON.stringify({user: 'bob', slot: 'edge-1'}))")
        page.do("Page.reload")
        assert "below the reserve price" in said(page, "verdict", "edge-1: lost")
        assert page.complaints == []
    [(ledger, _, wrong)] = audited(tmp_path / "m.sqlite", receipts=[receipt])
    assert wrong + audit(ledger, PROFILES) == []
    assert [bid.user for bid in ledger.bids] == ["ann", "bob"]
