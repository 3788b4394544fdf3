"""The transactional outbox: messages that go out if, and only if, the transaction they were written in commits.

A message is a row, written in the transaction that it belongs to. After the commit the process itself delivers it
(:mod:`tta_sync.sqlalchemy.courier`); what it could not deliver, because it died or nobody answered, an
:class:`OutboxRelay` delivers later, in whatever process runs one. Rows are deleted only after delivery. Who delivers
may therefore be given a message twice, and remembers those that it has had: see :class:`tta_sync.context.Delivery`.

Whoever delivers reads what is committed. A hook that runs too early, in the tests of an application that never really
commit say, thus finds nothing, and a savepoint that was rolled back has taken its messages with it.

Source: Richardson, *Microservices Patterns*, "Transactional outbox", "Polling publisher", "Idempotent consumer".
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Row,
    String,
    Table,
    Text,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from sqlalchemy.schema import BLANK_SCHEMA

from tta_sync.clock import SYSTEM_CLOCK, Clock
from tta_sync.context import Delivery, Message, ports
from tta_sync.exceptions import ConfigurationError, NoCallerError
from tta_sync.sqlalchemy import courier
from tta_sync.sqlalchemy.engines import require_adopted
from tta_sync.sqlalchemy.units import current_session, current_unit, stepping

logger = logging.getLogger(__name__)

TABLE = "tta_sync_outbox"
BATCH = 100
"""Messages delivered and deleted together."""
FRESH = 60.0
"""Seconds after which what was read must be read again before it is delivered; deliveries remember for far longer."""
ATTEMPTS = 6
"""How often a message is tried before it is parked: with the back-off below, over some 6 minutes."""
LONGEST_OUTAGE_WAIT = 30.0
MAX_ERROR = 500


def outbox_table(metadata: MetaData) -> Table:
    """Add the outbox's table to *metadata*, for ``create_all`` and alembic's autogenerate; return it."""
    known = metadata.tables.get(TABLE)
    if known is not None:
        return known
    return Table(
        TABLE,
        metadata,
        Column("id", BigInteger().with_variant(Integer, "sqlite"), autoincrement=True, nullable=False),
        Column("unit", String(32), nullable=False),  # the same for all of one transaction
        Column("key", String(32), nullable=False),
        Column("name", Text, nullable=False),  # of the function; for people
        Column("job_id", Text, nullable=False),  # for people
        Column("body", Text, nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False),
        Column("due_at", DateTime(timezone=True), nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("error", String(MAX_ERROR), nullable=True),
        Column("parked_at", DateTime(timezone=True), nullable=True),
        # By name: an application's naming convention must not make another of it.
        PrimaryKeyConstraint("id", name=f"pk_{TABLE}"),
        Index(f"ix_{TABLE}_unit_id", "unit", "id"),
        schema=BLANK_SCHEMA,
    )


_table = outbox_table(MetaData())
_c = _table.c
_other = _table.alias()
_ahead = (
    select(func.count())
    .where(_other.c.unit == _c.unit, _other.c.id < _c.id, _other.c.parked_at.is_(None))
    .scalar_subquery()
    .label("ahead")
)
"""How many of the same transaction are before a message and have not been delivered."""

_Row = Row[int, str, str, str, int, str, str, int]


def create_outbox(bind: Engine | Connection) -> None:
    """Create the table where it is missing: at start-up, or in a migration as ``create_outbox(op.get_bind())``."""
    _table.create(bind, checkfirst=True)


def drop_outbox(bind: Engine | Connection) -> None:
    """Drop the table, with the messages that are in it."""
    _table.drop(bind, checkfirst=True)


# ---- writing ---------------------------------------------------------------------------------------------------------

_NOTE = "tta_sync_outbox"  # in session.info


class _Note:
    """What a session has written to outboxes in the transaction that is under way."""

    __slots__ = ("committed", "root", "written")

    def __init__(self) -> None:
        self.root: SessionTransaction | None = None
        self.written: dict[Engine, tuple[str, list[Delivery]]] = {}
        self.committed = False

    def begin(self, root: SessionTransaction | None) -> None:
        self.root, self.written, self.committed = root, {}, False


class _Outbox:
    """The port that ``tta_sync.rq`` writes to; see :class:`tta_sync.context.Outbox`."""

    def write(self, session: Any, name: str, job_id: str, body: str, delivery: Delivery) -> None:
        session = _session_of(session)
        require_adopted(session)
        try:
            bind = session.get_bind(clause=_table)
            connection = session.connection(bind_arguments={"clause": _table})
        except UnboundExecutionError as error:
            raise ConfigurationError(
                "this session is bound model by model, so there is no one transaction for an outbox: "
                "give it the engine to write to as bind= as well"
            ) from error
        _refuse_autocommit(connection)
        note = session.info.get(_NOTE)
        if note is None:
            note = session.info[_NOTE] = _Note()
            event.listen(session, "after_commit", _on_commit)
            event.listen(session, "after_transaction_end", _on_end)
        root = session.get_transaction()
        if note.root is not root:
            note.begin(root)
        engine = connection.engine
        unit, deliveries = note.written.setdefault(engine, (uuid.uuid4().hex, []))
        now = datetime.now(UTC)
        row = {
            "unit": unit,
            "key": uuid.uuid4().hex,
            "name": name,
            "job_id": job_id,
            "body": body,
            "created_at": now,
            "due_at": now,
            "attempts": 0,
        }
        with _table_expected():
            connection.execute(insert(_table), row)
        # What a connection of the caller's own is bound to ends when the caller ends it; a relay will see.
        if not isinstance(bind, Connection) and delivery not in deliveries:
            deliveries.append(delivery)

    def relay(self, engine: Any, delivery: Delivery, attempts: int) -> OutboxRelay:
        return OutboxRelay(engine, delivery, attempts=attempts)


ports.outbox = _Outbox()


def _session_of(session: Any) -> Session:
    if session is None:
        session = _session_here()
    elif isinstance(session, scoped_session):
        session = session()
    if not isinstance(session, Session):
        if hasattr(session, "sync_session"):
            raise ConfigurationError(
                "an AsyncSession writes on its loop: call `await session.run_sync(lambda session: ...)` "
                "and give enqueue_on_commit the session that it passes"
            )
        raise ConfigurationError(f"session is a SQLAlchemy Session, not {session!r}")
    return session


def _session_here() -> Session:
    if stepping.get() is not None or current_unit.get() is not None:
        return current_session()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:  # a provider would make this thread a session of its own, which nobody commits
        raise NoCallerError(
            "enqueue_on_commit belongs to a transaction, and there is none on the loop: "
            "call it in a session_step or a caller_step, or give session="
        )
    try:
        return current_session()
    except ConfigurationError as error:
        raise ConfigurationError(
            "enqueue_on_commit was called outside any transaction: call it in a unit of work or a session step, "
            "give session=, or name the application's session by provide_session; "
            "enqueue puts a job on the queue without a transaction"
        ) from error


def _refuse_autocommit(connection: Connection) -> None:
    level = connection.get_execution_options().get("isolation_level")
    if (level or getattr(connection.dialect, "_on_connect_isolation_level", None)) == "AUTOCOMMIT":
        raise ConfigurationError(
            "this session commits each statement by itself, so there is no transaction to enqueue with: use enqueue"
        )


@contextmanager
def _table_expected() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        missing = getattr(error.orig, "sqlstate", None) == "42P01" or f"no such table: {TABLE}" in str(error.orig)
        if not missing:
            raise
        raise ConfigurationError(
            f"there is no table {TABLE} in this database: name it in your models' metadata by "
            "outbox_table(Base.metadata) and migrate, or call create_outbox(engine) once"
        ) from error


def _on_commit(session: Session) -> None:
    if session.get_nested_transaction() is None:  # the release of a savepoint is a commit to SQLAlchemy
        session.info[_NOTE].committed = True


def _on_end(session: Session, transaction: SessionTransaction) -> None:
    """Hand over once the transaction has ended and its connection is back: delivering needs one as well."""
    note: _Note = session.info[_NOTE]
    if transaction is not note.root:
        return
    written, committed = note.written, note.committed
    note.begin(None)
    if not committed:
        return
    for engine, (unit, deliveries) in written.items():
        for delivery in deliveries:
            _send_off(engine, delivery, unit)


def _send_off(engine: Engine, delivery: Delivery, unit: str) -> None:
    if engine.dialect.is_async:
        return  # its connections belong to a loop; a relay has a sync engine
    if isinstance(engine.pool, (StaticPool, SingletonThreadPool)):  # an SQLite in memory: this thread's connection only
        OutboxRelay(engine, delivery).deliver([unit])
        return
    courier.hand_over((engine, delivery), lambda: OutboxRelay(engine, delivery), unit)


# ---- delivering ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """One message that waits, as people may want to see it; not its arguments."""

    id: int
    name: str
    """The function's."""
    job_id: str
    created_at: datetime
    attempts: int
    error: str | None
    """Why the last attempt failed."""
    parked: bool
    """It is not tried any more."""


class OutboxRelay:
    """Deliver what waits in the outbox of one database. One thread at a time; as many relays as you like.

    Args:
        engine: where the table is.
        delivery: where messages go.
        attempts: how often a message that cannot be delivered is tried, 1, 4, 16 s apart, before it is parked.

    A message that cannot be delivered (its function can no longer be imported) holds up those behind it of the same
    transaction, and no others, until it is parked. When nobody answers at all no message is blamed, and the relay
    itself backs off: 0.5 to 30 s with jitter.

    On PostgreSQL a relay locks the rows that it delivers and passes over those locked by others (``FOR UPDATE SKIP
    LOCKED``). SQLite has one write lock for all, which is not held while messages are delivered: two relays may deliver
    the same message, which counts once.

    Raises:
        ConfigurationError: a SQLite engine that is not ours, or an async one.
    """

    def __init__(
        self,
        engine: Engine,
        delivery: Delivery,
        *,
        attempts: int = ATTEMPTS,
        clock: Clock = SYSTEM_CLOCK,
        chance: random.Random | None = None,
    ) -> None:
        if not isinstance(engine, Engine) or engine.dialect.is_async:
            raise ConfigurationError(f"a relay needs a sync Engine, not {engine!r}")
        if attempts < 1:
            raise ConfigurationError(f"attempts is {attempts}: it must be 1 or more")
        require_adopted(Session(engine))
        self.engine = engine
        self.delivery = delivery
        self.attempts = attempts
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311  # jitter, no secret
        self._locks = engine.dialect.name != "sqlite"
        # Where rows are locked, what others have deleted meanwhile must be seen to be gone.
        self._writer = engine.execution_options(isolation_level="READ COMMITTED") if self._locks else engine
        self._failures = 0
        self._not_before = 0.0  # on the clock's monotonic()

    # ---- delivering

    @property
    def pause(self) -> float:
        """Seconds until the relay, after an outage, tries again; 0 where all is well."""
        return max(0.0, self._not_before - self._clock.monotonic()) if self._failures else 0.0

    def run_once(self, limit: int = 500) -> int:
        """Deliver messages that are due, *limit* at most, and return how many have left the outbox.

        To be called now and then: by a worker's maintenance, a timer, ``tta-sync outbox relay``. An outage of the
        database or of where messages go is logged once and raised to nobody; calls return 0 at once until it is time to
        try again.
        """
        return self._run(None, limit)

    def deliver(self, units: Sequence[str], arrived: Callable[[], object] = lambda: None) -> bool:
        """Deliver what was written in these transactions; say whether the way was clear. For the courier.

        *arrived* is called when all has been delivered and nothing of what is left to do can be in anybody's way.
        """
        while True:
            moved = self._run(units, BATCH, arrived)
            if moved < BATCH:
                return not self._failures

    def _run(self, units: Sequence[str] | None, limit: int, arrived: Callable[[], object] = lambda: None) -> int:
        if self.pause:
            return 0
        moved = 0
        try:
            while moved < limit:
                size = min(BATCH, limit - moved)
                taken, gone = self._batch(size, units, arrived)
                moved += len(gone)
                if gone:
                    self.delivery.forget(gone)
                if taken < size or not gone:
                    break
        except (ConnectionError, SQLAlchemyError) as error:
            self._note_outage(error)
        else:
            if self._failures:
                self._failures = 0
                logger.info("the outbox is delivered again")
        return moved

    def _note_outage(self, error: Exception) -> None:
        wait = min(LONGEST_OUTAGE_WAIT, 0.5 * 2**self._failures) * self._chance.uniform(0.5, 1.0)
        self._failures = min(self._failures + 1, 10)
        self._not_before = self._clock.monotonic() + wait
        if self._failures == 1:
            # SQLAlchemy's own text would add the statement and its parameters.
            text = type(error).__name__ if isinstance(error, SQLAlchemyError) else str(error)
            logger.warning("the outbox cannot be delivered (%s); what is in it waits and is tried again", text)

    def _batch(self, size: int, units: Sequence[str] | None, arrived: Callable[[], object]) -> tuple[int, list[str]]:
        """Deliver up to *size* messages; return how many were looked at, and the keys of those that are gone."""
        read_at = time.monotonic()

        def fresh() -> bool:
            return time.monotonic() - read_at < FRESH

        if self._locks:
            with self._writer.begin() as connection:
                rows, taken = self._claim(connection, size, units)
                outcome = self._hand_over(rows, fresh) if rows else {}
                if taken < size:
                    arrived()  # on SQLite not before the write lock is given back
                gone = self._settle(connection, rows, outcome)
        else:
            with self._writer.begin() as connection:
                rows, taken = self._claim(connection, size, units)
            if not rows:
                return taken, []
            outcome = self._hand_over(rows, fresh)
            with self._writer.begin() as connection:
                gone = self._settle(connection, rows, outcome)
        return taken, gone

    def _hand_over(self, rows: Sequence[_Row], fresh: Callable[[], bool]) -> Mapping[str, Exception | None]:
        return self.delivery.deliver([Message(row.key, row.unit, row.body) for row in rows], fresh)

    def _claim(self, connection: Connection, size: int, units: Sequence[str] | None) -> tuple[list[_Row], int]:
        """Read messages that are due, each with all before it of its transaction, and how many were looked at."""
        wanted = (
            select(_c.id, _c.unit, _c.key, _c.body, _c.attempts, _c.name, _c.job_id, _ahead)
            .where(_c.parked_at.is_(None), _c.due_at <= self._now())
            .order_by(_c.id)
            .limit(size)
        )
        if units is not None:
            wanted = wanted.where(_c.unit.in_(units))
        if self._locks:
            wanted = wanted.with_for_update(skip_locked=True)
        found = connection.execute(wanted).all()
        # Those passed over, because another relay has them or they are not due yet, must not be overtaken.
        rows: list[_Row] = []
        taken: dict[str, int] = {}  # by unit
        for row in found:
            if row.ahead == taken.get(row.unit, 0):
                taken[row.unit] = row.ahead + 1
                rows.append(row)
        return rows, len(found)

    def _settle(
        self, connection: Connection, rows: Sequence[_Row], outcome: Mapping[str, Exception | None]
    ) -> list[str]:
        """Delete what was delivered, note what failed; return the keys of what was deleted."""
        delivered = [row for row in rows if outcome.get(row.key, _LEFT) is None]
        if delivered:
            # By key as well: SQLite may have given the id to another row since it was read.
            which = _c.id.in_([row.id for row in delivered]), _c.key.in_([row.key for row in delivered])
            connection.execute(delete(_table).where(*which))
        for row in rows:
            error = outcome.get(row.key)
            if error is not None:
                self._note_failure(connection, row, error)
        return [row.key for row in delivered]

    def _note_failure(self, connection: Connection, row: _Row, error: Exception) -> None:
        attempts = row.attempts + 1
        parked = attempts >= self.attempts
        text = _said(error)
        now = self._now()
        changes: dict[str, Any] = {"attempts": attempts, "error": text, "parked_at": now if parked else None}
        changed = connection.execute(update(_table).where(_c.id == row.id, _c.key == row.key).values(changes))
        if not changed.rowcount:
            return  # another relay could deliver it
        due = now if parked else now + timedelta(seconds=4.0**row.attempts)
        connection.execute(update(_table).where(_c.unit == row.unit, _c.parked_at.is_(None)).values(due_at=due))
        if parked:
            logger.error(
                "message %d of the outbox, for %s (job %s), is parked after %d attempts: %s; "
                "mend the cause, then retry it",
                row.id,
                row.name,
                row.job_id,
                attempts,
                text,
            )
        else:
            logger.warning(
                "message %d of the outbox, for %s (job %s), could not be delivered: %s; it is tried again in %g s",
                row.id,
                row.name,
                row.job_id,
                text,
                4.0**row.attempts,
            )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)

    # ---- for people

    def waiting(self) -> int:
        """Return how many messages have not been delivered, parked ones aside."""
        with self.engine.begin() as connection, _table_expected():
            count: int = connection.scalar(select(func.count()).where(_c.parked_at.is_(None))) or 0
        return count

    def parked(self, limit: int = 100) -> list[OutboxMessage]:
        """Return messages that are parked, the oldest first."""
        return self._list(limit, parked=True)

    def messages(self, limit: int = 100) -> list[OutboxMessage]:
        """Return messages in the outbox, the oldest first."""
        return self._list(limit, parked=None)

    def _list(self, limit: int, *, parked: bool | None) -> list[OutboxMessage]:
        wanted = select(_table).order_by(_c.id).limit(limit)
        if parked:
            wanted = wanted.where(_c.parked_at.is_not(None))
        with self.engine.begin() as connection, _table_expected():
            rows = connection.execute(wanted).all()
        return [
            OutboxMessage(
                row.id, row.name, row.job_id, _utc(row.created_at), row.attempts, row.error, row.parked_at is not None
            )
            for row in rows
        ]

    def retry(self, ids: Sequence[int] | None = None) -> int:
        """Have parked messages tried anew, those with *ids* or all; return how many."""
        which = update(_table).where(_c.parked_at.is_not(None))
        if ids is not None:
            which = which.where(_c.id.in_(ids))
        with self._writer.begin() as connection, _table_expected():
            return connection.execute(which.values(parked_at=None, attempts=0, due_at=self._now())).rowcount

    def drop(self, ids: Sequence[int]) -> int:
        """Delete parked messages for good; return how many."""
        with self._writer.begin() as connection, _table_expected():
            return connection.execute(delete(_table).where(_c.parked_at.is_not(None), _c.id.in_(ids))).rowcount


_LEFT = Exception("not tried")


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)  # SQLite keeps no zone


def _said(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace("\0", "?").encode(errors="replace").decode()[:MAX_ERROR]  # what any database can store
