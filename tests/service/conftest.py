"""What the service's tests share: settings over a temporary directory, and a provider to misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic import command
from flask import Flask
from flask.testing import FlaskClient

from blueprints.app import create_app
from blueprints.settings import Settings, load_settings
from migrations.__main__ import with_database
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


@pytest.fixture
def migrated(make_settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """``migrated(...)``: settings as of ``make_settings``, whose database is up to date."""

    def make(**env: object) -> Settings:
        settings = make_settings(**env)
        with_database(settings, lambda config: command.upgrade(config, "head"))
        return settings

    return make


@pytest.fixture
def make_client(migrated: Callable[..., Settings]) -> Iterator[Callable[..., FlaskClient]]:
    """``make_client(TTA_DEADLINE=4, ...)``: a client of a service with these settings, over real SQLite."""
    apps: list[Flask] = []

    def make(**env: object) -> FlaskClient:
        app = create_app(migrated(**env))
        apps.append(app)
        return app.test_client()

    yield make
    for app in apps:
        app.extensions["database"].close()
