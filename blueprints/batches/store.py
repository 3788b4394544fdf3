"""Batches in SQL: what is recorded, and every step from one state to the next.

Each step is one UPDATE that names the state it leaves, so that of two who try the same step only one succeeds, on any
database and at any isolation level.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, insert, select, update
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import Session

from blueprints.batches.models import OPEN_STATES, Batch, BatchItem, State
from blueprints.documents.models import Document

MAX_ERROR = 500


# ---- a batch --------------------------------------------------------------------------------------------------------


def record_batch(
    session: Session, documents: Sequence[dict[str, Any]], correlation_id: str, now: datetime
) -> tuple[str, list[str]]:
    """Record a batch of validated documents, all queued; return its id and its items' ids in order."""
    batch_id = str(uuid.uuid4())
    ids = [str(uuid.uuid4()) for _ in documents]
    session.execute(insert(Batch).values(id=batch_id, correlation_id=correlation_id, created_at=now))
    session.execute(
        insert(BatchItem),
        [
            {
                "id": item_id,
                "batch_id": batch_id,
                "position": position,
                "text": document["text"],
                "tasks": document["tasks"],
                "state": State.QUEUED.value,
                "enqueued_at": now,
                "recoveries": 0,
            }
            for position, (item_id, document) in enumerate(zip(ids, documents, strict=True))
        ],
    )
    return batch_id, ids


def forget_batch(session: Session, batch_id: str) -> None:
    """Delete a batch with all that came of it; a job that still runs one of its items finds nothing to finish."""
    # The items first: that waits for jobs which are just storing a document, and the document is seen afterwards.
    ids = list(session.scalars(delete(BatchItem).where(BatchItem.batch_id == batch_id).returning(BatchItem.id)))
    session.execute(delete(Document).where(Document.id.in_(ids)))
    session.execute(delete(Batch).where(Batch.id == batch_id))


def read_batch(session: Session, batch_id: str) -> dict[str, Any] | None:
    """Return how a batch stands, or None where there is no such batch."""
    batch = session.get(Batch, batch_id)
    if batch is None:
        return None
    rows = session.execute(
        select(BatchItem.id, BatchItem.position, BatchItem.state, BatchItem.error)
        .where(BatchItem.batch_id == batch_id)
        .order_by(BatchItem.position)
    ).all()
    states = [State(row.state) for row in rows]
    return {
        "id": batch_id,
        "status": status_of(states, batch.cancelled_at is not None),
        "total": len(rows),
        "done": states.count(State.DONE),
        "failed": states.count(State.FAILED),
        "results": [
            {
                "index": row.position,
                "document_id": row.id if row.state == State.DONE else None,
                "error": row.error,
            }
            for row in rows
            if row.state in (State.DONE, State.FAILED)
        ],
    }


def status_of(states: Sequence[State], cancelled: bool) -> str:
    """Return a batch's status: done once every document has succeeded or failed, whatever else was asked for."""
    if all(state in (State.DONE, State.FAILED) for state in states):
        return "done"
    if cancelled:
        return "cancelled"
    return "queued" if all(state is State.QUEUED for state in states) else "running"


def cancel_batch(session: Session, batch_id: str, now: datetime) -> list[str] | None:
    """Let nothing further of a batch start; return the items called off, or None where there is no such batch."""
    marked = session.execute(
        update(Batch).where(Batch.id == batch_id, Batch.cancelled_at.is_(None)).values(cancelled_at=now)
    )
    if not _changed(marked) and session.get(Batch, batch_id) is None:
        return None
    waiting = and_(BatchItem.batch_id == batch_id, BatchItem.state == State.QUEUED)
    called_off = update(BatchItem).where(waiting).values(state=State.CANCELLED, text=None).returning(BatchItem.id)
    return list(session.scalars(called_off))


# ---- an item, as its job sees it ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """An item that this job, and no other, is to process."""

    item_id: str
    owner: str
    text: str
    tasks: list[str]
    correlation_id: str


def claim_item(session: Session, item_id: str, owner: str, now: datetime) -> Claim | None:
    """Take a queued item of a batch that goes on; None where there is nothing to do."""
    going_on = select(Batch.id).where(Batch.cancelled_at.is_(None))
    taken = session.execute(
        update(BatchItem)
        .where(BatchItem.id == item_id, BatchItem.state == State.QUEUED, BatchItem.batch_id.in_(going_on))
        .values(state=State.RUNNING, owner=owner, started_at=now)
    )
    if not _changed(taken):
        return None
    text, tasks, correlation_id = session.execute(
        select(BatchItem.text, BatchItem.tasks, Batch.correlation_id).join(Batch).where(BatchItem.id == item_id)
    ).one()
    return Claim(item_id, owner, text or "", tasks, correlation_id)


def finish_item(session: Session, item_id: str, owner: str) -> bool:
    """Mark an item done; False where it is no longer *owner*'s, whose work must then not be stored."""
    return _end(session, _held(item_id, owner), State.DONE)


def fail_item(session: Session, item_id: str, owner: str, error: str) -> bool:
    """Mark an item failed with a short text; False where it is no longer *owner*'s."""
    return _end(session, _held(item_id, owner), State.FAILED, error)


def _held(item_id: str, owner: str) -> ColumnElement[bool]:
    return and_(BatchItem.id == item_id, BatchItem.state == State.RUNNING, BatchItem.owner == owner)


def _end(session: Session, which: ColumnElement[bool], state: State, error: str | None = None) -> bool:
    ended = session.execute(
        update(BatchItem).where(which).values(state=state, text=None, error=error and error[:MAX_ERROR])
    )
    return _changed(ended)


# ---- an item, as the sweep sees it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenItem:
    """An item that has not ended, as it stood when it was read."""

    id: str
    state: State
    owner: str | None
    started_at: datetime | None
    enqueued_at: datetime
    recoveries: int
    cancelled: bool
    correlation_id: str


def open_items(session: Session, after: str, limit: int) -> list[OpenItem]:
    """Return items that have not ended, in order of id, from the one behind *after* on."""
    rows = session.execute(
        select(
            BatchItem.id,
            BatchItem.state,
            BatchItem.owner,
            BatchItem.started_at,
            BatchItem.enqueued_at,
            BatchItem.recoveries,
            Batch.cancelled_at,
            Batch.correlation_id,
        )
        .join(Batch)
        .where(BatchItem.state.in_(OPEN_STATES), BatchItem.id > after)
        .order_by(BatchItem.id)
        .limit(limit)
    )
    return [
        OpenItem(
            row.id,
            State(row.state),
            row.owner,
            row.started_at,
            row.enqueued_at,
            row.recoveries,
            row.cancelled_at is not None,
            row.correlation_id,
        )
        for row in rows
    ]


def take_to_enqueue(session: Session, item: OpenItem, now: datetime, *, recovery: bool) -> bool:
    """Put an item back to queued and take it on to enqueue it; False where another has been quicker.

    A *recovery*, after its worker's end, is counted; putting back what Redis forgot is not.
    """
    taken = session.execute(
        update(BatchItem)
        .where(_unchanged(item))
        .values(
            state=State.QUEUED,
            owner=None,
            started_at=None,
            enqueued_at=now,
            recoveries=item.recoveries + (1 if recovery else 0),
        )
    )
    return _changed(taken)


def end_abandoned(session: Session, item: OpenItem, state: State, error: str | None = None) -> bool:
    """End an item that nobody runs any more; False where another has been quicker."""
    return _end(session, _unchanged(item), state, error)


def _unchanged(item: OpenItem) -> ColumnElement[bool]:
    return and_(
        BatchItem.id == item.id,
        BatchItem.state == item.state,
        BatchItem.enqueued_at == item.enqueued_at,
        BatchItem.recoveries == item.recoveries,
        BatchItem.owner.is_(None) if item.owner is None else BatchItem.owner == item.owner,
    )


def _changed(result: Any) -> bool:
    assert isinstance(result, CursorResult)
    return result.rowcount > 0
