"""One step over many items."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.events import Event, MapProgressed
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import step
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.testing import FakeClock


async def work(data: float, context: WorkflowContext) -> float:
    await context.clock.sleep(data)
    if data == 13:
        raise ValueError("unlucky")
    return data * 2


def run(workflow: Any, data: Any, context: WorkflowContext | None = None) -> Any:
    return asyncio.run(workflow.execute(data, context or WorkflowContext(clock=FakeClock())))


def test_results_come_in_the_order_of_the_items() -> None:
    """Whatever finishes first, the list is in the order of the input, from any iterable."""
    assert run(MapPrimitive(work), [3, 1, 2]) == [6, 2, 4]
    assert run(MapPrimitive(step(work)), (number for number in (2, 1))) == [4, 2]
    assert run(MapPrimitive(work), []) == []


def test_items_may_come_from_an_asynchronous_iterable() -> None:
    """An async generator is read to its end, and closed by whoever cancels; what it raises comes out."""
    closed = False

    async def pages(data: int) -> AsyncIterator[int]:
        nonlocal closed
        try:
            for number in range(data):
                await asyncio.sleep(0)
                yield number
            if data == 3:
                raise LookupError("no more pages")
            if data == 4:
                await asyncio.sleep(3600)
        finally:
            closed = True

    flow = step(pages) >> MapPrimitive(work, max_concurrency=2)
    assert run(flow, 2) == [0, 2]
    with pytest.raises(LookupError, match="no more pages"):
        run(flow, 3)
    closed = False

    async def main() -> None:
        task = asyncio.ensure_future(flow.execute(4, WorkflowContext()))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed

    asyncio.run(main())


def test_items_may_come_from_anything_that_can_be_iterated() -> None:
    """A dict gives its keys; an old sequence with ``__getitem__`` alone gives its items."""

    class Old:
        def __getitem__(self, index: int) -> int:
            return [1, 2][index]

    assert run(MapPrimitive(work), {1: "a", 2: "b"}) == [2, 4]
    assert run(MapPrimitive(work), Old()) == [2, 4]


def test_limit_bounds_how_many_items_run_at_once() -> None:
    """Ten at a time by default; a place that gets free is taken at once."""
    context = WorkflowContext(clock=FakeClock())
    run(MapPrimitive(work), [1.0] * 25, context)
    assert context.clock.monotonic() == 3.0
    context = WorkflowContext(clock=FakeClock())
    run(MapPrimitive(work, max_concurrency=2), [3, 1, 1, 1, 3], context)
    assert context.clock.monotonic() == 6.0


def test_thousands_of_items_need_no_thousands_of_tasks() -> None:
    """At no time are there more tasks than places."""
    peak = 0

    async def count(data: int) -> int:
        nonlocal peak
        peak = max(peak, len(asyncio.all_tasks()))
        await asyncio.sleep(0)
        return data

    assert run(MapPrimitive(count, max_concurrency=5), range(5000)) == list(range(5000))
    assert peak <= 7


def test_first_failure_stops_the_map() -> None:
    """Items in flight are cancelled and awaited, those that wait never start, and the item is named."""
    started: list[float] = []

    async def track(data: float, context: WorkflowContext) -> float:
        started.append(data)
        return await work(data, context)

    with pytest.raises(ValueError, match="unlucky") as caught:
        run(MapPrimitive(step(track, name="track"), max_concurrency=2), [50, 13, 1, 1])
    assert caught.value.__notes__ == ["in item 2 of 4: track"]
    assert started == [50, 13]


def test_collected_errors_stand_in_the_place_of_results() -> None:
    """With on_error="collect" every item runs."""
    first, error, last = run(MapPrimitive(work, on_error="collect"), [1, 13, 2])
    assert (first, last) == (2, 4)
    assert isinstance(error, ValueError)


def test_each_item_has_a_context_of_its_own() -> None:
    """What one item writes to the state, another does not read."""

    def write(data: int, context: WorkflowContext) -> dict[str, int]:
        context.state[f"item{data}"] = data
        return context.state.copy()

    context = WorkflowContext(state={"shared": 0})
    assert run(MapPrimitive(write, max_concurrency=1), [1, 2], context) == [
        {"shared": 0, "item1": 1},
        {"shared": 0, "item2": 2},
    ]
    assert context.state == {"shared": 0}


def test_progress_is_told_after_each_item(workflow_events: list[Event]) -> None:
    """One event per item, with what is done, what there is, and what failed."""
    context = WorkflowContext(clock=FakeClock(), correlation_id="id")
    run(MapPrimitive(step(work, name="work"), on_error="collect"), [1, 13, 2], context)
    assert [event for event in workflow_events if isinstance(event, MapProgressed)] == [
        MapProgressed(step="work", correlation_id="id", done=1, total=3, failed=0),
        MapProgressed(step="work", correlation_id="id", done=2, total=3, failed=0),
        MapProgressed(step="work", correlation_id="id", done=3, total=3, failed=1),
    ]


def test_options_and_inputs_are_refused_when_they_make_no_sense() -> None:
    """The message says what may stand there."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        MapPrimitive(work, max_concurrency=0)
    with pytest.raises(ConfigurationError, match="a number of items"):
        MapPrimitive(work, max_concurrency=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match='"raise" or "collect"'):
        MapPrimitive(work, on_error="skip")  # type: ignore[arg-type]
    for single in "text", b"bytes", 5, None, work:
        with pytest.raises(TypeError, match="put it in a list"):
            run(MapPrimitive(work), single)


def test_repr_shows_the_step_and_the_limit() -> None:
    """Readable, with the options that matter."""
    inner = step(work)
    assert MapPrimitive(inner).children() == (inner,)
    assert repr(MapPrimitive(work)) == "Map(work, max_concurrency=10)"
    assert repr(MapPrimitive(work, on_error="collect")) == 'Map(work, max_concurrency=10, on_error="collect")'
