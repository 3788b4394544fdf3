"""Steps that tell when they begin and end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.events import Event, StepEnded, StepStarted
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives import HedgePrimitive, MapPrimitive
from tta_sync.primitives.observability import InstrumentedPrimitive, instrumented
from tta_sync.primitives.recovery import RetryPrimitive, TimeoutPrimitive
from tta_sync.primitives.recovery.naming import shared_name
from tta_sync.testing import FakeClock


class Work(InstrumentedPrimitive[Any, Any]):
    async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
        await context.clock.sleep(2)
        if isinstance(data, BaseException):
            raise data
        return context.trace_id, context.span_id, context.parent_span_id


class Seen(InstrumentedPrimitive[Any, Any]):
    traces: ClassVar[list[str | None]] = []

    async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
        self.traces.append(context.trace_id)
        await context.clock.sleep(2)
        return context.trace_id


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


@pytest.mark.parametrize(
    ("workflow", "steps"),
    [
        (lambda: Seen("a") | Seen("b"), 2),
        (lambda: (lambda data: data) >> (Seen("a") | Seen("b") | (Seen("c") >> (Seen("d") | Seen("e")))), 5),
        (lambda: MapPrimitive(Seen("a")), 3),
        (lambda: HedgePrimitive(Seen("a"), delay=1.0, idempotent=True), 2),
    ],
)
def test_branches_of_one_call_share_its_trace(workflow: Any, steps: int) -> None:
    """Whoever asks first: the id is the call's own, and stands on the caller's context afterwards."""
    context = WorkflowContext(clock=FakeClock())
    Seen.traces.clear()
    run(workflow(), ["x", "y", "z"], context)
    assert len(Seen.traces) == steps
    assert context.trace_id is not None
    assert set(Seen.traces) == {context.trace_id}


def test_trace_is_that_of_the_nearest_ancestor_that_has_one() -> None:
    """A context between is told, too; one that has its own keeps it."""
    root = WorkflowContext(clock=FakeClock())
    between = root.create_child_context()
    leaf = between.create_child_context()
    root.trace_id = "a" * 32
    assert run(Seen("a"), "x", leaf) == "a" * 32 == between.trace_id
    other = root.create_child_context()
    other.trace_id = "b" * 32
    assert run(Seen("a"), "x", other.create_child_context()) == "b" * 32
    assert root.trace_id == "a" * 32


def test_threads_that_ask_at_once_share_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of one context that begin on several threads at the same moment."""
    root = WorkflowContext()
    children = [root.create_child_context() for _ in range(4)]
    urandom, never = os.urandom, threading.Event()

    def slow(size: int) -> bytes:  # lets everybody else arrive before it answers
        never.wait(0.2 if size == 16 else 0.0)
        return urandom(size)

    monkeypatch.setattr(os, "urandom", slow)
    with ThreadPoolExecutor(4) as pool:
        traces = set(pool.map(lambda context: run(Seen("a"), "x", context), children))
    assert traces == {root.trace_id}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_has_a_free_lock() -> None:
    """A thread of the parent that is making a trace id at that moment does not hold up the child."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with instrumented._making_trace:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(20)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a child that hangs is killed
            os._exit(0 if instrumented._making_trace.acquire(blocking=False) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        thread.join(20)


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])))
def test_calls_that_overlap_on_one_context_leave_no_span_behind(order: tuple[int, ...]) -> None:
    """In whichever order they end, the caller's own span stands there afterwards, and nothing is kept of theirs."""

    class For(InstrumentedPrimitive[Any, Any]):
        async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
            await context.clock.sleep(data)

    async def main() -> None:
        await asyncio.gather(*(For("for").execute(seconds, context) for seconds in order))

    context = WorkflowContext(clock=FakeClock(), span_id="b" * 16, parent_span_id="c" * 16)
    asyncio.run(main())
    assert (context.span_id, context.parent_span_id) == ("b" * 16, "c" * 16)
    assert not instrumented._running


def test_spans_that_overlap_for_ever_are_not_kept() -> None:
    """Each begins before the one before it ends: those that have ended are let go."""
    context = WorkflowContext(clock=FakeClock())
    before = None
    for _ in range(10):
        span = instrumented._begin(context)
        if before is not None:
            instrumented._end(before, context)
        before = span
    depth = 0
    around: Any = span
    while around is not None:
        depth += 1
        around = around.around
    assert depth <= 3
    instrumented._end(span, context)
    assert (context.span_id, context.parent_span_id) == (None, None)


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


def test_name_is_the_class_when_nobody_has_given_one(workflow_events: list[Event]) -> None:
    """Not the function in which it was written; a name of the class, or of a parent, or an argument comes first."""

    class Inner(InstrumentedPrimitive[Any, Any]):
        async def _execute_impl(self, data: Any, context: WorkflowContext) -> Any:
            return data

    class Lazy(Inner):
        def __init__(self) -> None:
            pass  # without a word to its parent

    class Unnamed(Inner):
        def __init__(self, name: Any = None) -> None:
            self.name = name

    class Named(Inner):
        name = "mine"

    class Heir(Named):
        pass

    steps = [Inner(), Inner(None), Lazy(), Named(), Heir(), Inner("given"), Named("given")]
    names = ["Inner", "Inner", "Lazy", "mine", "mine", "given", "given"]
    assert [step.name for step in steps] == names
    steps.append(Unnamed())
    names.append("Unnamed")
    for step, name in zip(steps, names, strict=True):
        workflow_events.clear()
        context = WorkflowContext(clock=FakeClock())
        run(RetryPrimitive(step) if isinstance(step, Lazy) else step, "x", context)
        assert {event.step for event in workflow_events} == {name}
        assert context.checkpoints[0][0] == f"{name}.start"
        assert repr(step).endswith(name)


def test_class_name_alone_is_no_name_that_processes_share() -> None:
    """A limit or a circuit that all processes know must not be that of another module's class of the same name."""

    class Local(InstrumentedPrimitive[Any, Any]):
        pass

    assert shared_name(Work(), "rate limit") == f"{Work.__module__}.Work"
    assert shared_name(Work("given"), "rate limit") == "given"
    with pytest.raises(ConfigurationError, match="give the rate limit name="):
        shared_name(Local(), "rate limit")


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
