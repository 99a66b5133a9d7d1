"""A page in headless Chromium, spoken to over the DevTools pipe: width, colour scheme, console, network, pixels."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# DevTools listens on descriptors 3 and 4; a process of its own moves them there, so that this one needs no fork hook.
_LAUNCH = "import os,sys; os.dup2(int(sys.argv[1]),3); os.dup2(int(sys.argv[2]),4); os.execv(sys.argv[3],sys.argv[3:])"


def chromium() -> str | None:
    """Path of the browser."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Page:
    """One open page."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer, self._next = read, write, b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, timeout_s: float = 30.0, **params: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive(timeout_s)
            if found.get("id") == self._next:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def wait_for(self, event: str, timeout_s: float = 30.0) -> None:
        while not any(found.get("method") == event for found in self.events):
            self.events.append(self._receive(timeout_s))

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, full: bool = True) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"])

    def faults(self) -> list[str]:
        """Console errors, exceptions and violations of the page's policy so far."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Runtime.exceptionThrown" or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")
            ):
                found.append(json.dumps(params)[:300])
        return found

    def requests(self) -> list[str]:
        """Addresses the page asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError(f"Chromium said nothing for {timeout_s} s, or ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


@contextlib.contextmanager
def opened(file: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1.0) -> Iterator[Page]:
    """The file in a fresh browser at a width in CSS pixels; a phone below 500 of them."""
    browser = chromium()
    if browser is None:
        raise FileNotFoundError("chromium")
    to_browser, from_browser = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser[0], from_browser[1])]
    with tempfile.TemporaryDirectory(prefix="rlhf-jax-chromium-", ignore_cleanup_errors=True) as home:
        command = [sys.executable, "-c", _LAUNCH, *map(str, theirs), browser, *FLAGS, f"--user-data-dir={home}", "about:blank"]
        process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for fd in (*theirs, to_browser[0], from_browser[1]):
            os.close(fd)
        try:
            page = Page(from_browser[0], to_browser[1])
            target = next(t for t in page.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
            page.session = page.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 500
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            page.call("Emulation.setEmulatedMedia", features=[scheme])
            page.call("Page.navigate", url=file.resolve().as_uri())
            page.wait_for("Page.loadEventFired")
            yield page
            with contextlib.suppress(TimeoutError, RuntimeError, OSError):
                page.session = None
                page.call("Browser.close", timeout_s=5.0)
        finally:
            for fd in (to_browser[1], from_browser[0]):
                os.close(fd)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def png_rows(data: bytes) -> tuple[int, int, list[bytes]]:
    """(width, bytes per pixel, rows) of an 8-bit PNG without interlacing."""
    at, packed, width, channels = 8, b"", 0, 0
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, _, _, colour = struct.unpack(">IIBB", body[:10])
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw, stride = zlib.decompress(packed), width * channels
    rows, above = [], bytes(stride)
    for begin in range(0, len(raw), stride + 1):
        above = _unfiltered(raw[begin], bytearray(raw[begin + 1 : begin + 1 + stride]), above, channels)
        rows.append(above)
    return width, channels, rows


def _unfiltered(kind: int, row: bytearray, above: bytes, channels: int) -> bytes:
    for i in range(len(row) if kind else 0):
        left, up, corner = (row[i - channels], above[i], above[i - channels]) if i >= channels else (0, above[i], 0)
        if kind == 4:
            guess = left + up - corner
            near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
        else:
            near = (0, left, up, (left + up) // 2)[kind]
        row[i] = (row[i] + near) & 255
    return bytes(row)
