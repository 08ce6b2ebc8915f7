"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import connect

_CODES = {" ": 32, ".": 190, "Backspace": 8, "ArrowLeft": 37, "ArrowRight": 39}
_PATIENCE = 300  # seconds, on a busy machine too


class Browser:
    """One page.

    Attributes:
        troubles: What the page has thrown, or the browser has refused or complained about.
    """

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        words += [f"--user-data-dir={self.folder.name}", "--no-proxy-server", "about:blank"]
        self.process = subprocess.Popen([program, *words], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = next(x for x in self.process.stderr if "DevTools listening on" in x)
        host = line.split("ws://")[1].partition("/")[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{host}/json", timeout=_PATIENCE) as answer:
            tab = next(x for x in json.load(answer) if x["type"] == "page")
        self.socket = connect(tab["webSocketDebuggerUrl"], proxy=None, max_size=None).__enter__()
        self.troubles: list[Any] = []
        self.calls = 0
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser something; returns its result."""
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv(timeout=_PATIENCE))
            if said.get("id") == self.calls:
                found: dict[str, Any] = said["result"]
                return found
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.troubles.append(said["params"])

    def go(self, address: str) -> None:
        """Open a page."""
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """What JavaScript makes of an expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        tried = f"(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()"
        wait = f"""new Promise((done) => {{
            const look = () => {tried} ? done(true) : setTimeout(look, 20);
            look();
        }})"""
        while True:
            found = self.call(
                "Runtime.evaluate", expression=wait, awaitPromise=True, returnByValue=True
            )
            if found["result"].get("value") is True:  # not where the page was changed meanwhile
                return

    def key(self, name: str) -> None:
        """Press a key and let it go."""
        with self.held(name):
            pass

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold a key."""
        code = _CODES.get(name) or ord(name.upper())
        key = {"key": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **key)
        yield
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)
