"""The sweep: what was lost is given back to the queue, once, however many sweep; what lives is left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis
from rq import Queue
from rq.job import JobStatus

import jobs.sweep
from blueprints.batches.models import BatchItem, State
from blueprints.batches.queue import RedisQueue
from blueprints.batches.store import OpenItem, cancel_batch, claim_item, record_batch
from blueprints.db import Database
from blueprints.settings import Settings
from jobs.documents import parts, process_document
from jobs.owner import new_owner
from jobs.sweep import Action, Seen, Sweep, decide
from tests.conftest import RedisServer
from tta_sync.rq import WorkflowJob

LONG_AGO = datetime.now(UTC) - timedelta(hours=1)
NOW = datetime(2026, 5, 5, 12, 0, 0, tzinfo=UTC)
LONGEST = timedelta(seconds=120)


# ---- the decision


def queued(age: float = 60) -> OpenItem:
    return OpenItem("i", State.QUEUED, None, None, NOW - timedelta(seconds=age), 0, False, "c")


def running(age: float = 10) -> OpenItem:
    moment = NOW - timedelta(seconds=age)
    return OpenItem("i", State.RUNNING, "o", moment, moment, 0, False, "c")


@pytest.mark.parametrize(
    ("item", "job", "owner_lives", "action"),
    [
        # waiting
        (queued(age=1), Seen(None), None, Action.LEAVE),
        (queued(), Seen(None), None, Action.ENQUEUE),
        (queued(), Seen("queued"), None, Action.LEAVE),
        (queued(), Seen("queued", listed=False), None, Action.SUSPECT),
        (queued(), Seen("started"), None, Action.LEAVE),
        (queued(), Seen("started", worker_lives=False), None, Action.RECOVER),
        (queued(), Seen("failed"), None, Action.RECOVER),
        (queued(), Seen("finished"), None, Action.RECOVER),
        (queued(), Seen("canceled"), None, Action.RECOVER),
        (queued(), Seen("scheduled"), None, Action.LEAVE),
        (queued(), Seen("deferred"), None, Action.LEAVE),
        # running here, alive
        (running(), Seen("started"), True, Action.LEAVE),
        (running(), Seen(None), True, Action.LEAVE),
        (running(), Seen("failed"), True, Action.LEAVE),
        (running(age=500), Seen("started"), True, Action.LEAVE),
        (running(age=500), Seen("failed"), True, Action.RECOVER),
        (running(age=500), Seen(None), True, Action.RECOVER),
        # running here, dead
        (running(), Seen("started"), False, Action.SUSPECT),
        (running(), Seen("started", worker_lives=False), False, Action.RECOVER),
        (running(), Seen("failed"), False, Action.RECOVER),
        (running(), Seen(None), False, Action.RECOVER),
        # running elsewhere
        (running(), Seen("started"), None, Action.LEAVE),
        (running(), Seen("started", worker_lives=False), None, Action.RECOVER),
        (running(), Seen("failed"), None, Action.RECOVER),
        (running(), Seen("queued"), None, Action.LEAVE),
        (running(), Seen(None), None, Action.LEAVE),
        (running(age=500), Seen(None), None, Action.RECOVER),
        (running(age=500), Seen("started"), None, Action.LEAVE),
    ],
)
def test_decision_takes_up_what_is_lost_and_leaves_what_lives(
    item: OpenItem, job: Seen, owner_lives: bool | None, action: Action
) -> None:
    """The table of what is done about an item, by what SQL, Redis and this machine say of it."""
    assert decide(item, job, owner_lives, NOW, LONGEST) is action


# ---- with a real Redis and real databases


class Service:
    """A database, a Redis, and what sweeps between them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings)
        self.redis = Redis.from_url(settings.require_redis_url())
        self.queue = RedisQueue(settings, process_document, self.redis)

    def sweep(self) -> Sweep:
        return Sweep(self.settings, self.database, self.queue, self.redis)

    def record(self, *texts: str, enqueue: bool = True, at: datetime = LONG_AGO) -> list[str]:
        with self.database.units as unit:
            documents = [{"text": text, "tasks": ["keywords"]} for text in texts]
            _, ids = record_batch(unit.session, documents, "corr", at)
        if enqueue:
            self.queue.enqueue(ids, "corr")
        return ids

    def claim(self, item_id: str, owner: str, at: datetime = LONG_AGO) -> None:
        with self.database.units as unit:
            assert claim_item(unit.session, item_id, owner, at) is not None

    def waiting(self) -> list[str]:
        return [item_id.decode() for item_id in self.redis.lrange("rq:queue:default", 0, -1)]

    def item(self, item_id: str) -> Any:
        with self.database.engine.connect() as connection:
            return connection.execute(sa.select(BatchItem).where(BatchItem.id == item_id)).one()

    def job(self, item_id: str) -> WorkflowJob:
        return WorkflowJob.fetch(item_id, connection=self.redis)

    def begin(self, item_id: str, worker: str, owner: str | None) -> None:
        """Bring a job to where a worker has it: popped, started, the worker's own record beside it."""
        self.redis.lmove("rq:queue:default", "rq:queue:default:intermediate", "LEFT", "RIGHT")
        self.redis.hset(f"rq:job:{item_id}", mapping={"status": "started", "worker_name": worker})
        self.redis.hset(f"rq:worker:{worker}", mapping={"birth": "x", **({"tta_owner": owner} if owner else {})})

    def close(self) -> None:
        self.database.close()
        self.redis.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def service(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    redis_url: str,
    migrated: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Service]:
    env = {"TTA_DATA_DIR": str(tmp_path), "REDIS_URL": redis_url}
    if request.param == "postgresql":
        env["DATABASE_URL"] = request.getfixturevalue("postgres_url")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    parts.reset()
    service = Service(migrated(**env))
    yield service
    service.close()
    parts.reset()


def dead_owner() -> str:
    where, pid, began, token = new_owner().split("/")
    return f"{where}/{pid}/{int(began) + 1}/{token}"


def test_sweep_enqueues_what_redis_does_not_know(service: Service) -> None:
    """Recorded items without a job are enqueued, under their own id and their batch's correlation id."""
    ids = service.record("one", "two", enqueue=False)
    assert service.sweep().run() == 2
    assert sorted(service.waiting()) == sorted(ids)
    assert service.job(ids[0]).meta["tta_sync"]["context"]["correlation_id"] == "corr"
    assert service.job(ids[0]).args == [{"item_id": ids[0]}]
    assert service.item(ids[0]).recoveries == 0
    assert process_document({"item_id": ids[0]}) == {"document_id": ids[0]}


def test_sweep_does_nothing_when_all_is_well(service: Service) -> None:
    """What is queued, and what has ended, is left alone."""
    ids = service.record("one", "two")
    process_document({"item_id": ids[0]})
    service.redis.delete(f"rq:job:{ids[0]}")
    sweep = service.sweep()
    assert [sweep.run() for _ in range(3)] == [0, 0, 0]
    assert service.waiting() == ids


def test_sweep_enqueues_again_when_redis_was_emptied(service: Service, redis_server: RedisServer) -> None:
    """A Redis that lost everything is filled from SQL."""
    ids = service.record(*"abcde")
    redis_server.flush()
    assert service.sweep().run() == 5
    assert sorted(service.waiting()) == sorted(ids)


def test_sweep_leaves_what_is_just_being_enqueued(service: Service) -> None:
    """An item that somebody took on a moment ago is not enqueued a second time."""
    service.record("one", enqueue=False, at=datetime.now(UTC))
    assert service.sweep().run() == 0
    assert service.waiting() == []


def test_item_is_enqueued_once_when_many_sweep_at_once(service: Service) -> None:
    """Sweeps at the same moment enqueue each lost item once between them."""
    ids = service.record(*(str(n) for n in range(40)), enqueue=False)
    barrier = threading.Barrier(4)

    def sweep(_: int) -> int:
        barrier.wait(20)
        return service.sweep().run()

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(sweep, range(4))) == 40
    assert sorted(service.waiting()) == sorted(ids)


def test_sweep_recovers_what_a_killed_worker_had(service: Service) -> None:
    """A running item whose process and worker are dead is queued again at once, without its old job's remains."""
    (item_id,) = service.record("one")
    service.claim(item_id, dead_owner())
    service.begin(item_id, "w", dead_owner())
    assert service.sweep().run() == 1
    assert service.waiting() == [item_id]
    assert service.redis.llen("rq:queue:default:intermediate") == 0
    assert service.job(item_id).get_status() == JobStatus.QUEUED
    assert (service.item(item_id).state, service.item(item_id).recoveries) == ("queued", 1)


def test_sweep_gives_the_worker_time_to_tell_when_only_the_job_is_dead(service: Service) -> None:
    """A forked job that died is first left to its worker; if that says nothing, the next sweep takes it."""
    (item_id,) = service.record("one")
    service.claim(item_id, dead_owner())
    service.begin(item_id, "w", new_owner())
    sweep = service.sweep()
    assert sweep.run() == 0
    assert sweep.run() == 1
    assert service.waiting() == [item_id]


def test_sweep_leaves_what_a_living_process_runs(service: Service) -> None:
    """Neither a started job nor one that Redis forgot is taken from a process that lives."""
    (item_id,) = service.record("one")
    service.claim(item_id, new_owner(), at=datetime.now(UTC))
    service.begin(item_id, "w", new_owner())
    sweep = service.sweep()
    assert [sweep.run(), sweep.run()] == [0, 0]
    service.redis.delete(f"rq:job:{item_id}")
    assert [sweep.run(), sweep.run()] == [0, 0]


def test_sweep_believes_a_worker_elsewhere_until_its_record_is_gone(service: Service) -> None:
    """Of another machine's worker only Redis can tell: it lives until its heartbeat ran out or it said goodbye."""
    first, second = service.record("one", "two")
    for item_id, worker in ((first, "a"), (second, "b")):
        service.claim(item_id, "elsewhere/1/2/3")
        service.begin(item_id, worker, "elsewhere/1/2/3")
    sweep = service.sweep()
    assert [sweep.run(), sweep.run()] == [0, 0]
    service.redis.delete("rq:worker:a")
    assert sweep.run() == 1
    assert service.waiting() == [first]
    service.redis.hset("rq:worker:b", "death", "x")
    assert sweep.run() == 1


def test_sweep_recovers_what_rq_gave_up_on(service: Service) -> None:
    """A job that failed in RQ without SQL knowing of an end is run again, and its failure forgotten."""
    (item_id,) = service.record("one")
    queue = Queue("default", connection=service.redis)
    job = service.job(item_id)
    service.redis.delete("rq:queue:default")
    job.set_status(JobStatus.FAILED)
    queue.failed_job_registry.add(job, ttl=1000)
    assert service.sweep().run() == 1
    assert service.waiting() == [item_id]
    assert queue.failed_job_registry.get_job_ids() == []


def test_sweep_takes_a_job_that_is_in_no_list_at_the_second_look(service: Service) -> None:
    """A job between the list and its worker is left once; one that was lost on that way is enqueued again."""
    (item_id,) = service.record("one")
    service.redis.lmove("rq:queue:default", "rq:queue:default:intermediate", "LEFT", "RIGHT")
    sweep = service.sweep()
    assert sweep.run() == 0
    assert sweep.run() == 1
    assert service.waiting() == [item_id]


def test_sweep_does_not_read_the_queue_when_it_is_very_long(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue too long to read is believed to hold what it should."""
    monkeypatch.setattr(jobs.sweep, "_LONGEST_LOOK", 0)
    service.record("one", "two")
    service.redis.lpop("rq:queue:default")
    sweep = service.sweep()
    assert [sweep.run(), sweep.run()] == [0, 0]


def test_item_is_failed_when_its_workers_keep_dying(service: Service) -> None:
    """An item that ends every worker is begun four times and then failed, with an error that says so."""
    (item_id,) = service.record("one")
    sweep = service.sweep()
    for n in range(jobs.sweep.MAX_RECOVERIES + 1):
        assert service.waiting() == [item_id]
        service.claim(item_id, dead_owner())
        service.begin(item_id, f"w{n}", dead_owner())
        with service.database.engine.begin() as connection:
            connection.execute(sa.update(BatchItem).values(enqueued_at=LONG_AGO + timedelta(seconds=n)))
        assert sweep.run() == 1
    assert service.waiting() == []
    found = service.item(item_id)
    assert (found.state, found.text) == ("failed", None)
    assert "begun 4 times" in found.error


def test_item_of_a_cancelled_batch_is_not_begun_again(service: Service) -> None:
    """What was running when its batch was called off, and lost its worker, ends cancelled."""
    (item_id,) = service.record("one")
    service.claim(item_id, dead_owner())
    service.begin(item_id, "w", dead_owner())
    with service.database.units as unit:
        assert cancel_batch(unit.session, service.item(item_id).batch_id, NOW) == []
    assert service.sweep().run() == 1
    assert service.item(item_id).state == "cancelled"
    assert service.waiting() == []


def test_sweep_looks_at_everything_when_there_are_many_pages(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages are looked at, in one round or, where that would take too long, in the next ones."""
    monkeypatch.setattr(jobs.sweep, "PAGE", 3)
    ids = service.record(*(str(n) for n in range(10)), enqueue=False)
    assert service.sweep().run() == 10
    service.redis.flushall()
    with service.database.engine.begin() as connection:
        connection.execute(sa.update(BatchItem).values(enqueued_at=LONG_AGO))
    monkeypatch.setattr(jobs.sweep, "ROUND", -1.0)
    sweep = service.sweep()
    assert [sweep.run() for _ in range(4)] == [3, 3, 3, 1]
    assert sorted(service.waiting()) == sorted(ids)


def test_sweep_is_tried_again_when_redis_or_the_database_is_down(
    tmp_path: Path,
    own_redis_server: RedisServer,
    migrated: Callable[..., Settings],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither stops a sweep for good: it is logged, and the next one does the work."""
    service = Service(migrated(TTA_DATA_DIR=tmp_path, REDIS_URL=own_redis_server.url))
    try:
        ids = service.record("one", enqueue=False)
        sweep = service.sweep()
        own_redis_server.stop()
        assert sweep.run() == 0
        assert "tried again" in caplog.text
        own_redis_server.start()
        with service.database.engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE batches RENAME TO hidden"))
        caplog.clear()
        assert sweep.run() == 0
        assert "OperationalError" in caplog.text
        with service.database.engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE hidden RENAME TO batches"))
        assert sweep.run() == 1
        assert service.waiting() == ids
    finally:
        service.close()
