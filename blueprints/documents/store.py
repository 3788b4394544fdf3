"""Documents in SQL: storing one, reading one, reading a page."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime
from typing import Any

from itsdangerous import BadData, URLSafeSerializer
from sqlalchemy import literal, select, tuple_
from sqlalchemy.orm import Session

from blueprints.db import UTCDateTime
from blueprints.documents.models import Document
from tta_sync import WorkflowContext
from tta_sync.sqlalchemy import session_step

Results = tuple[dict[str, Any] | None, list[str] | None, str | None, int]
"""What the branches of the workflow found: summary, keywords, language, word count."""


def insert_document(
    session: Session, results: Results, correlation_id: str, document_id: str | None = None
) -> Document:
    """Store what was found; the same text twice is two documents."""
    summary, keywords, language, word_count = results
    document = Document(
        id=document_id or str(uuid.uuid4()),
        summary=summary and summary["summary"],
        keywords=keywords or [],
        language=language,
        word_count=word_count,
        provider=summary and summary["provider"],
        degraded=bool(summary and summary["degraded"]),
        cached=bool(summary and summary["cached"]),
        correlation_id=correlation_id,
        created_at=datetime.now(UTC),
    )
    session.add(document)
    return document


@session_step(name="save")
def save_document(session: Session, results: Results, context: WorkflowContext) -> Document:
    """Store what the branches found, under the request's correlation id."""
    return insert_document(session, results, context.correlation_id)


def read_document(session: Session, document_id: str) -> Document | None:
    """Return a document, or None where there is none with this id."""
    return session.get(Document, document_id)


class BadCursorError(Exception):
    """This cursor is none that we gave out."""


class Pages:
    """The listing, newest first, by keyset: a page begins behind the last document of the one before.

    Documents that are stored while somebody turns pages neither shift nor repeat any. Cursors are signed, so that
    nobody probes the table with made-up ones.
    """

    def __init__(self, secret: str) -> None:
        self._cursors = URLSafeSerializer(
            secret, salt="documents.cursor", signer_kwargs={"digest_method": hashlib.sha256}
        )

    def read(self, session: Session, limit: int, cursor: str | None) -> dict[str, Any]:
        """Return ``items`` and ``next_cursor``, which is None on the last page.

        Raises:
            BadCursorError: *cursor* was not issued here.
        """
        order = tuple_(Document.created_at, Document.id)
        query = select(Document).order_by(Document.created_at.desc(), Document.id.desc()).limit(limit + 1)
        if cursor is not None:
            created_at, document_id = self._position(cursor)
            query = query.where(order < tuple_(literal(created_at, UTCDateTime()), literal(document_id)))
        documents = list(session.scalars(query))
        more = len(documents) > limit
        items = documents[:limit]
        return {"items": items, "next_cursor": self._cursor_behind(items[-1]) if more else None}

    def _cursor_behind(self, document: Document) -> str:
        signed = self._cursors.dumps([document.created_at.isoformat(), document.id])
        return signed if isinstance(signed, str) else signed.decode()

    def _position(self, cursor: str) -> tuple[datetime, str]:
        try:
            created_at, document_id = self._cursors.loads(cursor)
            return datetime.fromisoformat(created_at), document_id
        except (BadData, ValueError, TypeError):
            raise BadCursorError from None
