"""Composites tell when their steps begin and end, where somebody listens."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.events import Event, StepEnded, StepStarted
from tta_sync.primitives.core.base import WorkflowPrimitive, step
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.primitives.core.parallel import ParallelPrimitive
from tta_sync.primitives.core.routing import RouterPrimitive, SwitchPrimitive
from tta_sync.primitives.core.sequential import SequentialPrimitive
from tta_sync.primitives.observability import InstrumentedPrimitive
from tta_sync.testing import FakeClock


async def nap(data: Any, context: WorkflowContext) -> Any:
    await context.clock.sleep(2)
    if isinstance(data, BaseException):
        raise data
    return data


work = step(nap, name="work")
other = step(lambda data: data, name="other")


def told(workflow: Any, seen: list[Event], data: Any = "x") -> list[tuple[str, str, float | None]]:
    context = WorkflowContext(clock=FakeClock(), correlation_id="id")
    asyncio.run(workflow.execute(data, context))
    assert {event.correlation_id for event in seen} == {"id"}
    return [
        (type(event).__name__, event.step, getattr(event, "seconds", None))
        for event in seen
        if isinstance(event, (StepStarted, StepEnded))
    ]


def both(name: str, seconds: float) -> list[tuple[str, str, float | None]]:
    return [("StepStarted", name, None), ("StepEnded", name, seconds)]


@pytest.mark.parametrize(
    ("workflow", "expected"),
    [
        (work >> other, both("work", 2.0) + both("other", 0.0)),
        (SequentialPrimitive([work >> other]), both("work", 2.0) + both("other", 0.0)),
        (ParallelPrimitive([work]), both("work", 2.0)),
        (ConditionalPrimitive(bool, work), both("work", 2.0)),
        (SwitchPrimitive(str, {"x": work}), both("work", 2.0)),
        (RouterPrimitive({"x": work}, str), both("work", 2.0)),
        (step(list, name="other") >> MapPrimitive(work), both("other", 0.0) + both("work", 2.0)),
        (other >> ConditionalPrimitive(bool, work), both("other", 0.0) + both("work", 2.0)),
    ],
)
def test_steps_of_a_composite_are_told(workflow: Any, expected: list[Any], workflow_events: list[Event]) -> None:
    """One event at a step's start, one at its end with the seconds between; composites are not told as steps."""
    assert told(workflow, workflow_events) == expected


def test_instrumented_step_is_told_once(workflow_events: list[Event]) -> None:
    """It tells itself."""

    class Own(InstrumentedPrimitive[Any, Any]):
        async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
            return data

    assert told(Own("own") >> other, workflow_events) == both("own", 0.0) + both("other", 0.0)


def test_chain_with_a_cache_is_told(workflow_events: list[Event]) -> None:
    """The bound cache is one step, and what it runs is told as well."""

    class Cache(WorkflowPrimitive[Any, Any]):
        name = "cache"

        def __init__(self, inner: Any = None) -> None:
            self.inner = inner
            self.unbound = inner is None

        def bind(self, inner: Any) -> Any:
            return Cache(inner)

        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            return await self.inner.execute(data, context)

    names = [name for _, name, _ in told(Cache() >> work >> other, workflow_events)]
    assert names == ["cache", "work", "work", "other", "other", "cache"]


def test_failed_step_is_told_with_its_error(workflow_events: list[Event]) -> None:
    """The error comes through as itself, with the note that names the step."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        told(other >> work, workflow_events, error)
    assert caught.value is error
    assert error.__notes__ == ["in step 2 of 2: work"]
    assert workflow_events[-1] == StepEnded(step="work", correlation_id="id", seconds=2.0, error=error)


def test_hook_may_leave_while_a_step_runs() -> None:
    """The end of a step whose start was told is told to nobody."""
    seen: list[Event] = []
    unsubscribe = events.bus.subscribe(seen.append)
    asyncio.run((other >> (lambda data: unsubscribe())).execute("x", WorkflowContext()))
    assert [type(event).__name__ for event in seen] == ["StepStarted", "StepEnded", "StepStarted"]


def test_hook_may_come_while_a_step_runs(workflow_events: list[Event]) -> None:
    """With hooks coming and going, no step fails."""

    def swap(data: Any) -> Any:
        events.bus.subscribe(lambda event: None)()
        return data

    assert told(step(swap, name="swap") >> other, workflow_events) == both("swap", 0.0) + both("other", 0.0)


def test_failed_step_leaves_nothing_behind_when_its_error_is_dropped() -> None:
    """Telling of an error keeps the call's data no longer than the hook does."""

    class Data:
        pass

    def fail(data: Any) -> None:
        raise ValueError("mine")

    flow = other >> fail

    def attempt() -> weakref.ref[Data]:
        data = Data()
        try:
            flow.execute(data, WorkflowContext()).send(None)
        except ValueError:
            pass
        return weakref.ref(data)

    unsubscribe = events.bus.subscribe(lambda event: None)
    gc.collect()
    gc.disable()
    try:
        assert attempt()() is None
    finally:
        gc.enable()
        unsubscribe()
