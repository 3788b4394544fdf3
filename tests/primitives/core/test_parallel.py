"""Branches at once: order, isolation, the end of siblings, limits, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError
from tta_sync.primitives.core.base import WorkflowPrimitive, caller_step, step, thread_step
from tta_sync.primitives.core.composition import CompositionWarning
from tta_sync.primitives.core.parallel import ParallelPrimitive
from tta_sync.testing import FakeClock

ident = step(lambda data: data, name="ident")


def run(workflow: Any, data: Any = "x", context: WorkflowContext | None = None) -> Any:
    return asyncio.run(workflow.execute(data, context or WorkflowContext()))


def sleeping(seconds: float, result: Any = None, error: BaseException | None = None) -> WorkflowPrimitive[Any, Any]:
    """A step that takes *seconds* of the call's clock."""

    async def sleep(data: Any, context: WorkflowContext) -> Any:
        await context.clock.sleep(seconds)
        if error is not None:
            raise error
        return result

    return step(sleep, name=f"sleep{seconds:g}")


# ---- results ----------------------------------------------------------


def test_results_come_in_the_order_of_the_branches() -> None:
    """The slowest first branch still stands first."""
    context = WorkflowContext(clock=FakeClock())
    assert run(sleeping(3, "a") | sleeping(1, "b") | sleeping(2, "c"), context=context) == ["a", "b", "c"]
    assert context.clock.monotonic() == 3.0


def test_branches_get_the_same_input() -> None:
    """Each branch sees the data as it came, and functions may stand on either side."""
    assert run((lambda data: data + "1") | ident | (lambda data: data + "2")) == ["x1", "x", "x2"]


def test_operator_grows_one_parallel_from_either_side() -> None:
    """``a | b | c`` has three results; a parallel in a list, or with options of its own, stays one branch."""
    assert len((ident | ident | ident).children()) == 3
    assert len((ident | (ident | ident)).children()) == 3
    assert len(((ident | ident) | (ident | ident)).children()) == 4
    limited = ParallelPrimitive([ident, ident], max_concurrency=1)
    assert run(limited | ident) == [["x", "x"], "x"]
    assert run(ParallelPrimitive([ident | ident, ident])) == [["x", "x"], "x"]
    assert (ident | ident).primitives == [ident, ident]


def test_empty_parallel_is_refused() -> None:
    """No branches is a ValueError."""
    with pytest.raises(ValueError, match="at least one branch"):
        ParallelPrimitive([])


@pytest.mark.parametrize("limit", [0, -1])
def test_options_are_refused_when_they_make_no_sense(limit: int) -> None:
    """The message says what may stand there."""
    with pytest.raises(ConfigurationError, match="at least 1"):
        ParallelPrimitive([ident], max_concurrency=limit)
    with pytest.raises(ConfigurationError, match='"raise" or "collect"'):
        ParallelPrimitive([ident], on_error="ignore")  # type: ignore[arg-type]


# ---- isolation ----------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_branch_works_on_a_child_of_the_context(limit: int | None) -> None:
    """State written in a branch stays there; identity and deadline are shared; degraded comes back."""
    seen: list[WorkflowContext] = []

    def write(data: Any, context: WorkflowContext) -> Any:
        seen.append(context)
        context.state["mine"] = data
        context.state["outer"] += "!"
        return context.state.copy()

    def degrade(data: Any, context: WorkflowContext) -> Any:
        context.mark_degraded()

    context = WorkflowContext(state={"outer": "o"})
    flow = ParallelPrimitive([write, write, degrade], max_concurrency=limit)
    assert run(flow, context=context) == [{"outer": "o!", "mine": "x"}] * 2 + [None]
    assert context.state == {"outer": "o"}
    assert context.degraded
    assert {child.correlation_id for child in seen} == {context.correlation_id}
    assert {child.causation_id for child in seen} == {context.correlation_id}


@pytest.mark.parametrize("limit", [None, 1])
def test_branch_does_not_see_the_context_variables_of_another(limit: int | None) -> None:
    """What one branch sets, a branch that starts later does not read."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="untouched")

    def touch(data: Any) -> str:
        before = variable.get()
        variable.set("touched")
        return before

    assert run(ParallelPrimitive([touch, touch, touch], max_concurrency=limit)) == ["untouched"] * 3


# ---- failure ----------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 3])
def test_siblings_are_cancelled_and_awaited_when_one_fails(limit: int | None) -> None:
    """After the error is out, no side effect of a sibling lands: its clean-up has already run."""
    landed: list[str] = []

    async def sibling(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(10)
            landed.append("late side effect")
        finally:
            await asyncio.sleep(0)
            landed.append("cleaned")

    error = KeyError("mine")
    flow = ParallelPrimitive([sibling, sleeping(1, error=error), sibling], max_concurrency=limit)

    async def check() -> None:
        with pytest.raises(KeyError) as caught:
            await flow.execute("x", WorkflowContext(clock=FakeClock()))
        assert caught.value is error
        assert landed == ["cleaned", "cleaned"]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(check())
    assert error.__notes__ == ["in branch 2 of 3: sleep1"]


def test_other_errors_become_notes_of_the_first() -> None:
    """The first error in time comes out; what else went wrong stands in its notes."""

    async def fails_while_cleaning(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(10)
        finally:
            raise ValueError("in the clean-up")

    first = KeyError("first")
    context = WorkflowContext(clock=FakeClock())
    with pytest.raises(KeyError) as caught:
        run(step(fails_while_cleaning, name="messy") | sleeping(1, error=first), context=context)
    assert caught.value.__notes__ == [
        "in branch 2 of 2: sleep1",
        "branch 1 of 2: messy failed as well: ValueError('in the clean-up')",
    ]


def test_error_that_two_branches_share_is_not_its_own_note() -> None:
    """One error object raised twice comes out once."""
    error = ValueError("shared")
    flow = sleeping(1, error=error) | sleeping(1, error=error)
    with pytest.raises(ValueError, match="shared"):
        run(flow, context=WorkflowContext(clock=FakeClock()))
    assert error.__notes__ == ["in branch 1 of 2: sleep1"]


@pytest.mark.parametrize("limit", [None, 2])
def test_branch_that_is_cancelled_before_it_began_is_no_error(
    limit: int | None, run_shuffled: Callable[..., Any]
) -> None:
    """In whatever order the branches begin, only the one that failed is named."""

    async def fail(data: Any) -> None:
        raise ValueError("mine")

    started: list[Any] = []

    async def late(data: Any) -> None:
        started.append(data)
        await asyncio.Event().wait()

    async def check() -> list[str]:
        branches = [ident, step(fail, name="fail"), late]
        with pytest.raises(ValueError, match="mine") as caught:
            await ParallelPrimitive(branches, max_concurrency=limit).execute("x", WorkflowContext())
        return caught.value.__notes__

    assert {tuple(run_shuffled(check(), seed)) for seed in range(40)} == {("in branch 2 of 3: fail",)}
    assert len(started) < 40 or limit is None  # with a place for two, the third was sometimes cancelled unborn


def test_branch_that_never_started_is_not_run_when_an_earlier_one_fails(run_shuffled: Callable[..., Any]) -> None:
    """With a limit, branches that wait for a place are dropped."""
    started: list[int] = []

    def branch(number: int) -> WorkflowPrimitive[Any, Any]:
        def work(data: Any) -> None:
            started.append(number)
            raise ValueError(f"from {number}")

        return step(work)

    for seed in range(20):
        started.clear()
        flow = ParallelPrimitive([branch(number) for number in range(5)], max_concurrency=1)
        with pytest.raises(ValueError, match="from 0"):
            run_shuffled(flow.execute("x", WorkflowContext()), seed)
        assert started == [0]


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_collected_errors_stand_in_the_place_of_results(limit: int | None) -> None:
    """With on_error="collect" every branch runs to its end."""
    error = ValueError("mine")
    flow = ParallelPrimitive(
        [sleeping(1, "a"), sleeping(0.5, error=error), sleeping(2, "c")], on_error="collect", max_concurrency=limit
    )
    assert run(flow, context=WorkflowContext(clock=FakeClock())) == ["a", error, "c"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("on_error", ["raise", "collect"])
def test_interrupt_in_a_branch_comes_out_of_the_parallel(kind: type[BaseException], on_error: Any) -> None:
    """An interrupt ends the siblings and comes out in the task that runs the parallel, past any mere error."""
    ended: list[str] = []

    async def sibling(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(10)
        finally:
            ended.append("sibling")
            raise ValueError("a mere error")

    async def interrupt(data: Any, context: WorkflowContext) -> None:
        await context.clock.sleep(1)
        raise kind()

    async def check() -> None:
        flow = ParallelPrimitive([sibling, interrupt], on_error=on_error)
        with pytest.raises(kind):
            await flow.execute("x", WorkflowContext(clock=FakeClock()))

    asyncio.run(check())
    assert ended == ["sibling"]


def test_interrupt_in_a_clean_up_wins_over_the_error_that_started_it() -> None:
    """SystemExit from a cancelled sibling is not buried under the first error."""

    async def sibling(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(10)
        finally:
            raise SystemExit(3)

    async def check() -> None:
        flow = step(sibling) | sleeping(1, error=ValueError("first"))
        with pytest.raises(SystemExit):
            await flow.execute("x", WorkflowContext(clock=FakeClock()))

    asyncio.run(check())


# ---- cancellation ----------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("passes", range(5))
def test_cancelling_the_parallel_ends_every_branch(
    passes: int, limit: int | None, run_shuffled: Callable[..., Any]
) -> None:
    """Wherever the cancellation lands, no branch is left running and CancelledError comes out."""
    running = 0

    async def branch(data: Any) -> None:
        nonlocal running
        running += 1
        try:
            await asyncio.Event().wait()
        finally:
            running -= 1

    async def check() -> None:
        task = asyncio.create_task(
            ParallelPrimitive([branch] * 3, max_concurrency=limit).execute("x", WorkflowContext())
        )
        for _ in range(passes):
            await asyncio.sleep(0)
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for seed in range(20):
        run_shuffled(check(), seed)


def test_cancellation_wins_when_it_comes_while_siblings_are_awaited() -> None:
    """A caller who leaves during the clean-up gets CancelledError, not the branch's error."""
    cleaning = asyncio.Event()

    async def slow_to_leave(data: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def fail(data: Any) -> None:
        await asyncio.sleep(0)
        raise ValueError("mine")

    async def check() -> None:
        task = asyncio.create_task((step(slow_to_leave) | fail).execute("x", WorkflowContext()))
        await cleaning.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(check())


def test_second_cancellation_reaches_a_branch_that_swallowed_the_first() -> None:
    """A branch that ignores one cancellation does not hold a caller who insists."""
    swallowed = asyncio.Event()

    async def stubborn(data: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.Event().wait()

    async def check() -> None:
        task = asyncio.create_task((step(stubborn) | sleeping(1)).execute("x", WorkflowContext(clock=FakeClock())))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await swallowed.wait()
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)

    asyncio.run(check())


@pytest.mark.parametrize("limit", [None, 2])
def test_branch_that_somebody_cancels_ends_the_parallel(limit: int | None) -> None:
    """A stranger's cancellation of one branch, even before its first step, does not hang the caller."""

    async def check(first_step: bool) -> None:
        before = asyncio.all_tasks()
        task = asyncio.create_task(
            ParallelPrimitive([sleeping(100), sleeping(100)], max_concurrency=limit).execute(
                "x", WorkflowContext(clock=FakeClock(autojump_threshold=None))
            )
        )
        await asyncio.sleep(0)  # the branches are made, and have not begun
        if first_step:
            await asyncio.sleep(0)
        branch = next(iter(asyncio.all_tasks() - before - {task}))
        assert branch.get_name() == "sleep100"
        branch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
        assert asyncio.all_tasks() == before

    asyncio.run(check(False))
    asyncio.run(check(True))


def test_closing_the_loop_on_a_suspended_parallel_is_silent() -> None:
    """Branches that are dropped with their loop do not try to wake anybody."""
    loop = asyncio.new_event_loop()

    async def forever(data: Any) -> None:
        await asyncio.Event().wait()

    coroutine = (step(forever) | forever).execute("x", WorkflowContext())
    tasks = [loop.create_task(coroutine)]
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    tasks += [task for task in asyncio.all_tasks(loop) if task is not tasks[0]]
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # what the test is not about
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del coroutine, task
        tasks.clear()
        gc.collect()


# ---- limits ----------------------------------------------------------


def test_limit_bounds_how_many_branches_run_at_once() -> None:
    """Never more than max_concurrency, and never fewer while work is left."""
    running = peak = 0

    async def work(data: Any, context: WorkflowContext) -> float:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await context.clock.sleep(1)
        running -= 1
        return context.clock.monotonic()

    context = WorkflowContext(clock=FakeClock())
    assert run(ParallelPrimitive([work] * 6, max_concurrency=2), context=context) == [1, 1, 2, 2, 3, 3]
    assert peak == 2


# ---- nothing left behind ----------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("on_error", ["raise", "collect"])
def test_failed_call_leaves_nothing_behind_when_its_error_is_dropped(limit: int | None, on_error: Any) -> None:
    """No reference cycle keeps the call's data alive: it goes without the garbage collector."""

    class Data:
        pass

    async def fail(data: Any) -> None:
        await asyncio.sleep(0)
        raise ValueError("mine")

    async def attempt() -> list[weakref.ref[Data]]:
        gone = []
        for _ in range(3):
            data = Data()
            try:
                await ParallelPrimitive([fail, fail, ident], max_concurrency=limit, on_error=on_error).execute(data)
            except ValueError:
                pass
            gone.append(weakref.ref(data))
            del data
            await asyncio.sleep(0)  # the loop drops the last handle of the branches
        return gone

    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in asyncio.run(attempt())] == [None] * 3
    finally:
        gc.enable()


# ---- caller steps ----------------------------------------------------------


def test_parallel_of_caller_steps_warns_when_built() -> None:
    """They share one thread: the warning says so, at the line that composed them."""
    one, two = caller_step(lambda data: 1), caller_step(lambda data: 2)
    with pytest.warns(CompositionWarning, match="one after another") as caught:
        one | two
    assert caught[0].filename == __file__
    with pytest.warns(CompositionWarning):
        ParallelPrimitive([one >> two, two])


def test_parallel_with_other_steps_does_not_warn() -> None:
    """One branch that runs elsewhere is reason enough for a parallel."""
    one, two = caller_step(lambda data: 1), thread_step(lambda data: 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one | two
        ident | one | one
        ParallelPrimitive([one])
        ParallelPrimitive([one, one], max_concurrency=1)  # whoever writes this knows
        (one >> ident) | one
