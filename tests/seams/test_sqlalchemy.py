"""Sessions inside workflows, on real SQLite files and a real PostgreSQL: the promises of tta_sync.sqlalchemy."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)

from tta_sync import events
from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import Deadline, WorkflowContext, running_context
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, NoCallerError, StepTimeoutError
from tta_sync.facade import call_sync, run_sync
from tta_sync.primitives.core.base import step
from tta_sync.primitives.recovery.retry import RetryPrimitive
from tta_sync.primitives.recovery.timeout import TimeoutPrimitive
from tta_sync.sqlalchemy import (
    UnitOfWork,
    adopt,
    create_engine,
    current_session,
    engines,
    is_transient,
    provide_session,
    session_step,
    steps,
    unit_of_work,
    units,
)


class Base(DeclarativeBase): ...


class Row(Base):
    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column(unique=True)
    count: Mapped[int] = mapped_column(default=0)
    parts: Mapped[list[Part]] = relationship(back_populates="row")


class Part(Base):
    __tablename__ = "parts"
    id: Mapped[int] = mapped_column(primary_key=True)
    row_id: Mapped[int] = mapped_column(sa.ForeignKey("rows.id"))
    row: Mapped[Row] = relationship(back_populates="parts")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture(scope="module")
def postgres_database(postgres_server: Callable[[str | None], str]) -> Iterator[str]:
    """One database for this module: making one takes longer than most of its tests."""
    with psycopg.connect(postgres_server(None), autocommit=True) as admin:
        admin.execute("CREATE DATABASE seams")
    yield postgres_server("seams")
    with psycopg.connect(postgres_server(None), autocommit=True) as admin:
        admin.execute("DROP DATABASE seams WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_database: str) -> str:
    """The SQLAlchemy URL of the module's database, emptied."""
    with psycopg.connect(postgres_database, autocommit=True) as admin:
        admin.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return postgres_database.replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """Both databases, in turn."""
    return str(request.getfixturevalue(f"{request.param}_url"))


def prepared(engine: sa.Engine) -> sa.Engine:
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = prepared(create_engine(url))
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[sa.Engine]:
    engine = prepared(create_engine(sqlite_url))
    yield engine
    engine.dispose()


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[sa.Engine]:
    engine = prepared(create_engine(postgres_url))
    yield engine
    engine.dispose()


@pytest.fixture
def work(engine: sa.Engine) -> UnitOfWork:
    return unit_of_work(sessionmaker(engine))


def values(engine: sa.Engine) -> list[str]:
    with Session(engine) as session:
        return sorted(session.scalars(sa.select(Row.value)))


@session_step
def save(session: Session, data: str, context: WorkflowContext) -> Row:
    row = Row(value=data)
    session.add(row)
    return row


@step
async def later(data: Any) -> Any:
    await asyncio.sleep(0)
    return data


def failing(error: BaseException) -> Any:
    @step
    async def fail(data: Any) -> Any:
        raise error

    return fail


class statements:
    """The SQL that an engine sends meanwhile, transaction statements included."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.seen: list[str] = []

    def __enter__(self) -> list[str]:
        for name, word in {"savepoint": "SAVEPOINT", "release_savepoint": "RELEASE"}.items():
            event.listen(self.engine, name, self._note(name, word))
        for name, word in {"rollback_savepoint": "ROLLBACK TO", "commit": "COMMIT", "rollback": "ROLLBACK"}.items():
            event.listen(self.engine, name, self._note(name, word))
        event.listen(self.engine, "before_cursor_execute", self._statement)
        return self.seen

    def _note(self, name: str, word: str) -> Callable[..., None]:
        return lambda *_: self.seen.append(word)

    def _statement(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        self.seen.append(statement.split()[0])

    def __exit__(self, *_: Any) -> None: ...


# ---- 1. one turn -----------------------------------------------------------------------------------------------------


def test_step_runs_in_a_savepoint_on_the_callers_thread(engine: sa.Engine, work: UnitOfWork) -> None:
    """SAVEPOINT, the function, flush, RELEASE, in one turn on the thread that called run_sync; then COMMIT."""
    threads: list[int] = []

    @session_step
    def note(session: Session, data: str) -> str:
        threads.append(threading.get_ident())
        session.add(Row(value=data))
        return data

    with statements(engine) as sent:
        assert work.run(run_sync, later >> note >> later, "a") == "a"
    interesting = [word for word in sent if word in ("SAVEPOINT", "INSERT", "RELEASE", "COMMIT", "ROLLBACK")]
    assert interesting == ["SAVEPOINT", "SAVEPOINT", "INSERT", "RELEASE", "RELEASE", "COMMIT"] or interesting == [
        "SAVEPOINT",
        "INSERT",
        "RELEASE",
        "COMMIT",
    ]
    assert threads == [threading.get_ident()]
    assert values(engine) == ["a"]


def test_steps_of_a_unit_share_session_and_transaction(engine: sa.Engine, work: UnitOfWork) -> None:
    """One session for all steps of a unit, one transaction; the next unit has another."""
    seen: list[Session] = []

    @session_step
    def look(session: Session, data: Any) -> Any:
        seen.append(session)
        return data

    work.run(run_sync, look >> later >> look, None)
    work.run(run_sync, look, None)
    first, second, third = seen
    assert first is second
    assert first is not third


def test_failure_rolls_everything_back(engine: sa.Engine, work: UnitOfWork) -> None:
    """An error of a later step undoes what earlier steps wrote, and comes out as itself."""
    with pytest.raises(LookupError):
        work.run(run_sync, save >> failing(LookupError("x")), "a")
    assert values(engine) == []


def test_failing_step_undoes_only_itself_when_the_workflow_goes_on(engine: sa.Engine, work: UnitOfWork) -> None:
    """A step that failed inside its savepoint leaves the transaction usable, PostgreSQL's too."""

    @session_step(integrity_retries=0)
    def twice(session: Session, data: str) -> None:
        session.add_all([Row(value="x"), Row(value="x")])

    @step
    async def flow(data: str, context: WorkflowContext) -> None:
        await save.execute("a", context)
        with pytest.raises(IntegrityError):
            await twice.execute(None, context)
        await save.execute("b", context)

    work.run(run_sync, flow, None)
    assert values(engine) == ["a", "b"]


def test_what_the_step_returned_can_be_read_after_the_commit(engine: sa.Engine, work: UnitOfWork) -> None:
    """The commit does not expire what it saved: it can be dumped, without a session and without a query."""
    row = work.run(run_sync, save, "a")
    with statements(engine) as sent:
        assert (row.value, row.count) == ("a", 0)
        assert row.id is not None
    assert sent == []


def test_step_that_commits_by_itself_is_told_not_to(engine: sa.Engine, work: UnitOfWork) -> None:
    """A commit inside a step would break the unit in two."""

    @session_step
    def commits(session: Session, data: Any) -> None:
        session.add(Row(value="a"))
        session.commit()

    with pytest.raises(ConfigurationError, match="commits"):
        work.run(run_sync, commits, None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: None,
        lambda session: None,
        lambda session, data, context, more: None,
        lambda session, *, data: None,
    ],
)
def test_function_with_other_arguments_is_refused(wrong: Any) -> None:
    """A session step takes a session and data, and may take the context."""
    with pytest.raises(ConfigurationError, match="session, data"):
        session_step(wrong)


def test_functions_of_every_fitting_form_become_steps(sqlite: sa.Engine) -> None:
    """The context is passed where the function has a place for it, and not to an unrelated default."""

    def with_default(session: Session, data: Any, batch: int = 5) -> Any:
        return batch

    def with_context(session: Session, data: Any, context: Any = None) -> Any:
        return type(context).__name__

    def with_any(*args: Any) -> Any:
        return len(args)

    work = unit_of_work(sqlite)
    assert work.run(run_sync, session_step(with_default), None) == 5
    assert work.run(run_sync, session_step(with_context), None) == "WorkflowContext"
    assert work.run(run_sync, session_step(with_any), None) == 3


def test_async_functions_are_refused(sqlite: sa.Engine) -> None:
    """A session belongs to the caller's thread, and a coroutine to the loop's."""

    async def wrong(session: Session, data: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="async"):
        session_step(wrong)
    with pytest.raises(ConfigurationError, match="async"):
        unit_of_work(sqlite).run(run_sync, session_step(lambda session, data: wrong(session, data)), None)
    with pytest.raises(ConfigurationError, match="async"):
        unit_of_work(sqlite)(later.func)


def test_step_keeps_its_functions_face() -> None:
    """Name and docstring stay, and calling the step calls the function."""

    @session_step(name="keeper")
    def keep(session: Any, data: Any) -> Any:
        """Keep it."""
        return (session, data)

    assert (keep.name, keep.__doc__, keep.__name__) == ("keeper", "Keep it.", "keep")
    assert keep(1, 2) == (1, 2)
    assert repr(save) == "save"


def test_step_says_what_is_missing_when_nobody_waits(sqlite: sa.Engine) -> None:
    """Under a bare await there is no caller, and without a unit of work no session."""
    with pytest.raises(NoCallerError, match="run_sync"):
        asyncio.run(save.execute("a", WorkflowContext()))
    with pytest.raises(ConfigurationError, match="unit_of_work"):
        run_sync(save, "a")


def test_unit_of_another_thread_is_refused(sqlite: sa.Engine) -> None:
    """A unit opened where nobody waits, inside a coroutine, has no thread for its steps."""
    work = unit_of_work(sqlite)

    @step
    async def wrong(data: Any, context: WorkflowContext) -> None:
        with work:
            await save.execute("a", context)

    with pytest.raises(NoCallerError, match="another thread"):
        run_sync(wrong, None)


def test_unit_of_the_parent_is_refused_and_left_alone_in_a_forked_child(engine: sa.Engine, work: UnitOfWork) -> None:
    """A process forked in the middle of a unit can neither use nor end it; the parent's commit is whole."""
    with work:
        run_sync(save, "a")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with pytest.raises(NoCallerError, match="process"):
                    current_session()
                work.__exit__(None, None, None)
                gc.collect()
                work.run(run_sync, save, "child") if engine.dialect.name == "postgresql" else None
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        run_sync(save, "b")
    assert values(engine)[:2] == ["a", "b"]


# ---- 2. abandoned steps ----------------------------------------------------------------------------------------------


def test_step_is_rolled_back_when_its_awaiter_has_given_up(engine: sa.Engine, work: UnitOfWork) -> None:
    """Retry(Timeout(step)): the attempt that took too long leaves no row behind, the one that was waited for does."""
    began: list[int] = []
    given_up = threading.Event()

    @session_step
    def slow_at_first(session: Session, data: Any) -> int:
        began.append(1)
        session.add(Row(value=f"attempt {len(began)}"))
        session.flush()
        if len(began) == 1:
            assert given_up.wait(20)
        return len(began)

    @step
    async def flow(data: Any, context: WorkflowContext) -> Any:
        first = asyncio.ensure_future(slow_at_first.execute(data, context))
        while not began:
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        given_up.set()
        return await slow_at_first.execute(data, context)

    assert work.run(run_sync, flow, None) == 2
    assert values(engine) == ["attempt 2"]


def test_timeout_around_a_step_leaves_nothing_behind(engine: sa.Engine, work: UnitOfWork) -> None:
    """The same with our own Retry and Timeout."""
    began: list[int] = []

    @session_step
    def slow_at_first(session: Session, data: Any) -> int:
        began.append(1)
        session.add(Row(value=f"attempt {len(began)}"))
        session.flush()
        if len(began) == 1:
            time.sleep(0.7)
        return len(began)

    # An attempt has time even if it has to wait until the one before it lets go of the thread.
    flow = RetryPrimitive(TimeoutPrimitive(slow_at_first, 0.5), max_retries=2)
    assert work.run(run_sync, flow, None) == 2
    assert values(engine) == ["attempt 2"]


def test_step_never_starts_when_it_is_cancelled_in_the_queue(engine: sa.Engine, work: UnitOfWork) -> None:
    """A step that waits for the caller and loses its awaiter is not run."""
    ran: list[str] = []
    holding, let_go = threading.Event(), threading.Event()

    @session_step
    def hold(session: Session, data: Any) -> None:
        holding.set()
        assert let_go.wait(20)

    @session_step
    def second(session: Session, data: Any) -> None:
        ran.append("second")

    @step
    async def flow(data: Any, context: WorkflowContext) -> None:
        first = asyncio.ensure_future(hold.execute(data, context))
        while not holding.is_set():
            await asyncio.sleep(0.001)
        queued = asyncio.ensure_future(second.execute(data, context))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        let_go.set()
        await first

    work.run(run_sync, flow, None)
    assert ran == []


def test_result_stands_when_the_cancellation_comes_after_the_release(engine: sa.Engine, work: UnitOfWork) -> None:
    """Between the claim and the result's arrival a cancellation is too late: row and result stay."""
    cancelled = threading.Event()
    tasks: list[Any] = []

    @event.listens_for(engine, "release_savepoint")
    def cancel_now(*_: Any) -> None:
        loop, task = tasks[0]
        loop.call_soon_threadsafe(lambda: (task.cancel(), loop.call_later(0.02, cancelled.set)))
        assert cancelled.wait(20)

    @step
    async def flow(data: Any, context: WorkflowContext) -> Any:
        task = asyncio.ensure_future(save.execute("a", context))
        tasks.append((asyncio.get_running_loop(), task))
        return (await task).value

    assert work.run(run_sync, flow, None) == "a"
    assert values(engine) == ["a"]


def test_call_ends_when_its_deadline_passes_after_the_release(engine: sa.Engine, work: UnitOfWork) -> None:
    """When it was the whole call's deadline, the released step does not keep the call alive; nothing is committed."""
    after = []

    @event.listens_for(engine, "release_savepoint")
    def outlast(*_: Any) -> None:
        time.sleep(0.4)

    @step
    async def note(data: Any) -> None:
        after.append(data)

    with pytest.raises(DeadlineExceededError):
        work.run(run_sync, save >> note, "a", timeout=0.3)
    assert after == []
    assert values(engine) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupt_inside_a_step_comes_out_and_nothing_is_saved(
    engine: sa.Engine, work: UnitOfWork, interrupt: type[BaseException]
) -> None:
    """Ctrl-C in the middle of a step ends the call and the unit, and the connection is fit for the next."""

    @session_step
    def interrupted(session: Session, data: Any) -> None:
        session.add(Row(value="lost"))
        session.flush()
        raise interrupt

    with pytest.raises(interrupt):
        work.run(run_sync, save >> interrupted, "a")
    assert values(engine) == []
    work.run(run_sync, save, "b")
    assert values(engine) == ["b"]


# ---- 3. and 4. what is retried ---------------------------------------------------------------------------------------


def test_integrity_error_is_retried_in_a_new_savepoint(engine: sa.Engine, work: UnitOfWork) -> None:
    """Get-or-create: who came second finds what the first one committed, and what was done before stays."""
    attempts: list[Any] = []

    @session_step
    def get_or_create(session: Session, data: str) -> int:
        found = session.scalar(sa.select(Row).where(Row.value == data))
        attempts.append(found)
        if len(attempts) == 1:
            found = None  # as if the other one had not committed yet
        if found is None:
            session.add(Row(value=data))
            session.flush()
            return -1
        return found.id

    with Session(engine) as session, session.begin():
        session.add(Row(value="a"))
    work.run(run_sync, save, "before")
    assert work.run(run_sync, get_or_create, "a") > 0
    assert len(attempts) == 2
    assert values(engine) == ["a", "before"]


def test_integrity_error_comes_out_when_it_persists(engine: sa.Engine, work: UnitOfWork) -> None:
    """A duplicate that is one comes out as SQLAlchemy's own error, after one retry; none for idempotent=False."""
    calls: list[int] = []

    def duplicate(session: Session, data: str) -> None:
        calls.append(1)
        session.add(Row(value=data))

    work.run(run_sync, save, "a")
    with pytest.raises(IntegrityError):
        work.run(run_sync, session_step(duplicate), "a")
    assert len(calls) == 2
    with pytest.raises(IntegrityError):
        work.run(run_sync, session_step(idempotent=False)(duplicate), "a")
    assert len(calls) == 3
    with pytest.raises(ConfigurationError, match="integrity_retries"):
        session_step(integrity_retries=-1)(duplicate)


def test_retried_step_reads_its_objects_again(engine: sa.Engine, work: UnitOfWork) -> None:
    """A retry does not decide by what the failed attempt had loaded or changed in memory."""
    seen: list[int] = []

    @session_step
    def count_up(session: Session, data: Any) -> int:
        row = session.scalars(sa.select(Row).where(Row.value == "a")).one()
        seen.append(row.count)
        row.count += 1
        session.flush()
        if len(seen) == 1:
            raise IntegrityError("once", {}, ValueError())
        return row.count

    work.run(run_sync, save, "a")
    assert work.run(run_sync, count_up, None) == 1
    assert seen == [0, 0]


def test_retried_step_reads_what_others_have_committed_meanwhile(postgres: sa.Engine) -> None:
    """What the failed attempt had only read is read again too, not remembered."""
    work = unit_of_work(postgres)
    work.run(run_sync, save, "a")
    seen: list[int] = []
    kept: list[Row] = []  # while somebody holds an object, a session answers a query with it as it was

    @session_step
    def look(session: Session, data: Any) -> None:
        row = session.scalars(sa.select(Row).where(Row.value == "a")).one()
        kept.append(row)
        seen.append(row.count)
        if len(seen) == 1:
            with Session(postgres) as other, other.begin():
                other.execute(sa.update(Row).values(count=5))
            raise IntegrityError("once", {}, ValueError())

    work.run(run_sync, look, None)
    assert seen == [0, 5]


def test_unit_runs_again_after_a_serialization_failure(postgres: sa.Engine) -> None:
    """PostgreSQL refuses one of two SERIALIZABLE transactions: its unit runs again from its start, and both count."""
    engine = postgres.execution_options(isolation_level="SERIALIZABLE")
    work = unit_of_work(sessionmaker(engine))
    unit_of_work(postgres).run(run_sync, save, "a")
    barrier = threading.Barrier(2, timeout=20)
    attempts: list[int] = []

    @session_step
    def read(session: Session, data: Any) -> int:
        return session.scalars(sa.select(Row.count).where(Row.value == "a")).one()

    @session_step
    def write(session: Session, count: int) -> int:
        session.execute(sa.update(Row).where(Row.value == "a").values(count=count + 1))
        return count + 1

    def meet(data: Any) -> Any:
        attempts.append(1)
        if len(attempts) <= 2:
            barrier.wait()
        return data

    from tta_sync.primitives.core.base import caller_step

    flow = read >> caller_step(meet) >> write
    threads = [threading.Thread(target=work.run, args=(run_sync, flow, None)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with Session(postgres) as session:
        assert session.scalars(sa.select(Row.count)).one() == 2
    assert len(attempts) == 3


def test_unit_runs_again_after_a_deadlock(postgres: sa.Engine) -> None:
    """Two units that lock two rows in opposite order both end well: PostgreSQL ends one, which runs again."""
    work = unit_of_work(sessionmaker(postgres))
    work.run(run_sync, save >> step(lambda _: "b") >> save, "a")
    barrier = threading.Barrier(2, timeout=20)
    met: list[int] = []

    @session_step
    def lock(session: Session, data: tuple[str, ...]) -> tuple[str, ...]:
        session.execute(sa.update(Row).where(Row.value == data[0]).values(count=Row.count + 1))
        return data[1:]

    from tta_sync.primitives.core.base import caller_step

    @caller_step
    def meet(data: Any) -> Any:
        met.append(1)
        if len(met) <= 2:
            barrier.wait()
        return data

    flow = lock >> meet >> lock
    errors: list[BaseException] = []

    def run(order: tuple[str, str]) -> None:
        try:
            work.run(run_sync, flow, order)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(order,)) for order in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    with Session(postgres) as session:
        assert session.scalars(sa.select(Row.count)).all() == [2, 2]
    assert len(met) == 3


class Locker:
    """Another connection to a SQLite file, which can hold its write lock."""

    def __init__(self, engine: sa.Engine) -> None:
        assert engine.url.database is not None
        self.raw = sqlite3.connect(engine.url.database, isolation_level=None, check_same_thread=False)

    def lock(self) -> None:
        self.raw.execute("BEGIN IMMEDIATE")

    def unlock(self) -> None:
        self.raw.execute("COMMIT")


@pytest.fixture
def locker(sqlite: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Locker]:
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0.02)
    locker = Locker(sqlite)
    yield locker
    locker.raw.close()


def test_first_step_alone_begins_again_when_the_database_is_locked(sqlite: sa.Engine, locker: Locker) -> None:
    """Nothing had been written yet: the slow call before the step is not made again."""
    work = unit_of_work(sqlite)
    calls: list[str] = []

    @step
    async def slow_call(data: Any) -> Any:
        calls.append("slow call")
        return data

    class Clock:
        monotonic, time, call_at = SYSTEM_CLOCK.monotonic, SYSTEM_CLOCK.time, SYSTEM_CLOCK.call_at

        async def sleep(self, seconds: float) -> None:
            calls.append("pause")
            locker.unlock()

    locker.lock()
    assert work.run(run_sync, slow_call >> save, "a", WorkflowContext(clock=Clock())).value == "a"
    assert calls == ["slow call", "pause"]
    assert values(sqlite) == ["a"]


def test_lock_comes_out_as_it_is_when_it_lasts(sqlite: sa.Engine, locker: Locker) -> None:
    """After its retries the database's own error comes out, by a unit that can run again and by one that cannot."""
    work = unit_of_work(sqlite, retries=1)
    locker.lock()
    with pytest.raises(OperationalError, match="locked"):
        work.run(run_sync, save, "a")
    with pytest.raises(OperationalError, match="locked"), work:
        run_sync(save, "a")
    locker.unlock()
    assert values(sqlite) == []


def test_lock_is_the_deadlines_error_when_the_deadline_passes_first(sqlite: sa.Engine, locker: Locker) -> None:
    """Waiting for a lock ends at the deadline, not at the busy timeout."""
    engines.BUSY_TIMEOUT = 30.0
    locker.lock()
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        unit_of_work(sqlite).run(run_sync, save, "a", timeout=0.2)
    assert time.monotonic() - began < 10
    locker.unlock()
    unit_of_work(sqlite).run(run_sync, save, "b", timeout=5)
    assert values(sqlite) == ["b"]


def test_whole_unit_runs_again_when_a_later_step_loses_the_transaction(sqlite: sa.Engine) -> None:
    """What the first step wrote is lost with the transaction, so it runs again too."""
    ran: list[str] = []

    @session_step
    def first(session: Session, data: str) -> str:
        ran.append("first")
        session.add(Row(value=data))
        return data

    @session_step
    def second(session: Session, data: str) -> str:
        ran.append("second")
        if ran.count("second") == 1:
            raise locked()
        return data

    work = unit_of_work(sqlite)
    assert work.run(run_sync, first >> later >> second, "a") == "a"
    assert ran == ["first", "second", "first", "second"]
    assert values(sqlite) == ["a"]


def locked() -> OperationalError:
    original = sqlite3.OperationalError("database is locked")
    original.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return OperationalError("UPDATE", {}, original)


def test_lost_transaction_is_not_committed_when_a_fallback_answers(sqlite: sa.Engine) -> None:
    """A fallback may hide the step's error, not the loss: later steps see it at once, and the unit does not commit."""
    ran: list[str] = []

    @session_step
    def loses(session: Session, data: Any) -> None:
        ran.append("loses")
        raise locked()

    @step
    async def flow(data: Any, context: WorkflowContext) -> str:
        await save.execute("a", context)
        for _ in range(2):
            with pytest.raises(OperationalError):
                await loses.execute(None, context)
        return "hidden"

    with pytest.raises(OperationalError, match="locked"), unit_of_work(sqlite):
        assert run_sync(flow, None) == "hidden"
    assert ran == ["loses"]
    assert values(sqlite) == []


def test_unit_is_not_run_again_when_the_error_is_another(sqlite: sa.Engine) -> None:
    """Only what the database calls transient is tried again."""
    ran: list[int] = []

    def fails() -> None:
        ran.append(1)
        raise OperationalError("x", {}, sqlite3.OperationalError("no such table"))

    with pytest.raises(OperationalError):
        unit_of_work(sqlite).run(fails)
    assert len(ran) == 1


def test_unit_is_not_run_again_when_the_deadline_leaves_no_time(sqlite: sa.Engine) -> None:
    """A pause that does not fit into the request's deadline is not made."""
    ran: list[int] = []

    def fails() -> None:
        ran.append(1)
        raise locked()

    token = running_context.set(WorkflowContext(deadline=Deadline.after(0.005)))
    try:
        with pytest.raises(OperationalError):
            unit_of_work(sqlite).run(fails)
    finally:
        running_context.reset(token)
    assert len(ran) == 1


def test_pauses_are_jittered_and_bounded(sqlite: sa.Engine) -> None:
    """Those who collided do not come back at the same moment, and nobody waits long."""
    work = UnitOfWork(sqlite, chance=random.Random(1))
    first = [work.delay(0) for _ in range(100)]
    assert len(set(first)) > 90
    assert min(first) >= 0.01
    assert max(first) <= 0.031
    assert max(work.delay(50) for _ in range(100)) <= 0.311


@pytest.mark.parametrize(
    ("code", "transient"),
    [(sqlite3.SQLITE_BUSY, True), (sqlite3.SQLITE_BUSY_SNAPSHOT, True), (sqlite3.SQLITE_LOCKED, True), (1, False)],
)
def test_transient_errors_of_sqlite_are_known_by_their_code(code: int, transient: bool) -> None:
    """Not by their text; extended codes count as what they extend."""
    original = sqlite3.OperationalError("database is locked")
    original.sqlite_errorcode = code
    assert is_transient(OperationalError("x", {}, original)) is transient
    assert not is_transient(original)


@pytest.mark.parametrize("attribute", ["sqlstate", "pgcode"])
def test_transient_errors_of_postgresql_are_known_by_their_state(attribute: str) -> None:
    """psycopg says sqlstate, psycopg2 pgcode."""
    for state, transient in {"40001": True, "40P01": True, "57014": False, "23505": False}.items():
        original = type("E", (Exception,), {attribute: state})()
        assert is_transient(DBAPIError("x", {}, original)) is transient


# ---- 5. engines ------------------------------------------------------------------------------------------------------


def test_legacy_sqlite_engine_is_refused_with_the_cure(sqlite_url: str) -> None:
    """pysqlite's own transactions make savepoints that survive a rollback; adopt(engine) mends it in place."""
    engine = prepared(sa.create_engine(sqlite_url))
    work = unit_of_work(sessionmaker(engine))
    with pytest.raises(ConfigurationError, match=r"adopt\(engine\)"):
        work.run(run_sync, save, "a")
    withdraw = provide_session(sessionmaker(engine))
    try:
        with pytest.raises(ConfigurationError, match=r"create_engine\(url\)"):
            run_sync(save, "a")
    finally:
        withdraw()
    assert adopt(engine) is engine
    assert adopt(engine) is engine
    with pytest.raises(LookupError):
        work.run(run_sync, save >> failing(LookupError()), "a")
    assert values(engine) == []
    work.run(run_sync, save, "b")
    assert values(engine) == ["b"]
    engine.dispose()


def test_adopted_engine_keeps_its_connections_and_settings(sqlite_url: str) -> None:
    """Adopting disposes of nothing: the pool, what is checked out, its size and timeout stay."""
    engine = prepared(sa.create_engine(sqlite_url, pool_timeout=7, pool_size=3))
    pool = engine.pool
    with engine.connect() as connection:
        adopt(engine)
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert engine.pool is pool
    assert pool.timeout() == 7
    assert pool.size() == 3
    engine.dispose()
    assert engine.pool.timeout() == 7
    assert engine.pool.size() == 3
    work = unit_of_work(engine)
    work.run(run_sync, save, "a")
    assert values(engine) == ["a"]
    engine.dispose()


def test_adopted_engine_gets_along_with_an_applications_own_begin(sqlite_url: str) -> None:
    """SQLAlchemy's documented recipe, already in place, is not begun twice."""
    engine = prepared(sa.create_engine(sqlite_url))
    event.listen(engine, "connect", lambda raw, record: setattr(raw, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    adopt(engine)
    engine.dispose()
    with pytest.raises(LookupError):
        unit_of_work(engine).run(run_sync, save >> failing(LookupError()), "a")
    unit_of_work(engine).run(run_sync, save, "b")
    assert values(engine) == ["b"]
    engine.dispose()


def test_autocommit_stays_autocommit_and_an_engine_of_it_is_refused(sqlite_url: str) -> None:
    """One connection may ask for autocommit; an engine that does so has no transactions to offer."""
    engine = prepared(create_engine(sqlite_url))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("INSERT INTO rows (value, count) VALUES ('a', 0)")
    assert values(engine) == ["a"]
    unit_of_work(engine).run(run_sync, save, "b")
    engine.dispose()
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        create_engine(sqlite_url, isolation_level="AUTOCOMMIT")


def test_async_engines_are_refused() -> None:
    """Session steps are for sync engines, and the message says so."""
    with pytest.raises(ConfigurationError, match="sync Engine"):
        adopt(create_async_engine("postgresql+psycopg://x/y"))  # type: ignore[arg-type]


def test_rollback_is_not_skipped_when_an_engine_skips_it_for_autocommit(sqlite_url: str) -> None:
    """SQLAlchemy takes pysqlite's isolation_level None for autocommit; our transactions are rolled back."""
    engine = prepared(create_engine(sqlite_url, skip_autocommit_rollback=True))
    with engine.connect() as connection:
        connection.exec_driver_sql("INSERT INTO rows (value, count) VALUES ('a', 0)")
        connection.rollback()
    assert values(engine) == []
    engine.dispose()


def test_sqlite_engine_has_what_a_service_needs(sqlite: sa.Engine) -> None:
    """WAL, foreign keys, a busy timeout; a unit takes the write lock at once, a read-only one never."""
    with sqlite.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000
    with pytest.raises(IntegrityError):
        unit_of_work(sqlite).run(run_sync, session_step(lambda s, d: s.add(Part(row_id=99))), None)
    locker = Locker(sqlite)
    with unit_of_work(sqlite) as unit:
        assert unit.session.scalar(sa.select(sa.func.count()).select_from(Row)) == 0
        locker.raw.execute("PRAGMA busy_timeout=0")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            locker.lock()
    with unit_of_work(sqlite, read_only=True) as unit:
        assert unit.session.scalar(sa.select(sa.func.count()).select_from(Row)) == 0
        locker.lock()
        locker.unlock()
    with Session(sqlite) as session:  # outside units: a plain BEGIN
        session.scalar(sa.select(sa.func.count()).select_from(Row))
        locker.lock()
        locker.unlock()
    locker.raw.close()


def test_read_only_unit_cannot_write_on_postgresql(postgres: sa.Engine) -> None:
    """There the database itself holds a unit to it; the connection is not read-only afterwards."""
    with pytest.raises(DBAPIError, match="read-only"):
        unit_of_work(postgres, read_only=True).run(run_sync, save, "a")
    unit_of_work(postgres).run(run_sync, save, "a")
    assert values(postgres) == ["a"]


def test_read_then_write_units_never_collide_on_sqlite(sqlite: sa.Engine) -> None:
    """Eight threads that each read and then write end well; a plain BEGIN gives "database is locked" at once."""
    work = unit_of_work(sqlite, retries=0)
    errors: list[BaseException] = []

    @session_step
    def read_and_write(session: Session, data: str) -> None:
        session.scalar(sa.select(sa.func.count()).select_from(Row))
        session.add(Row(value=data))

    def run(thread: int) -> None:
        try:
            for i in range(10):
                work.run(run_sync, read_and_write, f"{thread}.{i}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(values(sqlite)) == 80


def test_file_that_may_only_be_read_can_be_read(sqlite: sa.Engine, sqlite_url: str) -> None:
    """A read-only file cannot be switched to WAL, and need not be."""
    unit_of_work(sqlite).run(run_sync, save, "a")
    with sqlite.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=DELETE")
    sqlite.dispose()
    path = sqlite_url.removeprefix("sqlite:///")
    readonly = create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert values(readonly) == ["a"]
    readonly.dispose()


def test_switch_to_wal_that_meets_a_lock_is_tried_again(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection to a file may find it locked: the unit is tried again, and the file does become WAL."""
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 0.02)
    plain = prepared(sa.create_engine(sqlite_url))
    plain.dispose()
    locker = Locker(plain)
    locker.lock()
    locker.raw.execute("INSERT INTO rows (value, count) VALUES ('theirs', 0)")
    engine = create_engine(sqlite_url)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        locker.unlock()

    monkeypatch.setattr(units.time, "sleep", pause)

    def insert() -> None:
        current_session().add(Row(value="ours"))
        current_session().flush()

    unit_of_work(engine).run(insert)
    assert len(pauses) == 1
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    assert values(engine) == ["ours", "theirs"]
    engine.dispose()
    locker.raw.close()


def test_memory_database_is_one_for_all_sessions() -> None:
    """For tests of applications: every session sees the same in-memory database."""
    for url in ("sqlite://", "sqlite:///:memory:"):
        engine = prepared(create_engine(url))
        unit_of_work(engine).run(run_sync, save, "a")
        assert values(engine) == ["a"]
        engine.dispose()


def test_options_of_the_application_are_kept(sqlite_url: str, postgres_url: str) -> None:
    """A pool, its size, connect_args: what is given is not overridden."""
    engine = create_engine(sqlite_url, poolclass=sa.NullPool)
    assert type(engine.pool) is sa.NullPool
    engine = create_engine(sqlite_url, pool_size=3)
    assert engine.pool.size() == 3  # type: ignore[attr-defined]
    assert create_engine(sqlite_url).pool.size() == 32  # type: ignore[attr-defined]
    engine = create_engine(postgres_url, connect_args={"application_name": "mine"}, pool_pre_ping=False)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW application_name").scalar() == "mine"
    engine.dispose()


def test_forked_child_leaves_its_parents_connections_alone(engine: sa.Engine, work: UnitOfWork) -> None:
    """A child opens connections of its own, never closes its parent's, and these still work when it has gone."""
    work.run(run_sync, save, "parent 1")
    spare = create_engine(engine.url)
    values(spare)
    spare_pool = weakref.ref(spare.pool)
    with engine.connect() as held:
        held.exec_driver_sql("SELECT 1")
        pool = engine.pool
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                gc.collect()
                assert spare_pool() is not None  # collecting it would close what is the parent's
                assert engine.pool is not pool
                work.run(run_sync, save, "child")
                engine.dispose()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert held.exec_driver_sql("SELECT 1").scalar() == 1
    work.run(run_sync, save, "parent 2")
    assert values(engine) == ["child", "parent 1", "parent 2"]
    spare.dispose()


# ---- 6. deadlines ----------------------------------------------------------------------------------------------------

FOREVER = {
    "postgresql": "SELECT pg_sleep(60)",
    "sqlite": "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c",
}


@session_step
def slow_query(session: Session, data: Any) -> None:
    assert session.bind is not None
    session.execute(sa.text(FOREVER[session.bind.dialect.name]))


def test_statement_ends_at_the_deadline(engine: sa.Engine, work: UnitOfWork) -> None:
    """A query without end is cut at the call's deadline, with the deadline's error; the connection lives on."""
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        work.run(run_sync, save >> slow_query, "a", timeout=0.3)
    assert time.monotonic() - began < 15
    assert values(engine) == []
    work.run(run_sync, save, "b", timeout=20)
    work.run(run_sync, save, "c")
    assert values(engine) == ["b", "c"]


def test_statement_ends_at_the_timeout_around_the_step(engine: sa.Engine, work: UnitOfWork) -> None:
    """A TimeoutPrimitive bounds the statement too, so that the caller's thread is free again."""
    began = time.monotonic()
    with pytest.raises(StepTimeoutError):
        work.run(run_sync, TimeoutPrimitive(slow_query, 0.2), None, timeout=60)
    assert time.monotonic() - began < 15


def test_timeout_does_not_reach_beyond_the_step(engine: sa.Engine, work: UnitOfWork) -> None:
    """After a bounded step the session runs statements without that bound."""

    @step
    async def flow(data: Any, context: WorkflowContext) -> None:
        await TimeoutPrimitive(save, 30).execute("a", context)

    with work as unit:
        run_sync(flow, None)
        if engine.dialect.name == "postgresql":
            assert unit.session.execute(sa.text("SHOW statement_timeout")).scalar() == "0"
        else:
            assert len(unit.session.scalars(sa.select(Row)).all()) == 1


def test_connection_has_no_limit_left_when_the_step_has_ended(sqlite: sa.Engine) -> None:
    """Once the limit of a step that ended in time has passed, its connection still runs long statements."""
    with unit_of_work(sqlite) as unit:
        end = time.monotonic() + 0.2
        save._perform(steps._Turn(), "a", WorkflowContext(), end)
        time.sleep(max(0.0, end - time.monotonic()))
        long = FOREVER["sqlite"].replace("FROM c)", "FROM c WHERE n < 100000)")
        assert unit.session.scalar(sa.text(long)) == 100000


def test_step_does_not_start_when_the_deadline_has_passed(sqlite: sa.Engine) -> None:
    """A limit that passed while the step was queued is raised, not tried."""
    ran: list[int] = []

    @session_step
    def step_(session: Session, data: Any) -> None:
        ran.append(1)

    past, future = Deadline.after(-1), Deadline.after(100)
    with unit_of_work(sqlite), pytest.raises(DeadlineExceededError):
        step_._perform(steps._Turn(), None, WorkflowContext(deadline=past), past.at)
    with unit_of_work(sqlite), pytest.raises(StepTimeoutError):
        step_._perform(steps._Turn(), None, WorkflowContext(deadline=future), time.monotonic() - 1)
    assert ran == []


@pytest.mark.parametrize("expected", [DeadlineExceededError, StepTimeoutError])
def test_database_that_is_first_to_notice_raises_the_same_error(
    engine: sa.Engine, work: UnitOfWork, expected: type[Exception]
) -> None:
    """Whether the loop's timer or the database's ends the statement, the error is the deadline's, or the step's."""
    end = time.monotonic() + 0.2
    context = WorkflowContext(deadline=Deadline(end if expected is DeadlineExceededError else end + 100, 0.2))
    with work, pytest.raises(expected) as caught:
        slow_query._perform(steps._Turn(), None, context, end)
    assert isinstance(caught.value.__cause__, DBAPIError)


def test_lock_wait_ends_at_the_deadline_on_postgresql(postgres: sa.Engine) -> None:
    """Waiting for another's row lock is part of the statement."""
    work = unit_of_work(postgres)
    work.run(run_sync, save, "a")

    @session_step
    def lock(session: Session, data: Any) -> None:
        session.execute(sa.update(Row).values(count=1))

    with Session(postgres) as other:
        other.execute(sa.update(Row).values(count=2))
        with pytest.raises(DeadlineExceededError):
            work.run(run_sync, lock, None, timeout=0.3)


def test_wait_for_a_connection_ends_at_the_deadline(url: str) -> None:
    """An empty pool makes a step wait as long as the deadline allows, not 30 s."""
    engine = prepared(create_engine(url, pool_size=1, max_overflow=0))
    with engine.connect():
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            unit_of_work(engine).run(run_sync, save, "a", timeout=0.2)
        assert time.monotonic() - began < 15
    unit_of_work(engine).run(run_sync, save, "b", timeout=20)
    assert engine.pool.timeout() == 30  # type: ignore[attr-defined]
    engine.dispose()


def test_pool_that_is_replaced_inside_a_step_keeps_its_own_wait(sqlite: sa.Engine) -> None:
    """engine.dispose() while a step's limit holds does not make that limit the new pool's for ever."""

    @session_step
    def dispose(session: Session, data: Any) -> None:
        sqlite.dispose()

    unit_of_work(sqlite).run(run_sync, dispose, None, timeout=20)
    assert sqlite.pool.timeout() == 30  # type: ignore[attr-defined]


def test_pool_wait_is_the_pools_own_without_a_deadline(sqlite_url: str) -> None:
    """Without a deadline nothing changes: SQLAlchemy's own error after the pool's own time."""
    engine = prepared(create_engine(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0.05))
    with engine.connect(), pytest.raises(sa.exc.TimeoutError):
        unit_of_work(engine).run(run_sync, save, "a")
    engine.dispose()


# ---- 7. to 9. units of work ------------------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    heard: list[Any] = []
    unsubscribe = events.bus.subscribe(heard.append)
    yield heard
    unsubscribe()


def held(heard: list[Any]) -> list[Any]:
    return [e for e in heard if type(e).__name__ == "TransactionHeld"]


def test_transaction_held_across_an_await_is_told(
    sqlite: sa.Engine, heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps, and between the last one and the commit, an open transaction is an event."""
    monkeypatch.setattr(units, "HELD", 0.0)
    work = unit_of_work(sqlite)

    @session_step
    def look(session: Session, data: Any) -> Any:
        session.execute(sa.text("SELECT 1"))
        return data

    context = WorkflowContext(correlation_id="c")
    work.run(run_sync, look >> later >> look >> later, None, context)
    first, second = held(heard)
    assert (first.step, first.correlation_id) == ("test_transaction_held_across_an_await_is_told.<locals>.look", "c")
    assert first.seconds > 0
    assert (second.step, second.correlation_id) == (first.step, "c")


def test_short_transactions_and_committed_steps_are_no_event(
    sqlite: sa.Engine, heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under 100 ms nobody is told; with commit="step" there is nothing to tell."""
    monkeypatch.setattr(units, "HELD", 1000.0)
    unit_of_work(sqlite).run(run_sync, save >> later, "a")
    assert held(heard) == []
    monkeypatch.setattr(units, "HELD", 0.0)
    unit_of_work(sqlite, commit="step").run(run_sync, save >> later, "b")
    assert held(heard) == []


def test_each_step_is_committed_when_the_unit_says_so(engine: sa.Engine) -> None:
    """commit="step": what a step wrote stays when a later one fails, and no transaction is open in between."""
    work = unit_of_work(engine, commit="step")
    between: list[list[str]] = []

    @step
    async def look(data: Any) -> str:
        between.append(await asyncio.to_thread(values, engine))
        return "b"

    with pytest.raises(LookupError):
        work.run(run_sync, save >> look >> save >> failing(LookupError()), "a")
    assert between == [["a"]]
    assert values(engine) == ["a", "b"]


@pytest.mark.parametrize("commit", ["end", "step"])
def test_no_lock_is_held_for_a_step_that_failed(sqlite: sa.Engine, commit: Any) -> None:
    """A failed step before which nothing was done leaves no transaction open across the awaits that follow."""
    locker = Locker(sqlite)
    locker.raw.execute("PRAGMA busy_timeout=0")

    @step
    async def flow(data: Any, context: WorkflowContext) -> None:
        with pytest.raises(LookupError):
            await session_step(fail_in_session).execute(None, context)
        locker.lock()
        locker.unlock()
        await save.execute("a", context)

    unit_of_work(sqlite, commit=commit).run(run_sync, flow, None)
    assert values(sqlite) == ["a"]
    locker.raw.close()


def fail_in_session(session: Session, data: Any) -> None:
    session.add(Row(value="x"))
    session.flush()
    raise LookupError


def test_unit_is_fresh_again_after_each_commit(sqlite: sa.Engine) -> None:
    """With commit="step" a later step can begin again by itself, whatever was done and committed before it."""
    ran: list[int] = []

    @session_step
    def locked_once(session: Session, data: Any) -> None:
        ran.append(1)
        if len(ran) == 1:
            raise locked()

    with unit_of_work(sqlite, commit="step") as unit:
        unit.session.add(Row(value="beside"))
        run_sync(save, "a")
        run_sync(locked_once, None)
    assert len(ran) == 2
    assert values(sqlite) == ["a", "beside"]


def test_step_begins_again_when_its_own_commit_is_refused(sqlite: sa.Engine) -> None:
    """commit="step": a commit that failed for a passing reason runs the step again; another error comes out."""
    work = unit_of_work(sqlite, commit="step")
    refusals: list[Exception] = [locked(), locked()]
    ran: list[int] = []

    @session_step
    def write(session: Session, data: str) -> None:
        ran.append(1)
        session.add(Row(value=data))

    @event.listens_for(sqlite, "commit")
    def refuse(connection: Any) -> None:
        if refusals:
            raise refusals.pop()

    work.run(run_sync, write, "a")
    assert len(ran) == 3
    assert values(sqlite) == ["a"]
    refusals.append(OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error")))
    with pytest.raises(OperationalError, match="disk"):
        work.run(run_sync, write, "b")
    assert len(ran) == 4


def test_parallel_session_steps_take_turns(engine: sa.Engine, work: UnitOfWork) -> None:
    """Branches that use the session run one after the other; their savepoints never overlap."""
    inside: list[int] = []

    @session_step
    def alone(session: Session, data: str) -> int:
        inside.append(1)
        session.add(Row(value=f"{data}{len(inside)}"))
        session.flush()
        count = len(inside)
        session.flush()
        assert len(inside) == count
        return count

    @step
    async def flow(data: str, context: WorkflowContext) -> list[int]:
        return list(await asyncio.gather(*(alone.execute(data, context) for _ in range(5))))

    assert work.run(run_sync, flow, "a") == [1, 2, 3, 4, 5]
    assert len(values(engine)) == 5


def test_session_cannot_be_used_on_the_loops_thread(engine: sa.Engine, work: UnitOfWork) -> None:
    """An attribute that would load lazily in an async step is an error there, not a blocked loop or a torn session."""

    @session_step
    def fetch(session: Session, data: Any) -> Row:
        session.add(Row(value="a", parts=[Part()]))
        session.flush()
        session.expire_all()
        return session.scalars(sa.select(Row)).one()

    @step
    async def touch(row: Row) -> int:
        return len(row.parts)

    with pytest.raises(NoCallerError, match="session_step"):
        work.run(run_sync, fetch >> touch, None)
    assert values(engine) == []


def test_unit_joins_the_one_around_it(engine: sa.Engine, work: UnitOfWork) -> None:
    """A unit inside a unit of the same kind is part of it, and is not run again by itself."""
    ran: list[int] = []

    def inner() -> None:
        ran.append(1)
        work.run(run_sync, save, "a")

    @work
    def outer() -> None:
        work.run(inner)
        with work as joined:
            assert values_of(joined.session) == ["a"]
        raise LookupError

    with pytest.raises(LookupError):
        outer()
    assert values(engine) == []

    def fails() -> None:
        ran.append(1)
        raise locked()

    ran.clear()
    with pytest.raises(OperationalError), work:
        work.run(fails)
    assert len(ran) == 1


def values_of(session: Session) -> list[str]:
    return sorted(session.scalars(sa.select(Row.value)))


def test_unit_of_another_kind_is_its_own(postgres: sa.Engine) -> None:
    """An audit trail that must stay is written in a unit of its own inside the other."""
    work, audit = unit_of_work(postgres), unit_of_work(postgres)

    @work
    def outer() -> None:
        run_sync(save, "lost")
        audit.run(run_sync, save, "kept")
        run_sync(save, "lost too")
        raise LookupError

    with pytest.raises(LookupError):
        outer()
    assert values(postgres) == ["kept"]


def test_function_becomes_a_unit_when_it_is_decorated(engine: sa.Engine, work: UnitOfWork) -> None:
    """@units makes each call of a function a unit, arguments and result included."""

    @work
    def store(*names: str, fail: bool = False) -> int:
        """Store them."""
        for name in names:
            run_sync(save, name)
        if fail:
            raise LookupError
        return len(names)

    assert store("a", "b") == 2
    assert store.__doc__ == "Store them."
    with pytest.raises(LookupError):
        store("c", fail=True)
    assert values(engine) == ["a", "b"]


def test_sync_code_beside_the_workflow_has_the_same_session(engine: sa.Engine, work: UnitOfWork) -> None:
    """current_session() is the unit's; using it means that a lost transaction cannot be begun again half-way."""
    with work as unit:
        current_session().add(Row(value="a"))
        run_sync(save, "b")
        assert unit.session is current_session()
        assert not unit.fresh
    assert values(engine) == ["a", "b"]
    with pytest.raises(ConfigurationError):
        current_session()


def test_unit_that_used_no_session_opens_none(sqlite_url: str) -> None:
    """A unit around a workflow without session steps costs no connection."""
    engine = create_engine(sqlite_url)
    assert unit_of_work(engine).run(run_sync, later, 1) == 1
    assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]


def test_connection_goes_back_to_the_pool(engine: sa.Engine, work: UnitOfWork) -> None:
    """Whatever happens, no unit keeps a connection."""
    work.run(run_sync, save, "a")
    with pytest.raises(IntegrityError):
        work.run(run_sync, save, "a")
    with pytest.raises(LookupError):
        work.run(run_sync, save >> failing(LookupError()), "b")
    with pytest.raises(DeadlineExceededError):
        work.run(run_sync, slow_query, None, timeout=0.1)
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_scoped_session_stays_the_applications(engine: sa.Engine) -> None:
    """A scoped_session is committed by the unit and left open, with the options it came with."""
    registry = scoped_session(sessionmaker(engine))
    work = unit_of_work(registry)
    session = registry()
    options = session.execution_options
    work.run(run_sync, save, "a")
    assert registry() is session
    assert session.execution_options == options
    assert values_of(session) == ["a"]
    session.rollback()
    with pytest.raises(LookupError):
        work.run(run_sync, save >> failing(LookupError()), "b")
    assert values_of(session) == ["a"]
    registry.remove()


def test_work_in_a_scoped_session_is_not_undone_by_a_failed_step(sqlite: sa.Engine) -> None:
    """What the application did before the unit stays in the transaction when a step fails, and is committed with it."""
    registry = scoped_session(sessionmaker(sqlite))
    registry().add(Row(value="before"))
    registry().flush()
    with unit_of_work(registry), pytest.raises(LookupError):
        run_sync(session_step(fail_in_session), None)
    registry.remove()
    assert values(sqlite) == ["before"]


def test_sessions_come_from_any_callable(engine: sa.Engine) -> None:
    """A function that makes sessions will do."""
    unit_of_work(lambda: Session(engine)).run(run_sync, save, "a")
    assert values(engine) == ["a"]


def test_step_uses_the_applications_own_session_when_a_provider_has_one(engine: sa.Engine) -> None:
    """Outside a unit a step is a savepoint of the application's session, which commits when it likes."""
    with Session(engine) as session:
        end_first, end_second = provide_session(lambda: None), provide_session(lambda: session)
        try:
            assert current_session() is session
            run_sync(save, "a", timeout=20)
            assert session.in_transaction()
            assert values_of(session) == ["a"]
            with pytest.raises(IntegrityError):
                run_sync(save, "a", timeout=20)
            if engine.dialect.name == "postgresql":
                assert session.execute(sa.text("SHOW statement_timeout")).scalar() == "0"
            session.commit()
        finally:
            end_first()
            end_second()
            end_second()
    assert values(engine) == ["a"]
    with pytest.raises(ConfigurationError):
        run_sync(save, "b")


def test_error_of_the_step_comes_out_when_the_applications_session_is_beyond_use(postgres: sa.Engine) -> None:
    """A provided session whose connection has died raises what the step raised, and works again afterwards."""

    @session_step
    def dies(session: Session, data: Any) -> None:
        kill(postgres, session)
        raise LookupError("mine")

    with Session(postgres) as session:
        end = provide_session(lambda: session)
        try:
            with pytest.raises(LookupError, match="mine"):
                run_sync(dies, None, timeout=30)
            session.rollback()
            assert values_of(session) == []
        finally:
            end()


def test_result_of_the_step_comes_out_when_only_tidying_up_fails(
    postgres: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that dies right after the step is noticed by who uses it next, not in place of the result."""

    def fails(session: Session) -> None:
        raise OperationalError("SET LOCAL", {}, psycopg.OperationalError("gone"))

    with Session(postgres) as session:
        end = provide_session(lambda: session)
        monkeypatch.setattr(steps, "unbound", fails)
        try:
            assert run_sync(save, "a", timeout=30).value == "a"
        finally:
            end()
        session.rollback()
        assert values_of(session) == []


def kill(engine: sa.Engine, session: Session) -> None:
    """End the server's side of a session's connection, and wait until it has ended."""
    pid = session.scalar(sa.text("SELECT pg_backend_pid()"))
    with Session(engine) as other:
        assert other.scalar(sa.text(f"SELECT pg_terminate_backend({pid}, 20000)"))


def test_step_uses_the_session_it_is_told_to(engine: sa.Engine, work: UnitOfWork) -> None:
    """session= of a step wins over the unit around it."""
    with Session(engine) as own:

        @session_step(session=lambda: own)
        def save_there(session: Session, data: str) -> None:
            assert session is own

        work.run(run_sync, save_there, "a")


def test_session_bound_by_class_works(engine: sa.Engine) -> None:
    """A session that is bound class by class has no one engine to ask beforehand."""
    maker = sessionmaker(binds={Row: engine})
    unit_of_work(maker).run(run_sync, save, "a", timeout=20)
    assert values(engine) == ["a"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda e: unit_of_work(e, commit="never"),  # type: ignore[arg-type]
        lambda e: unit_of_work(e, retries=-1),
        lambda e: unit_of_work("sqlite://"),  # type: ignore[arg-type]
        lambda e: unit_of_work(None),  # type: ignore[arg-type]
    ],
)
def test_settings_of_a_unit_that_cannot_be_are_refused(sqlite: sa.Engine, wrong: Any) -> None:
    """At construction, not at the first request."""
    with pytest.raises(ConfigurationError):
        wrong(sqlite)


def test_step_begins_again_when_its_connection_had_died(postgres: sa.Engine) -> None:
    """A connection that the server closed before anything was done on it is replaced, and the step runs."""
    work = unit_of_work(postgres)
    killed: list[int] = []

    @session_step
    def write(session: Session, data: str) -> None:
        if not killed:
            killed.append(1)
            kill(postgres, session)
        session.add(Row(value=data))

    work.run(run_sync, write, "a")
    assert len(killed) == 1
    assert values(postgres) == ["a"]


def test_original_error_comes_out_when_the_savepoint_cannot_be_rolled_back(postgres: sa.Engine) -> None:
    """A step that fails on a dead connection raises its own error, not the roll-back's; the next unit is well."""
    work = unit_of_work(postgres)

    @session_step
    def dies(session: Session, data: Any) -> None:
        kill(postgres, session)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        work.run(run_sync, dies, None)
    work.run(run_sync, save, "a")
    assert values(postgres) == ["a"]


def test_call_from_a_coroutine_of_the_loop_is_refused_as_everywhere(sqlite: sa.Engine) -> None:
    """A unit of work entered on the loop for a call there is the facade's own refusal."""

    async def inside() -> None:
        run_sync(save, "a")

    from tta_sync.exceptions import LoopUnavailableError

    with unit_of_work(sqlite), pytest.raises(LoopUnavailableError):
        call_sync(inside)
