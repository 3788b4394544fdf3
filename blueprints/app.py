"""Put the service together."""

from __future__ import annotations

import os
from collections.abc import Callable

from flask import Flask
from sqlalchemy import NullPool, select
from sqlalchemy.exc import OperationalError, TimeoutError as PoolTimeoutError

from blueprints import access
from blueprints.batches import views as batches
from blueprints.batches.queue import RedisQueue
from blueprints.db import Database, prepare_directory
from blueprints.documents import views as documents
from blueprints.documents.models import Document
from blueprints.health import views as health
from blueprints.health.checks import BUDGET, Check
from blueprints.jobs import views as job_views
from blueprints.settings import Settings, load_settings
from jobs.documents import process_document
from tta_sync import call_sync
from tta_sync.flask import TTASync


def create_app(settings: Settings | None = None) -> Flask:
    """Make the service that *settings* describe, by default those of the environment.

    Raises:
        SettingsError: one of them is wrong; the message is one line that names it.
    """
    settings = settings or load_settings()
    prepare_directory(settings)
    app = Flask("tta_sync_service")
    app.config.update(
        TTA_DEADLINE=settings.deadline,
        TTA_MAX_BODY=settings.max_body,
        TTA_REDIS_URL=settings.redis_url,
        MAX_CONTENT_LENGTH=settings.max_body,
    )
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the provider is Flask's default one
    tta = TTASync(problems="app")
    tta.map_error(OperationalError, 503, "database_unavailable", "The database does not answer; try again later.")
    tta.map_error(PoolTimeoutError, 503, "database_unavailable", "The database is busy; try again later.")
    tta.init_app(app)
    access.guard(app, settings)

    database = Database(settings, statement_timeout=settings.deadline)
    queue = RedisQueue(settings, process_document)
    app.extensions["database"] = database
    app.register_blueprint(documents.create_blueprint(tta, settings, database))
    app.register_blueprint(batches.create_blueprint(tta, settings, database, queue))
    app.register_blueprint(job_views.create_blueprint(settings))
    app.register_blueprint(
        health.create_blueprint(
            [
                Check("loop", lambda: call_sync(_answer, timeout=BUDGET)),
                Check("redis", queue.ping),
                Check("database", _database_question(settings, database)),
            ]
        )
    )
    return app


async def _answer() -> None:
    """Run on the loop: that it ran is the answer."""


def _database_question(settings: Settings, database: Database) -> Callable[[], None]:
    file = settings.database_url.database if settings.database_url.get_backend_name() == "sqlite" else None
    if file is not None:
        # The pool's connections go on with a file that was moved away or replaced; only a new one finds that out.
        database = Database(settings, poolclass=NullPool)

    def ask() -> None:
        if file is not None and not file.startswith("file:"):
            os.stat(file)  # or SQLite would make an empty one
        with database.engine.connect() as connection:
            connection.execute(select(Document.id).limit(1))

    return ask
