"""Engines on which savepoints, locks and deadlines mean what they say."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import DBAPIError, TimeoutError as PoolTimeoutError, UnboundExecutionError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool, StaticPool

from tta_sync.exceptions import ConfigurationError, NoCallerError

BUSY_TIMEOUT = 5.0
"""Seconds that a SQLite connection waits for a lock where no deadline says less."""

POOL_SIZE = 32

BEGIN = "tta_sync_begin"
"""Execution option: the statement by which SQLite begins."""

THREAD = "tta_sync_thread"
"""Execution option: the one thread on which the connection may be used."""

limit: ContextVar[float | None] = ContextVar("tta_sync_sql_limit", default=None)
"""The moment (``time.monotonic()``) by which what runs here must have ended; set for the length of a step."""

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()  # to be disposed of after a fork
_adopted: weakref.WeakSet[Dialect] = weakref.WeakSet()  # the dialect: an engine and its option engines share it
_inherited: list[Any] = []  # a child's references to what is its parent's: collecting it would end the parent's work


def remaining(most: float) -> float:
    """Return the seconds left until the limit, *most* at most."""
    end = limit.get()
    return most if end is None else max(0.0, min(most, end - time.monotonic()))


class DeadlinePool(QueuePool):
    """SQLAlchemy's own pool, but that nobody waits in it past the limit of the step that runs."""

    _wait: float

    @property
    def _timeout(self) -> float:  # QueuePool reads it for every wait
        return remaining(self._wait)

    @_timeout.setter
    def _timeout(self, seconds: float) -> None:
        self._wait = seconds

    def recreate(self) -> QueuePool:
        token = limit.set(None)  # the copy takes over the whole wait, not what is left of it at this moment
        try:
            return super().recreate()
        finally:
            limit.reset(token)


def create_engine(url: str | URL, **options: Any) -> Engine:
    """Make an engine on which session steps keep their promises; *options* are ``sqlalchemy.create_engine``'s.

    SQLite: WAL, foreign keys on, ``BEGIN IMMEDIATE`` for units of work, 5 s of waiting for a lock. Servers: a
    connection is tested before use. The pool has 32 connections; it needs one for each thread that uses it at once.

    Raises:
        ConfigurationError: *options* ask for autocommit.
    """
    url = make_url(url)
    backend = url.get_backend_name()
    if backend == "sqlite":
        if _is_memory(url):  # one connection, or every connection would have a database of its own
            options.setdefault("poolclass", StaticPool)
            options["connect_args"] = {"check_same_thread": False, **options.get("connect_args", {})}
    else:
        options.setdefault("pool_pre_ping", True)
        if backend == "postgresql":
            options["connect_args"] = {"connect_timeout": 5, **options.get("connect_args", {})}
    if "poolclass" not in options and "pool" not in options:
        options["poolclass"] = DeadlinePool
        options.setdefault("pool_size", POOL_SIZE)
    engine = sqlalchemy.create_engine(url, **options)
    if backend == "sqlite":
        event.listen(engine, "connect", _foreign_keys)
    return adopt(engine)


def adopt(engine: Engine) -> Engine:
    """Do to an engine that an application already has what :func:`create_engine` does, but for foreign keys.

    What the application does with it outside units of work goes on as before; SQLite then begins with a plain BEGIN.

    Raises:
        ConfigurationError: it is an async engine, or one that commits by itself.
    """
    if not isinstance(engine, Engine):
        raise ConfigurationError(f"session steps need a sync Engine, not {engine!r}")
    dialect = engine.dialect
    if dialect in _adopted:
        return engine
    if getattr(dialect, "_on_connect_isolation_level", None) == "AUTOCOMMIT":
        raise ConfigurationError("this engine commits each statement by itself: leave isolation_level='AUTOCOMMIT' out")
    if type(engine.pool) is QueuePool:
        settings = engine.pool.__dict__
        settings["_wait"] = settings.pop("_timeout")
        engine.pool.__class__ = DeadlinePool  # the same pool, connections and all; only _timeout is read differently
    if dialect.name == "sqlite":
        # pysqlite's isolation_level is None from now on; SQLAlchemy would take that for autocommit and never roll back.
        dialect.skip_autocommit_rollback = False
        event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "before_cursor_execute", _check_thread)
    _adopted.add(dialect)
    _engines.add(engine)
    return engine


def require_adopted(session: Session) -> None:
    """Refuse an engine whose savepoints lie.

    Raises:
        ConfigurationError: a SQLite engine that is neither from :func:`create_engine` nor adopted.
    """
    try:
        dialect = session.get_bind().dialect
    except UnboundExecutionError:  # bound by mapper: known only statement by statement
        return
    if dialect.name == "sqlite" and dialect not in _adopted:
        raise ConfigurationError(
            "this SQLite engine begins its transactions too late, so a savepoint survives the rollback around it: "
            "make it by tta_sync.sqlalchemy.create_engine(url), or call tta_sync.sqlalchemy.adopt(engine) once"
        )


def _is_memory(url: URL) -> bool:
    return url.database in (None, "", ":memory:") or "mode=memory" in str(url)


def _foreign_keys(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    """Begin in SQL. pysqlite itself begins at the first write, after the reads: 128 of 160 such units were "locked"."""
    options = connection.get_execution_options()
    if options.get("isolation_level") == "AUTOCOMMIT":
        return
    raw = cast(sqlite3.Connection, connection.connection.dbapi_connection)
    if raw.isolation_level is not None:
        raw.isolation_level = None
    if raw.in_transaction:  # an application's own listener was faster
        return
    known = connection.connection.info
    milliseconds = int(remaining(BUSY_TIMEOUT) * 1000)
    if known.get("tta_sync_busy") != milliseconds:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={milliseconds}").close()
        known["tta_sync_busy"] = milliseconds
    if "tta_sync_wal" not in known:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL").close()
        except DBAPIError as error:
            if is_transient(error):
                raise
            # A file that may only be read cannot be switched to WAL, and need not be.
        known["tta_sync_wal"] = True
    connection.exec_driver_sql(options.get(BEGIN, "BEGIN"))


def _check_thread(connection: Connection, *statement: Any) -> None:
    owner = connection.get_execution_options().get(THREAD)
    if owner is not None and owner != threading.get_ident():
        raise NoCallerError(
            "a unit of work's session was used on another thread, by an attribute that loads lazily perhaps: "
            "read and write in a session_step, which runs on the thread that owns the session"
        )


def leave_to_parent(thing: Any) -> None:
    """In a forked child: keep *thing* untouched and uncollected, for its connection is the parent's."""
    _inherited.append(thing)


def _leave_pools_to_parent() -> None:
    for engine in list(_engines):
        leave_to_parent(engine.pool)
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_pools_to_parent)


# ---- errors ----------------------------------------------------------------------------------------------------------


def _sqlite_code(error: BaseException | None) -> int | None:
    return getattr(error, "sqlite_errorcode", -1) & 0xFF if isinstance(error, sqlite3.Error) else None


def _sqlstate(error: BaseException | None) -> str | None:
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)  # psycopg; psycopg2


def is_transient(error: BaseException) -> bool:
    """Say whether running the whole unit of work again may help: serialization failure, deadlock, lock not obtained."""
    if not isinstance(error, DBAPIError):
        return False
    code = _sqlite_code(error.orig)
    if code is not None:
        return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return _sqlstate(error.orig) in ("40001", "40P01")


def ran_out(error: Exception) -> bool:
    """Say whether *error* is the database's way of saying that the limit has passed."""
    end = limit.get()
    if end is None or time.monotonic() < end - 0.05:
        return False
    if isinstance(error, PoolTimeoutError):
        return True
    original = error.orig if isinstance(error, DBAPIError) else None
    code = _sqlite_code(original)
    if code is not None:
        return code in (sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return _sqlstate(original) == "57014"  # query_canceled


_BOUNDED = "tta_sync_bounded"  # in session.info: the transaction has a statement_timeout of ours


def unbound(session: Session) -> None:
    """Take the limit of an earlier step off the transaction."""
    if session.info.pop(_BOUNDED, False) and session.in_transaction():
        session.connection().exec_driver_sql("SET LOCAL statement_timeout = DEFAULT")


@contextmanager
def bounded(session: Session) -> Iterator[None]:
    """Let no statement of the session run past the limit. Opens the transaction."""
    end = limit.get()
    if end is None:
        unbound(session)
        yield
        return
    try:
        connection = session.connection()
    except UnboundExecutionError:  # bound by mapper: there is no one connection to bound
        yield
        return
    if connection.dialect.name == "postgresql":
        milliseconds = max(1, min(2**31 - 1, int((end - time.monotonic()) * 1000)))
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds}")
        session.info[_BOUNDED] = True
    if connection.dialect.name != "sqlite":
        yield
        return
    raw = cast(sqlite3.Connection, connection.connection.dbapi_connection)
    raw.set_progress_handler(lambda: time.monotonic() >= end, 4000)  # instructions: a fraction of a millisecond
    try:
        yield
    finally:
        raw.set_progress_handler(None, 0)
