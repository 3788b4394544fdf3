"""Jobs enqueued if and only if the transaction commits: real SQLite and PostgreSQL, a real Redis, real deaths."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from marshmallow import ValidationError
from redis import Redis
from rq import Callback, Queue, Repeat, Retry
from rq.job import Dependency, Job
from rq.serializers import JSONSerializer
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.rq import outbox_jobs as jobs
from tests.rq.outbox_jobs import Base, Entry, anything, index, only_once
from tta_sync import WorkflowContext, run_sync, step
from tta_sync.context import Message, running_context
from tta_sync.exceptions import ConfigurationError, NoCallerError
from tta_sync.primitives.recovery import FallbackPrimitive
from tta_sync.rq import JobDelivery, WorkflowJob, enqueue_on_commit, outbox, outbox_relay, workflow_job
from tta_sync.sqlalchemy import (
    OutboxRelay,
    UnitOfWork,
    courier,
    create_engine,
    create_outbox,
    drop_outbox,
    outbox_table,
    provide_session,
    session_step,
    unit_of_work,
)
from tta_sync.testing import FakeClock

CHECKOUT = Path(__file__).parents[2]

Eventually = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_courier(monkeypatch: pytest.MonkeyPatch) -> Iterator[courier.Courier]:
    """A courier of this test's own, which is told to forget everything when the test ends."""
    made = courier.Courier()
    monkeypatch.setattr(courier, "_courier", made)
    yield made
    with made._changed:
        made._desks.clear()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both databases, in turn."""
    return f"sqlite:///{tmp_path}/outbox.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def engine(url: str, own_courier: courier.Courier, eventually: Eventually) -> Iterator[sa.Engine]:
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    yield engine
    eventually(lambda: not own_courier._desks, what="the courier's rest")  # which has a connection of the engine's
    engine.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/outbox.db")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def work(engine: sa.Engine) -> UnitOfWork:
    return unit_of_work(sessionmaker(engine))


@pytest.fixture
def client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """The test's Redis, which REDIS_URL names."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    client = Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def nobody_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process died at the commit: what it has committed stays in the outbox."""
    monkeypatch.setattr(courier, "hand_over", lambda *arguments: None)


def queued(client: Redis, queue: str = "default") -> list[str]:
    return [job_id.decode() for job_id in client.lrange(f"rq:queue:{queue}", 0, -1)]


def waiting(engine: sa.Engine) -> int:
    with Session(engine) as session:
        return session.scalar(sa.select(sa.func.count()).select_from(outbox_table(Base.metadata))) or 0


def argument(client: Redis, job_id: str) -> Any:
    return WorkflowJob.fetch(job_id, connection=client).args[0]


# ---- if ... ----------------------------------------------------------------------------------------------------------


def in_a_unit(engine: sa.Engine) -> str:
    with unit_of_work(engine):
        return index.enqueue_on_commit({"id": 7})


def in_a_session_step(engine: sa.Engine) -> str:
    @session_step
    def save(session: Session, data: dict[str, Any], context: WorkflowContext) -> str:
        return index.enqueue_on_commit(data, context=context.next_call())

    return unit_of_work(sessionmaker(engine)).run(run_sync, save, {"id": 7})


def in_a_step_that_commits_itself(engine: sa.Engine) -> str:
    step = session_step(lambda session, data: index.enqueue_on_commit(data, session=session))
    return unit_of_work(engine, commit="step").run(run_sync, step, {"id": 7})


def in_a_step_with_a_session_of_its_own(engine: sa.Engine) -> str:
    with Session(engine) as own:
        step = session_step(session=lambda: own)(lambda session, data: index.enqueue_on_commit(data))
        result = run_sync(step, {"id": 7})
        own.commit()
    return result


def with_a_plain_session(engine: sa.Engine) -> str:
    with Session(engine) as session, session.begin():
        return index.enqueue_on_commit({"id": 7}, session=session)


def with_a_session_begun_by_hand(engine: sa.Engine) -> str:
    session = Session(engine)
    job_id = enqueue_on_commit(session, index, {"id": 7})
    session.commit()
    session.close()
    return job_id


def with_a_scoped_session(engine: sa.Engine) -> str:
    scoped = scoped_session(sessionmaker(engine))
    job_id = enqueue_on_commit(index, {"id": 7}, session=scoped)
    scoped.commit()
    scoped.remove()
    return job_id


def in_a_flask_request(engine: sa.Engine) -> str:
    app = Flask("shop")
    db = scoped_session(sessionmaker(engine))
    app.teardown_appcontext(lambda error: db.remove())

    @app.post("/orders")
    def order() -> dict[str, str]:
        job_id = index.enqueue_on_commit({"id": 7})
        db.commit()
        return {"job": job_id}

    withdraw = provide_session(lambda: db())
    try:
        answer = app.test_client().post("/orders")
        assert answer.json is not None
        return str(answer.json["job"])
    finally:
        withdraw()


def in_a_job(engine: sa.Engine) -> str:
    step = session_step(lambda session, data: index.enqueue_on_commit(data))
    job = workflow_job("default", unit_of_work=unit_of_work(engine))(step)
    return str(job.run({"id": 7}))


@pytest.mark.parametrize(
    "way",
    [
        in_a_unit,
        in_a_session_step,
        in_a_step_that_commits_itself,
        in_a_step_with_a_session_of_its_own,
        with_a_plain_session,
        with_a_session_begun_by_hand,
        with_a_scoped_session,
        in_a_flask_request,
        in_a_job,
    ],
)
def test_job_is_enqueued_once_when_its_transaction_commits(
    way: Callable[[sa.Engine], str], engine: sa.Engine, client: Redis, eventually: Eventually
) -> None:
    """Wherever a transaction may come from, its commit puts the job on the queue, and nothing is left behind."""
    job_id = way(engine)
    eventually(lambda: queued(client), what="the job in its queue")
    eventually(lambda: not waiting(engine), what="the empty outbox")
    assert queued(client) == [job_id]
    assert argument(client, job_id) == {"id": 7}
    assert outbox_relay(engine).run_once() == 0
    assert queued(client) == [job_id]


def test_job_is_there_when_the_commit_returns_unless_something_is_slow(
    work: UnitOfWork, engine: sa.Engine, client: Redis, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """The commit waits for the courier, so that what comes after it finds the job."""
    monkeypatch.setattr(courier, "PATIENCE", 60.0)
    for number in range(5):
        with work:
            index.enqueue_on_commit({"id": number}, job_id=f"job-{number}")
        assert len(queued(client)) == number + 1
        # SQLite has one write lock: the next transaction is not to meet the deletion of this one's row.
        assert engine.dialect.name != "sqlite" or waiting(engine) == 0
    eventually(lambda: not waiting(engine))


def test_commit_does_not_wait_for_the_deletion_of_rows_that_are_in_nobodys_way(
    postgres_url: str, client: Redis, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """On PostgreSQL, where no other writer is held up by it, the job is there and the commit returns."""
    monkeypatch.setattr(courier, "PATIENCE", 60.0)
    engine = create_engine(postgres_url)
    create_outbox(engine)
    gate, settle = threading.Event(), OutboxRelay._settle

    def slowly(*arguments: Any) -> Any:
        assert gate.wait(60)
        return settle(*arguments)

    monkeypatch.setattr(OutboxRelay, "_settle", slowly)
    with unit_of_work(engine):
        job_id = anything.enqueue_on_commit(1)
    assert queued(client) == [job_id]
    assert waiting(engine) == 1
    gate.set()
    eventually(lambda: not courier._courier._desks)
    assert waiting(engine) == 0
    engine.dispose()


def test_large_transaction_is_delivered_as_a_whole_when_it_commits(
    work: UnitOfWork, engine: sa.Engine, client: Redis, eventually: Eventually
) -> None:
    """More than goes in one delivery does not wait for a relay."""
    with work:
        ids = [anything.enqueue_on_commit(number) for number in range(230)]
    eventually(lambda: not waiting(engine))
    assert queued(client) == ids


def test_job_is_not_there_before_the_commit(work: UnitOfWork, client: Redis) -> None:
    """Nobody can run a job whose data others cannot see yet."""
    with work as unit:
        index.enqueue_on_commit({"id": 1})
        unit.session.flush()
        assert client.keys() == []


# ---- ... and only if -------------------------------------------------------------------------------------------------


class Regret(Exception):
    pass


def fails_in_a_unit(engine: sa.Engine) -> None:
    def fail() -> None:
        index.enqueue_on_commit({"id": 7})
        raise Regret

    with pytest.raises(Regret):
        unit_of_work(engine).run(fail)


def fails_in_a_later_step(engine: sa.Engine) -> None:
    @step
    async def fail(data: Any) -> None:
        raise Regret

    save = session_step(lambda session, data: index.enqueue_on_commit(data))
    with pytest.raises(Regret):
        unit_of_work(engine).run(run_sync, save >> fail, {"id": 7})


def rolls_back(engine: sa.Engine) -> None:
    with Session(engine) as session:
        index.enqueue_on_commit({"id": 7}, session=session)
        session.rollback()
        session.add(Entry(job_id="x", batch="x"))
        session.commit()  # of another transaction


def closes(engine: sa.Engine) -> None:
    with Session(engine) as session:
        index.enqueue_on_commit({"id": 7}, session=session)


def loses_its_commit(engine: sa.Engine) -> None:
    session = Session(engine)
    index.enqueue_on_commit({"id": 7}, session=session)
    session.add(Entry(job_id="same", batch="a"))
    session.add(Entry(job_id="same", batch="b"))
    with pytest.raises(sa.exc.IntegrityError):
        session.commit()
    session.close()


def drops_the_savepoint(engine: sa.Engine) -> None:
    with Session(engine) as session, session.begin():
        savepoint = session.begin_nested()
        index.enqueue_on_commit({"id": 7}, session=session)
        savepoint.rollback()


def fails_in_its_step(engine: sa.Engine) -> None:
    @session_step
    def save(session: Session, data: dict[str, Any]) -> None:
        index.enqueue_on_commit(data)
        raise Regret

    @step
    async def instead(data: Any) -> str:
        return "instead"

    assert unit_of_work(engine).run(run_sync, FallbackPrimitive(save, instead), {"id": 7}) == "instead"


def only_seems_to_commit(engine: sa.Engine) -> None:
    """As the tests of many an application do: all that it commits is inside a transaction of the test's."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            index.enqueue_on_commit({"id": 7}, session=session)
            session.commit()
        outer.rollback()


@pytest.mark.parametrize(
    "way",
    [
        fails_in_a_unit,
        fails_in_a_later_step,
        rolls_back,
        closes,
        loses_its_commit,
        drops_the_savepoint,
        fails_in_its_step,
        only_seems_to_commit,
    ],
)
def test_job_is_never_enqueued_when_its_transaction_is_rolled_back(
    way: Callable[[sa.Engine], None], engine: sa.Engine, client: Redis
) -> None:
    """Nothing of it is left, in SQL or in Redis."""
    way(engine)
    assert waiting(engine) == 0
    assert outbox_relay(engine).run_once() == 0
    assert client.keys() == []


def test_courier_is_not_troubled_when_nothing_was_committed(
    sqlite: sa.Engine, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release of a savepoint is no commit, and neither is a rollback or a commit of something else."""
    sent = []
    monkeypatch.setattr(courier, "hand_over", lambda *arguments: sent.append(arguments))
    with Session(sqlite) as session:
        with session.begin_nested():
            index.enqueue_on_commit({"id": 1}, session=session)
        session.rollback()
        session.add(Entry(job_id="x", batch="x"))
        session.commit()
        assert sent == []
        with session.begin_nested():
            index.enqueue_on_commit({"id": 1}, session=session)
        assert sent == []
        session.commit()
        assert len(sent) == 1
        session.add(Entry(job_id="y", batch="y"))
        session.commit()
        assert len(sent) == 1
    with sqlite.connect() as connection, connection.begin(), Session(connection) as session:
        index.enqueue_on_commit({"id": 1}, session=session)
        session.commit()
    assert len(sent) == 1


def test_savepoints_that_stand_keep_their_jobs_when_others_are_dropped(
    work: UnitOfWork, engine: sa.Engine, client: Redis, eventually: Eventually
) -> None:
    """A step that failed takes its own jobs along, and no others; the order is that of the calls."""

    @session_step
    def save(session: Session, name: str) -> str:
        anything.enqueue_on_commit(name, job_id=name)
        if name == "bad":
            raise Regret
        return name

    @step
    async def last(data: Any) -> str:
        return "last"

    @step
    async def bad(data: Any) -> str:
        return "bad"

    work.run(run_sync, save >> bad >> FallbackPrimitive(save, last) >> save, "first")
    eventually(lambda: len(queued(client)) == 2)
    assert queued(client) == ["first", "last"]


def test_unit_of_work_that_is_run_again_enqueues_once(
    work: UnitOfWork, engine: sa.Engine, client: Redis, eventually: Eventually
) -> None:
    """What the first run had written went with its transaction."""
    runs = []

    def once() -> str:
        runs.append(1)
        job_id = index.enqueue_on_commit({"id": len(runs)})
        if len(runs) < 3:
            busy = sqlite3.OperationalError("database is locked")
            busy.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise OperationalError("COMMIT", {}, busy)
        return job_id

    job_id = work.run(once)
    eventually(lambda: queued(client))
    eventually(lambda: not waiting(engine))
    assert queued(client) == [job_id]
    assert argument(client, job_id) == {"id": 3}


# ---- what is refused at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, {}, {"id": -1}, {"id": 1, "more": 1}])
def test_bad_data_is_refused_before_anything_is_written(
    data: Any, work: UnitOfWork, engine: sa.Engine, client: Redis
) -> None:
    """marshmallow's ValidationError where the mistake is, and the transaction goes on without a row."""
    with work as unit:
        with pytest.raises(ValidationError):
            index.enqueue_on_commit(data)
        assert unit.session.scalar(sa.select(sa.func.count()).select_from(outbox_table(Base.metadata))) == 0
    assert client.keys() == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"job_id": "not a valid id!"}, ValueError),
        ({"ttl": -5}, ValueError),
        ({"nonsense": 1}, TypeError),
        ({"description": "\ud800"}, UnicodeError),
        ({"connection": Redis()}, ConfigurationError),
        ({"context": WorkflowContext(state={"a": object()})}, TypeError),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], sqlite: sa.Engine, client: Redis
) -> None:
    """Not by a relay hours later, when nobody can tell any more who wrote it."""
    with unit_of_work(sqlite), pytest.raises(error):
        anything.enqueue_on_commit({}, **options)
    assert waiting(sqlite) == 0


def test_unique_job_with_dependencies_is_refused_at_once(sqlite: sa.Engine, client: Redis) -> None:
    """RQ would refuse it when it is enqueued."""
    with unit_of_work(sqlite), pytest.raises(ValueError, match="unique"):
        only_once.enqueue_on_commit(1, depends_on="other")


def test_call_outside_any_transaction_says_what_to_do(client: Redis) -> None:
    """The error names the ways in, and the method that needs no transaction."""
    with pytest.raises(ConfigurationError, match=r"outside any transaction.*unit of work.*session=.*enqueue puts"):
        index.enqueue_on_commit({"id": 1})
    with pytest.raises(ConfigurationError, match="outside any transaction"):
        enqueue_on_commit(index, {"id": 1})
    assert client.keys() == []


def test_call_on_the_loop_says_where_it_belongs(sqlite: sa.Engine, client: Redis) -> None:
    """A scoped session would be another one there, which nobody commits: the job would be lost without a word."""
    scoped = scoped_session(sessionmaker(sqlite))
    withdraw = provide_session(lambda: scoped())

    @step
    async def wrong(data: Any) -> None:
        index.enqueue_on_commit({"id": 1})

    try:
        with pytest.raises(NoCallerError, match="session_step"):
            run_sync(wrong)
        with pytest.raises(NoCallerError), unit_of_work(sqlite):
            run_sync(wrong)
    finally:
        withdraw()


def plain(data: Any) -> None: ...


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: enqueue_on_commit(plain, 1), "workflow_job"),
        (lambda: enqueue_on_commit(Session(), plain, 1), "workflow_job"),
        (lambda: enqueue_on_commit(index, 1, 2), r"\(session, function, data\)"),
        (lambda: index.enqueue_on_commit({"id": 1}, session="a session"), "SQLAlchemy Session"),
        (lambda: index.enqueue_on_commit({"id": 1}, session=AsyncSession()), "run_sync"),
        (
            lambda: index.enqueue_on_commit({"id": 1}, session=Session(sa.create_engine("sqlite://"))),
            "tta_sync.sqlalchemy.adopt",
        ),
        (
            lambda: index.enqueue_on_commit({"id": 1}, session=Session(binds={Entry: create_engine("sqlite://")})),
            "bind=",
        ),
        (lambda: outbox_relay("sqlite://"), "sync Engine"),
        (lambda: outbox_relay(sa.create_engine("sqlite://")), "adopt"),
        (lambda: outbox_relay(create_engine("sqlite://"), attempts=0), "attempts is 0"),
    ],
)
def test_mistake_is_told_with_its_remedy(call: Callable[[], Any], text: str, client: Redis) -> None:
    """What cannot work is refused where it is written."""
    with pytest.raises(ConfigurationError, match=text):
        call()


def test_session_that_commits_each_statement_is_refused(engine: sa.Engine, client: Redis) -> None:
    """There would be no transaction to go with."""
    own = Session(engine.execution_options(isolation_level="AUTOCOMMIT"))
    with own as session, pytest.raises(ConfigurationError, match="no transaction to enqueue with"):
        index.enqueue_on_commit({"id": 1}, session=session)
    assert waiting(engine) == 0


def test_missing_table_is_told_with_its_remedy(url: str, client: Redis) -> None:
    """Whoever has not made the table learns how to."""
    engine = create_engine(url)
    try:
        with pytest.raises(ConfigurationError, match="create_outbox"), unit_of_work(engine):
            index.enqueue_on_commit({"id": 1})
        with pytest.raises(ConfigurationError, match="create_outbox"):
            outbox_relay(engine).waiting()
        create_outbox(engine)
        create_outbox(engine)  # again does no harm
        with unit_of_work(engine):
            index.enqueue_on_commit({"id": 1})
        drop_outbox(engine)
        drop_outbox(engine)
        assert sa.inspect(engine).get_table_names() == []
    finally:
        engine.dispose()


def test_other_errors_of_the_database_pass_through_as_themselves(sqlite: sa.Engine, client: Redis) -> None:
    """Only the missing table is translated."""
    with sqlite.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER no BEFORE INSERT ON tta_sync_outbox BEGIN SELECT RAISE(FAIL, 'no'); END"
        )
    with pytest.raises(sa.exc.IntegrityError), unit_of_work(sqlite):
        index.enqueue_on_commit({"id": 1})


# ---- what is enqueued ------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"timeout": 7, "ttl": 500, "result_ttl": 0, "failure_ttl": 9, "description": "mine: ü"},
    {"retry": Retry(max=3, interval=[1, 2, 3]), "meta": {"owner": "ada"}},
    {"repeat": Repeat(times=2, interval=5), "at_front": True},
    {
        "on_success": Callback("os.getpid"),
        "on_failure": Callback("os.getpid", timeout=5),
        "on_stopped": Callback("a.b"),
    },
    {"depends_on": "first"},
    {"depends_on": Dependency(jobs=["first"], allow_failure=True, enqueue_at_front=True)},
    {"depends_on": "gone long since"},
    {"deadline": 1000.0},
]

MOMENTS = {b"created_at", b"enqueued_at"}


def keyspace(client: Redis) -> dict[bytes, Any]:
    """All that is in Redis, but for moments and the outbox's own markers."""
    found: dict[bytes, Any] = {}
    for key in client.scan_iter():
        kind = client.type(key)
        if key.startswith(b"tta:outbox:"):
            continue
        if kind == b"hash":
            found[key] = {name: value for name, value in client.hgetall(key).items() if name not in MOMENTS}
            found[key].update({name: json.loads(found[key][name]) for name in (b"meta",) if name in found[key]})
            travelled = found[key].get(b"meta", {}).get("tta_sync", {}).get("context", {})
            travelled.update(start_time=None, expires_at=travelled.get("expires_at") is not None)
        elif kind == b"list":
            found[key] = client.lrange(key, 0, -1)
        elif kind == b"set":
            found[key] = client.smembers(key)
        else:
            found[key] = [member for member, _ in client.zrange(key, 0, -1, withscores=True)]
        found[b"ttl " + key] = client.ttl(key) > 0
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "none")
def test_job_is_the_one_that_enqueue_makes(
    options: dict[str, Any], sqlite: sa.Engine, client: Redis, eventually: Eventually
) -> None:
    """Every option of RQ's, the context and the deadline arrive: the whole keyspace is the same."""
    context = WorkflowContext(correlation_id="c", tenant="t", trace_id="a" * 32)
    anything.enqueue(0, job_id="first", context=context)
    job = index.enqueue({"id": 1}, job_id="second", context=context, **options)
    direct = keyspace(client)
    client.flushall()
    anything.enqueue(0, job_id="first", context=context)
    with unit_of_work(sqlite):
        assert index.enqueue_on_commit({"id": 1}, job_id="second", context=context, **options) == "second"
    eventually(lambda: not waiting(sqlite))
    assert keyspace(client) == direct
    assert set(direct) > {b"rq:job:first", b"rq:job:second"}
    moments = client.hgetall("rq:job:second")
    assert set(moments) >= MOMENTS or job.get_status() == "deferred"


def test_settings_of_the_function_travel(sqlite: sa.Engine, client: Redis, eventually: Eventually) -> None:
    """What AsyncWorker goes by, idempotence and limits of concurrency, is in the job as enqueue writes it."""
    direct = jobs.a_few.enqueue({"tenant": "ada"})
    with unit_of_work(sqlite):
        job_id = jobs.a_few.enqueue_on_commit({"tenant": "ada"})
    eventually(lambda: not waiting(sqlite))
    wanted, found = (WorkflowJob.fetch(name, connection=client).meta["tta_sync"] for name in (direct.id, job_id))
    assert set(found) == set(wanted) == {"context", "idempotent", "concurrency"}
    assert found["concurrency"] == wanted["concurrency"] == ["of ada", 2]


def test_context_of_the_request_travels_without_its_deadline(
    sqlite: sa.Engine, client: Redis, eventually: Eventually
) -> None:
    """As with enqueue: the id, not the deadline, unless one is given; and that counts from the call."""

    @session_step
    def save(session: Session, data: Any) -> list[str]:
        return [anything.enqueue_on_commit(1), anything.enqueue_on_commit(2, deadline=100.0)]

    ids = unit_of_work(sqlite).run(run_sync, save, None, WorkflowContext(correlation_id="asked"), timeout=30.0)
    eventually(lambda: not waiting(sqlite))
    first, second = (WorkflowJob.fetch(job_id, connection=client).meta["tta_sync"]["context"] for job_id in ids)
    assert first["correlation_id"] == second["correlation_id"] == "asked"
    assert first["expires_at"] is None
    assert 50 < second["expires_at"] - time.time() <= 100


def test_queue_of_the_functions_own_is_used_with_its_connection_and_timeout(
    sqlite: sa.Engine, client: Redis, redis_url: str, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function made with a Queue needs no REDIS_URL."""
    monkeypatch.delenv("REDIS_URL")
    queue = Queue("own", connection=client, default_timeout=77)
    function = workflow_job(queue)(anything.workflow)
    monkeypatch.setattr(jobs, "of_its_own", function, raising=False)
    function._tta_job.modules = ("tests.rq.outbox_jobs",)
    with unit_of_work(sqlite):
        job_id = function.enqueue_on_commit("x")
    eventually(lambda: queued(client, "own"))
    assert WorkflowJob.fetch(job_id, connection=client).timeout == 77


def test_functions_of_different_redises_may_share_a_transaction(
    engine: sa.Engine, client: Redis, redis_url: str, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job goes where its function says, whichever was written first."""
    with Redis.from_url(redis_url.removesuffix("0") + "1") as elsewhere:
        function = workflow_job("default", connection=elsewhere)(anything.workflow)
        monkeypatch.setattr(jobs, "elsewhere", function, raising=False)
        function._tta_job.modules = ("tests.rq.outbox_jobs",)
        with unit_of_work(engine):
            there = [function.enqueue_on_commit(1)]
            here = [anything.enqueue_on_commit(2)]
            there.append(function.enqueue_on_commit(3))
        eventually(lambda: not waiting(engine))
        assert queued(client) == here
        assert queued(elsewhere) == there
        assert len(elsewhere.keys("tta:outbox:*")) == 2


def test_flask_applications_redis_is_used_in_its_requests(
    sqlite: sa.Engine, client: Redis, redis_url: str, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The courier's thread has no application context, and needs none."""
    monkeypatch.delenv("REDIS_URL")
    app = Flask("shop")
    app.config["TTA_REDIS_URL"] = redis_url
    with app.app_context(), unit_of_work(sqlite):
        job_id = index.enqueue_on_commit({"id": 1})
    eventually(lambda: queued(client))
    assert queued(client) == [job_id]


def test_unique_job_is_enqueued_once_while_it_is_there(
    engine: sa.Engine, client: Redis, nobody_delivers: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two in one transaction, one that is there already, and one delivered again are each one job; the log tells."""
    with unit_of_work(engine):
        ids = [only_once.enqueue_on_commit({"a": 1}) for _ in range(2)]
    with unit_of_work(engine):
        ids.append(only_once.enqueue_on_commit({"a": 1}))
    assert len(set(ids)) == 1
    with caplog.at_level(logging.INFO, "tta_sync"):
        assert outbox_relay(engine).run_once() == 3
    assert queued(client) == ids[:1]
    assert caplog.text.count("unique and there already") == 2
    with unit_of_work(engine):
        only_once.enqueue_on_commit({"a": 1})
    assert outbox_relay(engine).run_once() == 1
    assert queued(client) == ids[:1]


def test_jobs_of_one_transaction_may_depend_on_each_other(
    engine: sa.Engine, client: Redis, nobody_delivers: None
) -> None:
    """The id that the first call returns is what the second waits for; those behind them are not held up."""
    with unit_of_work(engine):
        first = anything.enqueue_on_commit(1)
        second = anything.enqueue_on_commit(2, depends_on=first)
        third = anything.enqueue_on_commit(3)
    assert outbox_relay(engine).run_once() == 3
    assert queued(client) == [first, third]
    assert WorkflowJob.fetch(second, connection=client).get_status() == "deferred"
    assert {job_id.decode() for job_id in client.smembers(Job.dependents_key_for(first))} == {second}


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relays", [1, 2])
def test_thousand_jobs_keep_their_order(relays: int, engine: sa.Engine, client: Redis, nobody_delivers: None) -> None:
    """One transaction's jobs are enqueued in the order of the calls, each once, also when relays race."""
    with unit_of_work(engine):
        ids = [anything.enqueue_on_commit(number, job_id=f"job-{number}") for number in range(1000)]
    with unit_of_work(engine):
        others = [anything.enqueue_on_commit(number, job_id=f"other-{number}") for number in range(150)]
    begin = threading.Barrier(relays)

    def race() -> None:
        relay = outbox_relay(engine, connection=client)
        begin.wait()
        while relay.waiting():
            relay.run_once(limit=130)

    threads = [threading.Thread(target=race) for _ in range(relays)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    found = queued(client)
    assert [job_id for job_id in found if job_id.startswith("job")] == ids
    assert [job_id for job_id in found if job_id.startswith("other")] == others
    assert waiting(engine) == 0


def test_relay_stops_at_its_limit(engine: sa.Engine, client: Redis, nobody_delivers: None) -> None:
    """A worker's maintenance is not held up by a long outbox; run_once says how many are gone."""
    with unit_of_work(engine):
        ids = [anything.enqueue_on_commit(number) for number in range(250)]
    relay = outbox_relay(engine)
    assert relay.waiting() == 250
    assert [relay.run_once(limit=120) for _ in range(4)] == [120, 120, 10, 0]
    assert queued(client) == ids


def test_jobs_that_another_relay_holds_are_not_overtaken(
    postgres_url: str, client: Redis, nobody_delivers: None
) -> None:
    """A relay passes over what another has locked and what is behind it in the transaction, not over others."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with unit_of_work(engine):
        held = [anything.enqueue_on_commit(number, job_id=f"held-{number}") for number in range(5)]
    with unit_of_work(engine):
        anything.enqueue_on_commit(0, job_id="free")
    with engine.begin() as other:
        other.execute(sa.text("SELECT 1 FROM tta_sync_outbox WHERE job_id IN ('held-0', 'held-3') FOR UPDATE"))
        assert outbox_relay(engine).run_once() == 1
        assert queued(client) == ["free"]
    with engine.begin() as other:
        other.execute(sa.text("SELECT 1 FROM tta_sync_outbox WHERE job_id = 'held-3' FOR UPDATE"))
        assert outbox_relay(engine).run_once() == 3
    assert outbox_relay(engine).run_once() == 2
    assert queued(client) == ["free", *held]
    engine.dispose()


# ---- exactly once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def program(url: str, redis_url: str, tmp_path: Path) -> Callable[..., int]:
    """Run the program of tests.rq.outbox_jobs; returns its exit status, negative for the signal that ended it."""

    def run(*arguments: str, within: float = 60.0) -> int:
        env = {**os.environ, "REDIS_URL": redis_url, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.rq.outbox_jobs", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=within)
        assert done.stderr == ""
        return done.returncode

    return run


@pytest.fixture
def relay_all(engine: sa.Engine, eventually: Eventually) -> Callable[[], None]:
    """Relay until the outbox is empty: PostgreSQL takes a moment to notice that whoever held a lock has died."""

    def run() -> None:
        relay = outbox_relay(engine)
        eventually(lambda: not relay.run_once() and not waiting(engine), what="the empty outbox")

    return run


def consume(client: Redis) -> int:
    """Do as a worker of jobs with result_ttl=0: afterwards there is no trace of the job; return how many there were."""
    ids = queued(client)
    for job_id in ids:
        client.lrem("rq:queue:default", 1, job_id)
        client.delete(f"rq:job:{job_id}")
    return len(ids)


def test_job_is_never_enqueued_when_the_process_dies_before_the_commit(
    program: Callable[..., int], url: str, engine: sa.Engine, client: Redis
) -> None:
    """kill -9 after the row is written and before the commit: nothing was done, nothing is enqueued."""
    assert program(url, "write", "before the commit") == -signal.SIGKILL
    assert outbox_relay(engine).run_once() == 0
    assert client.keys() == []


def test_process_that_ends_with_its_last_commit_ends_well(
    program: Callable[..., int], url: str, engine: sa.Engine, client: Redis
) -> None:
    """The courier holds up no exit, and says nothing; what it had no time for is a relay's."""
    assert program(url, "write", "nowhere") == 0
    outbox_relay(engine).run_once()
    assert queued(client) == ["the-job"]
    assert waiting(engine) == 0


@pytest.mark.parametrize("point", list(jobs.POINTS))
def test_job_is_enqueued_once_when_its_process_dies_after_the_commit(
    point: str,
    program: Callable[..., int],
    url: str,
    engine: sa.Engine,
    client: Redis,
    relay_all: Callable[[], None],
) -> None:
    """kill -9 anywhere between the commit and the end of the delivery, though the job has been run and is gone."""
    assert program(url, "write", point) == -signal.SIGKILL
    with Session(engine) as session:
        assert session.scalar(sa.select(Entry.job_id)) == "the-job"
    times = consume(client)
    relay_all()
    assert times + len(queued(client)) == 1


@pytest.mark.parametrize("point", [point for point in jobs.POINTS if point != "after the commit"])
def test_job_is_enqueued_once_when_the_relay_dies(
    point: str,
    program: Callable[..., int],
    url: str,
    engine: sa.Engine,
    client: Redis,
    nobody_delivers: None,
    relay_all: Callable[[], None],
) -> None:
    """kill -9 of a relay in the middle of its work: the next one neither repeats nor forgets anything."""
    with unit_of_work(engine):
        ids = [index.enqueue_on_commit({"id": number}) for number in range(3)]
    assert program(url, "relay", point) == -signal.SIGKILL
    relay_all()
    assert queued(client) == ids


def test_nothing_is_lost_or_doubled_in_a_storm_of_deaths(
    program: Callable[..., int], url: str, engine: sa.Engine, client: Redis, relay_all: Callable[[], None]
) -> None:
    """Dozens of processes write and relay at once and die at random: what was committed is queued, once, in order."""
    assert program("storm", url, "1", "20" if engine.dialect.name == "sqlite" else "8", within=110) == 0
    relay_all()
    with Session(engine) as session:
        committed = list(session.execute(sa.select(Entry.job_id, Entry.batch).order_by(Entry.id)))
    found = queued(client)
    assert len(committed) > 100
    assert sorted(found) == sorted(row.job_id for row in committed)
    for batch in {row.batch for row in committed}:
        own = [row.job_id for row in committed if row.batch == batch]
        assert [job_id for job_id in found if job_id in set(own)] == own
    assert waiting(engine) == 0


def test_job_that_has_run_without_a_trace_is_not_enqueued_again(
    engine: sa.Engine,
    client: Redis,
    redis_url: str,
    tmp_path: Path,
    nobody_delivers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real worker, result_ttl=0, and a relay that died before it could delete the row: the job runs once."""
    with unit_of_work(engine):
        jobs.count.enqueue_on_commit("times")
    with monkeypatch.context() as dying:
        dying.setattr(OutboxRelay, "_settle", lambda *arguments: sys.exit("dies"))
        with pytest.raises(SystemExit):
            outbox_relay(engine).run_once()
    for _ in range(2):
        command = [Path(sys.executable).with_name("rq"), "worker", "--burst", "--url", redis_url, "--path", CHECKOUT]
        options = ["--worker-class", "rq.SimpleWorker", "--job-class", "tta_sync.rq.WorkflowJob", "default"]
        subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        assert client.get("times") == b"1"
        assert not client.keys("rq:job:*")
        assert outbox_relay(engine).run_once() in (0, 1)
    assert waiting(engine) == 0


@pytest.mark.parametrize(
    "options",
    [["--job-class", "tta_sync.rq.WorkflowJob"], ["--worker-class", "tta_sync.rq.AsyncWorker"]],
    ids=["stock", "async"],
)
def test_job_written_in_a_job_is_enqueued_when_a_real_worker_runs_it(
    options: list[str], url: str, engine: sa.Engine, client: Redis, redis_url: str, tmp_path: Path
) -> None:
    """In the forked work horse of a stock worker, which ends as soon as its job has, and on AsyncWorker's threads."""
    jobs.enqueue_another.enqueue("times")
    command = [Path(sys.executable).with_name("rq"), "worker", "--burst", "--url", redis_url, "--path", CHECKOUT]
    env = {**os.environ, "OUTBOX_TEST_DATABASE": url, "REDIS_URL": redis_url}
    for _ in range(2):  # a slow machine may leave the second job to a relay
        subprocess.run(
            [*command, *options, "default"],
            cwd=tmp_path,
            env=env,
            check=True,
            capture_output=True,
            timeout=60,
        )
        outbox_relay(engine).run_once()
    assert client.get("times") == b"1"
    with Session(engine) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Entry)) == 1


def test_marker_is_kept_while_the_message_may_come_again_and_no_longer(
    engine: sa.Engine, client: Redis, nobody_delivers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 days while the row may still be there, an hour after its deletion: memory stays bounded."""
    with unit_of_work(engine):
        anything.enqueue_on_commit(1)
    with monkeypatch.context() as dying:
        dying.setattr(OutboxRelay, "_settle", lambda *arguments: sys.exit("dies"))
        with pytest.raises(SystemExit):
            outbox_relay(engine).run_once()
    (marker,) = client.keys("tta:outbox:*")
    assert 29 * 24 * 3600 < client.ttl(marker) <= 30 * 24 * 3600
    assert outbox_relay(engine).run_once() == 1
    assert 0 < client.ttl(marker) <= 3600


def test_message_that_was_held_up_is_read_again(
    engine: sa.Engine, client: Redis, nobody_delivers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that slept with messages in hand must not deliver what others have delivered and forgotten meanwhile."""
    with unit_of_work(engine):
        anything.enqueue_on_commit(1)
    monkeypatch.setattr("tta_sync.sqlalchemy.outbox.FRESH", -1.0)
    relay = outbox_relay(engine)
    assert relay.run_once() == 0
    assert relay.pause > 0
    assert client.keys() == []
    monkeypatch.undo()
    monkeypatch.setattr(courier, "hand_over", lambda *arguments: None)
    assert outbox_relay(engine, connection=client).run_once() == 1


def test_delivery_of_another_relay_in_between_is_seen(client: Redis) -> None:
    """Between the question whether it has been delivered and the MULTI somebody else delivers it: once it is."""
    body = _body("job-1")
    rival, slow = JobDelivery(client), JobDelivery(client)
    messages = [Message("k1", "u", body)]

    def fresh() -> bool:
        rival.deliver(messages, lambda: True)
        return True

    assert slow.deliver(messages, fresh) == {"k1": None}
    assert queued(client) == ["job-1"]


def test_messages_that_have_been_delivered_are_passed_over_among_new_ones(client: Redis) -> None:
    """A relay that died in the middle: the next one delivers the rest, in its order."""
    messages = [Message(f"k{number}", "u", _body(f"job-{number}")) for number in range(4)]
    assert JobDelivery(client).deliver(messages[:2], lambda: True) == {"k0": None, "k1": None}
    assert consume(client) == 2
    assert JobDelivery(client).deliver(messages, lambda: True) == dict.fromkeys(["k0", "k1", "k2", "k3"])
    assert queued(client) == ["job-2", "job-3"]


def test_what_a_delivery_keeps_is_bounded(client: Redis) -> None:
    """Names of queues come from the database: any number of them may pass, not all are kept."""
    delivery = JobDelivery(client)
    for number in range(150):
        delivery.deliver([Message(f"k{number}", "u", _body(f"job-{number}", queue=f"q{number}"))], lambda: True)
        delivery.forget([f"k{number}", "never heard of"])
    assert len(delivery._queues) <= 101
    assert delivery._places == {}
    assert client.scard("rq:queues") == 150


def test_outage_while_markers_are_shortened_is_an_outage(own_redis_server: Any) -> None:
    """The row is gone by then: the marker just lives longer."""
    with Redis.from_url(own_redis_server.url) as client:
        delivery = JobDelivery(client)
        delivery.deliver([Message("k", "u", _body("job"))], lambda: True)
        own_redis_server.stop()
        with pytest.raises(ConnectionError, match="Redis: "):
            delivery.forget(["k"])


def test_failure_of_one_relay_counts_nothing_when_another_could_deliver(
    sqlite: sa.Engine, nobody_delivers: None, caplog: pytest.LogCaptureFixture
) -> None:
    """On SQLite two may have the same message in hand; the row is gone, and nothing is noted or logged about it."""
    with unit_of_work(sqlite):
        anything.enqueue_on_commit(1)

    class Slower:
        def deliver(self, messages: Any, fresh: Any) -> dict[str, Exception | None]:
            with sqlite.begin() as connection:
                connection.execute(sa.delete(outbox_table(Base.metadata)))
            return {message.key: LookupError("not here") for message in messages}

        def forget(self, keys: Any) -> None: ...

    assert OutboxRelay(sqlite, Slower()).run_once() == 0
    assert waiting(sqlite) == 0
    assert "not here" not in caplog.text


def test_row_that_has_got_the_number_of_a_deleted_one_is_not_deleted_for_it(
    sqlite: sa.Engine, client: Redis, nobody_delivers: None
) -> None:
    """SQLite gives numbers again: a slow relay must not delete a message that nobody has delivered."""
    with unit_of_work(sqlite):
        anything.enqueue_on_commit(1, job_id="old")
    fast, delivery = outbox_relay(sqlite), JobDelivery(client)

    class Slower:
        def deliver(self, messages: Any, fresh: Any) -> Any:
            assert fast.run_once() == 1
            with unit_of_work(sqlite):
                anything.enqueue_on_commit(2, job_id="new")
            return delivery.deliver(messages, fresh)

        forget = delivery.forget

    assert OutboxRelay(sqlite, Slower()).run_once() == 1
    assert [message.job_id for message in fast.messages()] == ["new"]
    assert fast.run_once() == 1
    assert queued(client) == ["old", "new"]


def test_delivery_gives_up_when_others_interfere_all_the_time(client: Redis) -> None:
    """No endless loop: the messages stay where they are."""

    def fresh() -> bool:
        client.set("tta:outbox:k1", 1)
        client.delete("tta:outbox:k1")
        return True

    with pytest.raises(ConnectionError, match="interfere"):
        JobDelivery(client).deliver([Message("k1", "u", _body("job-1"))], fresh)
    assert queued(client) == []


def _body(job_id: str, **changes: Any) -> str:
    """The body of a message, as enqueue_on_commit writes it."""
    engine = create_engine("sqlite://")
    create_outbox(engine)
    table = outbox_table(Base.metadata)
    with Session(engine) as session:
        anything.enqueue_on_commit(1, session=session, job_id=job_id)
        body = json.loads(session.scalar(sa.select(table.c.body)) or "")
    return json.dumps({**body, **changes})


# ---- when nobody answers ---------------------------------------------------------------------------------------------


def test_commit_is_not_held_up_when_redis_is_down_and_the_job_comes_when_it_is_back(
    work: UnitOfWork,
    engine: sa.Engine,
    own_redis_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing fails; one warning without a secret; the process itself enqueues as soon as it can, without a relay."""
    monkeypatch.setenv("REDIS_URL", own_redis_server.url)
    own_redis_server.stop()
    began = time.monotonic()
    for number in range(20):
        with work:
            index.enqueue_on_commit({"id": number}, job_id=f"job-{number}")
    assert time.monotonic() - began < 10
    assert waiting(engine) == 20
    eventually(lambda: caplog.text.count("cannot be delivered") >= 1)
    own_redis_server.start()
    with Redis.from_url(own_redis_server.url) as client:
        eventually(lambda: len(queued(client)) == 20, within=60)
        assert queued(client) == [f"job-{number}" for number in range(20)]
    eventually(lambda: not waiting(engine))
    assert caplog.text.count("cannot be delivered") == 1


def test_commit_is_not_held_up_when_redis_hangs(
    work: UnitOfWork, engine: sa.Engine, own_redis_server: Any, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A Redis that takes the connection and then says nothing costs one short wait, not its time-out, and no double."""
    monkeypatch.setenv("REDIS_URL", own_redis_server.url)
    with work:
        index.enqueue_on_commit({"id": 0}, job_id="job-0")
    eventually(lambda: not waiting(engine))
    os.kill(own_redis_server.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for number in range(1, 10):
            with work:
                index.enqueue_on_commit({"id": number}, job_id=f"job-{number}")
        took = time.monotonic() - began
    finally:
        os.kill(own_redis_server.pid, signal.SIGCONT)
    assert took < 4.5  # redis-py's own patience is 5 s for each
    with Redis.from_url(own_redis_server.url) as client:
        eventually(lambda: not waiting(engine), within=60)
        assert queued(client) == [f"job-{number}" for number in range(10)]


def test_relay_backs_off_when_nobody_answers(
    engine: sa.Engine, client: Redis, nobody_delivers: None, caplog: pytest.LogCaptureFixture
) -> None:
    """0.5, 1, 2 ... 30 s, with jitter; told once; and when all is well again that is told as well."""
    with unit_of_work(engine):
        anything.enqueue_on_commit(1)
    clock = FakeClock(epoch=time.time())

    class Down(JobDelivery):
        down = True
        calls = 0

        def deliver(self, *arguments: Any) -> Any:
            self.calls += 1
            if self.down:
                raise ConnectionError("Redis: ConnectionError")
            return super().deliver(*arguments)

    delivery = Down()
    relay = OutboxRelay(engine, delivery, clock=clock)
    pauses = []
    for _ in range(9):
        assert relay.run_once() == 0
        pauses.append(relay.pause)
        calls = delivery.calls
        assert relay.run_once() == 0
        assert delivery.calls == calls
        clock.jump(relay.pause)
    for number, pause in enumerate(pauses):
        assert 0.5 <= pause / min(30.0, 0.5 * 2**number) <= 1.0
    assert caplog.text.count("cannot be delivered (Redis: ConnectionError)") == 1
    delivery.down = False
    with caplog.at_level(logging.INFO, "tta_sync"):
        assert relay.run_once() == 1
    assert "delivered again" in caplog.text
    assert relay.pause == 0
    with Session(engine) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(outbox_table(Base.metadata))) == 0


def test_outage_of_the_database_is_no_error_of_who_calls_the_relay(
    sqlite: sa.Engine, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker's maintenance goes on; the statement and its parameters are not in the log."""
    drop_outbox(sqlite)
    relay = outbox_relay(sqlite)
    assert relay.run_once() == 0
    assert "OperationalError" in caplog.text
    assert "SELECT" not in caplog.text


def test_no_redis_named_is_an_outage_and_not_the_jobs_fault(
    engine: sa.Engine, nobody_delivers: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A web process need not know where Redis is; a relay that does not know says so, and blames no message."""
    with unit_of_work(engine):
        anything.enqueue_on_commit(1)
    relay = outbox_relay(engine)
    assert relay.run_once() == 0
    assert "REDIS_URL" in caplog.text
    (message,) = relay.messages()
    assert (message.attempts, message.error, message.parked) == (0, None, False)


# ---- poison ----------------------------------------------------------------------------------------------------------


def test_job_whose_function_is_gone_is_parked_with_its_error(
    engine: sa.Engine,
    client: Redis,
    nobody_delivers: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tried over some minutes, then parked, visible and logged; those behind it wait until then, others do not."""
    monkeypatch.setattr(jobs, "short_lived", workflow_job("default")(anything.workflow), raising=False)
    jobs.short_lived._tta_job.modules = ("tests.rq.outbox_jobs",)
    with unit_of_work(engine):
        before = anything.enqueue_on_commit(0)
        bad = jobs.short_lived.enqueue_on_commit(1)
        behind = anything.enqueue_on_commit(2)
    with unit_of_work(engine):
        other = anything.enqueue_on_commit(3)
    function = jobs.short_lived
    del jobs.short_lived
    clock = FakeClock(epoch=time.time() + 5)
    relay = OutboxRelay(engine, JobDelivery(client), attempts=3, clock=clock)
    assert relay.run_once() == 2
    assert queued(client) == [before, other]
    (message, second) = relay.messages()
    assert (message.job_id, message.attempts, message.parked) == (bad, 1, False)
    assert "short_lived cannot be imported here" in (message.error or "")
    assert second.attempts == 0
    assert relay.run_once() == 0  # not due
    assert "tried again in 1 s" in caplog.text
    clock.jump(1.1)
    assert relay.run_once() == 0
    clock.jump(4.1)
    assert relay.run_once() == 0
    assert "parked after 3 attempts" in caplog.text
    assert bad in caplog.text
    assert relay.run_once() == 1
    assert queued(client) == [before, other, behind]
    (message,) = relay.parked()
    assert message.parked
    assert message.name == "tests.rq.outbox_jobs.short_lived"
    assert 0 <= time.time() - message.created_at.timestamp() < 600
    assert (relay.waiting(), len(relay.messages())) == (0, 1)
    clock.jump(1e6)
    assert relay.run_once() == 0

    jobs.short_lived = function  # mended
    assert relay.retry([message.id + 1]) == 0
    assert relay.retry() == 1
    assert relay.run_once() == 1
    assert queued(client)[-1] == bad
    assert relay.messages() == []


def test_large_transaction_that_waits_does_not_keep_others_waiting(
    engine: sa.Engine, client: Redis, nobody_delivers: None
) -> None:
    """While its first job cannot be enqueued none of its jobs is looked at, however many there are."""
    with unit_of_work(engine):
        for number in range(250):
            anything.enqueue_on_commit(number)
    with engine.begin() as connection:
        table = outbox_table(Base.metadata)
        first = sa.select(sa.func.min(table.c.id)).scalar_subquery()
        connection.execute(sa.update(table).where(table.c.id == first).values(body="no JSON"))
    with unit_of_work(engine):
        anything.enqueue_on_commit(0, job_id="other")
    clock = FakeClock(epoch=time.time())
    relay = OutboxRelay(engine, JobDelivery(client), attempts=2, clock=clock)
    assert relay.run_once() == 0
    assert relay.run_once() == 1
    assert queued(client) == ["other"]
    clock.jump(1.1)
    assert [relay.run_once(), relay.run_once()] == [0, 249]


def test_parked_message_can_be_dropped_and_others_cannot(
    engine: sa.Engine, client: Redis, nobody_delivers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dropped is gone; a message that still may be delivered is not dropped by mistake."""
    with unit_of_work(engine):
        anything.enqueue_on_commit(1)
        anything.enqueue_on_commit(2)
    monkeypatch.setattr(jobs, "anything", None)
    relay = outbox_relay(engine, attempts=1)
    relay.run_once(limit=1)
    parked, waits = relay.messages()
    assert (parked.parked, waits.parked) == (True, False)
    assert "no job function any more" in (parked.error or "")
    assert relay.drop([parked.id, waits.id]) == 1
    assert [message.id for message in relay.messages()] == [waits.id]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("no JSON", "JSONDecodeError"),
        (_body("x", v=2), "newer release"),
        (_body("x", job={"data": '["nowhere.to.be.found", null, [], {}]'}), "nowhere.to.be.found cannot be imported"),
        (_body("x", job={"data": '["plain", null, [], {}]'}), "plain cannot be imported"),
        (_body("x", id="not an id!"), "ValueError"),
        (_body("x", job={}), "KeyError"),
    ],
)
def test_message_that_cannot_be_read_is_parked(
    body: str, text: str, sqlite: sa.Engine, client: Redis, nobody_delivers: None
) -> None:
    """Whatever stands in the table, the relay goes on with the next."""
    with unit_of_work(sqlite):
        anything.enqueue_on_commit(1)
    with sqlite.begin() as connection:
        connection.execute(sa.update(outbox_table(Base.metadata)).values(body=body))
    with unit_of_work(sqlite):
        good = anything.enqueue_on_commit(1)
    relay = outbox_relay(sqlite, attempts=1)
    assert relay.run_once() == 1
    assert queued(client) == [good]
    assert text in (relay.parked()[0].error or "")


def test_interrupt_of_rq_passes_through_the_import_of_a_function(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's alarm that lands in a relay is no message's error."""
    from rq.timeouts import JobTimeoutException

    def alarm(name: str) -> None:
        raise JobTimeoutException

    monkeypatch.setattr(outbox, "_import", alarm)
    with pytest.raises(JobTimeoutException):
        JobDelivery(client).deliver([Message("k", "u", _body("x"))], lambda: True)


def test_job_that_redis_refuses_is_kept_and_the_others_go_on(
    sqlite: sa.Engine, client: Redis, nobody_delivers: None
) -> None:
    """MULTI does not stop at a refusal: the marker behind it is taken back; later batches of its transaction wait."""
    client.set("rq:job:bad", "no hash")
    with unit_of_work(sqlite):
        anything.enqueue_on_commit(1, job_id="good")
        anything.enqueue_on_commit(2, job_id="bad")
        behind = [anything.enqueue_on_commit(number, job_id=f"behind-{number}") for number in range(80)]
    with unit_of_work(sqlite):
        anything.enqueue_on_commit(4, job_id="other")
    clock = FakeClock(epoch=time.time() + 60)
    relay = OutboxRelay(sqlite, JobDelivery(client), clock=clock)
    relay.run_once()
    refused, *left = relay.messages()
    assert refused.job_id == "bad"
    assert "WRONGTYPE" in (refused.error or "")
    assert [message.job_id for message in left] == behind[48:]  # 50 go in one MULTI
    assert {"good", "other", *behind[:48]} <= set(queued(client))
    client.delete("rq:job:bad")
    clock.jump(2.0)
    relay.run_once()
    assert waiting(sqlite) == 0
    assert client.type("rq:job:bad") == b"hash"
    assert [job_id for job_id in queued(client) if job_id.startswith("behind")] == behind


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_is_the_same_by_create_all_and_by_create_outbox_and_under_a_naming_convention(url: str) -> None:
    """alembic's autogenerate finds nothing to do, whatever the application calls its constraints."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    metadata = sa.MetaData(
        schema=None, naming_convention={"pk": "mine_%(table_name)s", "ix": "mine_%(column_0_label)s"}
    )
    table = outbox_table(metadata)
    assert outbox_table(metadata) is table
    engine = create_engine(url)
    with engine.begin() as connection:
        create_outbox(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()
    assert table.primary_key.name == "pk_tta_sync_outbox"
    assert [index.name for index in table.indexes] == ["ix_tta_sync_outbox_unit_id"]
    assert outbox_table(sa.MetaData(schema="elsewhere")).schema is None


# ---- beside it -------------------------------------------------------------------------------------------------------


def test_rq_seam_needs_no_sqlalchemy_until_a_job_is_written() -> None:
    """Who does not use the outbox need not have SQLAlchemy; who does is told what to install."""
    code = """
import sys
import tta_sync.rq
assert not [name for name in sys.modules if name.startswith("sqlalchemy")]
sys.modules["sqlalchemy"] = None
from tta_sync.exceptions import ConfigurationError
try:
    tta_sync.rq.outbox_relay(None)
except ConfigurationError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "tta-sync[sqlalchemy]" in done.stdout


def test_async_session_enqueues_by_its_sync_one(postgres_url: str, client: Redis) -> None:
    """Async connections belong to their loop, so the courier leaves them alone: a relay delivers."""
    sync = create_engine(postgres_url)
    Base.metadata.create_all(sync)

    async def main() -> str:
        engine = create_async_engine(postgres_url)
        async with AsyncSession(engine) as session:
            job_id = await session.run_sync(lambda own: index.enqueue_on_commit({"id": 1}, session=own))
            await session.commit()
        await engine.dispose()
        return job_id

    job_id = asyncio.run(main())
    assert outbox_relay(sync).run_once() == 1
    assert queued(client) == [job_id]
    with pytest.raises(ConfigurationError, match="sync Engine"):
        outbox_relay(create_async_engine(postgres_url).sync_engine)
    sync.dispose()


def test_database_in_memory_is_delivered_by_the_thread_that_commits(
    client: Redis, own_courier: courier.Courier
) -> None:
    """Its one connection must not be used by two threads at once."""
    engine = create_engine("sqlite://")
    create_outbox(engine)
    with unit_of_work(engine):
        job_id = anything.enqueue_on_commit(1)
    assert queued(client) == [job_id]
    assert waiting(engine) == 0
    assert own_courier._thread is None
    engine.dispose()


def test_unit_inside_a_step_is_the_one_that_counts(
    sqlite: sa.Engine, tmp_path: Path, client: Redis, eventually: Eventually
) -> None:
    """The innermost transaction is the current one."""
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    create_outbox(other)

    @session_step
    def save(session: Session, data: Any) -> str:
        with unit_of_work(other):
            inner = anything.enqueue_on_commit("inner")
        anything.enqueue_on_commit("outer")
        return inner

    inner = []

    def outer() -> None:
        inner.append(run_sync(save))
        raise Regret

    with pytest.raises(Regret):
        unit_of_work(sqlite).run(outer)
    eventually(lambda: queued(client))
    assert queued(client) == inner
    other.dispose()


def test_sync_code_beside_the_steps_has_the_units_session(
    work: UnitOfWork, client: Redis, eventually: Eventually
) -> None:
    """Between run_sync calls of one unit of work the same transaction is meant."""
    with work as unit:
        anything.enqueue_on_commit(1, job_id="beside")
        run_sync(session_step(lambda session, data: anything.enqueue_on_commit(data, job_id="inside")), 2)
        assert running_context.get() is None
        unit.session.flush()
    eventually(lambda: len(queued(client)) == 2)
    assert queued(client) == ["beside", "inside"]


def test_sessions_leave_nothing_behind_when_they_are_gone(sqlite: sa.Engine, nobody_delivers: None) -> None:
    """A process that opens a session for each request does not grow by it."""
    from sqlalchemy.event import registry

    def sessions(count: int) -> int:
        for _ in range(count):
            with Session(sqlite) as session:
                anything.enqueue_on_commit(1, session=session)
        gc.collect()
        return len(registry._key_to_collection)

    before = sessions(5)
    assert sessions(50) <= before


def test_queue_serializer_of_stored_jobs_is_json(sqlite: sa.Engine, client: Redis, eventually: Eventually) -> None:
    """Neither the row nor the job holds a pickle."""
    with unit_of_work(sqlite):
        job_id = anything.enqueue_on_commit({"a": "ü"})
        with Session(sqlite) as session:
            assert session is not None
    eventually(lambda: queued(client))
    assert Job.fetch(job_id, connection=client, serializer=JSONSerializer).args == [{"a": "ü"}]
