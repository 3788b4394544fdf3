"""A hit in memory from synchronous code, through what stands around a cache: the same as the long way, without it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.facade import run_sync
from tta_sync.primitives import (
    MISS,
    CachePrimitive,
    FallbackPrimitive,
    RetryPrimitive,
    SequentialPrimitive,
    TimeoutPrimitive,
)
from tta_sync.testing import FakeClock


async def tail(data: Any) -> Any:
    return data


def never(data: Any) -> Any:
    raise AssertionError("the fallback was asked")


Build = Callable[[Any], tuple[Any, CachePrimitive[Any, Any]]]


def around(wrap: Callable[[Any], Any]) -> Build:
    def build(step: Any) -> tuple[Any, CachePrimitive[Any, Any]]:
        cache: CachePrimitive[Any, Any] = CachePrimitive(step, ttl=60, tags=["t"])
        return wrap(cache), cache

    return build


def heading(build: Callable[[Any, Any], Any]) -> Build:
    def make(step: Any) -> tuple[Any, CachePrimitive[Any, Any]]:
        cache: CachePrimitive[Any, Any] = CachePrimitive(ttl=60, tags=["t"])
        return build(cache, step), cache

    return make


TRANSPARENT: dict[str, Build] = {
    "cache": around(lambda cache: cache),
    "timeout": around(lambda cache: TimeoutPrimitive(cache, 5.0)),
    "retry": around(lambda cache: RetryPrimitive(cache)),
    "fallback": around(lambda cache: FallbackPrimitive(cache, never)),
    "sequence of one": around(lambda cache: SequentialPrimitive([cache])),
    "all of them": around(
        lambda cache: FallbackPrimitive(TimeoutPrimitive(RetryPrimitive(SequentialPrimitive([cache])), 5.0), never)
    ),
    "head of a chain": heading(lambda cache, step: cache >> step >> tail),
    "tail of a chain": heading(lambda cache, step: step >> tail >> cache),
    "head in a timeout": heading(lambda cache, step: TimeoutPrimitive(cache >> step >> tail, 5.0)),
    "memory over memory": heading(lambda cache, step: cache >> step >> CachePrimitive(ttl=600)),
}


@pytest.mark.filterwarnings("ignore:the cache inside a retry")
@pytest.mark.parametrize("name", TRANSPARENT)
def test_hit_is_the_same_as_the_long_way_when_it_is_peeked_at_through_wrappers(
    Step: Any, heard: list[Any], clock: FakeClock, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Value, isolation, state, statistics, order of use and events are those of execute, and no loop is asked."""
    step = Step(lambda data: {"for": data})
    flow, cache = TRANSPARENT[name](step)

    def fresh() -> WorkflowContext:
        return WorkflowContext(clock=clock, correlation_id="x")

    first = fresh()
    assert flow.peek([1], first) is MISS
    assert (first.state, heard, cache.get_stats()["misses"]) == ({}, [], 0)
    assert asyncio.run(flow.execute([1], fresh())) == {"for": [1]}
    assert asyncio.run(flow.execute([1], fresh())) == {"for": [1]}  # a chain is bound by now, whatever it is in

    def watched(call: Callable[[WorkflowContext], Any]) -> tuple[Any, ...]:
        heard.clear()
        before, context = cache.get_stats(), fresh()
        answer = call(context)
        answer["for"].append("spoilt")
        after = cache.get_stats()
        counted = {name: after[name] - before[name] for name in ("size", "hits", "misses", "expirations")}
        return answer, context.state, counted, [dataclasses.asdict(event) for event in heard], context.degraded

    long_way = watched(lambda context: asyncio.run(flow.execute([1], context)))

    async def no_loop(self: Any, data: Any, context: Any) -> Any:
        raise AssertionError("the long way was taken")

    with monkeypatch.context() as patch:
        patch.setattr(CachePrimitive, "_run", no_loop)
        short_way = watched(lambda context: run_sync(flow, [1], context))
        peeked = watched(lambda context: flow.peek([1], context))
    assert long_way == short_way == peeked
    assert long_way[1:3] == ({"cache_hits": 1}, {"size": 0, "hits": 1, "misses": 0, "expirations": 0})
    assert [event["layer"] for event in long_way[3]] == ["memory"]
    assert step.calls == 1

    cache.invalidate(tags=["t"])
    quiet = fresh()
    heard.clear()
    assert flow.peek([1], quiet) is MISS
    assert (quiet.state, heard) == ({}, [])
    assert run_sync(flow, [1], fresh()) == {"for": [1]}


@pytest.mark.filterwarnings("ignore:the cache inside a retry")
@pytest.mark.parametrize(
    "build",
    [
        lambda cache: RetryPrimitive(cache, retry_on_result=lambda result: result is None),
        lambda cache: SequentialPrimitive([cache, tail]),
        lambda cache: SequentialPrimitive([tail, cache]),
    ],
)
def test_loop_is_asked_when_a_wrapper_has_a_say_in_the_result(Step: Any, build: Callable[[Any], Any]) -> None:
    """What judges or goes on with the result is not passed by."""
    flow = build(CachePrimitive(Step(), ttl=60))
    asyncio.run(flow.execute(1, WorkflowContext()))
    context = WorkflowContext()
    assert flow.peek(1, context) is MISS
    assert context.state == {}
    assert run_sync(flow, 1) == {"for": 1}
