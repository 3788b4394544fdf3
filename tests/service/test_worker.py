"""The worker as a process: RQ's own command, real forks, real kills."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from redis import Redis

from blueprints.batches.models import BatchItem
from blueprints.documents.models import Document
from jobs.owner import lives
from tests.conftest import RedisServer
from tests.service.llm_server import LLMServer

ROOT = Path(__file__).parents[2]
MakeClient = Callable[..., FlaskClient]
StartWorker = Callable[..., "subprocess.Popen[bytes]"]

# The same worker, but it sweeps every second; what is tested is that it does, not how long ten seconds are.
SWIFT = "import jobs.worker as w; w.SWEEP_EVERY = 1; from rq.cli import main; main()"


@pytest.fixture
def client(make_client: MakeClient, redis_url: str) -> FlaskClient:
    """A service without a provider."""
    return make_client(REDIS_URL=redis_url)


@pytest.fixture
def start_worker(tmp_path: Path, redis_server: RedisServer) -> Iterator[StartWorker]:
    """``start_worker("--burst", TTA_LLM_BASE_URL=...)``: a worker of the service that ``make_client`` makes."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str, url: str = redis_server.url, **env: str) -> subprocess.Popen[bytes]:
        command = ["worker", "--url", url, "-w", "jobs.worker.RecoveringWorker"]
        command += ["--job-class", "tta_sync.rq.WorkflowJob", "--path", ".", "--quiet", *options, "default"]
        process = subprocess.Popen(
            [sys.executable, "-c", SWIFT, *command],
            cwd=ROOT,
            env={**os.environ, "TTA_DATA_DIR": str(tmp_path), "REDIS_URL": url, **env},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait(20)


def post(client: FlaskClient, *texts: str) -> str:
    response = client.post("/api/batches", json={"documents": [{"text": text} for text in texts]})
    assert response.status_code == 202
    location: str = response.headers["Location"]
    return location


def is_done(client: FlaskClient, url: str) -> Any:
    batch = client.get(url).json
    return batch if batch["status"] == "done" else None


def owner_names(client: FlaskClient) -> list[str]:
    """The processes that run an item now, by name."""
    with client.application.extensions["database"].engine.connect() as connection:
        return [
            str(name) for name in connection.scalars(sa.select(BatchItem.owner).where(BatchItem.state == "running"))
        ]


def owners(client: FlaskClient) -> list[int]:
    """The processes that run an item now, by id."""
    return [int(name.split("/")[1]) for name in owner_names(client)]


def count_documents(client: FlaskClient) -> int:
    with client.application.extensions["database"].engine.connect() as connection:
        found: int = connection.scalar(sa.select(sa.func.count()).select_from(Document))
    return found


def test_worker_processes_a_batch_in_forked_jobs(client: FlaskClient, start_worker: StartWorker) -> None:
    """RQ's command line runs every document of a batch, and RQ knows each job as finished."""
    url = post(client, *(f"Document number {n} is about the number {n}." for n in range(20)))
    worker = start_worker("--burst")
    assert worker.wait(100) == 0
    batch = client.get(url).json
    assert (batch["status"], batch["done"], batch["failed"]) == ("done", 20, 0)
    assert [result["index"] for result in batch["results"]] == list(range(20))
    assert count_documents(client) == 20


def test_worker_begins_no_loop_and_keeps_no_connection_when_it_forks(tmp_path: Path, redis_url: str) -> None:
    """What a forked child would inherit broken is not there in the parent: no loop thread, no database connection."""
    program = """
import threading
from redis import Redis
from jobs.documents import parts
from jobs.worker import RecoveringWorker
import numpy, py3langid.langid, httpx, stopwordsiso

worker = RecoveringWorker(["default"], connection=Redis.from_url("%s"))
worker._warm_up()
worker.sweep_if_due()
assert not [t for t in threading.enumerate() if t is not threading.main_thread()], threading.enumerate()
assert parts.database.engine.pool.checkedin() == parts.database.engine.pool.checkedout() == 0
import os
for fd in os.listdir("/proc/self/fd"):
    if os.path.lexists(f"/proc/self/fd/{fd}"):
        print(os.readlink(f"/proc/self/fd/{fd}"))
"""
    env = {**os.environ, "TTA_DATA_DIR": str(tmp_path), "REDIS_URL": redis_url, "PYTHONPATH": str(ROOT)}
    migrate = subprocess.run([sys.executable, "-m", "migrations"], cwd=ROOT, env=env, timeout=60)
    assert migrate.returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", program % redis_url], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "tta.db" not in done.stdout


def test_batch_is_completed_once_each_when_the_worker_is_killed_with_a_job_in_hand(
    make_client: MakeClient,
    redis_url: str,
    start_worker: StartWorker,
    llm: LLMServer,
    eventually: Callable[..., Any],
) -> None:
    """kill -9 of the worker and of the job it had forked loses nothing: the next worker begins that document again."""
    client = make_client(REDIS_URL=redis_url)
    llm.script = ["good", "held"]
    url = post(client, "one", "two", "three", "four")
    env = {"TTA_LLM_BASE_URL": llm.base_url, "TTA_LLM_TIMEOUT": "60", "TTA_DEADLINE": "90"}
    worker = start_worker(**env)
    assert llm.arrived.acquire(timeout=60)
    assert llm.arrived.acquire(timeout=60)
    (job,) = owners(client)
    worker.kill()
    os.kill(job, signal.SIGKILL)
    worker.wait(20)
    llm.release.set()
    start_worker(**env)
    batch = eventually(lambda: is_done(client, url), within=60, what="the batch")
    assert (batch["done"], batch["failed"]) == (4, 0)
    assert count_documents(client) == 4


def test_job_goes_on_alone_when_only_its_worker_is_killed(
    make_client: MakeClient,
    redis_url: str,
    start_worker: StartWorker,
    llm: LLMServer,
    eventually: Callable[..., Any],
) -> None:
    """A job that outlives its worker ends its document itself; no other begins it meanwhile."""
    client = make_client(REDIS_URL=redis_url)
    llm.script = ["held"]
    url = post(client, "one")
    env = {"TTA_LLM_BASE_URL": llm.base_url, "TTA_LLM_TIMEOUT": "60", "TTA_DEADLINE": "90"}
    worker = start_worker(**env)
    assert llm.arrived.acquire(timeout=60)
    (job,) = owners(client)
    (name,) = owner_names(client)
    worker.kill()
    worker.wait(20)
    second = post(client, "two")
    start_worker(**env)
    eventually(lambda: is_done(client, second), within=60, what="another batch")
    assert owners(client) == [job]
    llm.release.set()
    assert eventually(lambda: is_done(client, url), within=60, what="the batch")["done"] == 1
    assert llm.calls == 2
    eventually(lambda: not lives(name), within=20, what="the job's end")


def test_batch_is_completed_when_redis_lost_its_jobs_under_an_idle_worker(
    client: FlaskClient, redis_server: RedisServer, start_worker: StartWorker, eventually: Callable[..., Any]
) -> None:
    """An idle worker finds recorded documents that Redis does not know, without a restart."""
    first = post(client, "one")
    start_worker()
    eventually(lambda: is_done(client, first), within=60, what="the first batch")
    with Redis.from_url(redis_server.url) as redis:
        workers = redis.keys("rq:worker*")
        second = post(client, "two", "three")
        with redis.pipeline() as pipe:  # all but the worker itself is lost before it gets to a job
            for key in redis.keys("rq:*"):
                if key not in workers:
                    pipe.unlink(key)
            pipe.execute()
    assert eventually(lambda: is_done(client, second), within=60, what="the second batch")["done"] == 2
    assert count_documents(client) == 3


def test_worker_sweeps_while_jobs_keep_coming(
    make_client: MakeClient,
    redis_url: str,
    start_worker: StartWorker,
    llm: LLMServer,
    eventually: Callable[..., Any],
) -> None:
    """A long job, or a queue that is never empty, does not keep lost ones from being enqueued."""
    client = make_client(REDIS_URL=redis_url)
    lost = post(client, "lost")
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
        llm.script = ["held"]
        post(client, "long")
        start_worker(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_TIMEOUT="60", TTA_DEADLINE="90")
        assert llm.arrived.acquire(timeout=60)
        lost_id = _item_of(client, lost)
        eventually(lambda: redis.exists(f"rq:job:{lost_id}"), within=60, what="the lost job's return to the queue")
    assert len(owners(client)) == 1  # the long one is still at it
    llm.release.set()
    eventually(lambda: is_done(client, lost), within=60, what="the lost batch")


def _item_of(client: FlaskClient, url: str) -> str:
    with client.application.extensions["database"].engine.connect() as connection:
        found: str = connection.scalar(sa.select(BatchItem.id).where(BatchItem.batch_id == url.rpartition("/")[2]))
    return found


def test_worker_ends_the_job_in_hand_and_no_other_when_it_is_told_to_stop(
    make_client: MakeClient,
    redis_url: str,
    start_worker: StartWorker,
    llm: LLMServer,
    eventually: Callable[..., Any],
) -> None:
    """SIGTERM in the middle of a batch: the document in hand is done, the others wait for the next worker."""
    client = make_client(REDIS_URL=redis_url)
    llm.script = ["held"]
    url = post(client, "one", "two", "three")
    env = {"TTA_LLM_BASE_URL": llm.base_url, "TTA_LLM_TIMEOUT": "60", "TTA_DEADLINE": "90"}
    worker = start_worker(**env)
    assert llm.arrived.acquire(timeout=60)
    worker.terminate()
    llm.release.set()
    assert worker.wait(60) == 0
    batch = client.get(url).json
    assert (batch["status"], batch["done"]) == ("running", 1)
    assert start_worker("--burst", **env).wait(60) == 0
    assert is_done(client, url)["done"] == 3
    assert llm.calls == 3


def test_failed_document_is_told_when_it_cannot_be_processed(
    client: FlaskClient, start_worker: StartWorker, redis_url: str
) -> None:
    """A document that fails in the worker is counted and its error told; RQ knows the job as failed."""
    url = post(client, "a text that was allowed when it was taken", "ok")
    assert start_worker("--burst", TTA_MAX_TEXT="5").wait(60) == 0
    batch = client.get(url).json
    assert (batch["status"], batch["done"], batch["failed"]) == ("done", 1, 1)
    assert batch["results"][0] == {"index": 0, "document_id": None, "error": "failed with ValidationError"}
    with Redis.from_url(redis_url) as redis:
        assert redis.zcard("rq:failed:default") == 1


def test_job_is_begun_again_and_then_failed_when_it_ends_every_worker(
    client: FlaskClient, start_worker: StartWorker, eventually: Callable[..., Any], llm: LLMServer
) -> None:
    """A document whose job is killed each time is begun four times, then failed."""
    llm.mode = "held"
    url = post(client, "poison")
    start_worker(TTA_LLM_BASE_URL=llm.base_url, TTA_LLM_TIMEOUT="60", TTA_DEADLINE="90")
    for _ in range(4):
        assert llm.arrived.acquire(timeout=60)
        (job,) = eventually(lambda: owners(client), within=20, what="a claim")
        os.kill(job, signal.SIGKILL)
    batch = eventually(lambda: is_done(client, url), within=60, what="the end of it")
    assert batch["failed"] == 1
    assert "begun 4 times" in batch["results"][0]["error"]
    assert count_documents(client) == 0


# ---- the class by itself


@pytest.fixture
def worker(make_client: MakeClient, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker that has not begun to work, over the database and the Redis of a service."""
    from jobs.documents import parts
    from jobs.worker import RecoveringWorker
    from tta_sync.rq import WorkflowJob

    make_client(REDIS_URL=redis_url)
    monkeypatch.setenv("TTA_DATA_DIR", str(tmp_path))
    parts.reset()
    with Redis.from_url(redis_url) as connection:
        yield RecoveringWorker(["default"], connection=connection, job_class=WorkflowJob)
    parts.reset()
    gc.unfreeze()  # what warming up has frozen


def test_worker_waits_in_short_turns_and_sweeps_between_them(
    worker: Any, make_client: MakeClient, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for a job it sweeps at start-up and again when that is due; a job that it finds so, it takes."""
    monkeypatch.setattr("jobs.worker.SWEEP_EVERY", 1)
    worker._warm_up()
    sweeps: list[float] = []
    monkeypatch.setattr(worker._sweep, "run", lambda: sweeps.append(1.0))
    assert worker.dequeue_job_and_maintain_ttl(10, max_idle_time=2) is None
    assert len(sweeps) >= 2
    assert worker.dequeue_timeout == 1

    post(make_client(REDIS_URL=redis_url), "one")
    job, queue = worker.dequeue_job_and_maintain_ttl(10, max_idle_time=20)
    assert (queue.name, job.func_name) == ("default", "jobs.documents.process_document")
    worker._next_sweep = 0.0
    assert worker.dequeue_job_and_maintain_ttl(None) is None
    assert len(sweeps) >= 3


def test_worker_keeps_a_short_watch(worker: Any) -> None:
    """Heartbeats of a long job, and RQ's own maintenance, are not minutes apart, whatever RQ's defaults are."""
    assert worker.job_monitoring_interval <= 10
    assert worker.maintenance_interval <= 60
    assert worker.dequeue_timeout <= 10


def test_worker_tells_who_it_is(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record in Redis names its process, so that a sweep can tell whether it lives."""
    from rq import Worker

    monkeypatch.setattr(Worker, "bootstrap", lambda self: self.register_birth())
    worker.bootstrap()
    (owner,) = worker.connection.hmget(worker.key, "tta_owner")
    assert lives(owner.decode()) is True


def test_worker_sweeps_with_the_heartbeat_of_a_long_job(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each heartbeat of a job at work is an occasion to sweep."""
    from rq import Worker

    sweeps: list[int] = []
    monkeypatch.setattr(Worker, "maintain_heartbeats", lambda self, job: None)
    monkeypatch.setattr(worker, "sweep_if_due", lambda: sweeps.append(1))
    worker.maintain_heartbeats(None)
    assert sweeps == [1]


def test_worker_does_not_start_when_a_setting_is_bad(start_worker: StartWorker) -> None:
    """A bad setting ends the worker at once, with status 2."""
    assert start_worker(TTA_DEADLINE="soon").wait(60) == 2
