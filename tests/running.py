"""``tta-sync dev`` as a process, followed by what it says and by what it leaves in the process table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    headers: Message
    body: Any  # JSON, else bytes


def request(method: str, url: str, body: Any = None, *, timeout: float = 30, **headers: str) -> Answer:
    """Send one request; *body* is sent as JSON unless it is bytes. Errors of HTTP are answers like others."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=timeout) as response:
            return _answer(response)
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error)


def _answer(response: Any) -> Answer:
    raw = response.read()
    try:
        body = json.loads(raw)
    except ValueError:
        body = raw
    return Answer(response.status, response.headers, body)


class Run:
    """One ``tta-sync dev`` as a process, with what it said."""

    def __init__(
        self, checkout: Path, port: int, output: Path, env: dict[str, str], command: Sequence[str | Path] = ()
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._output = output
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                command or [sys.executable, "-m", "tta_sync.cli", "dev"],
                cwd=checkout,
                env={**os.environ, "TTA_PORT": str(port), **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, to be sent Ctrl-C
            )

    def get(self, path: str) -> Answer:
        return request("GET", self.url + path)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return request("POST", self.url + path, body, **headers)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def is_up(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"it ended with {self.process.returncode}: {self.output}")
        return "curl" in self.output

    def stop(self, signum: int = signal.SIGTERM, within: float = 60.0) -> int:
        """Send the signal and return the exit status."""
        self.process.send_signal(signum)
        return self.process.wait(within)


class Processes:
    """The machine's processes, as a test may ask for them."""

    def __init__(self, marker: str) -> None:
        self._marker = f"{marker}=".encode()

    def of(self, value: object, *words: str) -> dict[int, str]:
        """Those whose environment says that they belong to *value* and whose command line holds all *words*."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                marked = self._marker + str(value).encode() in (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if marked and command and all(word in command for word in words):
                found[int(entry.name)] = command
        return found
