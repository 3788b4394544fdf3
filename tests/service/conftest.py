"""What the service's tests share: settings over a temporary directory, and a provider to misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blueprints.settings import Settings, load_settings
from tests.service.llm_server import LLMServer


@pytest.fixture
def llm() -> Iterator[LLMServer]:
    """A provider on 127.0.0.1 that answers well until its ``mode`` is set."""
    server = LLMServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """``make_settings(TTA_PORT=1, ...)``: settings of a service that keeps everything in ``tmp_path``."""

    def make(**env: object) -> Settings:
        return load_settings({"TTA_DATA_DIR": str(tmp_path), **{name: str(value) for name, value in env.items()}})

    return make
