"""Units of work: one session and one transaction per call, on the caller's thread."""

from __future__ import annotations

import functools
import inspect
import os
import random
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, cast

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tta_sync import events
from tta_sync.context import current_context
from tta_sync.exceptions import ConfigurationError, NoCallerError
from tta_sync.primitives.core.base import step_name
from tta_sync.sqlalchemy.engines import BEGIN, THREAD, is_transient, leave_to_parent, require_adopted, unbound

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Source = Engine | sessionmaker[Any] | scoped_session[Any] | Callable[[], Session]

HELD = 0.1
"""Seconds across an await from which on a transaction counts as held."""


class Unit:
    """One unit of work under way: its session, and what has become of it. Its own thread only."""

    def __init__(self, work: UnitOfWork, outer: Unit | None) -> None:
        self.work = work
        self.outer = outer
        self.thread = threading.get_ident()
        self.process = os.getpid()
        self.depth = 1
        self.fresh = True  # nothing has been done in the transaction: to begin again loses nothing
        self.doomed: Exception | None = None  # set once only running the whole unit again can help
        self._session: Session | None = None
        self._idle_since: float | None = None  # a transaction is open, and no step runs
        self._last_step: tuple[str, str | None] = ("", None)

    @property
    def session(self) -> Session:
        """The unit's session, for sync code on its thread, beside the steps."""
        session = self.open()
        unbound(session)
        self.fresh = False
        return session

    def open(self) -> Session:
        """Return the session for a step, made at the first one.

        Raises:
            NoCallerError: the unit belongs to another thread.
            sqlalchemy.exc.DBAPIError: an earlier step has lost the transaction.
        """
        if threading.get_ident() != self.thread or os.getpid() != self.process:
            raise NoCallerError(
                "this unit of work belongs to another thread or process: open it where run_sync is called"
            )
        if self.doomed is not None:
            raise self.doomed
        if self._session is None:
            self._session = self.work.open_session()
            self.fresh = not self._session.in_transaction()  # an application's own session may be under way
        return self._session

    def step_began(self) -> None:
        """Tell whoever listens that the transaction was held while nothing was done in it."""
        since, self._idle_since = self._idle_since, None
        if since is None or events.bus.emit is None:
            return
        seconds = time.monotonic() - since
        if seconds > HELD:
            step, correlation_id = self._last_step
            events.bus.emit(events.TransactionHeld(step=step, seconds=seconds, correlation_id=correlation_id))

    def step_ended(self, name: str, correlation_id: str) -> None:
        """Note that the transaction stays open from here on."""
        self._last_step = (name, correlation_id)
        self._idle_since = time.monotonic()

    def begin_again(self, session: Session) -> None:
        """Roll back, for the next step to open a new transaction."""
        self._idle_since = None
        self.fresh = True
        session.rollback()

    def end(self, *, commit: bool) -> None:
        """Commit or roll back, and let the session go."""
        session, self._session = self._session, None
        if session is None:
            return
        if os.getpid() != self.process:
            leave_to_parent(session)
            return
        try:
            if commit:
                self.step_began()
                session.commit()
        finally:
            try:
                session.rollback()  # nothing, after a commit
            finally:
                self.work.release_session(session)


current_unit: ContextVar[Unit | None] = ContextVar("tta_sync_unit_of_work", default=None)

stepping: ContextVar[tuple[Session, Unit | None] | None] = ContextVar("tta_sync_session_step", default=None)
"""The session of the session step that runs here, and the unit of work that was current when it began."""

_providers: list[Callable[[], Session | None]] = []


def provide_session(provider: Callable[[], Session | None]) -> Callable[[], None]:
    """Let session steps outside a unit of work use an application's own session, ``lambda: db.session()`` say.

    The steps are savepoints of it; commit, rollback and close stay with the application. *provider* is called on the
    caller's thread, and returns None where it has none. Returns the function that ends this.
    """
    _providers.append(provider)

    def withdraw() -> None:
        if provider in _providers:
            _providers.remove(provider)

    return withdraw


def provided_session() -> Session:
    """Return the session of the first provider that has one.

    Raises:
        ConfigurationError: none has.
    """
    for provider in _providers:
        session = provider()
        if session is not None:
            return session
    raise ConfigurationError(
        "no unit of work is open here: write `with unit_of_work(Session): run_sync(...)`, "
        "give it to TTASync or workflow_job, or name the application's session by provide_session"
    )


def current_session() -> Session:
    """Return the session that a session step would get here, or has got: for sync code beside the workflow, or in it.

    Raises:
        ConfigurationError: no unit of work is open here, and no provider has a session.
    """
    unit = current_unit.get()
    step = stepping.get()
    if step is not None and step[1] is unit:  # no unit of work was opened inside the step
        return step[0]
    return provided_session() if unit is None else unit.session


class UnitOfWork:
    """What a unit of work is; made by :func:`unit_of_work`. It keeps no state of a call: use one everywhere.

    - ``units.run(fn, *args)`` runs *fn* in a unit, and again where the database asks for it.
    - ``@units`` makes that of a function.
    - ``with units as unit:`` is a unit that cannot be run again: what the database refuses comes out.

    A unit inside another one of the same kind and thread joins it.
    """

    def __init__(
        self,
        source: Source,
        *,
        commit: Literal["end", "step"] = "end",
        read_only: bool = False,
        retries: int = 3,
        chance: random.Random | None = None,
    ) -> None:
        if commit not in ("end", "step"):
            raise ConfigurationError(f'commit is "end" or "step", not {commit!r}')
        if retries < 0:
            raise ConfigurationError(f"retries is {retries}: it must be 0 or more")
        if not isinstance(source, Engine) and not callable(source):
            raise ConfigurationError(f"a unit of work needs a sessionmaker or an Engine, not {source!r}")
        self.source = source
        self.commit = commit
        self.read_only = read_only
        self.retries = retries
        self._chance = chance or random.Random()  # noqa: S311  # jitter, no secret

    # ---- for its units

    def open_session(self) -> Session:
        source = self.source
        if isinstance(source, Engine):
            session = Session(source, expire_on_commit=False)
        elif isinstance(source, sessionmaker):
            session = source(expire_on_commit=False)
        else:
            session = source()
        require_adopted(session)
        options: dict[str, Any] = {
            BEGIN: "BEGIN" if self.read_only else "BEGIN IMMEDIATE",
            THREAD: threading.get_ident(),
        }
        if self.read_only:
            options["postgresql_readonly"] = True
        session.info[_OPTIONS] = session.execution_options
        session.execution_options = session.execution_options.union(options)
        return session

    def release_session(self, session: Session) -> None:
        session.execution_options = session.info.pop(_OPTIONS, session.execution_options)
        if not isinstance(self.source, scoped_session):  # that one is the application's to close
            session.close()

    # ---- for users

    def __enter__(self) -> Unit:
        outer = current_unit.get()
        if outer is not None and outer.work is self and outer.thread == threading.get_ident():
            outer.depth += 1
            return outer
        unit = Unit(self, outer)
        current_unit.set(unit)
        return unit

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        unit = current_unit.get()
        assert unit is not None
        unit.depth -= 1
        if unit.depth:
            return
        current_unit.set(unit.outer)
        unit.end(commit=error is None and unit.doomed is None)
        if error is None and unit.doomed is not None:
            # A fallback may have answered for the step that failed; what the steps before it wrote is lost.
            raise unit.doomed

    def run(self, fn: Callable[..., T], /, *args: Any, **keywords: Any) -> T:
        """Run *fn* in a unit of work, and again from its start after a serialization failure, a deadlock or a lock.

        At most ``retries`` times, within the deadline of the current request or job, with 10 to 310 ms between.

        Raises:
            Whatever *fn* raises; in the end the database's own error, unwrapped.
        """
        outer = current_unit.get()
        joins = outer is not None and outer.work is self and outer.thread == threading.get_ident()
        attempt = 0
        while True:
            try:
                with self:
                    return fn(*args, **keywords)
            except Exception as error:
                if joins or attempt >= self.retries or not is_transient(error):
                    raise
                delay = self.delay(attempt)
                context = current_context()
                if context is not None and context.deadline is not None and context.deadline.remaining() <= delay:
                    raise
            attempt += 1
            time.sleep(delay)

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait before trying again: full jitter, for those who collided must not do so again."""
        return 0.01 + self._chance.random() * float(min(0.3, 0.02 * 2**attempt))

    def __call__(self, fn: F) -> F:
        if inspect.iscoroutinefunction(fn):
            raise ConfigurationError(
                f"{step_name(fn)} is async: a unit of work belongs on the thread that calls run_sync"
            )

        @functools.wraps(fn)
        def run(*args: Any, **keywords: Any) -> Any:
            return self.run(fn, *args, **keywords)

        return cast(F, run)


_OPTIONS = "tta_sync_options"  # in session.info: the execution options that the session came with


def unit_of_work(
    source: Source,
    *,
    commit: Literal["end", "step"] = "end",
    read_only: bool = False,
    retries: int = 3,
) -> UnitOfWork:
    """Say what a unit of work is: where its session comes from, and when it commits.

    Args:
        source: a sessionmaker or an Engine, whose session lives as long as the unit; or a scoped_session, which the
            application closes.
        commit: "end": one transaction. "step": one per session step, so that none is held while a service is awaited.
        read_only: on SQLite, do not take the write lock; on PostgreSQL, a read-only transaction.
        retries: how often :meth:`UnitOfWork.run` may start again.

    Raises:
        ConfigurationError: *source* makes no sessions, or a setting is none.
    """
    return UnitOfWork(source, commit=commit, read_only=read_only, retries=retries)
