"""AsyncWorker at odd moments: each fault by itself, in this process, on a real Redis."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis.exceptions
from redis import Redis
from redis.client import Pipeline
from rq import Callback, Queue, Repeat, Retry, Webhook
from rq.group import Group
from rq.job import Dependency, Job, JobStatus
from rq.serializers import DefaultSerializer, JSONSerializer
from rq.worker import Worker

from tests.rq import worker_jobs as jobs
from tta_sync.context import WorkflowContext
from tta_sync.rq import AsyncWorker, WorkflowJob, worker as worker_module
from tta_sync.rq.claims import WORKERS, Answer, Claims, lease_key
from tta_sync.rq.delivery import DRAINED, LOST, TIMED_OUT, Delivery, Runner
from tta_sync.rq.lanes import Lanes
from tta_sync.rq.recovery import Recovery

JOBS = "tests.rq.worker_jobs."
LIFE = "the life of a worker"


@pytest.fixture
def queue(client: Redis) -> Queue:
    return Queue("default", connection=client, serializer=JSONSerializer, job_class=WorkflowJob)


@pytest.fixture
def work(client: Redis, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AsyncWorker]:
    """Run a worker in this process until its queues are empty, and return it."""
    monkeypatch.setenv("TTA_WORKER_RECOVERY_SECONDS", "2")
    monkeypatch.setattr(Recovery, "_redis_was_away", lambda self: False)  # the session's has only just begun, perhaps

    def run(*queues: str, name: str | None = None, **options: Any) -> AsyncWorker:
        worker = AsyncWorker(list(queues or ("default",)), connection=client, name=name)
        worker.work(**{"burst": True, "logging_level": "WARNING", **options})
        return worker

    return run


def claims_of(client: Redis, name: str, *queues: str) -> Claims:
    """What a worker of that name claims with, which lives."""
    client.set(lease_key(name), LIFE)
    client.hset(WORKERS, name, json.dumps(queues or ["default"]))
    return Claims(client, name, f"rq:worker:{name}", LIFE, {})


def claim(claims: Claims, queue: Queue, wanted: int = 100) -> Answer:
    return claims.claim([queue], wanted, in_turn=False)


def die_with_all(client: Redis, queue: Queue, name: str = "dead") -> None:
    """Leave what a worker leaves that has claimed all there is and was never heard of again."""
    assert claim(claims_of(client, name), queue).jobs
    client.delete(lease_key(name))


def fetch(job: Job) -> Job:
    return WorkflowJob.fetch(job.id, connection=job.connection)


def value(job: Job) -> Any:
    job = fetch(job)
    result = job.latest_result()
    assert job.get_status() == JobStatus.FINISHED, (job.get_status(), result and result.exc_string)
    return job.return_value()


def failure(job: Job) -> str:
    job = fetch(job)
    result = job.latest_result()
    assert job.get_status() == JobStatus.FAILED
    assert job.id in job.failed_job_registry.get_job_ids()
    assert result is not None
    assert result.exc_string is not None
    return result.exc_string


# ---- claims


def test_claim_is_refused_when_the_lease_has_run_out(client: Redis, queue: Queue) -> None:
    """Nobody would look after the jobs: they stay in their queue, and the worker is told why."""
    claims = claims_of(client, "late")
    job = queue.enqueue(JOBS + "double", 1)
    client.delete(lease_key("late"))
    assert claim(claims, queue).refused
    client.set(lease_key("late"), "another life of the same name")
    assert claim(claims, queue).refused
    assert queue.get_job_ids() == [job.id]
    client.set(lease_key("late"), LIFE)
    assert [one.job_id for one in claim(claims, queue).jobs] == [job.id]


def test_claim_brings_the_same_jobs_when_its_answer_was_lost(client: Redis, queue: Queue) -> None:
    """Repeated, it brings what it has brought; but not what was taken from the worker meanwhile."""
    enqueued = [queue.enqueue(JOBS + "double", n).id for n in range(6)]
    claims = claims_of(client, "unheard")
    first = claim(claims, queue, 4).jobs
    claims.unanswered = True
    again = claim(claims, queue, 4).jobs
    assert [(one.job_id, one.execution_id) for one in again] == [(one.job_id, one.execution_id) for one in first]
    assert [one.job_id for one in again] == enqueued[:4]
    client.delete(f"rq:execution:{first[1].job_id}:{first[1].execution_id}")
    client.delete(f"rq:job:{first[2].job_id}")
    claims.unanswered = True
    assert [one.job_id for one in claim(claims, queue, 4).jobs] == [enqueued[0], enqueued[3]]
    assert [one.job_id for one in claim(claims, queue, 4).jobs] == enqueued[4:]


@pytest.mark.parametrize("repeated", [True, False])
def test_nothing_is_claimed_when_a_claim_comes_late(client: Redis, queue: Queue, repeated: bool) -> None:
    """What a cut network delivers behind a later claim, or behind its own repetition, takes no job into nowhere."""
    claims = claims_of(client, "cut")
    late = Claims(client, "cut", "rq:worker:cut", LIFE, {})
    claims._number = late._number = 7
    if repeated:  # the repetition of the eighth found nothing
        claims._number, claims._asked, claims.unanswered = 8, ([queue], 10), True
        assert not claim(claims, queue).jobs
        job = queue.enqueue(JOBS + "double", 1)
    else:
        queue.enqueue(JOBS + "double", 1)
        claims._number = 8
        assert claim(claims, queue).jobs
        job = queue.enqueue(JOBS + "double", 1)
    assert not claim(late, queue).jobs
    assert queue.get_job_ids() == [job.id]


@pytest.mark.parametrize(
    "meta",
    [
        b'{"tta_sync": {"concurrency": ["k", "many"]}}',
        b'{"tta_sync": {"concurrency": [{"a": 1}, 2]}}',
        b'{"tta_sync": {"concurrency": 3}}',
        b'{"tta_sync": ["concurrency"]}',
        b'{"concurrency"',
        b"\xff",
    ],
)
def test_no_job_is_lost_when_anothers_meta_is_odd(client: Redis, queue: Queue, work: Any, meta: bytes) -> None:
    """A script of Redis that fails half-way keeps what it did: ours does not fail."""
    enqueued = [queue.enqueue(JOBS + "double", n) for n in range(3)]
    client.hset(enqueued[1].key, "meta", meta)
    work()
    assert [value(job) for job in (enqueued[0], enqueued[2])] == [0, 4]
    assert fetch(enqueued[1]).get_status() == JobStatus.FINISHED


def test_no_job_is_lost_when_other_keys_are_of_the_wrong_kind(client: Redis, queue: Queue, work: Any) -> None:
    """A string where a job, a queue or a counter should be."""
    client.set("rq:queue:odd", "not a list")
    client.set("tta_sync:running:odd", "not a set")
    good = queue.enqueue(JOBS + "double", 1)
    client.rpush(queue.key, "strange", "not/a name")
    client.set("rq:job:strange", "not a hash")
    held = queue.enqueue(JOBS + "double", 2, meta={"tta_sync": {"concurrency": ["odd", 1]}})
    behind = queue.enqueue(JOBS + "double", 3)
    work("odd", "default")
    assert [value(job) for job in (good, behind)] == [2, 6]
    assert queue.get_job_ids() == [held.id]


def test_no_job_is_lost_when_redis_is_full(own_redis_server: Any) -> None:
    """A claim that cannot be written takes nothing out of its queue; with room again the worker goes on."""
    client = Redis.from_url(own_redis_server.url)
    queue = Queue("default", connection=client, serializer=JSONSerializer)
    enqueued = [queue.enqueue(JOBS + "double", n).id for n in range(5)]
    claims = claims_of(client, "full")
    claim(claims, Queue("empty", connection=client))
    client.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.ResponseError, match="maxmemory"):
        claim(claims, queue)
    assert queue.get_job_ids() == enqueued
    assert queue.started_job_registry.get_job_ids() == []
    client.config_set("maxmemory", 0)
    assert [one.job_id for one in claim(claims, queue).jobs] == enqueued
    client.close()


def test_held_jobs_are_told_from_lost_ones_and_no_ghost_is_made(client: Redis, queue: Queue) -> None:
    """A sign of life is written where there is life: not to a job that was deleted, nor to one that was recovered."""
    enqueued = [queue.enqueue(JOBS + "double", n) for n in range(3)]
    claims = claims_of(client, "holder")
    held = [(one.job_id, one.execution_id, "default", None) for one in claim(claims, queue).jobs]
    client.delete(enqueued[1].key, f"rq:execution:{held[2][0]}:{held[2][1]}")
    client.hset(enqueued[0].key, "last_heartbeat", "long ago")
    assert claims.hold(held) == [True, True, False]
    assert client.hget(enqueued[0].key, "last_heartbeat") != b"long ago"
    assert not client.exists(enqueued[1].key)
    assert not client.exists(f"rq:execution:{held[2][0]}:{held[2][1]}")


# ---- recovery


def test_nothing_is_taken_from_a_worker_that_has_come_back(client: Redis, queue: Queue) -> None:
    """Between being found dead and losing its jobs it has renewed its lease: it keeps them."""
    job = queue.enqueue(JOBS + "double", 1)
    die_with_all(client, queue)
    recovery = Recovery(client, "other", "rq:worker:", "b", 1, lambda name: Queue(name, connection=client), print)
    dead = recovery._dead()
    assert [name for name, _ in dead] == ["dead"]
    client.set(lease_key("dead"), LIFE)
    assert recovery._take_up(*dead[0], lease_key("dead")) == 0
    assert fetch(job).get_status() == JobStatus.STARTED
    assert client.hexists(WORKERS, "dead")


def test_nobody_is_taken_for_dead_when_redis_itself_was_away(client: Redis, queue: Queue) -> None:
    """Leases ran out while nobody could renew them: all have the time to do so."""
    queue.enqueue(JOBS + "double", 1)
    die_with_all(client, queue)
    uptime = client.info("server")["uptime_in_seconds"]

    def recover(lease: float) -> int:
        return Recovery(client, "o", "rq:worker:", "b", lease, lambda n: Queue(n, connection=client), print).run()

    assert recover(lease=uptime + 1000) == 0
    assert queue.started_job_registry.count == 1


def test_job_stays_to_be_recovered_when_it_changes_all_the_time(
    client: Redis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead worker is not forgotten before all of its jobs are recovered."""
    job = queue.enqueue(JOBS + "double", 1)
    die_with_all(client, queue)
    recovery = Recovery(client, "other", "rq:worker:", "b", -10, lambda name: Queue(name, connection=client), print)
    transact = recovery._transact

    def disturbed(*args: Any) -> Any:
        client.sadd(job.dependents_key, f"child{time.monotonic_ns()}")
        return transact(*args)

    monkeypatch.setattr(recovery, "_transact", disturbed)
    assert recovery.run() == 0
    assert client.hexists(WORKERS, "dead")
    monkeypatch.setattr(recovery, "_transact", transact)
    assert recovery.run() == 1
    assert not client.hexists(WORKERS, "dead")
    assert fetch(job).get_status() == JobStatus.FAILED


def test_worker_recovers_its_namesakes_jobs_when_it_begins(client: Redis, queue: Queue, work: Any) -> None:
    """A worker with a fixed name was killed: the next one of that name takes its jobs up, alone and at once."""
    job, failed = jobs.act_once.enqueue({"key": "k", "ms": 0}), queue.enqueue(JOBS + "double", 1)
    die_with_all(client, queue, name="fixed")
    client.set(lease_key("fixed"), LIFE)
    with pytest.raises(ValueError, match="active worker"):
        work(name="fixed")
    client.delete(lease_key("fixed"))
    work(name="fixed")
    assert fetch(job).get_status() == JobStatus.FINISHED
    assert "its worker died" in failure(failed)


def test_dead_worker_is_shown_no_more_when_its_jobs_are_recovered(client: Redis, queue: Queue, work: Any) -> None:
    """rq info would list it for seven minutes, and RQ would let none of its name start."""
    dead = AsyncWorker(["default"], connection=client, name="dead")
    dead.register_birth()
    queue.enqueue(JOBS + "double", 1)
    die_with_all(client, queue)
    assert "rq:worker:dead" in Worker.all_keys(connection=client)
    work()
    assert Worker.all_keys(connection=client) == []
    assert not client.exists("rq:worker:dead")
    dead.connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        {"created_at": b"never"},
        {"tta_deliveries": b"many", "meta": b'{"tta_sync": {"idempotent": true}}'},
        {"data": b"\xff"},
        {"retries_left": b"2", "timeout": b"x"},
    ],
)
def test_damaged_job_fails_when_its_worker_died_and_the_others_are_recovered(
    queue: Queue, work: Any, damage: dict[str, Any]
) -> None:
    """It costs no further worker."""
    client = queue.connection
    bad, good = queue.enqueue(JOBS + "double", 1), jobs.act_once.enqueue({"key": "k", "ms": 0})
    client.hset(bad.key, mapping=damage)
    die_with_all(client, queue)
    work()
    assert fetch(good).get_status() == JobStatus.FINISHED
    assert client.hget(bad.key, "status") == b"failed"
    assert bad.id in queue.failed_job_registry.get_job_ids()
    assert queue.started_job_registry.get_job_ids() == []
    assert client.keys("rq:execution:*") == []


def test_pickled_job_is_not_read_when_its_worker_died(client: Redis, work: Any, tmp_path: Path) -> None:
    """Neither its arguments nor its meta are unpickled; with a retry left, what meta holds stays as it is."""

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "boom",)

    pickled = Queue("default", connection=client, serializer=DefaultSerializer)
    job = pickled.enqueue(jobs.double, 1, meta={"bomb": Bomb()}, retry=Retry(max=1))
    before = client.hget(job.key, "meta")
    die_with_all(client, pickled)
    work()
    assert client.hget(job.key, "status") == b"failed"
    assert client.hget(job.key, "meta") == before
    last = WorkflowJob.fetch(job.id, connection=client, serializer=JSONSerializer).latest_result()
    assert "PickleRefusedError" in str(last and last.exc_string)  # in its next run: the retry was not lost
    assert not (tmp_path / "boom").exists()


def test_failure_callback_is_called_when_the_jobs_worker_died(
    client: Redis, queue: Queue, work: Any, eventually: Any
) -> None:
    """As RQ does it for abandoned jobs; a callback that fails is logged and costs nothing."""
    told = queue.enqueue(JOBS + "double", 1, on_failure=Callback(JOBS + "told_of_failure"))
    bad = queue.enqueue(JOBS + "double", 1, on_failure=Callback(JOBS + "fail_to_be_told"))
    die_with_all(client, queue)
    keeps_it_busy = queue.enqueue(JOBS + "act", "k", 300)
    work()
    eventually(lambda: client.lrange(f"told:{told.id}", 0, -1) == [b"AbandonedJobError"])
    assert "its worker died" in failure(bad)
    assert value(keeps_it_busy) == "k"


def test_requeued_poison_has_three_lives_again(client: Redis, queue: Queue, work: Any) -> None:
    """Deliveries are counted anew when somebody has requeued the job by hand."""
    job = jobs.act_once.enqueue({"key": "k", "ms": 0})
    client.hset(job.key, "tta_deliveries", 3)
    die_with_all(client, queue)
    work()
    assert "poison" in failure(job)
    queue.failed_job_registry.requeue(job.id)
    die_with_all(client, queue)
    work()
    assert fetch(job).get_status() == JobStatus.FINISHED


# ---- ends


def test_job_is_not_scheduled_twice_when_its_end_was_not_written(
    client: Redis, queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ schedules a retry outside of the transaction: one that comes to nothing would leave the job to run again."""
    retried = queue.enqueue(JOBS + "fail", retry=Retry(max=1, interval=60))
    repeated = queue.enqueue(JOBS + "double", 1, repeat=Repeat(times=1, interval=60))
    seen: list[int] = []
    execute = Pipeline.execute

    def cut(self: Pipeline, *args: Any, **options: Any) -> Any:
        if any(b"rq:execution" in str(command).encode() for command in self.command_stack) and len(seen) < 4:
            seen.append(client.zcard("rq:scheduled:default"))
            self.connection.disconnect()
            raise redis.exceptions.ConnectionError("cut before it was sent")
        return execute(self, *args, **options)

    monkeypatch.setattr(Pipeline, "execute", cut)
    work()
    assert seen[:2] == [0, 0]
    assert [fetch(job).get_status() for job in (retried, repeated)] == [JobStatus.SCHEDULED] * 2
    assert client.zcard("rq:scheduled:default") == 2


def test_job_fails_and_the_worker_lives_when_the_end_cannot_be_written(queue: Queue, work: Any) -> None:
    """What a job has left in its meta is no JSON, and a retry would save it: that is the job's own failure."""
    bad, good = queue.enqueue(JOBS + "fail_with_meta", retry=Retry(max=2)), queue.enqueue(JOBS + "double", 1)
    worker = work()
    assert "and its meta cannot be saved" in failure(bad)
    assert "Its end could not be written: TypeError" in failure(bad)
    assert value(good) == 2
    assert worker._number == 2


def test_error_is_recorded_when_nothing_can_be_set_on_it(queue: Queue, work: Any) -> None:
    """A frozen dataclass refuses even a traceback."""
    job = queue.enqueue(JOBS + "fail_frozen")
    work()
    assert "FrozenError: cold" in failure(job)
    assert "FrozenInstanceError" not in failure(job)


def test_webhooks_are_sent_when_the_end_is_written(queue: Queue, work: Any) -> None:
    """As RQ's own workers do it: for a failure when no retry is left, for a success, and once."""
    heard: list[tuple[str, Any]] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    hooks = [Webhook(f"{url}/{status}", status, method="POST") for status in ("finished", "failed")]
    try:
        queue.enqueue(JOBS + "double", 1, job_id="good", webhooks=hooks)
        queue.enqueue(JOBS + "fail", job_id="bad", webhooks=hooks, retry=Retry(max=1))
        work()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert sorted((path, body["job_id"], body["status"]) for path, body in heard) == [
        ("/failed", "bad", "failed"),
        ("/finished", "good", "finished"),
    ]
    assert "ValueError" in next(body["exc_info"] for path, body in heard if path == "/failed")


# ---- what jobs do


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of jobs that nobody has imported yet; return its name."""
    import sys

    monkeypatch.syspath_prepend(tmp_path)
    written: list[str] = []

    def write(text: str) -> str:
        name = f"jobs_of_its_own_{tmp_path.name}_{len(written)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_worker_lives_when_a_module_exits_at_import(queue: Queue, work: Any, own_module: Any) -> None:
    """A script without a guard: its SystemExit is the job's."""
    bad = queue.enqueue(own_module("raise SystemExit(4)") + ".job")
    good = queue.enqueue(JOBS + "double", 1)
    work()
    assert "SystemExit: 4" in failure(bad)
    assert value(good) == 2


def test_others_run_on_when_a_module_takes_its_time_at_import(
    client: Redis, queue: Queue, work: Any, own_module: Any
) -> None:
    """Imports happen beside the main thread; the time they take is the job's."""
    waiting = (
        "import time, os, redis\nclient = redis.Redis.from_url(os.environ['REDIS_URL'])\n"
        "while not client.exists('go'):\n    time.sleep(0.01)\n"
        "client.close()\nasync def job():\n    return 'imported'\n"
    )
    late = queue.enqueue(own_module(waiting) + ".job", job_timeout=1)
    slow = queue.enqueue(own_module(waiting) + ".job")
    quick = queue.enqueue(JOBS + "act", "quick")
    opener = threading.Thread(
        target=open_when, args=(client, lambda: fetch(late).is_failed and fetch(quick).is_finished)
    )
    opener.start()
    work()
    opener.join()
    assert "JobTimeoutException" in failure(late)
    assert value(slow) == "imported"


def open_when(client: Redis, condition: Callable[[], bool], within: float = 20) -> None:
    give_up = time.monotonic() + within
    while time.monotonic() < give_up and not condition():
        time.sleep(0.02)
    client.set("go", 1)


def test_waiting_for_a_thread_is_not_the_jobs_time(
    client: Redis, queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain job that waits for its turn longer than its timeout is not late, and has all its time."""
    monkeypatch.setenv("TTA_WORKER_SYNC_THREADS", "1")
    monkeypatch.setenv("TTA_WORKER_SESSION_THREADS", "1")
    first = queue.enqueue(JOBS + "block", "first", "go")
    second = queue.enqueue(JOBS + "double_plainly", 1, job_timeout=1)
    third, fourth = jobs.time_left.enqueue("go"), jobs.time_left.enqueue(None, timeout=1)
    opened = time.monotonic() + 1.5
    opener = threading.Thread(target=open_when, args=(client, lambda: time.monotonic() > opened))
    opener.start()
    work()
    opener.join()
    assert (value(first), value(second)) == ("done", 2)
    assert value(third) < 180
    assert 0.2 < value(fourth) <= 1


def test_callbacks_timeout_error_is_its_own(client: Redis, queue: Queue, work: Any) -> None:
    """It is not taken for the end of the callback's time."""
    job = queue.enqueue(JOBS + "double", 1, on_success=Callback(JOBS + "time_out_in_callback"))
    work()
    assert "TimeoutError: of something that the callback called" in failure(job)
    assert "JobTimeoutException" not in failure(job)


def test_callback_enqueues_when_it_wants_to(client: Redis, queue: Queue, work: Any) -> None:
    """On the connection that it is given, from many jobs at once."""
    parents = [queue.enqueue(JOBS + "double", n, on_success=Callback(JOBS + "enqueue_next")) for n in range(20)]
    work()
    assert [value(WorkflowJob.fetch(f"{job.id}-next", connection=client)) for job in parents] == [42] * 20


# ---- queues and what others do to them


def test_jobs_of_twelve_queues_run_in_order_of_the_queues(client: Redis, work: Any, monkeypatch: Any) -> None:
    """More queues than there are doormen."""
    monkeypatch.setenv("TTA_WORKER_CONCURRENCY", "1")
    names = [f"queue{n}" for n in range(12)]
    for name in reversed(names):
        Queue(name, connection=client, serializer=JSONSerializer).enqueue(JOBS + "log_turn", "turns", job_id=name)
    work(*names)
    assert [turn.decode() for turn in client.lrange("turns", 0, -1)] == names


def test_job_in_any_of_twelve_queues_is_begun_soon_when_the_worker_rests(client: Redis, work: Any) -> None:
    """The queues without a doorman are looked at four times a second."""
    names = [f"queue{n}" for n in range(12)]
    waited: list[float] = []

    def enqueue() -> None:
        for name in (names[0], names[7], names[11], names[11]):
            job = Queue(name, connection=client, serializer=JSONSerializer).enqueue(JOBS + "double", 1)
            began = time.monotonic()
            while not fetch(job).is_finished and time.monotonic() < began + 10:
                time.sleep(0.005)
            waited.append(time.monotonic() - began)

    thread = threading.Thread(target=enqueue)
    thread.start()
    work(*names, burst=False, max_jobs=4)
    thread.join()
    assert max(waited) < 5


def test_deleted_and_cancelled_jobs_trouble_nobody(client: Redis, queue: Queue, work: Any, eventually: Any) -> None:
    """Deleted or cancelled in the queue: never begun. Deleted while it runs: its worker goes on."""
    running = queue.enqueue(JOBS + "block", "running", "go")
    cancelled, deleted = queue.enqueue(JOBS + "act", "cancelled"), queue.enqueue(JOBS + "act", "deleted")
    gone = queue.enqueue(JOBS + "act", "gone")
    cancelled.cancel()
    deleted.delete()
    client.delete(gone.key)  # its id is still in the queue
    good = queue.enqueue(JOBS + "double", 1)

    def delete() -> None:
        eventually(lambda: client.llen("running:began"))
        fetch(running).delete()
        client.set("go", 1)

    thread = threading.Thread(target=delete)
    thread.start()
    work()
    thread.join()
    assert value(good) == 2
    assert client.hgetall("runs") == {}
    assert queue.started_job_registry.get_job_ids() == []
    assert client.keys("rq:execution:*") == []


def test_queue_emptied_while_the_worker_is_at_it_leaves_nothing_behind(client: Redis, queue: Queue, work: Any) -> None:
    """q.empty() at any moment: what was begun ends, the rest is gone."""
    for n in range(300):
        queue.enqueue(JOBS + "act", f"job{n}", 5)
    thread = threading.Thread(target=open_when, args=(client, lambda: client.hlen("runs") > 20))
    thread.start()
    emptier = threading.Thread(target=lambda: (thread.join(), queue.empty()))
    emptier.start()
    work()
    emptier.join()
    begun = client.hlen("runs")
    assert begun >= 20
    assert queue.finished_job_registry.count == begun
    assert len(queue) == 0
    assert queue.started_job_registry.get_job_ids() == []


def test_id_enqueued_twice_runs_as_often_when_both_are_claimed_together(queue: Queue, work: Any) -> None:
    """RQ lets it, and so do we: two runs, two results, nothing left behind."""
    for _ in range(2):
        job = queue.enqueue(JOBS + "act", "twice", 10, job_id="twice")
    work()
    assert value(job) == "twice"
    assert queue.connection.hget("runs", "twice") == b"2"
    assert len(fetch(job).results()) == 2
    assert queue.started_job_registry.get_job_ids() == []
    assert queue.connection.keys("rq:execution:*") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_dependent_is_enqueued_once_when_a_hundred_parents_end_at_once(
    client: Redis, queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """In one batch, and on two workers at the same time; whatever queue each is in."""
    monkeypatch.setenv("TTA_WORKER_RECOVERY_SECONDS", "60")  # else a busy machine has one take the other for dead
    other = Queue("other", connection=client, serializer=JSONSerializer, job_class=WorkflowJob)
    parents = [(queue, other)[n % 2].enqueue(JOBS + "meet", "all", 100) for n in range(100)]
    child = queue.enqueue(JOBS + "act", "child", depends_on=parents)
    later = other.enqueue(JOBS + "act", "later", depends_on=Dependency(jobs=[*parents, child], allow_failure=True))
    if workers == 1:
        work("default", "other")
    else:
        second = AsyncWorker(["other", "default"], connection=client)
        thread = threading.Thread(target=second.work, kwargs={"max_jobs": 50, "logging_level": "WARNING"})
        thread.start()
        work("default", "other", burst=False, max_jobs=50)
        thread.join()
        work("default", "other")
    assert [value(job) for job in (child, later)] == ["child", "later"]
    assert {client.hget("runs", key) for key in ("child", "later")} == {b"1"}


def test_groups_repeats_and_results_without_a_life_are_right_when_concurrent(
    client: Redis, queue: Queue, work: Any
) -> None:
    """Fifty of each at once."""
    group = Group.create(client, "group")
    group.enqueue_many(queue, [Queue.prepare_data(JOBS + "act", args=(f"g{n}", 5)) for n in range(50)])
    for n in range(50):
        queue.enqueue(JOBS + "act", f"r{n}", 5, repeat=Repeat(times=2))
        queue.enqueue(JOBS + "act", f"z{n}", 5, result_ttl=0, job_id=f"z{n}")
    work()
    runs = {key.decode(): int(count) for key, count in client.hgetall("runs").items()}
    assert runs == {
        **{f"g{n}": 1 for n in range(50)},
        **{f"r{n}": 3 for n in range(50)},
        **{f"z{n}": 1 for n in range(50)},
    }
    assert all(job.is_finished for job in Group.fetch("group", client).get_jobs())
    assert client.keys("rq:job:z*") == []
    assert queue.finished_job_registry.count == 100


# ---- the loop's side, by itself


def delivered(queue: Queue, name: str, *args: Any, **options: Any) -> Delivery:
    """A delivery as the main thread makes it."""
    from tta_sync.rq.job import context_of

    job = queue.enqueue(JOBS + name, *args, **options)
    claims = claims_of(queue.connection, f"by hand {job.id}")
    (claimed,) = claim(claims, queue).jobs
    job = WorkflowJob.fetch(claimed.job_id, connection=queue.connection)
    from rq.executions import Execution

    delivery = Delivery(job, Execution(claimed.execution_id, job.id, queue.connection), queue, 1)
    delivery.fn, delivery.context = job.func, context_of(job)
    return delivery


def run_with(use: Callable[[Runner, list[Delivery]], Any], **options: Any) -> list[Delivery]:
    """Run a Runner for *use*, and return what it has reported."""
    reported: list[Delivery] = []

    async def main() -> None:
        settings = {"sync_threads": 2, "session_threads": 2, "grace": 0.2, "exception_handlers": [], **options}
        runner = Runner(reported.append, **settings)
        serving = asyncio.create_task(runner.serve())
        await asyncio.sleep(0)
        runner.renew(time.monotonic() + 60)
        await use(runner, reported)
        runner.close()
        await serving

    asyncio.run(main())
    return reported


async def until(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("why", [DRAINED, TIMED_OUT, LOST])
def test_job_ends_when_it_is_cancelled_before_its_first_step(client: Redis, queue: Queue, why: str) -> None:
    """A task that is cancelled before it has begun never begins, not even to say so."""
    delivery = delivered(queue, "act", "never")

    async def use(runner: Runner, reported: list[Delivery]) -> None:
        runner.launch([delivery])
        runner.cancel(delivery, why)
        await until(lambda: reported)

    assert run_with(use) == [delivery]
    assert isinstance(delivery.error, asyncio.CancelledError)
    assert client.hgetall("runs") == {}


def test_no_job_is_begun_when_the_lease_may_have_run_out(client: Redis, queue: Queue) -> None:
    """A worker that was stopped like a film: what it holds may run elsewhere by now."""
    delivery, lost = delivered(queue, "act", "held"), delivered(queue, "act", "lost")
    plain = delivered(queue, "who_am_i_plainly")

    async def use(runner: Runner, reported: list[Delivery]) -> None:
        runner.renew(time.monotonic() - 1)
        runner.launch([delivery, lost, plain])
        await asyncio.sleep(0.1)
        assert client.hgetall("runs") == {}
        runner.cancel(lost, LOST)
        await until(lambda: reported == [lost])
        runner.renew(time.monotonic() + 60)
        await until(lambda: len(reported) == 3)

    run_with(use)
    assert client.hgetall("runs") == {b"held": b"1"}
    assert plain.result == plain.job.id


def test_result_stands_when_a_worker_that_stops_leaves_the_callback(client: Redis, queue: Queue) -> None:
    """The function has succeeded; its callback takes longer than the worker may."""
    delivery = delivered(queue, "double", 21, on_success=Callback(JOBS + "hang_in_callback"))

    async def use(runner: Runner, reported: list[Delivery]) -> None:
        runner.launch([delivery])
        await until(lambda: client.llen(f"{delivery.job.id}:called"))
        runner.cancel(delivery, TIMED_OUT)  # it has ended already
        runner.drain(delivery, 1)
        await until(lambda: reported)
        client.set(f"{delivery.job.id}:go", 1)

    run_with(use)
    assert (delivery.error, delivery.result) == (None, 42)


def test_plain_job_is_put_back_when_it_waits_for_a_thread_and_fails_when_it_has_one(
    client: Redis, queue: Queue
) -> None:
    """A worker that stops: what has not begun has not failed."""
    begun, waiting = delivered(queue, "block", "begun", "go"), delivered(queue, "block", "waiting", "go")

    async def use(runner: Runner, reported: list[Delivery]) -> None:
        runner.launch([begun, waiting])
        await until(lambda: client.llen("begun:began"))
        for delivery in (begun, waiting):
            runner.drain(delivery, 1)
        await until(lambda: len(reported) == 2)
        client.set("go", 1)

    run_with(use, sync_threads=1)
    assert (begun.why, waiting.why) == (TIMED_OUT, DRAINED)
    assert "did not end within 1 s" in begun.exc_string
    assert client.llen("waiting:began") == 0


def test_lane_is_given_to_who_waits_when_an_abandoned_one_comes_to_rest() -> None:
    """At the bound nobody gets a thread; when one of those given up ends, the next in line does."""

    async def main() -> None:
        lanes = Lanes(2, "test")
        gates = [threading.Event() for _ in range(2)]
        for gate in gates:
            lane = await lanes.take()
            began = threading.Event()
            call = asyncio.create_task(lane.run(lambda gate=gate, began=began: (began.set(), gate.wait())))
            await until(began.is_set)
            call.cancel()
            lanes.give_back(lane)
        assert lanes.exhausted
        waiting = [asyncio.create_task(lanes.take()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        gates[0].set()
        first = await asyncio.wait_for(waiting[0], 10)
        assert not lanes.exhausted
        second = await asyncio.wait_for(waiting[1], 10)
        assert not waiting[2].done()
        lanes.give_back(first)
        assert await asyncio.wait_for(waiting[2], 10) is first
        gates[1].set()
        await until(lambda: lanes.count_abandoned() == 0)
        for lane in (first, second):
            lanes.give_back(lane)
        lanes.close()

    asyncio.run(main())


def test_worker_ends_when_too_many_threads_had_to_be_given_up(
    client: Redis, queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TTA_WORKER_SYNC_THREADS plain jobs that never end: the process is to be replaced; what waits is put back."""
    monkeypatch.setenv("TTA_WORKER_SYNC_THREADS", "1")
    monkeypatch.setenv("TTA_WORKER_DRAIN_SECONDS", "0.2")
    hung = queue.enqueue(JOBS + "block", "hung", "go", job_timeout=1)
    waiting = queue.enqueue(JOBS + "double_plainly", 1)
    with pytest.raises(SystemExit) as raised:
        work(burst=False)
    client.set("go", 1)
    assert raised.value.code == 1
    assert "JobTimeoutException" in failure(hung)
    assert queue.get_job_ids() == [waiting.id]


def test_context_travels_into_jobs_whose_deadline_is_their_senders(client: Redis, work: Any) -> None:
    """A deadline that came with the job is kept where it is sooner than the job's timeout."""
    job = jobs.context_seen.enqueue(None, context=WorkflowContext(), deadline=20)
    work()
    assert value(job)["left"] < 20


def test_unheard_of_claim_is_put_back_when_the_worker_stops(
    client: Redis, queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer was lost, and the worker is told to stop before it could ask again: the jobs are in their queue."""
    enqueued = [queue.enqueue(JOBS + "act", f"k{n}", job_id=f"job{n}").id for n in range(3)]
    original = Claims.claim
    workers: list[AsyncWorker] = []

    def unheard(self: Claims, *args: Any, **options: Any) -> Answer:
        answer = original(self, *args, **options)
        if len(answer.jobs) == 3 and not workers[0]._stop_requested:
            self.unanswered = True
            workers[0]._stop_requested = True
            raise redis.exceptions.ConnectionError("the answer was lost")
        return answer

    class Watched(AsyncWorker):
        def bootstrap(self, *args: Any, **options: Any) -> None:
            workers.append(self)
            super().bootstrap(*args, **options)

    monkeypatch.setattr(Claims, "claim", unheard)
    Watched(["default"], connection=client).work(logging_level="CRITICAL")
    assert queue.get_job_ids() == enqueued
    assert [fetch(job).get_status() for job in queue.jobs] == [JobStatus.QUEUED] * 3
    assert client.hgetall("runs") == {}
    assert client.keys("tta_sync:*") == []
    monkeypatch.undo()


def test_maintenance_that_fails_costs_no_job(
    client: Redis, queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback of somebody else's abandoned job raises inside RQ's own cleaning: it is logged."""

    def fail(self: AsyncWorker) -> None:
        raise ValueError("in a callback")

    monkeypatch.setattr(AsyncWorker, "run_maintenance_tasks", fail)
    job = queue.enqueue(JOBS + "double", 1)
    work()
    assert value(job) == 2


def test_loop_is_not_found_blocked_when_only_the_main_thread_was(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was stopped, or Redis kept it waiting, for longer than the limit: that is no fault of the loop."""
    monkeypatch.setenv("TTA_WORKER_STALL_LIMIT", "5")
    left: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", left.append)
    monkeypatch.setattr(worker_module.logging, "shutdown", lambda: None)
    worker = AsyncWorker(["default"], connection=client)
    worker._recovery = SimpleNamespace(abandon=lambda: None)  # type: ignore[assignment]
    worker._ticks = 1  # asked, and not answered

    def look(seconds: float) -> list[int]:
        worker._looked = time.monotonic() - seconds
        worker._look_after_loop()
        return left

    assert look(1000) == []
    assert look(1.5) == []
    assert look(1.5) == [70]  # it does not answer although it could
    worker.connection.close()


# ---- the rest of what may be a job, an error, or a moment


def test_every_kind_of_function_runs_when_it_is_a_job(queue: Queue, work: Any, own_module: Any) -> None:
    """A partial, an object that is called, a plain function around a coroutine; StopIteration is an error like any."""
    name = own_module(
        "import functools, asyncio\n"
        "async def add(a, b):\n    await asyncio.sleep(0)\n    return a + b\n"
        "def around(a):\n    return add(a, 1)\n"
        "part = functools.partial(add, 10)\n"
        "class Called:\n    async def __call__(self, a):\n        return await add(a, 100)\n"
        "called = Called()\n"
        "nothing = None\n"
        "def stop():\n    raise StopIteration(5)\n"
        "class Broken(Exception):\n"
        "    @property\n    def __suppress_context__(self):\n        raise ValueError('no')\n"
        "async def fail():\n    raise Broken\n"
    )
    good = [queue.enqueue(f"{name}.{function}", 1) for function in ("around", "part", "called")]
    bad = {function: queue.enqueue(f"{name}.{function}") for function in ("nothing", "stop", "fail")}
    work()
    assert [value(job) for job in good] == [2, 11, 101]
    assert "this job has no function" in failure(bad["nothing"])
    assert "StopIteration: 5" in failure(bad["stop"])
    assert "Broken (it cannot be shown" in failure(bad["fail"])


def test_handlers_are_asked_in_turn_when_a_job_fails(client: Redis, queue: Queue, work: Any) -> None:
    """RQ's exception handlers: one that returns False ends the row, one that fails is passed over."""
    told: list[Any] = []

    def last(job: Job, kind: type, error: BaseException, trace: Any) -> bool:
        told.append((job.id, kind, str(error), trace is not None))
        return False

    def never(*args: Any) -> None:
        told.append("never")

    job = queue.enqueue(JOBS + "fail", "why", on_failure=Callback(JOBS + "fail_to_be_told"))
    worker = AsyncWorker(["default"], connection=client, exception_handlers=[last, never])
    worker.work(burst=True, logging_level="CRITICAL")
    assert told == [(job.id, RuntimeError, "the callback failed", True)]

    def broken(*args: Any) -> None:
        raise KeyError("in a handler")

    another = queue.enqueue(JOBS + "fail", "why")
    AsyncWorker(["default"], connection=client, exception_handlers=[broken]).work(burst=True, logging_level="CRITICAL")
    assert "ValueError: why" in failure(another)


def test_callback_is_cut_when_its_time_is_over(client: Redis, queue: Queue, work: Any) -> None:
    """The job fails, as with RQ; the thread is left to itself."""
    job = queue.enqueue(JOBS + "double", 1, on_success=Callback(JOBS + "hang_in_callback", timeout=1))
    work()
    client.set(f"{job.id}:go", 1)
    assert "JobTimeoutException: Task exceeded maximum timeout value (1 seconds)" in failure(job)


def test_stopped_callback_is_called_and_its_error_recorded_when_a_job_is_stopped(client: Redis, queue: Queue) -> None:
    """Instead of the failure callback."""
    from tta_sync.exceptions import JobCancelledError
    from tta_sync.rq.delivery import STOPPED

    told = delivered(queue, "hang", "a", on_stopped=Callback(JOBS + "told_of_stop"))
    bad = delivered(queue, "hang", "b", on_stopped=Callback(JOBS + "fail_to_be_told"))

    async def use(runner: Runner, reported: list[Delivery]) -> None:
        runner.launch([told, bad])
        await until(lambda: client.llen("a:began") and client.llen("b:began"))
        for delivery in (told, bad):
            runner.cancel(delivery, STOPPED, JobCancelledError(delivery.job.id))
            runner.cancel(delivery, TIMED_OUT)  # the first reason stands
        await until(lambda: len(reported) == 2)
        runner.cancel(told, STOPPED)  # it is over

    run_with(use)
    assert client.lrange(f"told:{told.job.id}", 0, -1) == [b"stopped"]
    assert isinstance(told.error, JobCancelledError)
    assert isinstance(bad.error, RuntimeError)
    assert "the callback failed" in bad.exc_string


def test_worker_is_registered_anew_when_redis_has_lost_it(
    client: Redis, queue: Queue, work: Any, eventually: Any
) -> None:
    """Its key, its lease and its entry in RQ's list are gone: it puts them back, and keeps its jobs."""
    job = queue.enqueue(JOBS + "block", "busy", "go")
    seen: list[Any] = []

    def forget() -> None:
        eventually(lambda: client.llen("busy:began"))
        (key,) = Worker.all_keys(connection=client)
        name = key.removeprefix("rq:worker:")
        client.delete(key, lease_key(name), "rq:workers", "rq:workers:default")
        behind = queue.enqueue(JOBS + "double", 4)
        eventually(lambda: Worker.all_keys(connection=client) == [key])
        eventually(lambda: fetch(behind).is_finished)
        seen.extend(worker.get_state() for worker in Worker.all(connection=client))
        client.set("go", 1)

    thread = threading.Thread(target=forget)
    thread.start()
    work()
    thread.join()
    assert value(job) == "done"
    assert seen in (["busy"], ["idle"])


def test_end_is_written_later_when_others_change_the_job_all_the_time(
    queue: Queue, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have their turn between two tries, and the worker lives."""
    from tta_sync.rq.endings import Endings

    job, other = queue.enqueue(JOBS + "double", 1, result_ttl=100), queue.enqueue(JOBS + "double", 2)
    children = [queue.enqueue(JOBS + "double", 3, depends_on=job)]
    transact, disturbances = Endings._transact, iter(range(50))

    def disturbed(self: Endings, delivery: Delivery, pipe: Pipeline) -> None:
        if delivery.job.id == job.id and next(disturbances, None) is not None:
            queue.connection.sadd(job.dependents_key, f"child{time.monotonic_ns()}")
        transact(self, delivery, pipe)

    monkeypatch.setattr(Endings, "_transact", disturbed)
    work()
    assert [value(one) for one in (job, other, *children)] == [2, 4, 6]
    assert len(fetch(job).results()) == 1


def test_deleted_job_stays_deleted_when_it_would_be_put_back(
    client: Redis, queue: Queue, work: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner does not want it any more; a worker that stops does not bring it back."""
    monkeypatch.setenv("TTA_WORKER_DRAIN_SECONDS", "0")
    deleted, kept = queue.enqueue(JOBS + "hang", "deleted"), queue.enqueue(JOBS + "hang", "kept")
    worker = AsyncWorker(["default"], connection=client)

    def stop() -> None:
        eventually(lambda: client.llen("deleted:began") and client.llen("kept:began"))
        client.delete(deleted.key)
        worker.request_stop(None, None)

    thread = threading.Thread(target=stop)
    thread.start()
    worker.work(logging_level="CRITICAL")
    thread.join()
    assert queue.get_job_ids() == [kept.id]
    assert not client.exists(deleted.key)
    assert client.keys("rq:execution:*") == []


def test_odd_commands_are_passed_over_when_they_come(client: Redis) -> None:
    """What is no command, one that is for other kinds of workers, and one for a job that is not here."""
    worker = AsyncWorker(["default"], connection=client)
    for data in (b"no json", b"[]", b'{"command": "kill-horse"}', b'{"command": "stop-job", "job_id": 5}'):
        worker.handle_payload({"data": data})
    assert not worker._stop_now
    worker.handle_payload({"data": b'{"command": "stop-job", "job_id": "elsewhere"}'})
    assert list(worker._stop_now) == ["elsewhere"]
    worker._hear_cancels()
    assert not worker._stop_now
    with pytest.raises(KeyError):
        worker._pubsub_exception_handler(KeyError("a bug"), None, None)
    with pytest.raises(ValueError, match="Dequeue strategy"):
        worker.work(dequeue_strategy="by chance")  # type: ignore[arg-type]
    worker.connection.close()
