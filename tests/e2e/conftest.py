"""The real service, as a newcomer starts it, on a data directory of the test's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually, free_port
from tests.running import TOP, Processes, Run
from tests.service.llm_server import LLMServer


@pytest.fixture
def processes() -> Processes:
    """Look for processes by the data directory they were started for."""
    return Processes("TTA_DATA_DIR")


def starter(directory: Path, **always: str) -> Iterator[Callable[..., Run]]:
    """Yield ``start(up=True, **settings)``; whatever still runs at the end is ended."""
    runs: list[Run] = []

    def start(*, up: bool = True, **settings: str) -> Run:
        env = {"TTA_DATA_DIR": str(directory / "data"), **always, **settings}
        run = Run(TOP, free_port(), directory / f"output-{len(runs)}", env)
        runs.append(run)
        if up:
            eventually(lambda: run.is_up, within=60, what="the service")
        return run

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.stop()


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """``start_service(up=True, **settings)``: the real service, on this test's data directory."""
    yield from starter(tmp_path)


@pytest.fixture
def start_small(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """As ``start_service``, with one gunicorn worker: half of what a start costs is to load the application."""
    yield from starter(tmp_path, GUNICORN_CMD_ARGS="--workers 1")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One service with the default settings for all the tests of a module that leave it running."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("TTA_")}
    for start in starter(tmp_path_factory.mktemp("service")):
        yield start()
    os.environ.update(before)


@pytest.fixture
def llm() -> Iterator[LLMServer]:
    """A provider on 127.0.0.1 that answers well until its ``mode`` is set."""
    server = LLMServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def texts() -> Callable[[int], list[str]]:
    """``texts(n)``: as many different texts, each real prose of some sentences."""
    prose = (TOP / "README.md").read_text().split("\n\n")

    def make(count: int) -> list[str]:
        return [f"Document {number}. {prose[number % len(prose)]}" for number in range(count)]

    return make


@pytest.fixture
def documents() -> Callable[[Run], list[dict[str, Any]]]:
    """``documents(run)``: all that the service has stored, page by page."""

    def read(run: Run) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            page = run.get(f"/api/documents?limit=100{cursor and '&cursor=' + cursor}").body
            items += page["items"]
            cursor = page["next_cursor"]
        return items

    return read


@pytest.fixture
def finished() -> Callable[..., dict[str, Any]]:
    """``finished(run, location, within=200)``: the batch's state once it has ended."""

    def wait(run: Run, location: str, within: float = 200.0) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            state: dict[str, Any] = run.get(location).body
            return state if state.get("status") in ("done", "cancelled") else None

        return eventually(ended, within=within, what="the batch's end")

    return wait
