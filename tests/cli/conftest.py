"""A checkout in small: real gunicorn, real RQ worker, real Redis, and an application that a test can follow."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import TOP, Processes, Run


@pytest.fixture(autouse=True)
def _measured(measure_subprocesses: None) -> None:
    """The command's own processes count for its coverage."""


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
