"""A cancellation at every await point of every primitive: it comes out, nothing runs on, and nothing stays taken."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tta_sync.context import WorkflowContext, limit_in_force, time_limit
from tta_sync.primitives import (
    BulkheadPrimitive,
    CachePrimitive,
    ChaosPrimitive,
    CircuitBreakerPrimitive,
    CompensationPrimitive,
    ConditionalPrimitive,
    FallbackPrimitive,
    HedgePrimitive,
    InstrumentedPrimitive,
    MapPrimitive,
    MockPrimitive,
    ParallelPrimitive,
    RateLimitPrimitive,
    RetryPrimitive,
    RouterPrimitive,
    SagaPrimitive,
    SequentialPrimitive,
    StreamingPrimitive,
    SwitchPrimitive,
    TimeoutPrimitive,
    step,
)
from tta_sync.primitives.core.composition import inside
from tta_sync.testing import FakeClock


class Work:
    """A step that waits at several points, and cleans up with an await; knows how many calls are inside."""

    def __init__(self) -> None:
        self.inside = 0
        self.fails = 0

    async def __call__(self, data: Any, context: WorkflowContext) -> Any:
        self.inside += 1
        try:
            await asyncio.sleep(0)
            await context.clock.sleep(1.0)
            await asyncio.sleep(0)
            if self.fails:
                self.fails -= 1
                raise OSError("on purpose")
            return data
        finally:
            try:
                await asyncio.sleep(0)
            finally:
                self.inside -= 1


async def condition(data: Any, context: WorkflowContext) -> str:
    await asyncio.sleep(0)
    return "x"


class Stream(StreamingPrimitive[Any, Any]):
    def __init__(self, work: Any) -> None:
        self.work = work

    async def stream(self, data: Any, context: WorkflowContext) -> AsyncIterator[Any]:
        for _ in range(2):
            yield await self.work(data, context)


class Instrumented(InstrumentedPrimitive[Any, Any]):
    def __init__(self, work: Any) -> None:
        self.work = work

    async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
        return await self.work(data, context)


def stack(call: Any) -> Any:
    guarded = CircuitBreakerPrimitive(BulkheadPrimitive(TimeoutPrimitive(call, 5.0), 2, 10), window=20)
    tried = RetryPrimitive(RateLimitPrimitive(guarded, 1.0, 2, mode="wait"), max_retries=2)
    return FallbackPrimitive(CachePrimitive(TimeoutPrimitive(tried, 60.0), ttl=60, namespace="stack"), call)


def failing_first(work: Work) -> Work:
    work.fails = 1
    return work


# Each is built around the same step, and run on an input that is a list, so that a map has something to do.
WORKFLOWS: dict[str, Callable[[Work], Any]] = {
    "Lambda": lambda work: step(work),
    "Sequential": lambda work: SequentialPrimitive([work, work]),
    "Parallel": lambda work: ParallelPrimitive([work, work, work]),
    "Parallel, limited": lambda work: ParallelPrimitive([work, work, work], max_concurrency=2),
    "Parallel, failing": lambda work: ParallelPrimitive([failing_first(work), work], on_error="collect"),
    "Map": lambda work: MapPrimitive(work, max_concurrency=2),
    "Conditional": lambda work: ConditionalPrimitive(condition, work),
    "Switch": lambda work: SwitchPrimitive(condition, {"x": work}),
    "Router": lambda work: RouterPrimitive({"x": work}, condition),
    "Retry": lambda work: RetryPrimitive(failing_first(work), backoff_strategy="constant"),
    "Timeout": lambda work: TimeoutPrimitive(work, 10.0),
    "Timeout that strikes": lambda work: TimeoutPrimitive(work, 0.5, fallback=condition),
    "Fallback": lambda work: FallbackPrimitive(failing_first(work), work),
    "CircuitBreaker": lambda work: CircuitBreakerPrimitive(work),
    "CircuitBreaker, slow": lambda work: CircuitBreakerPrimitive(work, window=10, slow_call_seconds=30.0),
    "Bulkhead": lambda work: BulkheadPrimitive(work, 1, 5),
    "RateLimit": lambda work: RateLimitPrimitive(work, 1.0, mode="wait"),
    "Hedge": lambda work: HedgePrimitive(work, 0.5, idempotent=True),
    "Saga": lambda work: SagaPrimitive([(work, work), (failing_first(work), work)]),
    "Compensation": lambda work: CompensationPrimitive(work, work),
    "Chaos": lambda work: ChaosPrimitive(work, latency=0.5, seed=1),
    "Cache": lambda work: CachePrimitive(work, ttl=60),
    "Streaming": Stream,
    "Instrumented": Instrumented,
    "Mock": lambda work: MockPrimitive(side_effect=work),
    "stack": stack,
}


def taken(flow: Any) -> list[str]:
    """What calls still hold of the primitives in *flow*, where nothing should be held."""
    held = []
    for part in (flow, *(part for part, _ in inside(flow))):
        if isinstance(part, BulkheadPrimitive) and (part.in_use or part.waiting):
            held.append(f"{part!r}: {part.in_use} permits, {part.waiting} places")
        if isinstance(part, CircuitBreakerPrimitive) and part._leases:
            held.append(f"{part!r}: a probe's permit")
        if isinstance(part, RateLimitPrimitive) and part._limit.line:
            held.append(f"{part!r}: a place in line")
        lock = getattr(part, "_lock", None)
        if lock is not None and lock.locked():
            held.append(f"{part!r}: its lock")
    return held


async def cancelled_at(build: Callable[[Work], Any], first: int, second: int) -> bool:
    """Run a workflow twice side by side, cancel one call at a tick or at two; say whether it was over before that."""
    clock = FakeClock(autojump_threshold=None)
    work = Work()
    flow = build(work)
    context = WorkflowContext(clock=clock)
    mine = asyncio.current_task()
    task = asyncio.ensure_future(flow.execute(["x"], context))
    other = asyncio.ensure_future(flow.execute(["y"], WorkflowContext(clock=clock)))
    over = False
    for tick in itertools.count():
        if tick in (first, first + second):
            if tick == first and task.done():
                over = True
            task.cancel()
        if task.done() and other.done():
            break
        await asyncio.sleep(0)
        clock.jump(0.1)
        assert tick < 2000, "a call hangs"
    if task.cancelled():
        assert context.span_id is None
    else:
        assert over or second, task  # a first cancellation may come when the outcome is there already
    for _ in range(50):  # what a detached computation of a cache still needs to end
        if asyncio.all_tasks() == {mine}:
            break
        await asyncio.sleep(0)
        clock.jump(0.1)
    assert asyncio.all_tasks() == {mine}
    assert work.inside == 0
    assert taken(flow) == []
    assert limit_in_force(time_limit.get()) is None
    work.fails = 0
    again = asyncio.ensure_future(flow.execute(["x"], WorkflowContext(clock=clock)))
    for _ in range(1000):
        if again.done():
            break
        await asyncio.sleep(0)
        clock.jump(0.1)
    assert again.done()
    assert again.exception() is None
    return over


@pytest.mark.parametrize("build", WORKFLOWS.values(), ids=WORKFLOWS)
def test_cancel_at_every_await_point_leaves_nothing_behind(
    build: Callable[[Work], Any], run_shuffled: Callable[..., Any]
) -> None:
    """Cancelled once or twice, in whatever moment: both calls end, no permit, place or lock stays taken, and the
    workflow works on."""
    for second in (0, 1, 4):
        for first in itertools.count():
            if run_shuffled(cancelled_at(build, first, second), first):
                break
    gc.collect()
