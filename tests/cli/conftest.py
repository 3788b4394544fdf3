"""A checkout in small: real gunicorn, real RQ worker, real Redis, and an application that a test can follow."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _measured(measure_subprocesses: None) -> None:
    """The command's own processes count for its coverage."""


class Run:
    """One ``tta-sync dev`` as a process, with what it said."""

    def __init__(self, checkout: Path, port: int, output: Path, env: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._output = output
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tta_sync.cli", "dev"],
                cwd=checkout,
                env={**os.environ, "TTA_PORT": str(port), **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, to be sent Ctrl-C
            )

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


@pytest.fixture
def processes() -> Processes:
    """Look for processes by the data directory they were started for."""
    return Processes("TTA_DATA_DIR")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout with the real gunicorn.conf.py."""
    top = tmp_path / "checkout"
    for name, text in {
        "wsgi.py": (
            "import os\n"
            "def app(environ, start_response):\n"
            "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
            "    return [str(os.getpid()).encode()]\n"
        ),
        "migrations/__init__.py": "",
        "migrations/__main__.py": "",
        "jobs/__init__.py": "",
        "jobs/worker.py": "import rq\nclass RecoveringWorker(rq.Worker):\n    pass\n",
        "jobs/tasks.py": (
            "import os, time\n"
            "from pathlib import Path\n"
            "def work(directory):\n"
            "    Path(directory, 'begun').write_text(str(os.getpid()))\n"
            "    while not Path(directory, 'go').exists():\n"
            "        time.sleep(0.01)\n"
            "    Path(directory, 'ended').touch()\n"
        ),
    }.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(TOP / "gunicorn.conf.py", top)
    return top


@pytest.fixture
def start_run(
    checkout: Path, tmp_path: Path, free_port: Callable[[], int], eventually: Callable[..., Any]
) -> Iterator[Callable[..., Run]]:
    """``start_run(up=True, **settings)``: start ``tta-sync dev`` in the checkout; what runs on is ended."""
    runs: list[Run] = []

    def start(*, up: bool = True, **settings: str) -> Run:
        env = {"TTA_DATA_DIR": str(tmp_path / "data"), **settings}
        run = Run(checkout, free_port(), tmp_path / f"output-{len(runs)}", env)
        runs.append(run)
        if up:
            eventually(lambda: run.is_up, within=60, what="the service")
        return run

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.stop()
