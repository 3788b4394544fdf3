"""The cache in memory: what a hit is, what is shared, what is counted."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive
from tta_sync.primitives.performance import CachePrimitive


class Step(WorkflowPrimitive[Any, Any]):
    """A step that counts its calls, and can be told to wait, to fail, and what to answer."""

    def __init__(self, answer: Any = None) -> None:
        self.calls = 0
        self.answer = answer or (lambda data: {"for": data})
        self.error: BaseException | None = None
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.contexts: list[WorkflowContext] = []
        self.ended: list[str] = []

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        self.calls += 1
        self.contexts.append(context)
        self.started.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        if self.error is not None:
            raise self.error
        return self.answer(data)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call_at(self, when: float, callback: Any, *args: Any) -> Any:
        return asyncio.get_running_loop().call_later(3600, callback, *args)


def at(clock: Clock) -> WorkflowContext:
    return WorkflowContext(clock=clock)


@pytest.fixture
def heard() -> Any:
    """Every event of the test."""
    records: list[Any] = []
    stop = events.bus.subscribe(records.append)
    yield records
    stop()


# ---- both spellings --------------------------------------------------------------------------------------------------


async def _twice(cache: CachePrimitive[Any, Any], data: Any) -> tuple[Any, Any]:
    return await cache.execute(data, WorkflowContext()), await cache.execute(data, WorkflowContext())


def test_second_call_is_answered_from_memory_when_spelt_as_the_seeds_do() -> None:
    """CachePrimitive(primitive=x, ttl=...) runs the step once for equal data."""
    step = Step()
    first, second = asyncio.run(_twice(CachePrimitive(primitive=step, ttl=3600), {"q": 1}))
    assert first == second == {"for": {"q": 1}}
    assert step.calls == 1


def test_key_function_decides_when_spelt_as_tta_dev_does() -> None:
    """CachePrimitive(primitive, cache_key_fn, ttl_seconds=...) keys on what the function returns."""
    step = Step()
    cache = CachePrimitive(step, lambda data, context: data["q"], ttl_seconds=60.0)

    async def main() -> None:
        await cache.execute({"q": "a", "noise": 1}, WorkflowContext())
        await cache.execute({"q": "a", "noise": 2}, WorkflowContext())
        await cache.execute({"q": "b", "noise": 1}, WorkflowContext())

    asyncio.run(main())
    assert step.calls == 2
    assert cache.get_stats() == {"size": 2, "hits": 1, "misses": 2, "expirations": 0, "hit_rate": 33.33}
    assert cache.get_hit_rate() == 33.33


# ---- single-flight ---------------------------------------------------------------------------------------------------


def test_step_runs_once_when_a_hundred_callers_miss_at_once() -> None:
    """All callers of one key share one computation, and each gets a copy of its own."""

    async def main() -> None:
        step = Step()
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [asyncio.ensure_future(cache.execute([1], WorkflowContext())) for _ in range(100)]
        await step.started.wait()
        await asyncio.sleep(0)
        step.gate.set()
        results = await asyncio.gather(*calls)
        assert step.calls == 1
        results[0]["for"].append("spoilt")
        assert results[1:] == [{"for": [1]}] * 99
        assert await cache.execute([1], WorkflowContext()) == {"for": [1]}

    asyncio.run(main())


def test_flight_goes_on_when_its_leader_is_cancelled() -> None:
    """The others get the result of the computation that a cancelled caller began."""

    async def main() -> None:
        step = Step()
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        leader = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        other = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        await step.started.wait()
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        step.gate.set()
        assert await other == {"for": 1}
        assert step.calls == 1

    asyncio.run(main())


def test_flight_is_cancelled_when_its_last_waiter_leaves() -> None:
    """Nobody computes what nobody waits for, and the step's clean-up is over before the cancellation comes out."""

    async def main() -> None:
        step = Step()
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [asyncio.ensure_future(cache.execute(1, WorkflowContext())) for _ in range(3)]
        await step.started.wait()
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        assert step.ended == ["cancelled"]
        step.gate = None
        assert await cache.execute(1, WorkflowContext()) == {"for": 1}

    asyncio.run(main())


def test_each_waiter_gets_its_own_error_when_the_step_fails() -> None:
    """A failure is shared by those who wait: one run, and an exception object each."""

    async def main() -> None:
        step = Step()
        step.gate = asyncio.Event()
        step.error = KeyError("no such thing")
        step.error.add_note("a note")
        cache = CachePrimitive(step, ttl=60)
        calls = [asyncio.ensure_future(cache.execute(1, WorkflowContext())) for _ in range(5)]
        await step.started.wait()
        step.gate.set()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert step.calls == 1
        assert len({id(error) for error in errors}) == 5
        assert all(type(error) is KeyError and error.args == ("no such thing",) for error in errors)
        assert all(error.__notes__ == ["a note"] for error in errors)

    asyncio.run(main())


def test_waiter_leaves_alone_when_its_own_deadline_passes() -> None:
    """A waiter's deadline ends its wait, not the computation that others wait for."""

    async def main() -> None:
        step = Step()
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        hurried = asyncio.ensure_future(cache.execute(1, WorkflowContext(deadline=Deadline.after(0.02))))
        patient = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        with pytest.raises(DeadlineExceededError):
            await hurried
        step.gate.set()
        assert await patient == {"for": 1}
        assert step.calls == 1

    asyncio.run(main())


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_none_is_cached_when_a_step_returns_it() -> None:
    """None is a result like any other."""
    step = Step(lambda data: None)
    assert asyncio.run(_twice(CachePrimitive(step, ttl=60), 1)) == (None, None)
    assert step.calls == 1


def test_result_is_returned_and_not_kept_when_it_cannot_be_copied() -> None:
    """What cannot be copied is computed for each call."""
    step = Step(lambda data: threading.Lock())
    first, second = asyncio.run(_twice(CachePrimitive(step, ttl=60), 1))
    assert first is not second
    assert step.calls == 2


def test_least_recently_used_goes_first_when_max_size_is_reached() -> None:
    """The memory layer never holds more than max_size entries."""
    step = Step()
    cache = CachePrimitive(step, ttl=60, max_size=2)

    async def main() -> None:
        for data in (1, 2, 1, 3, 1, 2):
            await cache.execute(data, WorkflowContext())

    asyncio.run(main())
    assert step.calls == 4  # 2 was the least recently used when 3 came
    assert cache.get_stats()["size"] == 2


def test_oldest_go_first_when_max_bytes_is_reached() -> None:
    """The memory layer never holds more than max_bytes, and nothing that alone is more."""
    step = Step(lambda data: "x" * data)
    cache = CachePrimitive(step, ttl=60, max_bytes=10_000)

    async def main() -> None:
        for data in (4000, 4001, 4002, 20_000):
            await cache.execute(data, WorkflowContext())

    asyncio.run(main())
    assert cache.get_stats()["size"] == 2


def test_result_is_forgotten_when_its_ttl_has_passed() -> None:
    """An entry answers until its time to live ends, and then counts as an expiration."""
    step, clock = Step(), Clock()
    cache = CachePrimitive(step, ttl=10, jitter=0)

    async def main() -> None:
        await cache.execute(1, at(clock))
        clock.now += 9.99
        await cache.execute(1, at(clock))
        assert step.calls == 1
        clock.now += 0.01
        await cache.execute(1, at(clock))
        assert step.calls == 2

    asyncio.run(main())
    assert cache.get_stats() == {"size": 1, "hits": 1, "misses": 2, "expirations": 1, "hit_rate": 33.33}


# ---- peek, state and events ------------------------------------------------------------------------------------------


def test_peek_answers_as_the_long_way_does_when_it_is_a_hit(heard: list[Any]) -> None:
    """A hit by peek gives value, isolation, statistics, state and events as by execute; a miss leaves no trace."""
    step = Step()
    cache = CachePrimitive(step, ttl=60)
    context = WorkflowContext()
    assert cache.peek([1], context) is MISS
    assert (context.state, heard, cache.get_stats()["misses"]) == ({}, [], 0)
    asyncio.run(cache.execute([1], context))
    long_way, short_way = WorkflowContext(correlation_id="x"), WorkflowContext(correlation_id="x")
    heard.clear()
    by_execute = asyncio.run(cache.execute([1], long_way))
    by_peek = cache.peek([1], short_way)
    by_peek["for"].append(2)
    assert by_execute == {"for": [1]} == cache.peek([1], WorkflowContext(correlation_id="x"))
    assert long_way.state == short_way.state == {"cache_hits": 1}
    assert heard == [heard[0]] * 3
    assert isinstance(heard[0], events.CacheHit)
    assert cache.get_stats()["hits"] == 3


def test_context_tells_hits_from_misses_when_a_call_returns() -> None:
    """state["cache_hits"] and state["cache_misses"] say whether this call was answered from the cache."""
    cache = CachePrimitive(Step(), ttl=60)
    first, second = WorkflowContext(), WorkflowContext()
    asyncio.run(cache.execute(1, first))
    asyncio.run(cache.execute(1, second))
    assert first.state == {"cache_misses": 1}
    assert second.state == {"cache_hits": 1}


# ---- invalidation ----------------------------------------------------------------------------------------------------


def test_invalidated_result_is_computed_again_whatever_the_order_of_its_keys() -> None:
    """invalidate(data) finds the entry of equal data."""
    step = Step()
    cache = CachePrimitive(step, ttl=60)

    async def call() -> None:
        await cache.execute({"a": 1, "b": 2}, WorkflowContext())

    asyncio.run(call())
    cache.invalidate({"b": 2, "a": 1})
    asyncio.run(call())
    assert step.calls == 2
    cache.clear_cache()
    asyncio.run(call())
    assert step.calls == 3


def test_unbound_cache_is_refused_when_called() -> None:
    """A cache without a step says how to give it one."""
    with pytest.raises(ConfigurationError, match=r"CachePrimitive\(ttl=60\) >> step"):
        asyncio.run(CachePrimitive(ttl=60).execute(1, WorkflowContext()))
