"""The job that processes one document of a batch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from marshmallow import Schema, fields
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from blueprints.batches.store import Claim, claim_item, fail_item, finish_item
from blueprints.db import Database
from blueprints.documents.store import Results, insert_document
from blueprints.documents.workflow import build_flow
from blueprints.settings import Settings, load_settings
from jobs.owner import new_owner
from tta_sync import WorkflowContext
from tta_sync.exceptions import TTASyncError
from tta_sync.primitives import TimeoutPrimitive, WorkflowPrimitive
from tta_sync.rq import workflow_job
from tta_sync.sqlalchemy import session_step

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CLAIM = "jobs.claim"  # our key in context.state


class DocumentFailedError(Exception):
    """A document could not be processed; its batch says so, or soon will."""


class _LostError(Exception):
    """The item is somebody else's by now: what was done for it must not be stored. Never leaves this module."""


class Parts:
    """What this process needs for its jobs, made at first use and kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[Database, WorkflowPrimitive[Any, Any]] | None = None  # guarded by _lock until set

    def _get(self) -> tuple[Database, WorkflowPrimitive[Any, Any]]:
        if self._made is None:
            with self._lock:
                if self._made is None:
                    self._made = self._make(load_settings())
        return self._made

    def _make(self, settings: Settings) -> tuple[Database, WorkflowPrimitive[Any, Any]]:
        flow = build_flow(settings, save=save_item)
        # A document has as long as a request has; the job's own alarm, later, is for what ignores this.
        database = Database(settings, statement_timeout=settings.deadline)
        return database, TimeoutPrimitive(flow, timeout_seconds=settings.deadline, name="document")

    @property
    def database(self) -> Database:
        return self._get()[0]

    @property
    def flow(self) -> WorkflowPrimitive[Any, Any]:
        return self._get()[1]

    def prepare(self) -> None:
        """Make it now; nothing is connected yet."""
        self._get()

    def run(self, fn: Callable[..., T], /, *args: Any, **keywords: Any) -> T:
        """Be the job's unit of work: one transaction per step, so that none is held while the provider thinks."""
        return self.database.steps.run(fn, *args, **keywords)

    def reset(self) -> None:
        """Forget everything, for settings that have changed."""
        with self._lock:
            if self._made is not None:
                self._made[0].close()
            self._made = None


parts = Parts()


class JobSchema(Schema):
    """The job's argument: the text stays in SQL."""

    item_id = fields.UUID(required=True)


class OutcomeSchema(Schema):
    """The job's result; null where there was nothing to do."""

    document_id = fields.String(allow_none=True)


@session_step(name="claim")
def claim(session: Session, item_id: str) -> Claim | None:
    return claim_item(session, item_id, new_owner(), datetime.now(UTC))


@session_step(name="save")
def save_item(session: Session, results: Results, context: WorkflowContext) -> str:
    """Store the document and end its item in one transaction: both, or neither."""
    claimed: Claim = context.state[_CLAIM]
    if not finish_item(session, claimed.item_id, claimed.owner):
        raise _LostError
    return insert_document(session, results, claimed.correlation_id, document_id=claimed.item_id).id


@session_step(name="record failure")
def record_failure(session: Session, failure: tuple[Claim, str]) -> bool:
    claimed, error = failure
    return fail_item(session, claimed.item_id, claimed.owner, error)


@workflow_job("default", load=JobSchema, dump=OutcomeSchema, timeout=120, unit_of_work=parts, idempotent=True)
async def process_document(data: dict[str, Any], context: WorkflowContext) -> dict[str, Any]:
    """Process one item of a batch, unless it has been done, called off or taken by another job.

    Raises:
        DocumentFailedError: it could not be processed.
    """
    claimed: Claim | None = await claim.execute(str(data["item_id"]), context)
    if claimed is None:
        return {"document_id": None}
    context.correlation_id = claimed.correlation_id
    context.state[_CLAIM] = claimed
    try:
        request = {"text": claimed.text, "tasks": claimed.tasks}
        return {"document_id": await parts.flow.execute(request, context)}
    except _LostError:
        return {"document_id": None}
    except DBAPIError as error:
        # The database's own trouble says nothing about the document: the worker's sweep gives it back to the queue.
        raise DocumentFailedError("the database failed") from error
    except Exception as error:
        text = describe(error)
        try:
            await record_failure.execute((claimed, text), context)
        except Exception:
            logger.exception("the failure of item %s could not be recorded; the sweep will find it", claimed.item_id)
        raise DocumentFailedError(text) from error


def describe(error: Exception) -> str:
    """Say in a line what failed. Our own errors speak for themselves; others might quote the text, or a password."""
    return str(error) if isinstance(error, TTASyncError) else f"failed with {type(error).__name__}"
