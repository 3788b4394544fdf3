"""SQLAlchemy: sync sessions inside async workflows, on the thread that waits for them.

::

    engine = create_engine("sqlite:///app.db")
    units = unit_of_work(sessionmaker(engine))


    @session_step
    def save(session, data, context):
        document = Document(**data)
        session.add(document)
        return document


    result = units.run(run_sync, validate >> summarise >> save, data)

A unit of work owns one session and one transaction of one thread. Its session steps run there in turn, each in a
SAVEPOINT of its own, and the transaction ends when the unit does. A workflow that also waits for remote services should
read and write at its ends, or say ``commit="step"``: a transaction held across a slow call holds its locks as well.

What holds:

1. A session step is one uninterrupted turn on the caller's thread: SAVEPOINT, the function, flush, RELEASE.
2. It is released only if somebody still waits for it; else rolled back. One that was cancelled while queued never
   starts; a cancellation that comes after the release lets the result stand.
3. An IntegrityError is retried in a new savepoint. A serialization failure, a deadlock, "database is locked" are
   retried by running the unit again from its start (:meth:`UnitOfWork.run`); the step alone, where it was the first.
4. A step that is retried reads its objects again.
5. SQLite engines come from :func:`create_engine`, or are adopted by :func:`adopt`.
6. The deadline of the call, and a TimeoutPrimitive around the step, bound each statement and the wait for a connection.
7. A transaction held across an await for more than 100 ms emits ``TransactionHeld``.
8. Session steps of parallel branches take turns.
9. The commit comes before the result is dumped, and does not expire it.

The outbox, by which jobs are enqueued if and only if a transaction commits, is :mod:`tta_sync.sqlalchemy.outbox`.
"""

from tta_sync.sqlalchemy.engines import adopt, create_engine, is_transient
from tta_sync.sqlalchemy.outbox import OutboxMessage, OutboxRelay, create_outbox, drop_outbox, outbox_table
from tta_sync.sqlalchemy.steps import SessionPrimitive, session_step
from tta_sync.sqlalchemy.units import Unit, UnitOfWork, current_session, provide_session, unit_of_work

__all__ = [
    "OutboxMessage",
    "OutboxRelay",
    "SessionPrimitive",
    "Unit",
    "UnitOfWork",
    "adopt",
    "create_engine",
    "create_outbox",
    "current_session",
    "drop_outbox",
    "is_transient",
    "outbox_table",
    "provide_session",
    "session_step",
    "unit_of_work",
]
