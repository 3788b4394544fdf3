"""AsyncWorker: many jobs at once in one process, with what RQ's users know unchanged."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue, Repeat, Retry, SimpleWorker
from rq.command import send_shutdown_command, send_stop_job_command
from rq.exceptions import DuplicateJobError
from rq.group import Group
from rq.job import Dependency, Job, JobStatus
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import DefaultSerializer, JSONSerializer
from rq.suspension import resume, suspend
from rq.worker import DequeueStrategy, Worker

from tests.rq import worker_jobs as jobs
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.rq import AsyncWorker, WorkflowJob
from tta_sync.rq.control import Cancel, request_cancel

JOBS = "tests.rq.worker_jobs."
CHECKOUT = Path(__file__).parents[2]
RQ = Path(sys.executable).with_name("rq")


@pytest.fixture
def client(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("REDIS_URL", redis_url)
    client = Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def queue(client: Redis) -> Queue:
    return Queue("default", connection=client, serializer=JSONSerializer, job_class=WorkflowJob)


@pytest.fixture
def work(client: Redis) -> Callable[..., AsyncWorker]:
    """Run a worker in this process until its queues are empty, and return it."""

    def run(*queues: str, **options: Any) -> AsyncWorker:
        worker = AsyncWorker(list(queues or ("default",)), connection=client)
        worker.work(**{"burst": True, "logging_level": "WARNING", **options})
        return worker

    return run


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(client: Redis, redis_url: str, tmp_path: Path, measure_subprocesses: None) -> Iterator[Start]:
    """Start ``rq worker -w tta_sync.rq.AsyncWorker`` as a process; it is killed at the end."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*queues: str, options: tuple[str, ...] = (), wait: bool = True, **settings: str) -> subprocess.Popen[str]:
        command = [str(RQ), "worker", "-w", "tta_sync.rq.AsyncWorker", "--url", redis_url, "--path", str(CHECKOUT)]
        before = set(Worker.all_keys(connection=client))
        log = open(tmp_path / f"worker-{len(processes)}.log", "w+")  # noqa: SIM115
        process = subprocess.Popen(
            [*command, *options, *(queues or ("default",))],
            cwd=tmp_path,
            env={**os.environ, "TTA_WORKER_RECOVERY_SECONDS": "1", "PYTHONDONTWRITEBYTECODE": "1", **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        process.log = log  # type: ignore[attr-defined]
        processes.append(process)
        if wait:
            give_up = time.monotonic() + 30
            while before.issuperset(Worker.all_keys(connection=client)):  # it may strike a dead one off at once
                assert process.poll() is None, said(process)
                assert time.monotonic() < give_up, said(process)
                time.sleep(0.02)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        process.log.close()  # type: ignore[attr-defined]


def said(process: subprocess.Popen[str]) -> str:
    """What a worker process has printed so far."""
    log: Any = process.log  # type: ignore[attr-defined]
    log.seek(0)
    return str(log.read())


def fetch(job: Job) -> Job:
    return WorkflowJob.fetch(job.id, connection=job.connection)


def value(job: Job) -> Any:
    job = fetch(job)
    result = job.latest_result()
    assert job.get_status() == JobStatus.FINISHED, (job.get_status(), result and result.exc_string)
    return job.return_value()


def failure(job: Job, status: JobStatus = JobStatus.FAILED) -> str:
    job = fetch(job)
    assert job.get_status() == status
    assert job.id in FailedJobRegistry(job.origin, connection=job.connection).get_job_ids()
    result = job.latest_result()
    assert result is not None
    assert result.exc_string is not None
    return result.exc_string


# ---- the whole keyspace, as RQ's own worker leaves it ----------------------------------------------------------------


def plain_success(queue: Queue) -> None:
    queue.enqueue(JOBS + "double", 2, job_id="job")
    queue.enqueue(JOBS + "double_plainly", 2, job_id="plain", description="a plain one", meta={"a": 1})


def plain_failure(queue: Queue) -> None:
    queue.enqueue(JOBS + "fail", "a reason", job_id="job", failure_ttl=500)
    queue.enqueue(JOBS + "leave", job_id="left")


def retried(queue: Queue) -> None:
    queue.enqueue(JOBS + "fail_at_first", "first", job_id="job", retry=Retry(max=2))
    queue.enqueue(JOBS + "fail", job_id="in-vain", retry=Retry(max=2))


def retried_later(queue: Queue) -> None:
    queue.enqueue(JOBS + "fail", job_id="job", retry=Retry(max=2, interval=[60, 90]))


def returned_retry(queue: Queue) -> None:
    queue.enqueue(JOBS + "ask_again", "asked", 5, job_id="job")
    queue.enqueue(JOBS + "ask_again", "asked too", 1, job_id="too-often")


def dependents(queue: Queue) -> None:
    parent = queue.enqueue(JOBS + "double", 2, job_id="parent")
    queue.enqueue(JOBS + "double", 3, job_id="child", depends_on=parent)
    bad = queue.enqueue(JOBS + "fail", job_id="bad")
    queue.enqueue(JOBS + "double", 3, job_id="never", depends_on=bad)
    queue.enqueue(JOBS + "double", 3, job_id="anyway", depends_on=Dependency(jobs=[bad, parent], allow_failure=True))


def callbacks(queue: Queue) -> None:
    told, of_failure = Callback(JOBS + "told"), Callback(JOBS + "told_of_failure")
    queue.enqueue(JOBS + "double", 2, job_id="job", on_success=told, on_failure=of_failure)
    queue.enqueue(JOBS + "fail", job_id="bad", on_success=told, on_failure=of_failure)
    queue.enqueue(
        JOBS + "double", 2, job_id="told-badly", on_success=Callback(JOBS + "fail_to_be_told"), on_failure=of_failure
    )


def unique(queue: Queue) -> None:
    queue.enqueue(JOBS + "double", 2, job_id="job", unique=True)
    with pytest.raises(DuplicateJobError):
        queue.enqueue(JOBS + "double", 2, job_id="job", unique=True)


def repeated(queue: Queue) -> None:
    queue.enqueue(JOBS + "double", 2, job_id="job", repeat=Repeat(times=2))
    queue.enqueue(JOBS + "double", 2, job_id="later", repeat=Repeat(times=2, interval=60))


def result_ttls(queue: Queue) -> None:
    for ttl in (0, -1, 77):
        queue.enqueue(JOBS + "double", 2, job_id=f"job{ttl}", result_ttl=ttl)
    queue.enqueue(JOBS + "double", 2, job_id="ttl", ttl=300)
    queue.enqueue(JOBS + "double", 2, job_id="front", at_front=True)


def groups_and_meta(queue: Queue) -> None:
    group = Group.create(queue.connection, "group")
    group.enqueue_many(queue, [Queue.prepare_data(JOBS + "keep_meta", args=("x",), job_id=f"job{n}") for n in range(3)])


def missing(queue: Queue) -> None:
    queue.enqueue(JOBS + "no_such_function", job_id="job")
    queue.enqueue(JOBS + "double", "no", "such", "arguments", job_id="arguments")
    deleted = queue.enqueue(JOBS + "double", 2, job_id="deleted")
    queue.connection.delete(deleted.key)


def two_queues(queue: Queue) -> None:
    other = Queue("other", connection=queue.connection, serializer=JSONSerializer, job_class=WorkflowJob)
    parent = other.enqueue(JOBS + "double", 2, job_id="parent")
    queue.enqueue(JOBS + "double", 3, job_id="child", depends_on=parent)


SCENARIOS = [
    plain_success,
    plain_failure,
    retried,
    retried_later,
    returned_retry,
    dependents,
    callbacks,
    unique,
    repeated,
    result_ttls,
    groups_and_meta,
    missing,
    two_queues,
]

_SAME = [
    (re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"), b"<time>"),
    (re.compile(rb"\b1[6-9]\d{8}(\.\d+)?(-\d+)?\b"), b"<epoch>"),
    (re.compile(rb'File "[^"]*", line \d+, in \w+'), b"<frame>"),
]


def keyspace(client: Redis, worker: str) -> dict[str, Any]:
    """Everything in Redis, with what is different in every run (times, ids, names) made the same."""

    def same(data: Any) -> Any:
        if isinstance(data, bytes):
            data = data.replace(worker.encode(), b"<worker>")
            data = re.sub(rb"[0-9a-f]{32}", b"<id>", data)
            for pattern, by in _SAME:
                data = pattern.sub(by, data)
            return data
        if isinstance(data, dict):
            return {same(key): same(item) for key, item in data.items()}
        if isinstance(data, (list, tuple)):
            return [same(item) for item in data]
        return data

    found = {}
    for key in sorted(client.keys()):
        kind = client.type(key)
        if kind == b"hash":
            content = same(client.hgetall(key))
            if key.startswith(b"rq:worker:"):
                for changing in (b"pid", b"ip_address", b"total_working_time"):
                    content.pop(changing, None)
            if b"data" in content:
                content[b"data"] = b"<data>"
        elif kind == b"zset":
            content = sorted(
                (same(member), score in (float("inf"), -1.0))
                for member, score in client.zrange(key, 0, -1, withscores=True)
            )
        elif kind == b"stream":
            content = []
            for _, entry in client.xrange(key):
                entry = dict(entry)
                if b"exc_string" in entry:  # the frames between RQ and the job differ; its last line does not
                    import base64
                    import zlib

                    text = zlib.decompress(base64.b64decode(entry[b"exc_string"]))
                    entry[b"exc_string"] = text.strip().splitlines()[-1:]
                content.append(same(entry))
        elif kind == b"list":
            content = same(client.lrange(key, 0, -1))
        elif kind == b"set":
            content = sorted(same(list(client.smembers(key))))
        else:
            content = same(client.get(key))
        ttl = client.ttl(key)
        found[same(key).decode()] = (kind, content, ttl if ttl < 0 else round(ttl, -1))
    return found


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What is not the same, in lines that can be read."""
    lines = []
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) == ours.get(key):
            continue
        one, other = theirs.get(key), ours.get(key)
        if one and other and one[0] == other[0] == b"hash":
            for field in sorted({*one[1], *other[1]}):
                if one[1].get(field) != other[1].get(field):
                    lines.append(f"{key}[{field.decode()}]: {one[1].get(field)!r} and ours {other[1].get(field)!r}")
            one, other = one[2], other[2]
        if one != other:
            lines.append(f"{key}: {one!r} and ours {other!r}")
    return lines


class RQWorker(SimpleWorker):
    """RQ's own, but for a thread that it would leave behind."""

    def unsubscribe(self) -> None:
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
        super().unsubscribe()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_keyspace_is_what_rq_leaves_when_all_is_done(
    client: Redis, queue: Queue, scenario: Callable[[Queue], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the same jobs Redis holds the same as after RQ's SimpleWorker: every key, field and time to live."""
    monkeypatch.setenv("TTA_WORKER_CONCURRENCY", "1")  # in RQ's order: which dependent goes first leaves its traces
    left = []
    for kind in (RQWorker, AsyncWorker):
        client.flushall()
        scenario(queue)
        worker = kind(["default", "other"], connection=client, serializer=JSONSerializer, job_class=WorkflowJob)
        worker.work(burst=True, logging_level="CRITICAL")
        left.append(keyspace(client, worker.name))
    assert differences(*left) == []


# ---- jobs ------------------------------------------------------------------------------------------------------------


def test_async_jobs_run_at_once_on_one_thread_when_many_are_queued(queue: Queue, work: Any) -> None:
    """A hundred jobs that wait for each other all meet; one loop runs them."""
    met = [queue.enqueue(JOBS + "meet", "place", 100) for _ in range(100)]
    work()
    assert len({value(job) for job in met}) == 1


def test_no_more_jobs_than_allowed_run_when_more_are_queued(
    queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TTA_WORKER_CONCURRENCY is kept."""
    monkeypatch.setenv("TTA_WORKER_CONCURRENCY", "4")
    together = [queue.enqueue(JOBS + "count_together", "together", 20) for _ in range(20)]
    work()
    assert max(value(job) for job in together) == 4


def test_current_job_is_ones_own_when_jobs_are_interleaved(queue: Queue, work: Any) -> None:
    """get_current_job() is right at every await, in async jobs and in threads; afterwards there is none."""
    asked = [queue.enqueue(JOBS + "who_am_i", 20) for _ in range(30)]
    plain = [queue.enqueue(JOBS + "who_am_i_plainly") for _ in range(30)]
    work()
    assert [value(job) for job in asked] == [[job.id] * 5 for job in asked]
    assert [value(job) for job in plain] == [job.id for job in plain]
    assert jobs.get_current_job() is None


def test_workflow_job_goes_through_its_schemas_when_run(client: Redis, work: Any) -> None:
    """Loaded by one schema, dumped by the other: nothing else of the result reaches Redis."""
    job = jobs.doubled.enqueue({"number": 21})
    work()
    assert value(job) == {"doubled": 42}
    assert not any(b"not for Redis" in str(client.xrange(key)).encode() for key in client.keys("rq:results:*"))


def test_context_travels_and_the_timeout_is_its_deadline_when_run(client: Redis, work: Any) -> None:
    """Correlation id and tenant of the one who asked; the time that is left to the job."""
    job = jobs.context_seen.enqueue(None, context=WorkflowContext(correlation_id="asked-by-me", tenant="acme"))
    work()
    seen = value(job)
    assert (seen["correlation_id"], seen["tenant"]) == ("asked-by-me", "acme")
    assert 100 < seen["left"] <= 180


def test_job_fails_when_its_deadline_has_passed_in_the_queue(client: Redis, work: Any) -> None:
    """It is not begun: whoever wanted it does not wait any more."""
    job = jobs.doubled.enqueue({"number": 1}, deadline=-1)
    work()
    assert "DeadlineExceededError" in failure(job)


def test_primitives_work_when_they_are_the_job(client: Redis, work: Any) -> None:
    """A RetryPrimitive's retries happen inside the job."""
    job = jobs.retrying.enqueue("tries")
    work()
    assert value(job) == 3


def test_caller_steps_run_on_one_thread_of_the_job_when_awaited(client: Redis, work: Any) -> None:
    """Also from branches, and when such a step calls run_sync again; the loop's thread is another."""
    seen = [jobs.with_caller_steps.enqueue(None) for _ in range(5)]
    work()
    for job in seen:
        names = set(value(job)["names"])
        assert len(names) == 1
        assert names.pop().startswith("tta_sync-session")
        assert value(job)["nested"][0] != value(job)["names"][0]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A database with a table of notes; a function that counts them."""
    import sqlite3

    from tta_sync.sqlalchemy import create_engine

    path = tmp_path / "notes.sqlite"
    monkeypatch.setenv("TEST_DATABASE_URL", f"sqlite:///{path}")
    with sqlite3.connect(path) as database:
        database.execute("create table notes (body text)")
    database.close()

    def count() -> int:
        connection = sqlite3.connect(path)
        try:
            return int(connection.execute("select count(*) from notes").fetchone()[0])
        finally:
            connection.close()

    yield count
    for engine in jobs.engines.values():
        engine.dispose()
    jobs.engines.clear()
    assert create_engine


def test_unit_of_work_commits_when_its_job_succeeds_and_not_when_it_fails(
    client: Redis, work: Any, notes: Callable[[], int]
) -> None:
    """Session steps inside concurrent jobs, each in its job's own transaction."""
    good = [jobs.insert_note.enqueue(f"note {n}") for n in range(8)]
    bad = [jobs.insert_and_stumble.enqueue(f"bad {n}") for n in range(4)]
    work()
    assert sorted(value(job) for job in good) == list(range(1, 9))
    assert all("after the insert" in failure(job) for job in bad)
    assert notes() == 8


def test_unit_of_work_rolls_back_and_cleans_up_when_its_job_is_cut(
    client: Redis, work: Any, notes: Callable[[], int]
) -> None:
    """A job in a unit of work that runs out of time: its coroutine is cancelled, its transaction undone."""
    job = jobs.insert_and_hang.enqueue("hung", timeout=1)
    work()
    assert "JobTimeoutException" in failure(job)
    assert client.lrange("hung:ended", 0, -1) == [b"started"]
    assert notes() == 0


@pytest.mark.parametrize("name", ["leave", "give_a_set"])
def test_worker_survives_when_a_job_does_what_it_should_not(queue: Queue, work: Any, name: str) -> None:
    """SystemExit is the job's failure, and so is a result that JSON cannot carry; the job behind it runs."""
    bad, good = queue.enqueue(JOBS + name), queue.enqueue(JOBS + "double", 2)
    work()
    assert ("SystemExit: 3" if name == "leave" else "JSON cannot carry") in failure(bad)
    assert value(good) == 4


# ---- what is refused


def test_pickle_is_refused_unread_when_it_comes(client: Redis, queue: Queue, work: Any, tmp_path: Path) -> None:
    """A payload that would run code when loaded ends failed, with no code run; the job behind it runs."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "boom"),)

    pickled = Queue("default", connection=client, serializer=DefaultSerializer)
    bad = pickled.enqueue(jobs.double, Bomb(), meta={"bomb": 1}, retry=Retry(max=3))
    good = queue.enqueue(JOBS + "double", 2)
    work()
    assert not (tmp_path / "boom").exists()
    assert "PickleRefusedError" in failure(bad)
    assert value(good) == 4


def test_pickle_is_taken_when_that_is_allowed(client: Redis, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TTA_WORKER_ALLOW_PICKLE=1: queue.enqueue(async_fn, data) as RQ does it."""
    monkeypatch.setenv("TTA_WORKER_ALLOW_PICKLE", "1")
    job = Queue("default", connection=client).enqueue(jobs.double, 2)
    work()
    assert Job.fetch(job.id, connection=client).return_value() == 4


@pytest.mark.parametrize("damage", [{"data": b""}, {"data": b"\xff\xfe"}, {"created_at": b"never"}, {"timeout": b"x"}])
def test_damaged_job_fails_when_claimed_and_the_next_one_runs(
    queue: Queue, work: Any, damage: dict[str, bytes]
) -> None:
    """Whatever somebody has made of a job's hash is that job's end only."""
    bad, good = queue.enqueue(JOBS + "double", 2), queue.enqueue(JOBS + "double", 2)
    queue.connection.hset(bad.key, mapping=damage)
    work()
    assert value(good) == 4
    assert queue.connection.hget(bad.key, "status") == b"failed"
    assert bad.id in queue.failed_job_registry.get_job_ids()
    assert queue.started_job_registry.get_job_ids() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TTA_WORKER_CONCURRENCY", "0"),
        ("TTA_WORKER_CONCURRENCY", "many"),
        ("TTA_WORKER_RECOVERY_SECONDS", "-1"),
        ("TTA_WORKER_DRAIN_SECONDS", "nan"),
        ("TTA_WORKER_ALLOW_PICKLE", "perhaps"),
        ("TTA_WORKER_QUEUE_LIMITS", "low"),
        ("TTA_WORKER_QUEUE_LIMITS", "low=0"),
    ],
)
def test_worker_names_the_setting_when_it_is_none(
    client: Redis, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    """One clear error, before anything is registered."""
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError, match=name):
        AsyncWorker(["default"], connection=client)
    assert client.keys() == []


# ---- ends that others make


def test_coroutine_has_cleaned_up_when_its_job_times_out(client: Redis, queue: Queue, work: Any) -> None:
    """Its ``finally`` runs while the job's status is still started; the others are not disturbed."""
    late = queue.enqueue(JOBS + "hang", "late", job_timeout=1)
    others = [queue.enqueue(JOBS + "double", n) for n in range(10)]
    work()
    assert "JobTimeoutException: Task exceeded maximum timeout value (1 seconds)" in failure(late)
    assert client.lrange("late:ended", 0, -1) == [b"started"]
    assert [value(job) for job in others] == [2 * n for n in range(10)]


def test_job_fails_in_time_when_it_swallows_its_cancellation(client: Redis, queue: Queue, work: Any) -> None:
    """After a grace it ends failed; that it runs on is logged."""
    job = queue.enqueue(JOBS + "swallow", "deaf", 4, job_timeout=1)
    began = time.monotonic()
    work()
    assert "JobTimeoutException" in failure(job)
    assert time.monotonic() - began < 4


def test_plain_job_fails_at_once_when_it_times_out(client: Redis, queue: Queue, work: Any) -> None:
    """Its thread cannot be stopped: it is left to itself, and the worker goes on."""
    job, good = queue.enqueue(JOBS + "block", "blocked", "go", job_timeout=1), queue.enqueue(JOBS + "double_plainly", 2)
    work()
    assert "JobTimeoutException" in failure(job)
    assert value(good) == 4
    assert client.llen("blocked:ended") == 0
    client.set("go", 1)


@pytest.mark.parametrize("how", ["ours", "rq"])
def test_running_job_is_stopped_when_that_is_asked_for(
    client: Redis, queue: Queue, start: Start, eventually: Any, how: str
) -> None:
    """By our request or by RQ's command: its ``finally`` runs, it ends stopped, is not retried, others run on."""
    job = queue.enqueue(JOBS + "hang", "stopped", retry=Retry(max=3), on_stopped=Callback(JOBS + "told_of_stop"))
    other = queue.enqueue(JOBS + "hang", "other")
    start()
    eventually(lambda: client.llen("stopped:began") and client.llen("other:began"))
    asked = time.monotonic()
    if how == "ours":
        assert request_cancel(job.id, client) == Cancel.REQUESTED
    else:
        send_stop_job_command(client, job.id, serializer=JSONSerializer)
    eventually(lambda: client.llen("stopped:ended"), within=10)
    noticed = time.monotonic() - asked
    assert noticed < 3, "promised within 1 s; the rest is for a machine that is busy"
    eventually(lambda: fetch(job).get_status() == JobStatus.STOPPED, within=10)
    assert "cancel" in failure(job, JobStatus.STOPPED).lower()
    assert client.lrange("stopped:ended", 0, -1) == [b"started"]
    assert client.lrange(f"told:{job.id}", 0, -1) == [b"stopped"]
    assert fetch(other).get_status() == JobStatus.STARTED


# ---- limits


def test_shared_limit_is_kept_and_nobody_starves_when_tenants_compete(client: Redis, work: Any) -> None:
    """concurrency=2 by tenant: never three of one tenant, and another tenant's jobs pass those that must wait."""
    many = [jobs.for_tenant.enqueue({"tenant": "a", "ms": 60}) for _ in range(12)]
    few = [jobs.for_tenant.enqueue({"tenant": "b", "ms": 60}) for _ in range(2)]
    assert jobs.for_tenant.enqueue_many([{"tenant": "c"}])
    work()
    assert max(value(job) for job in many) == 2
    ended = {job.id: fetch(job).ended_at for job in (*many, *few)}
    assert max(ended[job.id] for job in few) < max(ended[job.id] for job in many)
    assert client.keys("tta_sync:running:*") == []


def test_queue_limit_is_kept_when_set(queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TTA_WORKER_QUEUE_LIMITS: of one queue's jobs no more run at once, of the others as many as there are."""
    monkeypatch.setenv("TTA_WORKER_QUEUE_LIMITS", "default=3")
    other = Queue("other", connection=queue.connection, serializer=JSONSerializer)
    limited = [queue.enqueue(JOBS + "count_together", "limited", 30) for _ in range(12)]
    free = [other.enqueue(JOBS + "count_together", "free", 60) for _ in range(12)]
    work("default", "other")
    assert max(value(job) for job in limited) == 3
    assert max(value(job) for job in free) == 12


# ---- queues and life


@pytest.mark.parametrize("strategy", list(DequeueStrategy))
def test_queues_have_their_turn_when_asked_in_order(
    queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    """First the first queue, or each in turn."""
    monkeypatch.setenv("TTA_WORKER_CONCURRENCY", "1")
    other = Queue("other", connection=queue.connection, serializer=JSONSerializer)
    first = [queue.enqueue(JOBS + "log_turn", "turns").id for _ in range(3)]
    second = [other.enqueue(JOBS + "log_turn", "turns").id for _ in range(3)]
    work("default", "other", dequeue_strategy=strategy)
    turns = [turn.decode() for turn in queue.connection.lrange("turns", 0, -1)]
    if strategy == DequeueStrategy.DEFAULT:
        assert turns == first + second
    elif strategy == DequeueStrategy.ROUND_ROBIN:
        assert turns == [job for pair in zip(first, second, strict=True) for job in pair]
    assert sorted(turns) == sorted(first + second)


def test_worker_stops_when_it_has_done_as_many_jobs_as_it_should(queue: Queue, work: Any) -> None:
    """max_jobs: exactly so many are claimed, the others wait in the queue."""
    for n in range(10):
        queue.enqueue(JOBS + "double", n)
    work(burst=False, max_jobs=7)
    assert (len(queue), queue.finished_job_registry.count) == (3, 7)


def test_worker_stops_when_it_has_been_idle(queue: Queue, work: Any) -> None:
    """max_idle_time, counted from the last job's end."""
    queue.enqueue(JOBS + "double", 1)
    began = time.monotonic()
    work(burst=False, max_idle_time=1)
    assert 1 <= time.monotonic() - began < 10
    assert queue.finished_job_registry.count == 1


def test_nothing_is_claimed_when_rq_is_suspended(client: Redis, queue: Queue, start: Start, eventually: Any) -> None:
    """rq suspend, rq resume: what runs goes on, nothing begins until the end of it."""
    start()
    suspend(client)
    eventually(lambda: [worker.get_state() for worker in Worker.all(connection=client)] == ["suspended"])
    job = queue.enqueue(JOBS + "double", 1)
    assert fetch(job).get_status() == JobStatus.QUEUED
    resume(client)
    eventually(lambda: fetch(job).get_status() == JobStatus.FINISHED)


def test_burst_ends_when_rq_is_suspended(client: Redis, queue: Queue, work: Any) -> None:
    """The jobs stay where they are."""
    suspend(client)
    queue.enqueue(JOBS + "double", 1)
    work()
    assert len(queue) == 1


def test_info_is_true_while_jobs_run(
    client: Redis, queue: Queue, start: Start, redis_url: str, eventually: Any
) -> None:
    """rq info: the worker is busy, started jobs are counted, and idle again when they have ended."""
    for n in range(5):
        queue.enqueue(JOBS + "hang", f"job{n}")
    start()
    eventually(lambda: client.llen("job4:began"))
    info = subprocess.run([str(RQ), "info", "--url", redis_url], capture_output=True, text=True, check=True).stdout
    assert "busy" in info
    assert re.search(r"default .*0, 5 executing", info), info
    assert len(StartedJobRegistry("default", connection=client).get_job_ids()) == 5
    for job_id in StartedJobRegistry("default", connection=client).get_job_ids():
        request_cancel(job_id, client)
    eventually(lambda: [worker.get_state() for worker in Worker.all(connection=client)] == ["idle"])
    (worker,) = Worker.all(connection=client)
    assert worker.get_current_job_id() is None
    assert worker.failed_job_count == 5


def test_scheduled_jobs_run_when_the_worker_schedules(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """--with-scheduler: a retry with an interval comes back."""
    job = queue.enqueue(JOBS + "fail_at_first", "scheduled", retry=Retry(max=1, interval=1))
    process = start(options=("--with-scheduler",))
    eventually(lambda: fetch(job).get_status() == JobStatus.FINISHED, within=30)
    stop(process)  # killed, it would leave RQ's scheduler behind


def test_idle_worker_begins_at_once_when_a_job_comes(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """It does not poll: jobs into any of its queues are begun while the worker rests."""
    low = Queue("low", connection=client, serializer=JSONSerializer)
    start("default", "low")
    for target in (queue, low, queue, low):
        job = target.enqueue(JOBS + "double", 1)
        eventually(lambda job=job: fetch(job).get_status() == JobStatus.FINISHED, within=10)


# ---- stopping


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM, within: float = 20) -> str:
    process.send_signal(number)
    process.wait(within)
    return said(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_jobs_end_when_the_worker_is_told_to_stop(
    client: Redis, queue: Queue, start: Start, eventually: Any, number: int
) -> None:
    """Warm: what is in flight ends, what waits stays queued, status 0, no job left started."""
    running = [queue.enqueue(JOBS + "block", f"b{n}", "go") for n in range(3)]
    process = start(TTA_WORKER_CONCURRENCY="3")
    eventually(lambda: all(client.llen(f"b{n}:began") for n in range(3)))
    waiting = queue.enqueue(JOBS + "double", 1)
    process.send_signal(number)
    client.set("go", 1)
    assert process.wait(20) == 0, said(process)
    assert [value(job) for job in running] == ["done"] * 3
    assert fetch(waiting).get_status() == JobStatus.QUEUED
    assert queue.get_job_ids() == [waiting.id]


def test_jobs_are_put_back_in_front_when_they_do_not_end_in_time(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """After the drain time: cancelled, clean-up run, back in their order, no retry spent, each named in the log."""
    left = [queue.enqueue(JOBS + "hang", f"h{n}", retry=Retry(max=2)) for n in range(4)]
    deaf = queue.enqueue(JOBS + "swallow", "deaf")
    process = start(TTA_WORKER_DRAIN_SECONDS="0.3", TTA_WORKER_CONCURRENCY="5")
    eventually(lambda: all(client.llen(f"h{n}:began") for n in range(4)) and client.llen("deaf:began"))
    behind = queue.enqueue(JOBS + "double", 1)
    log = stop(process)
    assert process.returncode == 0
    assert queue.get_job_ids() == [*(job.id for job in left), deaf.id, behind.id]
    for job in (*left, deaf):
        assert fetch(job).get_status() == JobStatus.QUEUED
        assert job.id in log
    assert [fetch(job).retries_left for job in left] == [2] * 4
    assert all(client.lrange(f"h{n}:ended", 0, -1) == [b"started"] for n in range(4))
    assert queue.started_job_registry.get_job_ids() == []
    assert queue.failed_job_registry.get_job_ids() == []


def test_plain_job_fails_when_the_worker_stops_before_it_ends(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """It cannot be interrupted: its end is failed, at once, and the process does not wait for its thread."""
    job = queue.enqueue(JOBS + "block", "plain", "never")
    process = start(TTA_WORKER_DRAIN_SECONDS="0.3")
    eventually(lambda: client.llen("plain:began"))
    stop(process)
    assert "WorkerStoppedError" in failure(job)
    assert queue.started_job_registry.get_job_ids() == []


def test_second_signal_ends_the_patience(client: Redis, queue: Queue, start: Start, eventually: Any) -> None:
    """Cold: not before a second has passed, as RQ has it; nothing is lost even so."""
    job = queue.enqueue(JOBS + "hang", "cold")
    process = start(TTA_WORKER_DRAIN_SECONDS="3000")
    eventually(lambda: client.llen("cold:began"))
    process.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping" in said(process))
    give_up = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < give_up:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(20) == 0
    assert fetch(job).get_status() == JobStatus.QUEUED
    assert queue.get_job_ids() == [job.id]


def test_worker_stops_when_rq_commands_it(client: Redis, start: Start) -> None:
    """send_shutdown_command, as on RQ's workers."""
    process = start()
    (worker,) = Worker.all(connection=client)
    send_shutdown_command(client, worker.name)
    assert process.wait(20) == 0
    assert Worker.all_keys(connection=client) == []
    assert client.keys("tta_sync:*") == []


def test_worker_hears_commands_as_soon_as_it_is_listed(client: Redis, eventually: Any) -> None:
    """RQ's own subscribes a moment after: a command sent in between is lost."""
    heard = []

    class Watched(AsyncWorker):
        def serialize(self) -> Any:  # asked for what to list
            heard.extend(client.pubsub_numsub(self.pubsub_channel_name))
            return super().serialize()  # type: ignore[no-untyped-call]

    worker = Watched(["default"], connection=client)
    for _ in range(2):  # the second time it subscribes anew
        worker.work(burst=True, logging_level="CRITICAL")
    assert [listeners for _, listeners in heard] == [1, 1]
    eventually(lambda: client.pubsub_channels("rq:pubsub:*") == [])


def test_worker_hears_nothing_when_its_name_is_taken(client: Redis, start: Start, eventually: Any) -> None:
    start(options=("--name", "twin"))
    worker = AsyncWorker(["default"], connection=client, name="twin")
    with pytest.raises(ValueError, match="active worker named 'twin'"):
        worker.work(burst=True, logging_level="CRITICAL")
    eventually(lambda: client.pubsub_numsub("rq:pubsub:twin") == [(b"rq:pubsub:twin", 1)])


# ---- dying


def test_idempotent_jobs_are_begun_again_when_their_worker_is_killed(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """kill -9 with 100 jobs in flight: idempotent ones run again, the others end failed; each once, none is missing."""
    again = [jobs.hang_first.enqueue(f"i{n}") for n in range(50)]
    once = [queue.enqueue(JOBS + "hang", f"o{n}") for n in range(40)]
    retried = [queue.enqueue(JOBS + "hang_once", f"r{n}", retry=Retry(max=1)) for n in range(10)]
    victim = start()
    eventually(lambda: len(client.keys("*:began")) == 100)
    heir = start("elsewhere", "default")
    victim.kill()
    eventually(lambda: queue.finished_job_registry.count == 60 and queue.failed_job_registry.count == 40, within=30)
    assert [value(job) for job in (*again, *retried)] == ["second time"] * 60
    assert all("its worker died" in failure(job) for job in once)
    assert queue.started_job_registry.get_job_ids() == []
    assert [int(client.get(f"i{n}:runs") or 0) for n in range(50)] == [2] * 50
    assert [fetch(job).retries_left for job in retried] == [0] * 10
    assert heir.poll() is None


def test_poison_ends_failed_when_three_workers_have_died_of_it(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """An idempotent job is delivered three times at most; its error says poison."""
    job = jobs.hang_idempotently.enqueue("poison")
    for deaths in range(3):
        process = start()
        eventually(lambda deaths=deaths: client.llen("poison:began") == deaths + 1)
        process.kill()
        process.wait(10)
    start()
    eventually(lambda: fetch(job).get_status() == JobStatus.FAILED)
    assert "poison" in failure(job)
    assert client.llen("poison:began") == 3


def test_cancelled_job_is_not_begun_again_when_its_worker_dies_first(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """Whoever recovers it ends it as stopped: neither its Retry nor its being idempotent brings it back."""
    cancelled = [
        jobs.hang_idempotently.enqueue("c0"),
        queue.enqueue(JOBS + "hang", "c1", retry=Retry(max=3)),
    ]
    victim = start()
    eventually(lambda: all(client.llen(f"c{n}:began") for n in range(2)))
    victim.send_signal(signal.SIGSTOP)  # it cannot hear of it any more
    assert [request_cancel(job.id, client) for job in cancelled] == [Cancel.REQUESTED] * 2
    victim.kill()
    start()
    eventually(lambda: all(fetch(job).get_status() == JobStatus.STOPPED for job in cancelled))
    assert all("JobCancelledError" in failure(job, JobStatus.STOPPED) for job in cancelled)
    assert [client.llen(f"c{n}:began") for n in range(2)] == [1, 1]
    assert client.keys("tta_sync:job:cancel:*") == []


def test_worker_that_was_taken_for_dead_writes_nothing_when_it_comes_back(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """Stopped for longer than its lease: its job is run elsewhere, and its own late end does not count."""
    job = jobs.hang_first.enqueue("zombie")
    zombie = start()
    eventually(lambda: client.llen("zombie:began") == 1)
    zombie.send_signal(signal.SIGSTOP)
    start()
    eventually(lambda: fetch(job).get_status() == JobStatus.FINISHED)
    zombie.send_signal(signal.SIGCONT)
    eventually(lambda: client.llen("zombie:ended") == 1, within=60)  # cancelled: it is somebody else's
    assert value(job) == "second time"
    assert len(fetch(job).results()) == 1
    assert zombie.poll() is None


def test_process_ends_and_its_jobs_are_taken_up_when_the_loop_is_blocked(
    client: Redis, queue: Queue, start: Start, eventually: Any
) -> None:
    """TTA_WORKER_STALL_LIMIT: a coroutine that blocks costs its worker, not the jobs beside it."""
    innocent = jobs.hang_first.enqueue("innocent")
    stalled = start(TTA_WORKER_STALL_LIMIT="2")
    eventually(lambda: client.llen("innocent:began") == 1)
    guilty = queue.enqueue(JOBS + "block_the_loop", "guilty")
    assert stalled.wait(30) == 70
    assert "the loop was blocked" in said(stalled)
    start()
    eventually(lambda: fetch(innocent).get_status() == JobStatus.FINISHED)
    eventually(lambda: fetch(guilty).get_status() == JobStatus.FAILED)
