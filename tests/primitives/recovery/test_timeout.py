"""The limit of a step: who cuts, when, what comes out, and what becomes of a step that will not stop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import logging
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tta_sync import SyncFacade, events
from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import (
    Deadline,
    TimeLimit,
    WorkflowContext,
    cancel_reason,
    cut_off,
    running_context,
    time_limit,
)
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, StepTimeoutError, copy_error
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive, step, thread_step
from tta_sync.primitives.core.composition import CompositionWarning
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.primitives.core.parallel import ParallelPrimitive
from tta_sync.primitives.performance import CachePrimitive
from tta_sync.primitives.recovery import (
    FallbackPrimitive,
    HedgePrimitive,
    SagaPrimitive,
    TimeoutPrimitive,
    driver,
    hedge as hedge_module,
    orphans as left_behind,
    timeout as module,
)
from tta_sync.testing import FakeClock


def sleeping(seconds: float, result: Any = "done") -> WorkflowPrimitive[Any, Any]:
    async def sleep(data: Any, context: WorkflowContext) -> Any:
        await context.clock.sleep(seconds)
        return result

    return step(sleep, name="sleep")


HANG = sleeping(1e9)


def run(primitive: WorkflowPrimitive[Any, Any], clock: FakeClock | None = None, deadline: float | None = None) -> Any:
    clock = clock or FakeClock()
    context = WorkflowContext(clock=clock)
    if deadline is not None:
        context.deadline = Deadline.after(deadline, clock)
    return asyncio.run(primitive.execute("x", context))


# ---- cutting ----------------------------------------------------------


def test_result_comes_through_when_the_step_is_in_time() -> None:
    """A step that ends before its limit is not disturbed, whether it waits or not."""
    assert run(TimeoutPrimitive(sleeping(0.9), 1.0)) == "done"
    assert run(TimeoutPrimitive(lambda data: data, 1.0)) == "x"


def test_step_is_cut_exactly_at_its_limit() -> None:
    """StepTimeoutError at the limit, naming the step; it is a builtin TimeoutError, and the module's TimeoutError."""
    clock = FakeClock()
    with pytest.raises(StepTimeoutError) as caught:
        run(TimeoutPrimitive(HANG, 2.5), clock)
    assert clock.monotonic() == 2.5
    assert clock._next() is None, "a timer was left armed"
    assert (caught.value.step, caught.value.timeout) == ("sleep", 2.5)
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, module.TimeoutError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    from tta_sync.primitives.recovery import TimeoutError as Exported

    assert Exported is StepTimeoutError


def test_cause_shows_where_the_step_hung() -> None:
    """The traceback of the cause leads to the line that waited."""
    with pytest.raises(StepTimeoutError) as caught:
        run(TimeoutPrimitive(HANG, 1.0))
    frames = []
    tb = caught.value.__cause__.__traceback__ if caught.value.__cause__ else None
    while tb is not None:
        frames.append(tb.tb_frame.f_code.co_name)
        tb = tb.tb_next
    assert "sleep" in frames


def test_step_runs_in_the_callers_own_task() -> None:
    """No task is made for the step: what is keyed by the current task works inside."""
    tasks: list[Any] = []

    async def who(data: Any) -> None:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())

    async def main() -> None:
        tasks.append(asyncio.current_task())
        await TimeoutPrimitive(who, 1.0).execute(1)

    asyncio.run(main())
    assert len(set(map(id, tasks))) == 1


def test_step_can_clean_up_with_awaits_when_it_is_cut() -> None:
    """The cancellation arrives as CancelledError, and awaits in `finally` still work."""
    seen: list[str] = []

    async def careful(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(60)
        finally:
            await context.clock.sleep(0.5)
            seen.append("clean")

    clock = FakeClock()
    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(careful, 1.0), clock)
    assert seen == ["clean"]
    assert clock.monotonic() == 1.5


def test_error_of_the_clean_up_is_the_cause() -> None:
    """A step that fails while it is being cut has timed out all the same."""

    async def clumsy(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(60)
        finally:
            raise ValueError("clumsy")

    with pytest.raises(StepTimeoutError) as caught:
        run(TimeoutPrimitive(clumsy, 1.0))
    assert isinstance(caught.value.__cause__, ValueError)


def test_inner_timeout_error_passes_as_what_it_is() -> None:
    """A TimeoutError that the step raises at 0 ms is not reported as a limit of 30 s."""

    async def impatient(data: Any) -> None:
        raise TimeoutError("socket")

    with pytest.raises(TimeoutError, match="socket") as caught:
        run(TimeoutPrimitive(impatient, 30.0))
    assert not isinstance(caught.value, StepTimeoutError)


def test_inner_limit_passes_through_the_outer_one() -> None:
    """The error names the limit that was hit."""
    with pytest.raises(StepTimeoutError) as caught:
        run(TimeoutPrimitive(TimeoutPrimitive(HANG, 1.0), 2.0))
    assert caught.value.timeout == 1.0


def test_late_result_is_discarded() -> None:
    """A step that catches its cancellation and returns something has timed out all the same."""

    async def stubborn(data: Any, context: WorkflowContext) -> str:
        try:
            await context.clock.sleep(60)
        except asyncio.CancelledError:
            pass
        return "too late"

    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(stubborn, 1.0))


def test_error_of_a_step_in_time_passes_as_itself() -> None:
    """Also after it has waited."""
    error = ValueError("own")

    async def fail(data: Any, context: WorkflowContext) -> None:
        await context.clock.sleep(0.5)
        raise error

    with pytest.raises(ValueError, match="own") as caught:
        run(TimeoutPrimitive(fail, 1.0))
    assert caught.value is error


@pytest.mark.parametrize("bad", [0, -1, None, float("nan"), float("inf"), True, "3"])
def test_limits_that_are_no_seconds_are_refused_at_construction(bad: Any) -> None:
    """timeout_seconds is a positive number."""
    with pytest.raises(ConfigurationError, match="positive number of seconds"):
        TimeoutPrimitive(HANG, bad)


def test_execute_that_returns_any_awaitable_is_driven() -> None:
    """A subclass may return a future instead of being a coroutine function."""

    class Future(WorkflowPrimitive[Any, Any]):
        def execute(self, data: Any, context: WorkflowContext) -> Any:  # type: ignore[override]
            return asyncio.ensure_future(asyncio.sleep(data, "slept"))

    async def main() -> tuple[Any, Any]:
        in_time = await TimeoutPrimitive(Future(), 5.0).execute(0)
        with pytest.raises(StepTimeoutError) as caught:
            await TimeoutPrimitive(Future(), 0.01).execute(3600)
        return in_time, caught.value.timeout

    assert asyncio.run(main()) == ("slept", 0.01)


def test_timeout_without_a_task_is_refused_with_the_remedy() -> None:
    """Only a task can be cancelled."""
    coroutine = TimeoutPrimitive(sleeping(1), 1.0).execute(1, WorkflowContext(clock=FakeClock()))
    loop = asyncio.new_event_loop()
    caught: list[BaseException] = []

    def drive() -> None:
        try:
            coroutine.send(None)
        except RuntimeError as error:
            caught.append(error)
        loop.stop()

    loop.call_soon(drive)
    loop.run_forever()
    loop.close()
    assert "asyncio.run or run_sync" in str(caught[0])


# ---- blocking ---------------------------------------------------------


@pytest.mark.parametrize("waits_first", [False, True])
def test_step_that_blocked_past_its_limit_times_out_when_it_returns(waits_first: bool) -> None:
    """50 ms over a step that blocks for 300 ms do not pass without a word."""
    clock = FakeClock()

    async def block(data: Any, context: WorkflowContext) -> str:
        if waits_first:
            await asyncio.sleep(0)
        clock.jump(0.3)
        return "unnoticed"

    with pytest.raises(StepTimeoutError, match="blocked the loop"):
        run(TimeoutPrimitive(block, 0.05), clock)


def test_error_of_a_step_that_blocked_passes_as_itself() -> None:
    """What went wrong tells more than that it took long."""
    clock = FakeClock()

    async def block(data: Any) -> None:
        clock.jump(0.3)
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        run(TimeoutPrimitive(block, 0.05), clock)


def test_error_says_that_a_thread_cannot_be_interrupted() -> None:
    """Whoever times out over a thread_step is told that the thread runs on."""
    go_on = threading.Event()

    @thread_step
    def wait(data: Any) -> None:
        go_on.wait(30)

    async def main() -> None:
        try:
            await TimeoutPrimitive(wait, 0.02).execute(1)
        finally:
            go_on.set()

    with pytest.raises(StepTimeoutError, match="a thread cannot be interrupted"):
        asyncio.run(main())


# ---- deadline and limits around ---------------------------------------


def test_deadline_error_comes_when_the_deadline_is_the_earlier_one() -> None:
    """StepTimeoutError is the own limit, DeadlineExceededError the inherited one."""
    clock = FakeClock()
    with pytest.raises(DeadlineExceededError) as caught:
        run(TimeoutPrimitive(HANG, 10.0), clock, deadline=2.0)
    assert clock.monotonic() == 2.0
    assert caught.value.deadline == 2.0
    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(HANG, 1.0), FakeClock(), deadline=2.0)


def test_step_is_not_called_when_the_deadline_has_passed() -> None:
    """No time left means no call."""
    called: list[Any] = []
    clock = FakeClock()
    context = WorkflowContext(clock=clock, deadline=Deadline.after(1.0, clock))
    clock.jump(1.0)
    with pytest.raises(DeadlineExceededError):
        asyncio.run(TimeoutPrimitive(called.append, 5.0).execute(1, context))
    assert called == []


def test_step_is_not_called_when_the_limit_around_has_passed() -> None:
    """The loop was blocked past the outer limit, which has not struck yet: the inner step does not begin."""
    called: list[Any] = []
    clock = FakeClock()

    async def block(data: Any, context: WorkflowContext) -> Any:
        await asyncio.sleep(0)
        clock.jump(2.0)
        return await TimeoutPrimitive(called.append, 5.0).execute(1, context)

    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(block, 1.0), clock)
    assert called == []


def test_deadline_is_noticed_when_the_step_blocked_past_it() -> None:
    """A result that comes after the deadline is as good as none."""
    clock = FakeClock()
    with pytest.raises(DeadlineExceededError):
        run(TimeoutPrimitive(lambda data: clock.jump(3.0), 10.0), clock, deadline=2.0)


def test_no_timer_is_set_when_a_limit_around_comes_first() -> None:
    """Under an enforced limit a longer timeout costs a check and nothing else."""

    class Strict(FakeClock):
        def call_at(self, *args: Any) -> Any:
            raise AssertionError("a timer was set")

    clock = Strict()

    async def main() -> Any:
        time_limit.set(clock.monotonic() + 1.0)
        return await TimeoutPrimitive(lambda data: asyncio.sleep(0, data), 5.0).execute(
            "x", WorkflowContext(clock=clock)
        )

    assert asyncio.run(main()) == "x"


def test_limit_is_visible_inside_and_gone_outside() -> None:
    """cut_off tells the earliest moment; each timeout takes its own away again, also after an error."""
    clock = FakeClock()
    seen: list[float | None] = []

    async def look(data: Any, context: WorkflowContext) -> None:
        seen.append(cut_off(context))

    async def main() -> None:
        context = WorkflowContext(clock=clock, deadline=Deadline.after(4.0, clock))
        inner = TimeoutPrimitive(look, 1.0)
        await TimeoutPrimitive(step(look) >> inner >> look, 3.0).execute(1, context)
        await look(1, context)
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(HANG, 1.0).execute(1, context)
        assert time_limit.get() is None

    asyncio.run(main())
    assert seen == [3.0, 1.0, 3.0, 4.0]


def test_task_left_running_by_a_step_is_not_bound_by_its_limit() -> None:
    """What a step starts and leaves behind outlives the limit: it waits, retries and times out on its own."""
    clock = FakeClock()
    seen: list[Any] = []

    async def background(context: WorkflowContext) -> None:
        await clock.sleep(5.0)
        seen.append(cut_off(context))
        with pytest.raises(StepTimeoutError) as caught:
            await TimeoutPrimitive(HANG, 2.0).execute(1, context)
        seen.append((caught.value.timeout, clock.monotonic()))
        seen.append(cancel_reason(context))

    async def main(fails: bool) -> None:
        tasks: list[asyncio.Task[None]] = []

        async def start(data: Any, context: WorkflowContext) -> None:
            tasks.append(asyncio.ensure_future(background(context)))
            await clock.sleep(60.0 if fails else 0.5)

        context = WorkflowContext(clock=clock)
        try:
            await TimeoutPrimitive(start, 1.0).execute(1, context)
        except StepTimeoutError:
            assert fails
        await tasks[0]

    for fails in (False, True):
        began = clock.monotonic()
        asyncio.run(main(fails))
        assert seen == [None, (2.0, began + 7.0), None]
        seen.clear()


def test_step_is_cut_at_the_moved_deadline_when_it_was_moved() -> None:
    """Work that several wait for gets the time of the most patient one; the own limit still holds."""
    for own, moved, expected, kind in (
        (60.0, 5.0, 5.0, DeadlineExceededError),
        (3.0, 5.0, 3.0, StepTimeoutError),
    ):
        clock = FakeClock()
        deadline = Deadline.after(2.0, clock)

        reasons: list[str | None] = []

        async def hang(
            data: list[str | None], context: WorkflowContext, deadline: Deadline = deadline, moved: float = moved
        ) -> None:
            await context.clock.sleep(1.0)
            deadline.at = moved
            try:
                await context.clock.sleep(3600)
            finally:
                data.append(cancel_reason(context))

        with pytest.raises(kind):
            asyncio.run(TimeoutPrimitive(hang, own).execute(reasons, WorkflowContext(clock=clock, deadline=deadline)))
        assert clock.monotonic() == expected
        assert reasons == ["deadline" if kind is DeadlineExceededError else "timeout"]


def test_first_steps_of_many_threads_and_of_limits_in_one_another_keep_apart() -> None:
    """Each call gets its own result, and what has answered keeps none of them."""

    class Mark:
        pass

    @step
    async def echo(data: Any, context: WorkflowContext) -> Any:
        if isinstance(data, int) and data % 7 < 3:
            await asyncio.sleep(0)
        if isinstance(data, int) and data % 5 == 0:
            raise LookupError(data)
        return data

    flow = TimeoutPrimitive(TimeoutPrimitive(TimeoutPrimitive(echo, 20.0), 25.0), 30.0)
    late = WorkflowContext(deadline=Deadline.after(3600.0))
    wrong: list[Any] = []

    async def many(context: WorkflowContext) -> None:
        for number in range(300):
            try:
                answer = await flow.execute(number, context)
            except LookupError as error:
                answer = error.args[0] if number % 5 == 0 else None
            if answer != number:
                wrong.append((number, answer))

    threads = [threading.Thread(target=asyncio.run, args=(many(context),)) for context in (WorkflowContext(), late) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

    gone = weakref.ref(asyncio.run(flow.execute(Mark())))
    assert gone() is None


def test_no_timer_is_set_when_the_waiting_caller_enforces_the_deadline() -> None:
    """Under run_sync the caller cuts at the deadline: a longer limit inside costs a check and nothing else."""

    async def count(data: Any) -> int:
        await TimeoutPrimitive(lambda data: asyncio.sleep(0), 60.0).execute(1)
        alarms = getattr(driver._thread, "alarms", None)
        return 0 if alarms is None else len(alarms._heap) + (alarms._timer is not None)

    async def call(context: WorkflowContext) -> int:
        return await step(count).execute(1, context)

    def bound(context: WorkflowContext) -> int:
        return facade.call_sync(call, context)

    facade = SyncFacade()
    context = WorkflowContext(deadline=Deadline.after(20.0))
    try:
        assert facade.run_sync(step(count), timeout=20.0) == 0
        assert facade.run_sync(step(count), 1, context) == 0
        context.deadline = Deadline.after(20.0)
        run_in = contextvars.copy_context()
        run_in.run(running_context.set, context)
        assert run_in.run(bound, context) == 0
        assert facade.run_sync(step(count), timeout=120.0) == 1
    finally:
        facade.shutdown(5)


# ---- who else cancels -------------------------------------------------


def test_foreign_cancellation_passes_through_untranslated(run_shuffled: Callable[..., Any]) -> None:
    """A caller who cancels gets CancelledError, never a timeout."""

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock(autojump_threshold=None))
        task = asyncio.ensure_future(TimeoutPrimitive(HANG, 1.0).execute(1, context))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    for seed in range(5):
        run_shuffled(main(), seed)


@pytest.mark.parametrize("swallows", [False, True])
def test_foreign_cancellation_wins_when_it_comes_with_the_timeout(swallows: bool) -> None:
    """Cancelled and timed out in one moment: the caller asked for the cancellation and gets it."""
    clock = FakeClock(autojump_threshold=None)

    async def hang(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(60)
        except asyncio.CancelledError:
            if not swallows:
                raise

    async def main() -> None:
        task = asyncio.ensure_future(TimeoutPrimitive(hang, 1.0).execute(1, WorkflowContext(clock=clock)))
        await asyncio.sleep(0)
        clock.jump(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_two_limits_of_the_same_moment_end_in_one_timeout() -> None:
    """The cancellation of the inner limit is not mistaken for a foreign one."""
    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(TimeoutPrimitive(TimeoutPrimitive(HANG, 1.0), 1.0), 1.0))
    with pytest.raises(DeadlineExceededError):
        run(TimeoutPrimitive(TimeoutPrimitive(HANG, 4.0), 5.0), deadline=1.0)

    async def main() -> int:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(TimeoutPrimitive(HANG, 1.0), 1.0).execute(1, WorkflowContext(clock=FakeClock()))
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert asyncio.run(main()) == 0


def test_asyncio_timeouts_nest_either_way() -> None:
    """Ours inside asyncio's and asyncio's inside ours: each reports its own limit."""

    async def inner(data: Any) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(3600)

    async def main() -> None:
        with pytest.raises(TimeoutError) as caught:
            await TimeoutPrimitive(inner, 3600.0).execute(1)
        assert not isinstance(caught.value, StepTimeoutError)
        with pytest.raises(StepTimeoutError):
            async with asyncio.timeout(3600):
                await TimeoutPrimitive(lambda data: asyncio.sleep(3600), 0.01).execute(1)

    asyncio.run(main())


def test_closing_the_coroutine_closes_the_step() -> None:
    """A workflow that is dropped half-way runs its `finally` blocks."""
    closed: list[str] = []

    async def hang(data: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            closed.append("closed")

    async def main() -> None:
        coroutine = TimeoutPrimitive(hang, 1.0).execute(1)
        coroutine.send(None)
        coroutine.close()

    asyncio.run(main())
    assert closed == ["closed"]


def test_cancel_reason_is_known_inside_while_the_step_is_cut() -> None:
    """Timeout, deadline, or somebody else: said, not guessed; also in a branch, a task of its own."""
    seen: dict[str, Any] = {}

    def probe(name: str) -> WorkflowPrimitive[Any, Any]:
        async def hang(data: Any, context: WorkflowContext) -> None:
            try:
                await context.clock.sleep(3600)
            finally:
                seen[name] = cancel_reason(context)

        return step(hang)

    branches = ParallelPrimitive([probe("branch"), sleeping(0)])
    for workflow, deadline in (
        (TimeoutPrimitive(probe("timeout"), 1.0), None),
        (TimeoutPrimitive(TimeoutPrimitive(probe("outer"), 1.0), 1.0), None),
        (TimeoutPrimitive(branches, 1.0), None),
        (TimeoutPrimitive(probe("deadline"), 9.0), 1.0),
    ):
        with pytest.raises(TimeoutError):
            run(workflow, deadline=deadline)

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock(autojump_threshold=None))
        task = asyncio.ensure_future(TimeoutPrimitive(probe("foreign"), 1.0).execute(1, context))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert cancel_reason(context) is None

    asyncio.run(main())
    assert seen == {
        "timeout": "timeout",
        "outer": "timeout",
        "branch": "timeout",
        "deadline": "deadline",
        "foreign": None,
    }


def test_time_limit_is_a_plain_moment_for_everybody_else() -> None:
    """It compares and adds as the float that it is; one that was never struck gives no reason."""
    limit = TimeLimit(3.0)
    assert limit == 3.0
    assert limit - 1 == 2.0
    assert contextvars.copy_context().run(lambda: (time_limit.set(limit), cancel_reason(WorkflowContext()))[1]) is None


def test_error_says_so_when_the_step_was_not_called() -> None:
    """``before_call``: the time was up before; kept through pickle and copy, and False for a call that was cut."""
    calls: list[Any] = []
    work = TimeoutPrimitive(calls.append, 1.0, name="work")
    with pytest.raises(DeadlineExceededError) as passed:
        run(work, deadline=0.0)

    async def after_the_limit() -> None:
        context = WorkflowContext(clock=FakeClock())
        time_limit.set(context.clock.monotonic() - 1.0)
        await work.execute("x", context)

    with pytest.raises(StepTimeoutError, match="had already passed") as late:
        asyncio.run(after_the_limit())
    assert not calls
    for error in (passed.value, late.value):
        assert error.before_call is True
        assert pickle.loads(pickle.dumps(error)).before_call is True
        assert copy_error(error).before_call is True  # type: ignore[attr-defined]
    with pytest.raises(StepTimeoutError) as own:
        run(TimeoutPrimitive(HANG, 1.0))
    with pytest.raises(DeadlineExceededError) as inherited:
        run(TimeoutPrimitive(HANG, 2.0), deadline=1.0)
    assert (own.value.before_call, inherited.value.before_call) == (False, False)
    assert pickle.loads(pickle.dumps(own.value)).before_call is False


# ---- steps that will not stop -----------------------------------------


def swallower(ended: list[str], extra: float) -> Callable[..., Any]:
    """A step that takes *extra* seconds over its cancellation."""

    async def swallow(data: Any, context: WorkflowContext) -> str:
        end = context.clock.monotonic() + 1.0 + extra
        while context.clock.monotonic() < end:
            try:
                await context.clock.sleep(end - context.clock.monotonic())
            except asyncio.CancelledError:
                ended.append("swallowed")
        ended.append("ended")
        return "late"

    return swallow


async def in_subtask(swallow: Any, data: Any, context: WorkflowContext) -> Any:
    return await asyncio.ensure_future(swallow(data, context))


async def in_group(swallow: Any, data: Any, context: WorkflowContext) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(swallow(data, context))


async def directly(swallow: Any, data: Any, context: WorkflowContext) -> Any:
    return await swallow(data, context)


@pytest.mark.parametrize("how", [directly, in_subtask, in_group])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("waited_before", [False, True])
def test_step_that_swallows_its_cancellation_is_left_behind_after_one_second(
    how: Any, seed: int, waited_before: bool, run_shuffled: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The caller goes on at limit + 1 s; the step runs on as a counted orphan, undisturbed, and ends."""
    clock = FakeClock()
    ended: list[str] = []

    async def stubborn(data: Any, context: WorkflowContext) -> Any:
        if data == "quick":
            return await asyncio.sleep(0, "answer")
        return await how(swallower(ended, 5.0), data, context)

    async def main() -> None:
        flow = TimeoutPrimitive(stubborn, 1.0)
        if waited_before:  # what a call does is guessed from the one before it
            assert await flow.execute("quick", WorkflowContext(clock=clock)) == "answer"
        with pytest.raises(StepTimeoutError, match="was left behind"):
            await flow.execute(1, WorkflowContext(clock=clock))
        assert clock.monotonic() == 2.0
        assert len(left_behind.orphans) == 1
        assert ended == ["swallowed"]
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.wait(set(left_behind.orphans))

    with caplog.at_level(logging.WARNING, "tta_sync"):
        run_shuffled(main(), seed)
    assert ended == ["swallowed", "ended"]
    assert clock.monotonic() == 6.0
    assert not left_behind.orphans
    (record,) = caplog.records
    assert f"{__file__}:" in record.getMessage()


def test_orphan_is_logged_with_line_and_function_of_the_user(caplog: pytest.LogCaptureFixture) -> None:
    """The innermost frame that is the user's own, not asyncio's."""

    async def stubborn(data: Any, context: WorkflowContext) -> None:
        await swallower([], 3.0)(data, context)

    async def main() -> None:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(stubborn, 1.0).execute(1, WorkflowContext(clock=FakeClock()))
        await asyncio.wait(set(left_behind.orphans))

    with caplog.at_level(logging.WARNING, "tta_sync"):
        asyncio.run(main())
    assert "swallower.<locals>.swallow" in caplog.text


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_orphan_of_a_call_is_counted_by_its_facade(
    loop: str, monkeypatch: pytest.MonkeyPatch, workflow_events: list[events.Event]
) -> None:
    """run_sync raises the step's timeout after the grace; stats() counts the orphan and an event tells of it."""
    monkeypatch.setattr(driver, "GRACE", 0.05)
    stop = threading.Event()

    async def stubborn(data: Any) -> None:
        while not stop.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass

    facade = SyncFacade(use_uvloop=loop == "uvloop")
    try:
        with pytest.raises(StepTimeoutError, match="left behind"):
            facade.run_sync(TimeoutPrimitive(stubborn, 0.05))
        assert facade.stats()["orphans"] == 1
    finally:
        stop.set()
        facade.shutdown(5)
    (orphaned,) = [event for event in workflow_events if isinstance(event, events.CallOrphaned)]
    assert orphaned.step.endswith("stubborn")


class Composite(WorkflowPrimitive[Any, Any]):
    def __init__(self, inner: WorkflowPrimitive[Any, Any]) -> None:
        self.inner = inner

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return await self.inner.execute(data, context)


@pytest.mark.parametrize(
    ("wrap", "name", "place"),
    [
        (lambda work: ParallelPrimitive([work, work]), "ParallelPrimitive", ""),
        (lambda work: MapPrimitive(work), "work", "swallow"),
        (lambda work: HedgePrimitive(work, delay=0.1, idempotent=True), "work", "swallow"),
        (lambda work: Composite(work | work), "Composite.execute", "execute"),
    ],
)
def test_orphan_is_called_by_the_step_when_it_waits_inside_a_primitive(
    wrap: Any,
    name: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workflow_events: list[events.Event],
) -> None:
    """Where no frame of the user's shows, the step's own name and place stand, and nobody is accused of swallowing."""
    clock = FakeClock()
    work = step(swallower([], 5.0), name="work")

    async def main() -> None:
        with pytest.raises(
            StepTimeoutError, match=r"; it had not ended 1 s after its cancellation; it was left behind"
        ):
            await TimeoutPrimitive(wrap(work), 1.0).execute([1, 2], WorkflowContext(clock=clock))
        await asyncio.wait(set(left_behind.orphans))

    monkeypatch.setattr(hedge_module, "GRACE", 60.0)  # so that the timeout is the one to leave it behind
    with caplog.at_level(logging.WARNING, "tta_sync"):
        asyncio.run(main())
    (orphaned,) = [event for event in workflow_events if isinstance(event, events.CallOrphaned)]
    assert (orphaned.step, orphaned.reason) == (name, "it had not ended 1 s after its cancellation")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "tta_sync/primitives" not in told
    line = swallower([], 0.0).__code__.co_firstlineno
    assert {"swallow": f"it stands at {__file__}:{line}", "execute": f"it stands at {__file__}:", "": ""}[place] in told
    assert ("stands at" in told) == bool(place)


@pytest.mark.parametrize("wrap", [lambda saga: saga, Composite], ids=["alone", "in a composite"])
def test_saga_that_is_still_compensating_is_not_accused(wrap: Any, workflow_events: list[events.Event]) -> None:
    """It is left behind like any other, but error and event say what it is at."""
    clock = FakeClock()
    saga = SagaPrimitive([(HANG, sleeping(10.0))], name="booking")

    async def main() -> None:
        with pytest.raises(StepTimeoutError) as caught:
            await TimeoutPrimitive(wrap(saga), 1.0).execute("x", WorkflowContext(clock=clock))
        assert caught.value.detail.startswith("its compensations were still running 1 s after its cancellation; it was")
        await asyncio.wait(set(left_behind.orphans))

    asyncio.run(main())
    (orphaned,) = [event for event in workflow_events if isinstance(event, events.CallOrphaned)]
    assert orphaned.reason == "its compensations were still running 1 s after its cancellation"
    assert orphaned.step == ("booking" if wrap is not Composite else "Composite.execute")


def test_orphan_has_no_place_when_its_code_is_nobodys() -> None:
    """A step of compiled code, or one of tta_sync's own, has no line to be told."""
    assert left_behind._place_of(step(len)) == ""
    assert left_behind._place_of(HANG | HANG) == ""
    assert left_behind._place_of(Composite(HANG)).startswith(f"{__file__}:")


def test_orphan_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What went wrong is told, though nobody waits for it; of the error only its type: its text may hold anything."""

    async def stubborn(data: Any, context: WorkflowContext) -> None:
        await swallower([], 3.0)(data, context)
        raise ValueError("the card number")

    async def main() -> None:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(stubborn, 1.0).execute(1, WorkflowContext(clock=FakeClock()))
        await asyncio.wait(set(left_behind.orphans))
        await asyncio.sleep(0)

    with caplog.at_level(logging.WARNING, "tta_sync"):
        asyncio.run(main())
    assert "a step that was left behind ended with ValueError\n" in caplog.text
    assert "card" not in caplog.text


def test_orphan_can_be_cancelled_at_the_end_of_the_loop() -> None:
    """asyncio.run's own clean-up reaches a step that was left behind, and ends."""
    seen: list[str] = []

    async def twice(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(3600)
        except asyncio.CancelledError:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                seen.append("cancelled again")

    async def main() -> None:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(twice, 1.0).execute(1, WorkflowContext(clock=FakeClock()))

    asyncio.run(main())
    assert seen == ["cancelled again"]
    assert not left_behind.orphans


@pytest.mark.parametrize("scope", ["asyncio.timeout", "TaskGroup", "ours"])
def test_scopes_inside_an_orphan_never_reach_the_caller(scope: str) -> None:
    """A timeout or task group entered before the cut cancels the orphan later on, and not whoever had to wait."""
    clock = FakeClock()
    ended: list[str] = []

    async def deaf(context: WorkflowContext) -> None:
        with pytest.raises(asyncio.CancelledError):
            await context.clock.sleep(3600)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("ended")

    async def stubborn(data: Any, context: WorkflowContext) -> None:
        if scope == "asyncio.timeout":
            async with asyncio.timeout(3600) as limit:
                asyncio.get_running_loop().call_later(0, lambda: clock.call_at(10.0, limit.reschedule, 0))
                await deaf(context)
        elif scope == "TaskGroup":
            async with asyncio.TaskGroup() as group:

                async def fail() -> None:
                    try:
                        await context.clock.sleep(10.0)
                    except asyncio.CancelledError:
                        await context.clock.sleep(10.0)
                    raise ValueError

                group.create_task(fail())
                await deaf(context)
        else:
            await TimeoutPrimitive(lambda data: deaf(context), 10.0).execute(data, context)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        time_limit.set(None)
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(stubborn, 1.0, name="outer").execute(1, context)
        orphans = set(left_behind.orphans)
        assert orphans or scope == "ours"
        await clock.sleep(30.0)  # an unrelated wait of the caller: it must not be cancelled
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        for orphan in orphans:
            orphan.cancel()
        await asyncio.gather(*orphans, return_exceptions=True)

    asyncio.run(main())
    assert ended == ["ended"]


def test_cancellation_that_a_scope_inside_an_orphan_asked_for_does_not_count_against_the_caller() -> None:
    """asyncio.timeout had cancelled already, and was swallowed too: the caller gets his timeout, not a cancellation."""
    clock = FakeClock()

    async def stubborn(data: Any, context: WorkflowContext) -> None:
        async with asyncio.timeout(0):
            for _ in range(3):
                try:
                    await context.clock.sleep(3600)
                except asyncio.CancelledError:
                    pass

    async def main() -> None:
        with pytest.raises(StepTimeoutError, match="left behind"):
            await TimeoutPrimitive(stubborn, 1.0).execute(1, WorkflowContext(clock=clock))
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.wait(set(left_behind.orphans))

    asyncio.run(main())


def test_foreign_future_type_is_cancelled_a_second_time(caplog: pytest.LogCaptureFixture) -> None:
    """Where a future does not show who waits for it, the way to the caller is a second cancellation."""
    seen: list[str] = []

    class Foreign:
        """A future by duck typing, as other libraries have them."""

        _asyncio_future_blocking = False

        def __init__(self) -> None:
            self.future = asyncio.get_running_loop().create_future()
            self.add_done_callback = self.future.add_done_callback
            self.remove_done_callback = self.future.remove_done_callback
            self.get_loop = self.future.get_loop
            self.cancel = self.future.cancel

        def __await__(self) -> Any:
            self._asyncio_future_blocking = True
            yield self
            return self.future.result()

    async def stubborn(data: Any, context: WorkflowContext) -> None:
        for _ in range(3):
            try:
                await Foreign()
            except asyncio.CancelledError:
                seen.append("cancelled")

    async def main() -> None:
        with pytest.raises(StepTimeoutError, match="left behind"):
            await TimeoutPrimitive(stubborn, 1.0).execute(1, WorkflowContext(clock=FakeClock()))
        (orphan,) = left_behind.orphans
        await asyncio.sleep(0)
        orphan.cancel()
        await asyncio.wait([orphan])

    asyncio.run(main())
    assert seen == ["cancelled"] * 3


@pytest.mark.parametrize("limits", [(1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.5)])
def test_step_in_several_limits_is_left_behind_once(
    limits: tuple[float, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Limits that strike together neither disturb the step a second time nor count their cancellations against one
    another; one that strikes during the grace of another leaves that to it."""
    clock = FakeClock()
    ended: list[str] = []
    workflow: WorkflowPrimitive[Any, Any] = step(swallower(ended, 5.0))
    for seconds in limits:
        workflow = TimeoutPrimitive(workflow, seconds)

    async def main() -> None:
        with pytest.raises(StepTimeoutError) as caught:
            await workflow.execute(1, WorkflowContext(clock=clock))
        assert caught.value.timeout == limits[-1]
        assert clock.monotonic() == 2.0
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        while left_behind.orphans:
            await asyncio.wait(set(left_behind.orphans))

    asyncio.run(main())
    assert ended.count("swallowed") <= len(limits)
    assert ended[-1] == "ended"


def test_busy_step_is_left_behind_too() -> None:
    """A step that swallows cancellation in a loop of sleep(0) waits for nothing, and is left behind all the same."""
    clock = FakeClock(autojump_threshold=None)
    stop: list[bool] = []

    async def busy(data: Any) -> None:
        while not stop:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass

    async def main() -> None:
        task = asyncio.ensure_future(TimeoutPrimitive(busy, 1.0).execute(1, WorkflowContext(clock=clock)))
        for _ in range(2):
            for _ in range(5):
                await asyncio.sleep(0)
            clock.jump(1.0)
        with pytest.raises(StepTimeoutError, match="left behind"):
            await task
        stop.append(True)
        await asyncio.wait(set(left_behind.orphans))

    asyncio.run(main())


# ---- state, fallback, events, peek ------------------------------------


def test_timeouts_are_tracked_in_the_state() -> None:
    """timeout_count and timeout_history grow with each timeout; track_timeouts=False leaves them alone."""

    async def main() -> dict[str, Any]:
        context = WorkflowContext(clock=FakeClock())
        for options in ({}, {"fallback": lambda data: "fell back"}, {"track_timeouts": False}):
            try:
                await TimeoutPrimitive(HANG, 1.5, **options).execute(1, context)
            except StepTimeoutError:
                pass
        return context.state

    assert asyncio.run(main()) == {
        "timeout_count": 2,
        "timeout_history": [
            {"primitive": "sleep", "timeout": 1.5, "had_fallback": False},
            {"primitive": "sleep", "timeout": 1.5, "had_fallback": True},
        ],
    }


def test_fallback_answers_at_the_own_limit_and_marks_the_context(workflow_events: list[events.Event]) -> None:
    """The fallback gets the same data; at the call's deadline it is not asked."""

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock())
        assert await TimeoutPrimitive(HANG, 1.0, lambda data: data + "!").execute("x", context) == "x!"
        assert context.degraded
        timed_out, used = workflow_events
        assert isinstance(timed_out, events.StepTimedOut)
        assert (timed_out.step, timed_out.timeout, timed_out.detached) == ("sleep", 1.0, False)
        assert isinstance(used, events.FallbackUsed)
        assert isinstance(used.error, StepTimeoutError)

    asyncio.run(main())
    with pytest.raises(DeadlineExceededError):
        run(TimeoutPrimitive(HANG, 5.0, lambda data: data), deadline=1.0)


class Known(WorkflowPrimitive[Any, Any]):
    peeks = True

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def execute(self, data: Any, context: WorkflowContext) -> Any:
        return "executed"

    def peek(self, data: Any, context: WorkflowContext) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_peek_is_transparent_to_values_and_errors() -> None:
    """What the step knows without the loop needs no limit."""
    context = WorkflowContext()
    assert TimeoutPrimitive(Known("cached"), 1.0).peek(1, context) == "cached"
    assert TimeoutPrimitive(Known(MISS), 1.0).peek(1, context) is MISS
    assert TimeoutPrimitive(HANG, 1.0).peek(1, context) is MISS
    with pytest.raises(ValueError, match="known"):
        TimeoutPrimitive(Known(ValueError("known")), 1.0).peek(1, context)


def test_warning_when_the_inner_limit_is_the_longer_one() -> None:
    """It could never fire; at any depth."""
    with pytest.warns(CompositionWarning, match="make the inner limit the shorter one"):
        TimeoutPrimitive(FallbackPrimitive(TimeoutPrimitive(HANG, 2.0) >> HANG, HANG), 1.0)
    TimeoutPrimitive(TimeoutPrimitive(HANG, 1.0), 2.0)
    TimeoutPrimitive(HANG, 1.0, fallback=TimeoutPrimitive(HANG, 5.0))  # the fallback has time of its own


def test_no_warning_where_the_inner_limit_may_fire_though_it_is_longer() -> None:
    """What undoes a saga is not cut with it, and what a cache computes may have others who wait for it, and longer."""
    TimeoutPrimitive(SagaPrimitive([(HANG, TimeoutPrimitive(HANG, 20.0))]), 5.0)
    cached = CachePrimitive(TimeoutPrimitive(HANG, 30.0), ttl=60, soft_ttl=10, namespace="slow")
    TimeoutPrimitive(cached, 5.0)
    TimeoutPrimitive(CachePrimitive(ttl=60) >> TimeoutPrimitive(HANG, 30.0) >> HANG, 5.0)
    with pytest.warns(CompositionWarning, match="make the inner limit the shorter one"):
        TimeoutPrimitive(SagaPrimitive([(TimeoutPrimitive(HANG, 20.0), None)]), 5.0)
    with pytest.warns(CompositionWarning, match="make the inner limit the shorter one"):
        SagaPrimitive([(HANG, TimeoutPrimitive(HANG, 60.0))], compensation_timeout=30.0)


def test_repr_shows_step_and_limit() -> None:
    """A workflow can be read."""
    assert repr(TimeoutPrimitive(HANG, 1.5)) == "Timeout(sleep, timeout_seconds=1.5)"
    assert TimeoutPrimitive(HANG, 1.5, HANG, name="n").children() == (HANG, HANG)


@pytest.mark.parametrize("kind", ["own", "deadline", "error", "fallback"])
def test_error_leaves_no_reference_cycle(kind: str) -> None:
    """Once the caller lets go of the error it is gone, without the garbage collector, out of a task too."""

    class Mark:
        pass

    def make() -> tuple[WorkflowPrimitive[Any, Any], weakref.ref[Mark]]:
        mark = Mark()

        async def hang(data: Any, context: WorkflowContext, mark: Mark = mark) -> None:
            local = mark
            await asyncio.sleep(0)
            if kind == "error":
                raise ValueError(local)
            await context.clock.sleep(3600)

        async def fall_back(data: Any) -> None:
            raise KeyError

        fallback = fall_back if kind == "fallback" else None
        return TimeoutPrimitive(hang, 1.0, fallback), weakref.ref(mark)

    async def main() -> weakref.ref[Mark]:
        workflow, mark = make()
        clock = FakeClock()
        deadline = Deadline.after(0.5, clock) if kind == "deadline" else None
        task = asyncio.ensure_future(workflow.execute(1, WorkflowContext(clock=clock, deadline=deadline)))
        await asyncio.wait([task])
        assert task.exception() is not None
        return mark

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


# ---- many limits behind one timer -------------------------------------


@settings(max_examples=60, deadline=None, database=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=30),
    seed=st.integers(0, 100),
)
def test_every_limit_holds_when_there_are_many_at_once(calls: list[tuple[int, int, int]], seed: int) -> None:
    """Each call ends at the earlier of its duration and its limit, exactly, whatever the others do."""
    clock = FakeClock()

    async def call(start: int, duration: int, limit: int) -> tuple[float, bool]:
        await clock.sleep(float(start))
        try:
            await TimeoutPrimitive(sleeping(float(duration)), float(limit)).execute(1, WorkflowContext(clock=clock))
        except StepTimeoutError:
            return clock.monotonic(), True
        return clock.monotonic(), False

    async def main() -> list[tuple[float, bool]]:
        order = list(range(len(calls)))
        random.Random(seed).shuffle(order)
        outcomes = await asyncio.gather(*(call(*calls[index]) for index in order))
        return [outcome for _, outcome in sorted(zip(order, outcomes, strict=True))]

    for (start, duration, limit), (end, timed_out) in zip(calls, asyncio.run(main()), strict=True):
        assert end == start + min(duration, limit)
        assert timed_out == (limit <= duration)


def test_entries_of_ended_steps_do_not_pile_up_behind_a_long_one() -> None:
    """A thousand short calls behind one that hangs leave no thousand entries."""

    async def main() -> int:
        context = WorkflowContext(clock=FakeClock())
        hanging = asyncio.ensure_future(TimeoutPrimitive(HANG, 1e6).execute(1, context))
        await asyncio.sleep(0)
        for _ in range(1000):
            await TimeoutPrimitive(sleeping(0), 2e6).execute(1, context)
        size = len(driver._thread.alarms._heap)
        hanging.cancel()
        await asyncio.wait([hanging])
        assert not driver._thread.alarms._heap
        return size

    assert asyncio.run(main()) <= 203


def test_real_clock_keeps_one_timer_for_calls_in_a_row() -> None:
    """On the machine's own clock a hundred calls in a row arm one timer, and later ones still fire."""
    armed: list[float] = []

    class Counting:
        monotonic = staticmethod(time.monotonic)
        time = staticmethod(time.time)
        sleep = staticmethod(asyncio.sleep)

        def call_at(self, when: float, *rest: Any) -> Any:
            armed.append(when)
            return SYSTEM_CLOCK.call_at(when, *rest)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        clock = Counting()
        alarms = driver._thread.alarms = driver._Alarms(loop, clock)  # type: ignore[arg-type]
        context = WorkflowContext(clock=clock)  # type: ignore[arg-type]
        module_clock = driver.SYSTEM_CLOCK
        driver.SYSTEM_CLOCK = clock  # type: ignore[assignment, misc]
        try:
            for _ in range(100):
                await TimeoutPrimitive(lambda data: asyncio.sleep(0), 30.0).execute(1, context)
            assert len(armed) == 1
            with pytest.raises(StepTimeoutError):
                await TimeoutPrimitive(lambda data: asyncio.sleep(60), 0.01).execute(1, context)
            assert driver._thread.alarms is alarms
        finally:
            driver.SYSTEM_CLOCK = module_clock  # type: ignore[misc]

    asyncio.run(main())


def test_stale_timer_rings_for_nobody_and_is_armed_again() -> None:
    """A timer whose step has ended finds the next one, and fires it in its own time."""

    async def main() -> None:
        await TimeoutPrimitive(lambda data: asyncio.sleep(0), 0.01).execute(1)
        began = time.monotonic()
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(lambda data: asyncio.sleep(60), 0.05).execute(1)
        assert time.monotonic() - began >= 0.05

    asyncio.run(main())


# ---- a cancel at every await point ------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_cancel_at_any_moment_leaves_nothing_armed(seed: int, run_shuffled: Callable[..., Any]) -> None:
    """Whenever the caller cancels, he gets the cancellation or the outcome, and no entry and no limit stays behind."""
    inner = TimeoutPrimitive(step(lambda data: asyncio.sleep(0, data)) >> sleeping(0) >> sleeping(1), 5.0)
    workflow = TimeoutPrimitive(FallbackPrimitive(inner, sleeping(0)) | sleeping(2), 10.0)

    async def main(ticks: int) -> bool:
        clock = FakeClock(autojump_threshold=None)
        task = asyncio.ensure_future(workflow.execute("x", WorkflowContext(clock=clock)))
        for _ in range(ticks):
            await asyncio.sleep(0)
            clock.jump(0.25)
        task.cancel()
        await asyncio.wait([task])
        assert ticks == 0 or not driver._thread.alarms._heap
        assert time_limit.get() is None
        return not task.cancelled()

    for ticks in itertools.count():
        if run_shuffled(main(ticks), seed):
            break
    assert ticks > 3
