"""Batches and their items. SQL is the truth about them; Redis only says what to do next."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from blueprints.db import Base, UTCDateTime


class State(StrEnum):
    """Where an item stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN_STATES = (State.QUEUED, State.RUNNING)


class Batch(Base):
    """Documents that came in one request."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    correlation_id: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    cancelled_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class BatchItem(Base):
    """One document of a batch; its id is its job's id, and its document's once that is stored."""

    __tablename__ = "batch_items"
    __table_args__ = (
        UniqueConstraint("batch_id", "position"),
        CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in State)})", name="state"),
        # What a worker's sweep reads, in the order in which it reads it.
        Index("ix_batch_items_state_id", "state", "id"),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column(Integer)
    text: Mapped[str | None] = mapped_column(Text)  # dropped as soon as the item has ended
    tasks: Mapped[list[Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(9))
    error: Mapped[str | None] = mapped_column(String(500))
    owner: Mapped[str | None] = mapped_column(String(200))  # the process that runs it
    started_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    enqueued_at: Mapped[datetime] = mapped_column(UTCDateTime)  # when somebody last took it on to enqueue it
    recoveries: Mapped[int] = mapped_column(Integer)  # how often it was given back to the queue after its worker's end
