"""Chromium without a window, driven by the Chrome DevTools protocol over a pair of pipes: no driver to install.

Source: https://chromedevtools.github.io/devtools-protocol/. A zero byte ends each message on the pipes.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FIRST_FREE = 10  # the browser reads at descriptor 3 and writes at 4; those of this process stay clear of them
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), " ": (32, " ")}  # code and text of a key
_SHIFT = 8


class Page:
    """A tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, os.fdopen(answers, "rb", closefd=False)
        self._number, self._rest, self._session = 0, b"", {}
        #: What the page wrote to the console, and errors that nothing caught.
        self.complaints: list[str] = []
        self.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found)
                return found["result"]
            if found.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.complaints.append(json.dumps(found["params"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._answers.fileno(), 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Open an address, and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def find(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.find(f"!!({script})"):
            assert time.monotonic() < until, f"{script} stays false: {self.find('document.body.innerText')}"
            time.sleep(0.01)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key."""
        code, text = _KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def drop(self, files: Sequence[Path], at: tuple[int, int]) -> None:
        """Drag files from outside of the browser, and drop them at a place."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=at[0], y=at[1], data=data)

    def resize(self, width: int, height: int, *, dark: bool) -> None:
        """Show the page on a screen of so many pixels, in light or dark colours."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[colours])

    def picture(self) -> bytes:
        """What the screen shows, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def controls(self) -> list[tuple[str, str]]:
        """Role and name of everything that takes the focus, as a screen reader tells them."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        found = []
        for node in nodes:
            states = {x["name"]: x["value"].get("value") for x in node.get("properties", ())}
            if states.get("focusable") and node["role"]["value"] != "RootWebArea":
                found.append((node["role"]["value"], node.get("name", {}).get("value", "")))
        return found


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A tab of a browser that keeps its files in a folder."""
    assert CHROMIUM is not None
    ours, theirs = os.pipe(), os.pipe()  # what the browser reads, and what it writes
    its = [fcntl.fcntl(end, fcntl.F_DUPFD, _FIRST_FREE) for end in (ours[0], theirs[1])]
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
             "--disable-dev-shm-usage", "--no-proxy-server", f"--user-data-dir={folder}"]  # fmt: skip
    shell = ["bash", "-c", f'exec "$@" 3<&{its[0]} 4>&{its[1]}', "bash", *words]
    process = subprocess.Popen(shell, pass_fds=its, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for end in (ours[0], theirs[1], *its):
        os.close(end)
    try:
        yield Page(ours[1], theirs[0])
    finally:
        os.close(ours[1])  # which ends the browser
        os.close(theirs[0])
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
