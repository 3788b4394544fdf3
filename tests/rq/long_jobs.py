"""Jobs that last, for the tests of progress and cancelling; imported by real workers too."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from redis import Redis
from rq import get_current_job

from tta_sync.context import WorkflowContext, current_context
from tta_sync.exceptions import DeadlineExceededError
from tta_sync.facade import run_sync
from tta_sync.primitives.core.base import caller_step, step
from tta_sync.rq import workflow_job


def redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


async def hang(key: str) -> None:
    """Wait for ever; say that it began, and in which state the job was when its clean-up ran."""
    client = redis()
    client.incr(f"{key}:began")
    try:
        await asyncio.Event().wait()
    finally:
        status = client.hget(f"rq:job:{key}", "status")
        await asyncio.sleep(0.05)
        client.set(f"{key}:cleaned", status or b"?")


@workflow_job("default", timeout=60, retry=3)
async def hangs(data: str, context: WorkflowContext) -> None:
    await hang(data)


@workflow_job("default", timeout=60)
async def swallows(data: str, context: WorkflowContext) -> str:
    """Make a result of the cancellation."""
    try:
        await hang(data)
    except asyncio.CancelledError:
        return "too late"
    return "never"


@workflow_job("default", timeout=60)
async def fails_at_its_end(data: str, context: WorkflowContext) -> None:
    try:
        await hang(data)
    finally:
        raise OSError("clean-up failed")


@workflow_job("default", timeout=60)
async def deaf(data: str, context: WorkflowContext) -> None:
    """Swallow every cancellation for a while."""
    redis().incr(f"{data}:began")
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            continue


@step
async def waiting(key: str) -> None:
    await hang(key)


def legacy(key: str) -> str:
    """A plain function that runs workflows, and takes whatever comes out of one for an answer."""
    for _ in range(3):
        try:
            run_sync(waiting, key)
        except DeadlineExceededError:
            continue
    return "went on"


def sleeper(key: str, seconds: float = 30) -> str:
    """Plain code that nothing of ours can interrupt."""
    redis().incr(f"{key}:began")
    time.sleep(seconds)
    return "slept"


@workflow_job("default", timeout=60)
def plain(data: str) -> str:
    return sleeper(data)


@workflow_job("default", timeout=60)
async def quick(data: Any) -> Any:
    return data


def bare(data: Any = None) -> Any:
    return data


# ---- progress


@workflow_job("default", timeout=60)
async def counts(data: dict[str, Any], context: WorkflowContext) -> str:
    """Report every item; wait at the marked ones until somebody says go."""
    client = redis()
    for number in range(data["items"] + 1):
        await context.progress(number, data["items"], f"item {number}")
        if number in data.get("wait_at", ()):
            while not await asyncio.to_thread(client.getdel, f"{data['key']}:go"):
                await asyncio.sleep(0.01)
    return "counted"


async def counts_without_ado(items: int) -> int:
    context = current_context()
    assert context is not None
    for number in range(items + 1):
        await context.progress(number, items)
    return items


@workflow_job("default", timeout=60)
async def saves_meta(data: str, context: WorkflowContext) -> None:
    """Report and save meta of its own, both as fast as they go."""
    job = get_current_job()
    assert job is not None
    for number in range(200):
        await context.progress(number, 200)
        job.meta[f"own-{number % 7}"] = number
        job.save_meta()
        await asyncio.sleep(0.01)


@caller_step
def half(data: Any, context: WorkflowContext) -> Any:
    context.report_progress(1, 2, "half")
    return data


reports_from_a_caller_step = workflow_job("default")(half)


@workflow_job("default", timeout=60)
async def fails_after_a_report(data: str, context: WorkflowContext) -> None:
    await context.progress(7, 9, data)
    raise ValueError(data)
