"""Progress: what is reported reaches job.meta, never takes anything else with it, and is never the job's concern."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.sentinel import SentinelConnectionPool
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from tests.rq import long_jobs as jobs
from tests.rq.conftest import WORKERS
from tta_sync.context import MAX_PROGRESS_MESSAGE, WorkflowContext
from tta_sync.rq import WorkflowJob, watch
from tta_sync.rq.control import watched_key
from tta_sync.rq.job import bind, context_of, running
from tta_sync.rq.progress import FIELD, INTERVAL, Progress, events_channel, flush
from tta_sync.rq.watch import Watch, process

Eventually = Callable[..., Any]


def progress_of(client: Redis, job_id: str) -> Any:
    meta = WorkflowJob.fetch(job_id, connection=client).meta
    return meta.get("progress")


def counted(progress: Any) -> tuple[Any, Any, Any]:
    return progress["done"], progress["total"], progress["message"]


# ---- context.progress ------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.reports: list[tuple[float, float | None, str | None]] = []

    def report(self, done: float, total: float | None, message: str | None) -> None:
        self.reports.append((done, total, message))


def test_report_is_checked_and_goes_nowhere_when_no_job_runs() -> None:
    """The same code runs in a request, in a test and in a job."""
    context = WorkflowContext()
    asyncio.run(context.progress(1, 2, "half"))
    context.report_progress(1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("1",), TypeError),
        ((True,), TypeError),
        ((None,), TypeError),
        ((1, "2"), TypeError),
        ((1, 2, b"half"), TypeError),
        ((-1,), ValueError),
        ((math.nan,), ValueError),
        ((math.inf,), ValueError),
        ((1, -2), ValueError),
        ((1, math.nan), ValueError),
    ],
)
def test_report_is_refused_when_it_is_none(arguments: Any, error: type[Exception]) -> None:
    """Outside a job too, so that a test finds the mistake."""
    context = WorkflowContext()
    context.reporter = recorder = Recorder()
    with pytest.raises(error):
        asyncio.run(context.progress(*arguments))
    with pytest.raises(error):
        context.report_progress(*arguments)
    assert recorder.reports == []


def test_report_of_a_branch_or_of_a_further_call_is_the_jobs() -> None:
    """Children and later calls report to the same place; a message is cut to a length that can be kept."""
    context = WorkflowContext()
    context.reporter = recorder = Recorder()
    context.create_child_context().report_progress(1)
    context.next_call().report_progress(2, 3, "x" * 10_000)
    assert recorder.reports == [(1, None, None), (2, 3, "x" * MAX_PROGRESS_MESSAGE)]
    assert "reporter" not in context.to_dict()
    assert WorkflowContext.from_dict(context.to_dict()).reporter is None


def test_report_gives_others_their_turn() -> None:
    """A coroutine that does nothing but work and report can be cancelled."""

    async def busy() -> None:
        context = WorkflowContext()
        while True:
            await context.progress(1)

    async def cancel_it() -> None:
        task = asyncio.create_task(busy())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_it())


# ---- on workers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WORKERS)
def test_progress_is_seen_while_the_job_runs_and_complete_when_it_has_ended(
    client: Redis, start_worker: Callable[..., Path], eventually: Eventually, kind: str
) -> None:
    """On every worker: the newest report in the middle, the last one at the end, meta of RQ's users besides."""
    job = jobs.counts.enqueue({"key": "k", "items": 50, "wait_at": [7]}, meta={"owner": "ada"})
    start_worker(kind)
    eventually(lambda: progress_of(client, job.id), within=60)
    eventually(lambda: progress_of(client, job.id)["done"] == 7)
    assert counted(progress_of(client, job.id)) == (7, 50, "item 7")
    client.set("k:go", 1)
    eventually(lambda: job.get_status() == "finished")
    assert counted(progress_of(client, job.id)) == (50, 50, "item 50")
    assert datetime.fromisoformat(progress_of(client, job.id)["at"]).utcoffset() is not None
    stored = WorkflowJob.fetch(job.id, connection=client)
    assert stored.meta["owner"] == "ada"
    assert stored.meta["tta_sync"] == job.meta["tta_sync"]


def test_progress_is_written_about_twice_a_second(
    client: Redis, work_here: Callable[..., None], eventually: Eventually
) -> None:
    """Two hundred reports in two seconds are a handful of writes; the last one is among them, and all are published."""
    job = jobs.saves_meta.enqueue("x")
    began = time.monotonic()
    with client.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(events_channel(job.id))
        heard.get_message(timeout=5)
        work_here()
        seconds = time.monotonic() - began
        published = []
        while (message := heard.get_message(timeout=0.1)) is not None:
            published.append(json.loads(message["data"]))
    assert [report["done"] for report in published] == sorted(report["done"] for report in published)
    assert published[-1]["done"] == 199
    assert 2 <= len(published) <= seconds / INTERVAL + 2


def test_meta_that_the_job_saves_itself_is_kept(client: Redis, work_here: Callable[..., None]) -> None:
    """save_meta() in the job and progress, both at once: nothing of either is lost."""
    job = jobs.saves_meta.enqueue("x", meta={"owner": "ada"})
    work_here()
    meta = WorkflowJob.fetch(job.id, connection=client).meta
    assert {name: meta[f"own-{name}"] for name in range(7)} == {n: max(range(n, 200, 7)) for n in range(7)}
    assert meta["owner"] == "ada"
    assert meta["progress"]["done"] == 199


def test_progress_of_a_pickled_job_is_in_its_meta_and_readable_without_unpickling(
    client: Redis, work_here: Callable[..., None]
) -> None:
    """`queue.enqueue(async_fn)` as RQ's users write it; who shows progress on the web needs no pickle."""
    job = Queue("default", connection=client).enqueue(jobs.counts_without_ado, 30, meta={"owner": "ada"})
    work_here()
    assert counted(progress_of(client, job.id)) == (30, 30, None)
    assert WorkflowJob.fetch(job.id, connection=client).meta["owner"] == "ada"
    raw = client.hget(job.key, FIELD)
    assert raw is not None
    assert json.loads(raw)["done"] == 30


def test_progress_is_reported_from_a_caller_step(client: Redis, work_here: Callable[..., None]) -> None:
    """report_progress is for synchronous code."""
    job = jobs.reports_from_a_caller_step.enqueue(1)
    work_here()
    assert counted(progress_of(client, job.id)) == (1, 2, "half")


def test_last_report_is_kept_when_the_job_fails(client: Redis, work_here: Callable[..., None]) -> None:
    """Where it stood when it failed is what one wants to know."""
    job = jobs.fails_after_a_report.enqueue("boom")
    work_here()
    assert job.get_status() == "failed"
    assert counted(progress_of(client, job.id)) == (7, 9, "boom")


def test_nothing_is_written_for_a_job_that_reports_nothing(client: Redis, work_here: Callable[..., None]) -> None:
    """Its keys are RQ's, and its meta is what it was."""
    job = jobs.quick.enqueue(1)
    meta = client.hget(job.key, "meta")
    work_here()
    assert client.hget(job.key, "meta") == meta
    assert client.keys("tta_sync:*") == []


def test_job_that_was_deleted_meanwhile_is_not_made_again(client: Redis) -> None:
    """A late report leaves no half of a job behind."""
    job = jobs.quick.enqueue(1)
    pickled = Queue("default", connection=client).enqueue(jobs.bare, 1)
    client.flushall()
    for one in (job, pickled):
        progress = Progress(one.id, client, one)
        progress.report(1)
        assert not progress.write()
    assert client.keys() == []


def test_job_is_not_held_up_when_redis_does_not_take_its_last_report(
    client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The report is lost, which is said; the job's result is not."""

    class Down(Redis):
        def eval(self, *args: Any, **options: Any) -> Any:
            raise RedisConnectionError("down")

    job = jobs.quick.enqueue(1)
    pool = job.connection.connection_pool
    process.watch._clients[pool] = Down(connection_pool=pool)
    try:
        with running(job) as context:
            context.report_progress(1)
    finally:
        process.watch._clients.clear()
    assert "last progress was not written (ConnectionError)" in caplog.text


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_writes_are_no_more_often_than_they_may(client: Redis) -> None:
    """due() is what throttles; the first report is due at once."""
    progress = Progress(jobs.quick.enqueue(1).id, client)
    assert progress.write()  # nothing to write
    assert not progress.reported
    assert progress.latest() is None
    assert not progress.due(time.monotonic())
    progress.report(1)
    assert progress.due(time.monotonic())
    assert progress.write()
    assert not progress.due(time.monotonic() + 10)
    progress.report(2)
    assert not progress.due(time.monotonic())
    assert progress.due(time.monotonic() + INTERVAL)
    latest = progress.latest()
    assert latest is not None
    assert latest["done"] == 2


def test_progress_of_many_jobs_is_one_command(client: Redis) -> None:
    """flush appends what is due to the caller's pipeline; at a job's end all that was ever reported."""
    made = [WorkflowJob.fetch(job.id, connection=client) for job in jobs.quick.enqueue_many(range(20))]
    progresses = [Progress(job.id, client, job) for job in made]
    for number, progress in enumerate(progresses[:15]):
        progress.report(number, 20)
    with client.pipeline(transaction=True) as pipe:
        assert flush(progresses, pipe) == 15
        assert len(pipe) == 1
        (outcome,) = pipe.execute()
    assert outcome == [1] * 15
    assert [progress_of(client, job.id)["done"] for job in made[:15]] == list(range(15))
    assert progress_of(client, made[15].id) is None
    assert made[3].meta["progress"]["done"] == 3
    progresses[0].report(100)
    with client.pipeline() as pipe:
        assert flush(progresses, pipe) == 0  # too soon
        assert flush(progresses, pipe, final=True) == 15
        pipe.execute()
    assert progress_of(client, made[0].id)["done"] == 100


def test_progress_of_a_pickled_job_among_many_is_written_on_its_own(client: Redis) -> None:
    """Its meta can be changed by who holds the job only."""
    job = Queue("default", connection=client).enqueue(jobs.bare, 1, meta={"a": 1})
    progress = Progress(job.id, client, job)
    progress.report(5)
    with client.pipeline() as pipe:
        assert flush([progress], pipe) == 0
    assert Job.fetch(job.id, connection=client).meta["progress"]["done"] == 5


def test_pickled_meta_that_is_saved_at_the_same_moment_is_kept(client: Redis) -> None:
    """Between our look and our write the job saves its meta: we look again."""
    job = Queue("default", connection=client).enqueue(jobs.bare, 1)
    saves = iter(range(3))

    class Racing:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def eval(self, *args: Any) -> Any:
            number = next(saves, None)
            if number is not None:
                job.meta[f"own-{number}"] = number
                job.save_meta()
            return client.eval(*args)

    progress = Progress(job.id, client, job)
    progress.report(1)
    assert progress.write(Racing())  # type: ignore[arg-type]
    meta = Job.fetch(job.id, connection=client).meta
    assert {"own-0": 0, "own-1": 1, "own-2": 2}.items() <= meta.items()
    assert meta["progress"]["done"] == 1


def test_write_gives_up_for_now_when_pickled_meta_is_saved_without_end(client: Redis) -> None:
    """It is no fight: the next write tries again."""
    job = Queue("default", connection=client).enqueue(jobs.bare, 1)

    class Racing:
        number = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def eval(self, *args: Any) -> Any:
            self.number += 1
            job.meta["own"] = self.number
            job.save_meta()
            return client.eval(*args)

    progress = Progress(job.id, client, job)
    progress.report(1)
    assert progress.write(Racing())  # type: ignore[arg-type]
    assert Job.fetch(job.id, connection=client).meta["own"] == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.text(max_size=6) | st.sampled_from(["progress", "tta_sync", '"', "\\", "{", "progress\\", '\\"progress'])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    meta=st.dictionaries(KEYS, JSON, max_size=6),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    message=st.text(max_size=20),
)
def test_all_other_meta_is_untouched_whatever_it_is(
    client: Redis, meta: dict[str, Any], indent: int | None, ascii_only: bool, message: str
) -> None:
    """Of any meta that is JSON only the one member changes; everything else is the same to the byte."""
    try:
        before = json.dumps(meta, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8
        return
    client.hset("rq:job:fuzz", mapping={"status": "started", "meta": before})
    progress = Progress("fuzz", client)
    progress.report(1, 2, message)
    assert progress.write()
    raw = client.hget("rq:job:fuzz", "meta")
    assert raw is not None
    after = json.loads(raw)
    assert after.pop("progress") == progress.latest()
    meta.pop("progress", None)
    assert list(after.items()) == list(meta.items())
    assert json.dumps(after) == json.dumps(meta)


@pytest.mark.parametrize("held", [b"", b"  ", b" { } ", b'{"a":1}', b'{"progress":null}'])
def test_meta_of_any_layout_takes_progress(client: Redis, held: bytes) -> None:
    """None at all, empty, without spaces, with an old report."""
    client.hset("rq:job:x", mapping={"status": "started", "meta": held})
    progress = Progress("x", client)
    progress.report(1)
    assert progress.write()
    meta = json.loads(client.hget("rq:job:x", "meta") or b"")
    assert meta["progress"]["done"] == 1
    assert ("a" in meta) == (b"a" in held)


@pytest.mark.parametrize(
    "held",
    [
        *("\x80}.", "[1]", "{", '{"a"', '{"a" 1}', '{"a": "x', '{"a": [1, "b', '{"a": 1', '{"a": 1; "b": 2}', "{a: 1}"),
        *('{"a": {"b": 1}', '{"a', '{"a": 1,', '{"a": 1, b}', '{"a": [1', '{"a":', '{"a": \\'),
    ],
)
def test_meta_that_is_not_json_is_left_alone(client: Redis, held: str) -> None:
    """Better no progress than broken meta."""
    client.hset("rq:job:x", mapping={"status": "started", "meta": held})
    progress = Progress("x", client)
    progress.report(1)
    assert progress.write()
    assert (client.hget("rq:job:x", "meta") or b"").decode() == held


def test_two_writes_never_overtake_each_other(client: Redis) -> None:
    """The last report is written while an earlier write is still on its way: it comes behind it."""
    job = jobs.quick.enqueue(1)
    progress = Progress(job.id, client, job)
    on_its_way, go = threading.Event(), threading.Event()

    class Slow:
        def eval(self, *args: Any) -> Any:
            on_its_way.set()
            assert go.wait(10)
            return client.eval(*args)

    progress.report(1)
    slow = threading.Thread(target=progress.write, args=(Slow(),))
    slow.start()
    assert on_its_way.wait(10)
    progress.report(2)
    last = threading.Thread(target=progress.write)
    last.start()
    go.set()
    slow.join()
    last.join()
    assert progress_of(client, job.id)["done"] == 2


# ---- bound to a job --------------------------------------------------------------------------------------------------


def test_bound_context_reports_to_the_job_and_nothing_is_written_by_itself(client: Redis) -> None:
    """For a worker that runs many jobs: bind, and write when it writes everything."""
    job = jobs.quick.enqueue(1)
    with bind(job, context_of(job)) as progress:
        context = WorkflowContext()
        context.reporter = progress
        context.report_progress(3, 4)
    assert progress_of(client, job.id) is None
    assert progress.write()
    assert counted(progress_of(client, job.id)) == (3, 4, None)


# ---- the watch -------------------------------------------------------------------------------------------------------


def test_watch_ends_when_no_job_has_run_for_a_while_and_begins_again(
    client: Redis, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """One thread, however many jobs, and none, nor a connection, when there are none."""
    monkeypatch.setattr(watch, "LOOK_AFTER", 0.01)
    monkeypatch.setattr(watch, "IDLE", 0.05)
    monkeypatch.setattr(process, "watch", Watch())
    for _ in range(2):
        job = jobs.quick.enqueue(1)
        with running(job) as context:
            eventually(lambda: not process.watch._free)
            context.report_progress(1)
            eventually(lambda job=job: progress_of(client, job.id))
            eventually(lambda job=job: client.exists(watched_key(job.id)))
        assert client.keys("tta_sync:*") == []
        eventually(lambda: process.watch._free)
        assert process.watch._clients == {}


def test_watch_survives_what_it_did_not_expect(
    client: Redis, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """A serializer of the user's that fails is logged; the job goes on, and so does the watch over others."""
    monkeypatch.setattr(watch, "LOOK_AFTER", 0.01)
    monkeypatch.setattr(process, "watch", Watch())

    class Broken:
        @staticmethod
        def dumps(thing: Any) -> bytes:
            raise ValueError("cannot")

        loads = JSONSerializer.loads

    job = jobs.quick.enqueue(1)
    job.serializer = Broken  # type: ignore[assignment]

    def run() -> None:
        with running(job) as context:
            context.report_progress(1)
            eventually(lambda: "could not be looked after" in caplog.text)

    with pytest.raises(ValueError, match="cannot"):
        run()


def test_trouble_with_redis_is_said_once_per_job(
    client: Redis, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again at every look, without filling the log."""
    monkeypatch.setattr(watch, "LOOK_AFTER", 0.01)
    monkeypatch.setattr(process, "watch", Watch())
    looks: list[object] = []

    class Down(Redis):
        def pipeline(self, *args: Any, **options: Any) -> Any:
            looks.append(None)
            raise RedisConnectionError("down")

    job = jobs.quick.enqueue(1)
    pool = job.connection.connection_pool
    process.watch._clients[pool] = Down(connection_pool=pool)
    with running(job):
        eventually(lambda: len(looks) > 3)
    assert caplog.text.count("Redis does not say") == 1


def test_there_is_one_watch_when_two_threads_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second leaves."""
    own = Watch()
    own._free.clear()
    monkeypatch.setattr(own, "_look_round", pytest.fail)
    own._start()


def test_watch_goes_on_when_a_job_came_in_its_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has given its place back: it takes it again, unless the job has already started another."""
    monkeypatch.setattr(watch, "LOOK_AFTER", 0.001)
    monkeypatch.setattr(watch, "IDLE", 0.001)
    own = Watch()
    taken = iter([True, True])

    class Late(dict):  # type: ignore[type-arg]  # a job is in it by the time of the second look only
        def __bool__(self) -> bool:
            return True

    class Place(list):  # type: ignore[type-arg]
        def pop(self, *_: Any) -> Any:
            try:
                return next(taken)
            except StopIteration:
                raise IndexError from None

    own._running, own._free = Late(), Place()
    own._look_round()
    assert next(taken, None) is None


def test_forked_child_has_a_watch_of_its_own(client: Redis) -> None:
    """Its parent's has no thread there, and its connections are its parent's."""
    job = jobs.quick.enqueue(1)
    with running(job):
        before = process.watch
        assert before._running
        pid = os.fork()
        if pid == 0:
            os._exit(0 if process.watch is not before and not process.watch._running else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert process.watch is before


def test_clients_of_the_watch_are_few(client: Redis) -> None:
    """One per pool, of little patience, and not without end where each job brings another."""
    own = Watch()
    clients = [Redis(port=1000 + number) for number in range(20)]
    for one in clients:
        first = own.client_for(one)
        assert own.client_for(one) is first
        assert first.connection_pool is not one.connection_pool
        options = first.connection_pool.connection_kwargs
        assert options["port"] == one.connection_pool.connection_kwargs["port"]
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (1.0, 1.0)
        assert options["retry"].get_retries() == 0
        assert len(own._clients) <= 8
        one.close()


def test_client_that_knows_more_than_an_address_is_used_itself() -> None:
    """Sentinel's, which asks for the master anew."""

    class Sentinel(Redis):
        pass

    one = Sentinel()
    pool = one.connection_pool
    one.connection_pool = SentinelConnectionPool.__new__(SentinelConnectionPool)
    try:
        own = Watch()
        assert own.client_for(one) is one
        own._close()
        assert own._clients == {}
    finally:
        one.connection_pool = pool
        one.close()
