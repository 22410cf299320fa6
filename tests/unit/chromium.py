# SPDX-License-Identifier: Apache-2.0
"""A real browser without a screen, driven over its debugging protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = shutil.which("chromium")
PATIENCE = 60.0
"""Seconds until something that must happen has not happened; nothing is measured by it."""


def wait_for(what: Callable[[], Any], why: str) -> Any:
    """What a function gives once it is true."""
    until = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < until, f"never: {why}"
        time.sleep(0.05)
    return found


class Page:
    """A tab. `complaints` holds what the browser reported: exceptions, refused scripts, styles and requests."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number, self.complaints = socket, 0, list[str]()
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        told = self._ask(method, **parameters)
        assert "error" not in told, told
        return told["result"]

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(PATIENCE))
            if told.get("id") == self._number:
                return told
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(told["params"]))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; asked again where another page took its place meanwhile."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        while "navigated" in (told := self._ask("Runtime.evaluate", **asked)).get("error", {}).get("message", ""):
            pass
        assert "error" not in told, told
        assert "exceptionDetails" not in told["result"], told
        return told["result"]["result"].get("value")

    def open(self, address: str) -> None:
        """Go to a page and wait until it is there."""
        self.do("Page.navigate", url=address)
        wait_for(
            lambda: self.js(f"document.readyState === 'complete' && location.href.startsWith('{address}')"), address
        )

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into an input."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


@contextmanager
def browser() -> Generator[Page]:
    """A browser of its own, gone afterwards."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
                   "--remote-debugging-port=0", f"--user-data-dir={home}", "about:blank"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(home) / "DevToolsActivePort"
            number = wait_for(lambda: port.exists() and port.read_text().split("\n")[0], "a debugging port")
            with connect(f"ws://127.0.0.1:{number}{port.read_text().split()[1]}", max_size=None) as front:
                front.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
                target = json.loads(front.recv(PATIENCE))["result"]["targetId"]
            with connect(f"ws://127.0.0.1:{number}/devtools/page/{target}", max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.wait()
