"""Jobs for the tests of tta_sync.rq; imported by real workers too."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from typing import Any

from marshmallow import Schema, fields, validate
from redis import Redis
from rq import Queue, Retry, get_current_job
from rq.serializers import JSONSerializer

from tta_sync.context import WorkflowContext, current_context
from tta_sync.exceptions import StepTimeoutError
from tta_sync.facade import default_facade
from tta_sync.primitives.core.base import caller_step, step
from tta_sync.rq import WorkflowJob, workflow_job


class Text(Schema):
    text = fields.String(required=True, validate=validate.Length(min=1))


class Length(Schema):
    length = fields.Integer()
    at = fields.DateTime()


def redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


def where() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "thread": threading.get_ident(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "generation": default_facade().stats().generation,
    }


# ---- plain functions, enqueued as RQ does it


async def shout(text: str, mark: str = "!") -> str:
    await asyncio.sleep(0)
    return text.upper() + mark


async def look(_: Any = None) -> dict[str, Any]:
    return where()


async def hang(key: str) -> None:
    """Wait for ever; say when it began and that its clean-up ran, and what the job's status was then."""
    job_id = key
    redis().set(f"{key}:began", 1)
    try:
        await asyncio.Event().wait()
    finally:
        status = redis().hget(f"rq:job:{job_id}", "status")
        await asyncio.sleep(0.05)
        redis().set(f"{key}:cleaned", status or b"?")


async def hang_deaf(key: str) -> None:
    """Swallow every cancellation for a while."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            redis().incr(f"{key}:cancelled")


async def unserialisable(_: Any = None) -> Any:
    return {1, 2, 3}


async def context_now(_: Any = None) -> Any:
    context = current_context()
    return None if context is None else describe(context)


async def fail(_: Any = None) -> None:
    raise StepTimeoutError("fetch", 1.5)


async def ask_for_retry(_: Any = None) -> Any:
    return Retry(max=1)


def around(text: str) -> Any:
    """A plain function around a coroutine."""
    return shout(text)


def plain(text: str) -> str:
    return text * 2


def describe(context: WorkflowContext) -> dict[str, Any]:
    return {
        "correlation_id": context.correlation_id,
        "tenant": context.tenant,
        "trace_id": context.trace_id,
        "baggage": context.baggage,
        "remaining": None if context.deadline is None else context.deadline.remaining(),
    }


# ---- job functions


@workflow_job("default", load=Text, dump=Length, timeout=60)
async def measure(data: dict[str, Any], context: WorkflowContext) -> dict[str, Any]:
    """Measure a text."""
    return {"length": len(data["text"]), "secret": "stays inside"}


@step
async def length_of(data: dict[str, Any]) -> dict[str, Any]:
    return {"length": len(data["text"])}


@caller_step
def on_the_caller(data: dict[str, Any]) -> dict[str, Any]:
    job = get_current_job()
    return {**data, "job": None if job is None else job.id, "main": threading.current_thread().name}


@step
async def on_the_loop(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "loop": threading.current_thread().name}


measure_flow = workflow_job("default", load=Text, dump=Length)(length_of)
places = workflow_job("default")(on_the_caller >> on_the_loop)


@workflow_job("default", timeout=30)
async def its_context(data: Any, context: WorkflowContext) -> dict[str, Any]:
    return describe(context)


@workflow_job("default")
async def its_state(data: Any, context: WorkflowContext) -> Any:
    return context.state


@step
async def state_of(data: Any, context: WorkflowContext) -> Any:
    return context.state


@workflow_job("default")
def enqueues_another(data: Any, context: WorkflowContext) -> Any:
    """Run another job inline, as tests do, and say whose context was whose."""
    queue = Queue("default", connection=redis(), is_async=False, job_class=WorkflowJob, serializer=JSONSerializer)
    inner = queue.enqueue(
        "tests.seams.rq_jobs.its_context", None, meta={"tta_sync": {"context": {"correlation_id": "inner"}}}
    )
    after = current_context()
    return [inner.return_value()["correlation_id"], after.correlation_id if after else None]


@workflow_job("default")
async def with_data_only(data: Any) -> Any:
    return data


@workflow_job("default")
def sync_job(data: Any, context: WorkflowContext) -> dict[str, Any]:
    return {"thread": threading.current_thread().name, "id": context.correlation_id}


@workflow_job("default", unique=True)
async def only_once(data: Any) -> Any:
    return data


@workflow_job("default", timeout=1)
async def too_long(data: str, context: WorkflowContext) -> None:
    await hang(data)


@workflow_job("default")
async def returns_a_set(data: Any) -> Any:
    return {1, 2}


@workflow_job("default", retry=2)
async def third_time(data: str) -> int:
    attempt: int = redis().incr(data)
    if attempt < 3:
        raise ValueError("not yet")
    return attempt


@workflow_job("default", dump=Length)
async def asks_again(data: Any) -> Any:
    return Retry(max=1)


@workflow_job("default", idempotent=True, result_ttl=77, failure_ttl=88, ttl=99)
async def with_settings(data: Any) -> Any:
    return data


@caller_step
def busy(key: str) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.05)


@step
async def catch_all(key: str) -> str:
    try:
        await busy.execute(key, WorkflowContext())
    except Exception:
        redis().set(f"{key}:caught", 1)
    return "swallowed"


busy_caller = workflow_job("default", timeout=1)(catch_all)

seen: list[WorkflowContext | None] = []


def sync_context() -> None:
    seen.append(current_context())


class Evil:
    """Unpickling this leaves a trace."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def evil_payload(path: str) -> bytes:
    return pickle.dumps(("tests.seams.rq_jobs.plain", None, (Evil(path),), {}))
