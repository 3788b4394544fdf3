"""Jobs for the tests of AsyncWorker; imported by real workers too."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import threading
import time
from pathlib import Path
from typing import Any

from marshmallow import Schema, fields
from redis import Redis
from rq import Queue, Retry, get_current_job
from rq.serializers import JSONSerializer
from sqlalchemy.orm import Session
from tenacity import wait_none

from tta_sync import WorkflowContext, caller_step, run_sync, step
from tta_sync.context import current_context
from tta_sync.primitives import RetryPrimitive
from tta_sync.rq import workflow_job
from tta_sync.sqlalchemy import create_engine, session_step, unit_of_work


def redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


# ---- what ends by itself


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return number * 2


def double_plainly(number: int) -> int:
    return number * 2


async def fail(text: str = "no") -> None:
    raise ValueError(text)


async def fail_at_first(key: str) -> str:
    client = redis()
    if client.incr(key) == 1:
        raise ValueError("at first")
    return "later"


async def ask_again(key: str, most: int) -> Any:
    client = redis()
    return Retry(max=most) if client.incr(key) <= 2 else "done"


async def leave() -> None:
    raise SystemExit(3)


async def give_a_set() -> Any:
    return {1, 2}


async def keep_meta(text: str) -> str:
    job = get_current_job()
    assert job is not None
    job.meta["kept"] = text
    job.save_meta()
    return text


def told(job: Any, connection: Redis, *what: Any) -> None:
    connection.rpush(f"told:{job.id}", type(what[0]).__name__ if isinstance(what[0], type) else repr(what[0]))


def told_of_failure(job: Any, connection: Redis, kind: type, *rest: Any) -> None:
    connection.rpush(f"told:{job.id}", kind.__name__)


def told_of_stop(job: Any, connection: Redis) -> None:
    connection.rpush(f"told:{job.id}", "stopped")


def fail_to_be_told(job: Any, connection: Redis, *what: Any) -> None:
    raise RuntimeError("the callback failed")


# ---- what shows where and when it runs


async def meet(name: str, others: int) -> int:
    """Return once *others* jobs are here at the same time, and say how many threads that took."""
    client = redis()
    client.sadd(name, str(id(asyncio.current_task())))
    while client.scard(name) < others:
        await asyncio.sleep(0.05)  # a hundred of them ask
    return threading.get_ident()


async def who_am_i(ms: int) -> list[str]:
    ids = []
    for _ in range(5):
        job = get_current_job()
        assert job is not None
        ids.append(job.id)
        await asyncio.sleep(ms / 5000)
    return ids


def who_am_i_plainly() -> str:
    job = get_current_job()
    assert job is not None
    return str(job.id)


async def log_turn(key: str, ms: int = 0) -> None:
    job = get_current_job()
    assert job is not None
    redis().rpush(key, job.id)
    await asyncio.sleep(ms / 1000)


async def count_together(key: str, ms: int = 50) -> int:
    """Return how many of its kind ran at the same time as it, at most."""
    client = redis()
    most = client.incr(key)
    try:
        await asyncio.sleep(ms / 1000)
        return int(most)
    finally:
        client.decr(key)


# ---- what must be ended by others


async def hang(key: str) -> None:
    """Wait for ever; say that it began, and at its end what its status was."""
    client = redis()
    job = get_current_job()
    assert job is not None
    client.rpush(f"{key}:began", job.id)
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0.01)
        client.rpush(f"{key}:ended", client.hget(job.key, "status") or b"")


async def hang_once(key: str) -> str:
    client = redis()
    if client.incr(f"{key}:runs") == 1:
        await hang(key)
    return "second time"


async def swallow(key: str, seconds: float = 3600) -> str:
    """Wait, whatever anybody says."""
    redis().rpush(f"{key}:began", "1")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            await asyncio.sleep(end - time.monotonic())
        except asyncio.CancelledError:
            pass
    return "at last"


def block(key: str, until: str) -> str:
    """Block its thread until the key *until* exists."""
    client = redis()
    client.rpush(f"{key}:began", "1")
    while not client.exists(until):
        time.sleep(0.01)
    client.rpush(f"{key}:ended", "1")
    return "done"


async def block_the_loop(key: str) -> None:
    redis().rpush(f"{key}:began", "1")
    time.sleep(3600)


# ---- workflow jobs


class Numbers(Schema):
    number = fields.Integer(required=True)


class Doubled(Schema):
    doubled = fields.Integer()


@workflow_job("default", load=Numbers, dump=Doubled, timeout=30)
async def doubled(data: dict[str, int], context: WorkflowContext) -> dict[str, Any]:
    return {"doubled": data["number"] * 2, "secret": "not for Redis", "id": context.correlation_id}


@workflow_job("default")
async def context_seen(data: Any, context: WorkflowContext) -> dict[str, Any]:
    assert context.deadline is not None
    return {"correlation_id": context.correlation_id, "tenant": context.tenant, "left": context.deadline.remaining()}


@workflow_job("default", idempotent=True)
async def hang_idempotently(key: str, context: WorkflowContext) -> None:
    await hang(key)


@workflow_job("default", idempotent=True)
async def hang_first(key: str, context: WorkflowContext) -> str:
    return await hang_once(key)


@workflow_job("default", concurrency=2, concurrency_key=lambda data: data["tenant"])
async def for_tenant(data: dict[str, Any], context: WorkflowContext) -> int:
    return await count_together(f"together:{data['tenant']}", data.get("ms", 50))


@caller_step
def on_caller(data: Any) -> list[Any]:
    return [*data, threading.current_thread().name]


@caller_step
def on_caller_again(data: Any) -> list[Any]:
    return [*data, run_sync(step(lambda x: threading.current_thread().name), 1)]


@workflow_job("default")
async def with_caller_steps(data: Any, context: WorkflowContext) -> Any:
    first = await on_caller.execute([], context)
    both = await asyncio.gather(on_caller.execute([], context), on_caller.execute([], context))
    return {"names": first + both[0] + both[1], "nested": await on_caller_again.execute([], context)}


engines: dict[str, Any] = {}


def session() -> Session:
    url = os.environ["TEST_DATABASE_URL"]
    if url not in engines:
        engines[url] = create_engine(url)
    return Session(engines[url])


@session_step
def insert(db: Session, data: str) -> int:
    from sqlalchemy import text

    db.execute(text("insert into notes (body) values (:body)"), {"body": data})
    return int(db.execute(text("select count(*) from notes")).scalar_one())


@step
async def stumble(data: Any) -> Any:
    raise ValueError("after the insert")


class LazyUnit:
    """A unit of work whose engine is made where the job runs."""

    def run(self, fn: Any, /, *args: Any, **keywords: Any) -> Any:
        from sqlalchemy.orm import sessionmaker

        session().close()
        return unit_of_work(sessionmaker(engines[os.environ["TEST_DATABASE_URL"]])).run(fn, *args, **keywords)


@workflow_job("default", unit_of_work=LazyUnit())
async def insert_note(data: str, context: WorkflowContext) -> int:
    return await insert.execute(data, context)


insert_and_stumble = workflow_job("default", unit_of_work=LazyUnit())(insert >> stumble)


@workflow_job("default", unit_of_work=LazyUnit())
async def insert_and_hang(data: str, context: WorkflowContext) -> None:
    await insert.execute(data, context)
    await hang(data)


@step(name="flaky")
async def flaky(key: str) -> int:
    tries = int(redis().incr(key))
    if tries < 3:
        raise ConnectionError("not yet")
    return tries


retrying = workflow_job("default")(RetryPrimitive(flaky, max_retries=5, wait=wait_none()))


# ---- what is counted by those who kill, cut and restart


@functools.lru_cache(maxsize=4)
def lasting(url: str) -> Redis:
    """One client per process: a thousand jobs a second are not to open a connection each."""
    return Redis.from_url(url)


def effects() -> Redis:
    """Where jobs leave their traces; not always where their queue is."""
    return lasting(os.environ.get("EFFECTS_URL") or os.environ["REDIS_URL"])


# Of one piece, as a transaction with a unique key is: the process may be killed at any point.
_IF_FIRST = "if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then redis.call('HINCRBY', KEYS[2], ARGV[1], 1) end"


@workflow_job("default", idempotent=True)
async def act_once(data: dict[str, Any], context: WorkflowContext) -> None:
    """A side effect that its key makes happen once, however often the job runs."""
    client = effects()
    client.hincrby("runs", data["key"], 1)
    await asyncio.sleep(data["ms"] / 1000)
    client.eval(_IF_FIRST, 2, "done", "effects", data["key"])


async def act(key: str, ms: int = 0) -> str:
    """A side effect that happens as often as the job runs."""
    effects().hincrby("runs", key, 1)
    await asyncio.sleep(ms / 1000)
    return key


@workflow_job("default")
def time_left(until: str | None) -> float:
    """Return the seconds that the job has left when the key *until* exists."""
    client = effects()
    while until is not None and not client.exists(until):
        time.sleep(0.01)
    context = current_context()
    assert context is not None
    assert context.deadline is not None
    return context.deadline.remaining()


async def nothing(data: Any = None) -> None:
    pass


def nothing_plainly(data: Any = None) -> None:
    pass


@workflow_job("default")
async def measured(data: str, context: WorkflowContext) -> dict[str, int]:
    """Return what the process that runs this holds."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "kilobytes": int(status["VmRSS"].split()[0]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
    }


async def report_progress(key: str) -> str:
    """Report a step whenever it is told to, and a last one at its end."""
    job, context = get_current_job(), current_context()
    assert job is not None
    assert context is not None
    client = effects()
    await context.progress(1, 3, "begun")
    while not client.exists(key):
        await asyncio.sleep(0.01)
    await context.progress(2, 3)
    await context.progress(3, 3, "last")
    return "reported"


def enqueue_next(job: Any, connection: Redis, *what: Any) -> None:
    """A callback that enqueues."""
    Queue("default", connection=connection, serializer=JSONSerializer).enqueue(
        "tests.rq.worker_jobs.double", 21, job_id=f"{job.id}-next"
    )


def hang_in_callback(job: Any, connection: Redis, *what: Any) -> None:
    client = effects()
    client.rpush(f"{job.id}:called", "1")
    while not client.exists(f"{job.id}:go"):
        time.sleep(0.01)


def time_out_in_callback(job: Any, connection: Redis, *what: Any) -> None:
    raise TimeoutError("of something that the callback called")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    reason: str


async def fail_frozen() -> None:
    raise FrozenError("cold")


async def fail_with_meta() -> None:
    """Fail with something in its meta that no serializer can store."""
    job = get_current_job()
    assert job is not None
    job.meta["lock"] = threading.Lock()
    raise ValueError("and its meta cannot be saved")
