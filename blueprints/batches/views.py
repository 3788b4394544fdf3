"""Batches: recorded in SQL first, then enqueued; what is asked about them is answered from SQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, current_app, url_for
from redis.exceptions import RedisError

from blueprints.batches.queue import JobQueue
from blueprints.batches.schemas import BatchSchema, batch_request_schema
from blueprints.batches.store import cancel_batch, forget_batch, read_batch, record_batch
from blueprints.db import Database
from blueprints.documents.views import is_id
from blueprints.settings import Settings, SettingsError
from tta_sync import current_context
from tta_sync.flask import Problem, TTASync


def create_blueprint(tta: TTASync, settings: Settings, database: Database, queue: JobQueue) -> Blueprint:
    """Make the batch routes."""
    bp = Blueprint("batches", __name__, url_prefix="/api")
    request_schema, batch_schema = batch_request_schema(settings.max_text), BatchSchema()

    @bp.post("/batches")
    def create() -> Any:
        documents = tta.load(request_schema)["documents"]
        context = current_context()
        assert context is not None
        try:
            queue.ping()
        except (RedisError, SettingsError) as error:
            raise _unavailable() from error

        def record() -> tuple[str, list[str], dict[str, Any] | None]:
            with database.units as unit:
                batch_id, ids = record_batch(unit.session, documents, context.correlation_id, datetime.now(UTC))
                return batch_id, ids, read_batch(unit.session, batch_id)

        batch_id, ids, batch = database.units.run(record)
        try:
            queue.enqueue(ids, context.correlation_id)
        except Exception as error:
            database.units.run(_forget, database, batch_id)
            if isinstance(error, RedisError):
                raise _unavailable() from error
            raise
        return batch_schema.dump(batch), 202, {"Location": url_for("batches.show", batch_id=batch_id)}

    @bp.get("/batches/<batch_id>")
    def show(batch_id: str) -> Any:
        with database.reads as unit:
            batch = read_batch(unit.session, batch_id) if is_id(batch_id) else None
        if batch is None:
            raise _no_such_batch()
        return batch_schema.dump(batch)

    @bp.delete("/batches/<batch_id>")
    def cancel(batch_id: str) -> Any:
        ids = database.units.run(_cancel, database, batch_id) if is_id(batch_id) else None
        if ids is None:
            raise _no_such_batch()
        try:
            queue.remove(ids)
        except (RedisError, SettingsError):
            # SQL has said that they are cancelled, and each job asks there before it does anything.
            current_app.logger.warning("Redis kept the jobs of cancelled batch %s; they will end unstarted", batch_id)
        return "", 204

    return bp


def _forget(database: Database, batch_id: str) -> None:
    with database.units as unit:
        forget_batch(unit.session, batch_id)


def _cancel(database: Database, batch_id: str) -> list[str] | None:
    with database.units as unit:
        return cancel_batch(unit.session, batch_id, datetime.now(UTC))


def _unavailable() -> Problem:
    return Problem(
        503,
        "redis_unavailable",
        "The queue does not answer, so no batch is taken; single documents are.",
        headers={"Retry-After": "5"},
    )


def _no_such_batch() -> Problem:
    return Problem(404, "no_such_batch", "There is no batch with this id.")
