"""Steps that tell when they begin and end."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.events import Event, StepEnded, StepStarted
from tta_sync.primitives.observability import InstrumentedPrimitive
from tta_sync.primitives.recovery import TimeoutPrimitive
from tta_sync.testing import FakeClock


class Work(InstrumentedPrimitive[Any, Any]):
    async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
        await context.clock.sleep(2)
        if isinstance(data, BaseException):
            raise data
        return context.trace_id, context.span_id, context.parent_span_id


class Nested(InstrumentedPrimitive[Any, Any]):
    def __init__(self) -> None:
        pass

    async def _execute_impl(self, context: WorkflowContext, data: Any) -> Any:
        return context.span_id, await Work("work").execute(data, context)


def run(workflow: Any, data: Any, context: WorkflowContext) -> Any:
    return asyncio.run(workflow.execute(data, context))


def test_step_has_a_span_of_its_own_while_it_runs() -> None:
    """W3C ids: the call's trace, a span per step, the outer span as its parent; afterwards the context is as before."""
    context = WorkflowContext(clock=FakeClock(), trace_id="a" * 32, span_id="b" * 16)
    outer, (trace, span, parent) = run(Nested(), "x", context)
    assert trace == "a" * 32
    assert parent == outer != span
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in (outer, span))
    assert (context.trace_id, context.span_id, context.parent_span_id) == ("a" * 32, "b" * 16, None)


def test_call_without_a_trace_gets_one() -> None:
    """The first step makes the trace id, the next ones share it; the caller's span stays the parent."""
    context = WorkflowContext(clock=FakeClock(), parent_span_id="c" * 16)
    trace, _, parent = run(Work("work"), "x", context)
    assert re.fullmatch("[0-9a-f]{32}", trace)
    assert parent == "c" * 16
    assert run(Work("work"), "x", context)[0] == trace


def test_step_that_was_left_behind_takes_no_span_from_the_one_that_runs_now() -> None:
    """It ends when the call has long gone on to another step, whose span it is by then."""

    class Stubborn(InstrumentedPrimitive[Any, Any]):
        async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
            while context.clock.monotonic() < 5.0:
                try:
                    await context.clock.sleep(5.0 - context.clock.monotonic())
                except asyncio.CancelledError:
                    pass

    class Long(InstrumentedPrimitive[Any, Any]):
        async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
            before = context.span_id
            await context.clock.sleep(10.0)
            return before, context.span_id

    async def main() -> Any:
        context = WorkflowContext(clock=FakeClock())
        with pytest.raises(TimeoutError):
            await TimeoutPrimitive(Stubborn(), 1.0).execute("x", context)
        return await Long().execute("x", context)

    before, after = asyncio.run(main())
    assert before == after is not None


def test_start_and_end_are_noted_and_told(workflow_events: list[Event]) -> None:
    """Two checkpoints and two events, with the seconds between."""
    context = WorkflowContext(clock=FakeClock(epoch=100.0), correlation_id="id")
    run(Work("work"), "x", context)
    assert context.checkpoints == [("work.start", 100.0), ("work.end", 102.0)]
    assert workflow_events == [
        StepStarted(step="work", correlation_id="id"),
        StepEnded(step="work", correlation_id="id", seconds=2.0),
    ]


def test_failure_is_told_and_comes_through(workflow_events: list[Event]) -> None:
    """The end has the error; the error is the step's own."""
    error = KeyError("mine")
    context = WorkflowContext(clock=FakeClock(), correlation_id="id")
    with pytest.raises(KeyError) as caught:
        run(Work(), error, context)
    assert caught.value is error
    assert workflow_events[1] == StepEnded(step="Work", correlation_id="id", seconds=2.0, error=error)
    assert [name for name, _ in context.checkpoints] == ["Work.start", "Work.end"]


def test_nothing_is_emitted_without_a_hook() -> None:
    """The step works the same where nobody listens."""
    assert run(Work("work"), "x", WorkflowContext(clock=FakeClock()))


def test_class_without_the_method_fails_when_called() -> None:
    """The call says what is missing."""
    with pytest.raises(NotImplementedError, match=r"no _execute_impl\(data, context\)"):
        run(InstrumentedPrimitive("none"), "x", WorkflowContext())


def test_failed_step_leaves_nothing_behind_when_its_error_is_dropped() -> None:
    """No reference cycle keeps the call's data alive."""

    class Data:
        pass

    class Failing(InstrumentedPrimitive[Any, Any]):
        async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
            raise ValueError("mine")

    def attempt() -> weakref.ref[Data]:
        data = Data()
        try:
            Failing("failing").execute(data, WorkflowContext()).send(None)
        except ValueError:
            pass
        return weakref.ref(data)

    gc.collect()
    gc.disable()
    try:
        assert attempt()() is None
    finally:
        gc.enable()
