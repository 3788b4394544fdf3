"""Limits and tasks: a limit cuts what runs inside its step, and what its step leaves running has its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tta_sync import SyncFacade, events
from tta_sync.context import Deadline, WorkflowContext, cut_off
from tta_sync.exceptions import DeadlineExceededError, StepTimeoutError
from tta_sync.primitives.core.base import WorkflowPrimitive, step
from tta_sync.primitives.recovery import (
    BulkheadPrimitive,
    CircuitBreakerPrimitive,
    RateLimitPrimitive,
    RetryPrimitive,
    TimeoutPrimitive,
)
from tta_sync.testing import FakeClock

Main = Callable[[WorkflowContext], Any]


class Tasks:
    """Begin a workflow in a task of its own, inside a step that lasts for a while; note how and when the task ends."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, float]] = []
        self.visible: list[float | None] = []
        self.task: asyncio.Task[Any] | None = None

    def starting(self, workflow: WorkflowPrimitive[Any, Any], lasting: float) -> WorkflowPrimitive[Any, Any]:
        async def start(data: Any, context: WorkflowContext) -> str:
            self.task = asyncio.create_task(workflow.execute(data, context))
            await context.clock.sleep(lasting)
            return "started"

        return step(start, name="start")

    def work(self, lasting: float) -> WorkflowPrimitive[Any, Any]:
        async def work(data: Any, context: WorkflowContext) -> str:
            self.visible.append(cut_off(context))
            try:
                for _ in range(int(lasting)):
                    await context.clock.sleep(1.0)
                    self.visible.append(cut_off(context))
            except BaseException as error:
                self.ended.append((type(error).__name__, context.clock.monotonic()))
                raise
            self.ended.append(("returned", context.clock.monotonic()))
            return "worked"

        return step(work, name="work")

    async def outcome(self) -> Any:
        assert self.task is not None
        (result,) = await asyncio.gather(self.task, return_exceptions=True)
        assert self.task.cancelling() == 0
        return result

    async def outlive(
        self, workflow: WorkflowPrimitive[Any, Any], context: WorkflowContext, lasting: float = 0.0
    ) -> Any:
        """Begin *workflow* in a step that lasts that long, within its limit of 1 s; return what comes of its task."""
        assert await TimeoutPrimitive(self.starting(workflow, lasting), 1.0).execute("x", context) == "started"
        return await self.outcome()


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


def run(main: Main, deadline: float | None = None) -> Any:
    clock = FakeClock()
    context = WorkflowContext(clock=clock)
    if deadline is not None:
        context.deadline = Deadline.after(deadline, clock)
    return asyncio.run(main(context))


def test_task_is_cut_at_its_own_limit_when_the_step_that_started_it_has_ended(tasks: Tasks) -> None:
    """The shorter limit around that step is over then: it does not cut the task, nor keep its own from it."""
    background = TimeoutPrimitive(tasks.work(10), 3.0)

    async def main(context: WorkflowContext) -> Any:
        return await tasks.outlive(background, context, 0.5)

    error = run(main)
    assert isinstance(error, StepTimeoutError)
    assert str(error) == "work took longer than its 3 s"
    assert tasks.ended == [("CancelledError", 3.0)]
    assert tasks.visible == [1.0, 3.0, 3.0]


def test_task_goes_on_past_the_limit_of_a_step_that_has_ended(tasks: Tasks) -> None:
    background = TimeoutPrimitive(tasks.work(3), 5.0)

    async def main(context: WorkflowContext) -> Any:
        return await tasks.outlive(background, context)

    assert run(main) == "worked"
    assert tasks.ended == [("returned", 3.0)]


def test_task_that_blocks_is_not_blamed_for_a_limit_that_is_over(tasks: Tasks) -> None:
    """Its end comes before anybody could look at the clock."""

    async def block(data: Any, context: WorkflowContext) -> str:
        await context.clock.sleep(0.5)
        context.clock.jump(2.0)  # type: ignore[attr-defined]
        return "worked"

    background = TimeoutPrimitive(step(block), 5.0)

    async def main(context: WorkflowContext) -> Any:
        return await tasks.outlive(background, context)

    assert run(main) == "worked"


@pytest.mark.parametrize("blocks", [False, True])
def test_task_of_a_task_has_its_own_limit_when_both_that_started_it_have_ended(tasks: Tasks, blocks: bool) -> None:
    """The first task's limit was put off when the step that had started it ended; it is over as well, in its turn."""
    innermost = TimeoutPrimitive(tasks.work(100), 20.0)
    begun: list[asyncio.Task[Any]] = []

    async def start(data: Any, context: WorkflowContext) -> None:
        async def later() -> None:
            await context.clock.sleep(2.0)
            await innermost.execute(data, context)

        if not blocks:
            await context.clock.sleep(1.5)  # beyond the limit of the step that started this
        begun.append(asyncio.create_task(later()))
        await context.clock.sleep(0.6)
        if blocks:
            context.clock.jump(1.0)  # type: ignore[attr-defined]  # to 1.6: the limit was not looked at before

    async def main(context: WorkflowContext) -> Any:
        assert await tasks.outlive(TimeoutPrimitive(step(start), 5.0), context) is None
        return (await asyncio.gather(*begun, return_exceptions=True))[0]

    assert isinstance(run(main), StepTimeoutError)
    began = 2.0 if blocks else 3.5
    assert tasks.ended == [("CancelledError", began + 20.0)]
    assert tasks.visible[0] == began + 20.0


def test_task_of_a_task_goes_by_a_limit_that_was_put_off(tasks: Tasks) -> None:
    """As long as the first task's step lasts; then by its own."""
    innermost = TimeoutPrimitive(tasks.work(100), 20.0)
    begun: list[asyncio.Task[Any]] = []

    async def start(data: Any, context: WorkflowContext) -> None:
        await context.clock.sleep(1.5)
        begun.append(asyncio.create_task(innermost.execute(data, context)))
        await context.clock.sleep(1.0)

    async def main(context: WorkflowContext) -> Any:
        assert await tasks.outlive(TimeoutPrimitive(step(start), 5.0), context) is None
        return (await asyncio.gather(*begun, return_exceptions=True))[0]

    assert isinstance(run(main), StepTimeoutError)
    assert tasks.ended == [("CancelledError", 21.5)]
    assert tasks.visible[0] == 5.0


def test_limit_inside_a_limit_in_a_task_strikes_in_its_time(tasks: Tasks) -> None:
    """The outer one goes by the limit of the step that started the task: the inner one cannot rely on that."""
    inner = TimeoutPrimitive(tasks.work(10), 3.0)
    background = TimeoutPrimitive(RetryPrimitive(inner, max_retries=0), 8.0)

    async def main(context: WorkflowContext) -> Any:
        return await tasks.outlive(background, context, 0.5)

    error = run(main)
    assert isinstance(error, StepTimeoutError)
    assert error.timeout == 3.0
    assert tasks.ended == [("CancelledError", 3.0)]


def test_limits_inside_each_other_in_a_task_are_cut_once_with_the_step_that_started_it(tasks: Tasks) -> None:
    inner = TimeoutPrimitive(tasks.work(10), 3.0)
    background = TimeoutPrimitive(RetryPrimitive(inner, max_retries=0), 8.0)

    async def main(context: WorkflowContext) -> Any:
        with pytest.raises(StepTimeoutError, match="its 2 s"):
            await TimeoutPrimitive(tasks.starting(background, 30.0), 2.0).execute("x", context)
        return await tasks.outcome()

    assert isinstance(run(main), StepTimeoutError)
    assert tasks.ended == [("CancelledError", 2.0)]


def test_reason_of_a_cut_is_known_when_the_step_that_started_the_task_ends_first(tasks: Tasks) -> None:
    """A breaker in the task counts the cut as a failure, though the limit is over by the time that it asks."""
    breaker = CircuitBreakerPrimitive(tasks.work(10))

    async def main(context: WorkflowContext) -> Any:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(tasks.starting(TimeoutPrimitive(breaker, 8.0), 30.0), 2.0).execute("x", context)
        return await tasks.outcome()

    assert isinstance(run(main), StepTimeoutError)
    assert breaker.failure_count == 1


def test_task_that_an_orphan_starts_is_free_when_the_orphan_has_ended() -> None:
    """While it runs on, nothing in it waits any more; its tasks are not bound by that for ever."""
    begun: list[asyncio.Task[Any]] = []
    later = TimeoutPrimitive(step(lambda data: asyncio.sleep(0, "worked")), 5.0)

    async def stubborn(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(100.0)
        except asyncio.CancelledError:
            await context.clock.sleep(2.0)

        async def wait() -> Any:
            await context.clock.sleep(1.0)
            return await later.execute(data, context)

        begun.append(asyncio.create_task(wait()))

    async def main(context: WorkflowContext) -> Any:
        with pytest.raises(StepTimeoutError, match="left behind"):
            await TimeoutPrimitive(stubborn, 1.0).execute("x", context)
        await context.clock.sleep(10.0)
        return await begun[0]

    assert run(main) == "worked"


def test_task_waits_for_its_turn_past_the_limit_of_a_step_that_has_ended(tasks: Tasks) -> None:
    limit = RateLimitPrimitive(tasks.work(0), 1.0, mode="wait")

    async def main(context: WorkflowContext) -> Any:
        await limit.execute("x", context)
        await context.clock.sleep(0.5)
        late = asyncio.create_task(tasks.outlive(limit, context, 0.2))
        while not limit._limit.line:
            await asyncio.sleep(0)
        limit._limit.arrival += 1.0  # taken by one that was passed over, and has come back to the front
        assert await late == "worked"

    run(main)
    assert tasks.ended == [("returned", 0.0), ("returned", 2.0)]


@pytest.mark.parametrize("max_wait", [None, 10.0])
def test_task_waits_in_a_line_past_the_limit_of_a_step_that_has_ended(tasks: Tasks, max_wait: float | None) -> None:
    line = BulkheadPrimitive(tasks.work(2), 1, max_queue=5, max_wait=max_wait)

    async def main(context: WorkflowContext) -> Any:
        before = [asyncio.create_task(line.execute("x", context)) for _ in range(2)]
        await asyncio.sleep(0)
        assert await tasks.outlive(line, context, 0.5) == "worked"
        await asyncio.gather(*before)

    run(main)
    assert len(tasks.ended) == 3


@pytest.mark.skipif(sys.version_info < (3, 12), reason="3.11 has no eager tasks")
@pytest.mark.parametrize("around", ["limit", "call"])
def test_task_that_begins_inside_its_starter_has_its_own_limit(tasks: Tasks, around: str) -> None:
    """An eager task does its first steps as if it were a part of the step that starts it."""
    background = TimeoutPrimitive(step(lambda data: asyncio.sleep(3600)), 0.2)

    async def start(data: Any, context: WorkflowContext) -> str:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        tasks.task = asyncio.create_task(background.execute(data, context))
        asyncio.get_running_loop().set_task_factory(None)
        return "started"

    async def wait() -> Any:
        return await asyncio.wait_for(tasks.outcome(), 30.0)

    if around == "limit":

        async def main() -> Any:
            assert await TimeoutPrimitive(start, 0.1).execute("x") == "started"
            return await wait()

        assert isinstance(asyncio.run(main()), StepTimeoutError)
        return
    facade = SyncFacade()
    try:
        assert facade.run_sync(step(start), "x", timeout=0.1) == "started"
        assert isinstance(facade.call_sync(wait), DeadlineExceededError)
    finally:
        facade.shutdown()


@pytest.mark.parametrize(("outermost", "cut_at"), [(2.0, 2.0), (10.0, 3.0)])
def test_task_is_cut_by_the_next_limit_around_when_the_nearest_is_over(
    tasks: Tasks, outermost: float, cut_at: float
) -> None:
    background = TimeoutPrimitive(tasks.work(10), 3.0)

    inner = TimeoutPrimitive(tasks.starting(background, 0.5), 1.0)
    wait = step(lambda data, context: context.clock.sleep(8.0))

    async def main(context: WorkflowContext) -> Any:
        await TimeoutPrimitive(inner >> wait, outermost, fallback=lambda data: None).execute("x", context)
        return await tasks.outcome()

    assert isinstance(run(main), StepTimeoutError)
    assert tasks.ended == [("CancelledError", cut_at)]
    assert tasks.visible == [1.0] + [cut_at] * (int(cut_at) - 1)


def test_task_is_cut_by_the_deadline_when_that_comes_before_its_limit(tasks: Tasks) -> None:
    background = TimeoutPrimitive(tasks.work(10), 5.0)

    async def main(context: WorkflowContext) -> Any:
        return await tasks.outlive(background, context, 0.5)

    assert isinstance(run(main, deadline=2.0), DeadlineExceededError)
    assert tasks.ended == [("CancelledError", 2.0)]


def test_task_that_runs_on_is_cut_with_the_step_that_started_it(tasks: Tasks) -> None:
    """That step hits its limit while it waits for something else: the task's limit cannot last longer. No fallback."""
    answered: list[Any] = []
    background = TimeoutPrimitive(tasks.work(10), 5.0, fallback=answered.append)

    async def main(context: WorkflowContext) -> Any:
        with pytest.raises(StepTimeoutError, match="start took longer than its 2 s"):
            await TimeoutPrimitive(tasks.starting(background, 30.0), 2.0).execute("x", context)
        return await tasks.outcome()

    error = run(main)
    assert isinstance(error, StepTimeoutError)
    assert "a shorter limit, around the step that started this task, came first" in str(error)
    assert tasks.ended == [("CancelledError", 2.0)]
    assert answered == []


def test_task_that_blocks_past_the_limit_around_it_is_told(tasks: Tasks) -> None:
    """It never waits, so nothing can cut it; the step that started it is still under way."""
    background = TimeoutPrimitive(step(lambda data, context: context.clock.jump(3.0)), 5.0)

    async def main(context: WorkflowContext) -> Any:
        with pytest.raises(StepTimeoutError):
            await TimeoutPrimitive(tasks.starting(background, 30.0), 2.0).execute("x", context)
        return await tasks.outcome()

    assert "around the step that started this task" in str(run(main))


def test_branches_are_cut_once_when_the_limit_around_them_comes_first(
    tasks: Tasks, workflow_events: list[events.Event]
) -> None:
    """Their own limits are longer: the one error is that of the limit around, and no timeout of theirs is told."""
    branch = step(TimeoutPrimitive(tasks.work(10), 5.0).execute)  # hidden: a composition would warn

    async def main(context: WorkflowContext) -> Any:
        with pytest.raises(StepTimeoutError, match="its 2 s"):
            await TimeoutPrimitive(branch | branch, 2.0).execute("x", context)
        return context.state["timeout_count"]

    assert run(main) == 1
    assert [event.timeout for event in workflow_events if isinstance(event, events.StepTimedOut)] == [2.0]
    assert tasks.ended == [("CancelledError", 2.0)] * 2


def test_task_is_cut_at_the_deadline_when_its_call_is_over(tasks: Tasks) -> None:
    """While the call lasts, who waits for it cuts it; what it leaves running has nobody but its own limit."""
    context = WorkflowContext(deadline=Deadline.after(0.5))
    background = TimeoutPrimitive(step(lambda data: asyncio.sleep(3600)), 60.0)

    async def wait(task: asyncio.Task[Any]) -> Any:
        return (await asyncio.gather(task, return_exceptions=True))[0]

    facade = SyncFacade()
    try:
        assert facade.run_sync(tasks.starting(background, 0.0), "x", context) == "started"
        assert tasks.task is not None
        assert isinstance(facade.call_sync(wait, tasks.task, timeout=30.0), DeadlineExceededError)
    finally:
        facade.shutdown()
