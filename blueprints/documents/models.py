"""What is kept of a processed document: the results, not the text."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from blueprints.db import Base, UTCDateTime


class Document(Base):
    """One processed text. Its id is also its job's id where a batch brought it."""

    __tablename__ = "documents"
    # The listing's order, newest first; both databases read an index backwards.
    __table_args__ = (Index("ix_documents_created_at_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    summary: Mapped[str | None] = mapped_column(Text)
    keywords: Mapped[list[Any]] = mapped_column(JSON)
    language: Mapped[str | None] = mapped_column(String(8))
    word_count: Mapped[int] = mapped_column(Integer)
    provider: Mapped[str | None] = mapped_column(String(200))
    degraded: Mapped[bool] = mapped_column()
    cached: Mapped[bool] = mapped_column()
    correlation_id: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
