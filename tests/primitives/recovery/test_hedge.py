"""The hedge: when a second attempt starts, who wins, and what becomes of the loser."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError, StepTimeoutError
from tta_sync.primitives.core.base import WorkflowPrimitive, step
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.recovery import (
    CircuitBreakerPrimitive,
    HedgePrimitive,
    RetryBudget,
    TimeoutPrimitive,
    orphans as left_behind,
)
from tta_sync.primitives.recovery.hedge import percentile
from tta_sync.testing import FakeClock


class Attempts:
    """A step whose n-th attempt takes seconds[n] and then does outcomes[n]; the last entry repeats."""

    def __init__(self, *plan: tuple[float, Any]) -> None:
        self.plan = plan
        self.begun: list[float] = []
        self.ended: list[tuple[int, str]] = []

    async def __call__(self, data: Any, context: WorkflowContext) -> Any:
        number = len(self.begun)
        self.begun.append(context.clock.monotonic())
        seconds, outcome = self.plan[min(number, len(self.plan) - 1)]
        context.state["attempt"] = number
        try:
            await context.clock.sleep(seconds)
        except asyncio.CancelledError:
            self.ended.append((number, "cancelled"))
            raise
        self.ended.append((number, "done"))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def hedge(attempts: Any, delay: float | None = 1.0, **options: Any) -> HedgePrimitive[Any, Any]:
    return HedgePrimitive(step(attempts, name="fetch", idempotent=True), delay, **options)


def run(primitive: WorkflowPrimitive[Any, Any], clock: FakeClock | None = None) -> Any:
    return asyncio.run(primitive.execute("x", WorkflowContext(clock=clock or FakeClock())))


def test_no_hedge_starts_when_the_first_attempt_is_quick() -> None:
    """One attempt, and its answer at its own time."""
    attempts, clock = Attempts((0.9, "first")), FakeClock()
    assert run(hedge(attempts), clock) == "first"
    assert attempts.begun == [0.0]
    assert clock.monotonic() == 0.9


def test_second_attempt_wins_and_the_slow_one_is_cancelled() -> None:
    """It starts after the delay; the loser is cancelled and has ended when the answer comes."""
    attempts, clock = Attempts((60, "slow"), (0.5, "quick")), FakeClock()
    assert run(hedge(attempts), clock) == "quick"
    assert attempts.begun == [0.0, 1.0]
    assert attempts.ended == [(1, "done"), (0, "cancelled")]
    assert clock.monotonic() == 1.5


def test_first_attempt_wins_when_it_answers_after_all() -> None:
    """The hedge is then the loser."""
    attempts = Attempts((1.5, "first"), (60, "hedge"))
    assert run(hedge(attempts)) == "first"
    assert attempts.ended == [(0, "done"), (1, "cancelled")]


def test_more_hedges_start_one_delay_after_another() -> None:
    """max_hedges bounds them."""
    attempts = Attempts((60, "a"), (60, "b"), (60, "c"), (0.25, "d"))
    assert run(hedge(attempts, 1.0, max_hedges=3)) == "d"
    assert attempts.begun == [0.0, 1.0, 2.0, 3.0]
    few = Attempts((60, "a"), (70, "b"))
    assert run(hedge(few, 1.0)) == "a"
    assert few.begun == [0.0, 1.0]


def test_failed_attempt_waits_for_the_other() -> None:
    """The first success wins, whoever failed before it."""
    assert run(hedge(Attempts((2.0, OSError("first")), (3.0, "hedge")))) == "hedge"
    assert run(hedge(Attempts((3.0, "first"), (0.5, OSError("hedge"))))) == "first"


def test_first_error_comes_out_when_all_attempts_fail() -> None:
    """With the others in its notes; an early failure starts no hedge: that is a retry's work."""
    first = OSError("first")
    attempts = Attempts((2.0, first), (2.0, ValueError("second")))
    with pytest.raises(OSError, match="first") as caught:
        run(hedge(attempts))
    assert caught.value is first
    assert "ValueError('second')" in first.__notes__[-1]
    early = Attempts((0.5, OSError("early")))
    with pytest.raises(OSError, match="early"):
        run(hedge(early))
    assert early.begun == [0.0]


def test_winner_keeps_its_state_and_the_loser_leaves_none() -> None:
    """Two attempts never write into one another's state."""

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock(), state={"kept": 1})
        await hedge(Attempts((60, "slow"), (0.5, "quick"))).execute("x", context)
        assert context.state == {"kept": 1, "attempt": 1}

    asyncio.run(main())


@pytest.mark.parametrize("delay", [1.0, None])
def test_winner_keeps_what_it_deleted_and_its_baggage(delay: float | None) -> None:
    """All that an attempt has its own copy of is the winner's in the end, with a race and without."""

    async def fetch(data: Any, context: WorkflowContext) -> None:
        del context.state["old"], context.tags["old"]
        context.metadata["new"] = context.baggage["new"] = "1"

    async def main() -> None:
        context = WorkflowContext(clock=FakeClock(), state={"old": 1, "kept": 2}, tags={"old": "1"})
        await hedge(fetch, delay).execute("x", context)
        assert (context.state, context.tags) == ({"kept": 2}, {})
        assert context.metadata == context.baggage == {"new": "1"}

    asyncio.run(main())


def test_only_the_winner_marks_the_call_degraded() -> None:
    """What a loser had to make do with on its way is nobody's answer."""

    async def main(loser: bool, winner: bool) -> bool:
        async def attempt(data: Any, context: WorkflowContext) -> str:
            first = context.clock.monotonic() == 0.0
            if loser if first else winner:
                context.mark_degraded()
            assert context.correlation_id == "call"
            await context.clock.sleep(60.0 if first else 0.5)
            return "answer"

        parent = WorkflowContext(clock=FakeClock(), correlation_id="call")
        context = parent.create_child_context()
        await hedge(attempt).execute("x", context)
        assert parent.degraded == context.degraded
        return context.degraded

    assert not asyncio.run(main(loser=True, winner=False))
    assert asyncio.run(main(loser=False, winner=True))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_an_attempt_comes_out_at_once(interrupt: type[BaseException]) -> None:
    """An exit of the interpreter waits for nobody, and cancels the other attempt."""
    attempts = Attempts((60, "slow"), (0.5, interrupt()))
    with pytest.raises(interrupt):
        run(hedge(attempts))
    assert attempts.ended == [(1, "done"), (0, "cancelled")]


def test_cancel_at_every_await_point_leaves_no_attempt_running(run_shuffled: Callable[..., Any]) -> None:
    """Whenever the caller cancels, once or twice, all attempts have ended when the cancellation comes out."""

    async def main(first: int, second: int) -> bool:
        attempts = Attempts((3.0, "a"), (3.0, "b"), (3.0, "c"))
        clock = FakeClock(autojump_threshold=None)
        task = asyncio.ensure_future(hedge(attempts, 0.5, max_hedges=2).execute("x", WorkflowContext(clock=clock)))
        before = asyncio.all_tasks() - {task}
        for tick in range(80):
            if tick in (first, first + second):
                if task.done():
                    break
                task.cancel()
            await asyncio.sleep(0)
            clock.jump(0.2)
        await asyncio.wait([task])
        assert asyncio.all_tasks() == before
        return not task.cancelled()

    for seed, second in itertools.product(range(2), (0, 1, 3)):
        for first in itertools.count():
            if run_shuffled(main(first, second), seed):
                break


def test_loser_that_swallows_its_cancellation_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    """The answer waits one second for it, and not for ever; a cancellation in that second comes out after it."""
    clock = FakeClock()

    async def stubborn(data: Any, context: WorkflowContext) -> str:
        if context.clock.monotonic() > 0:
            return "quick"
        end = context.clock.monotonic() + 5.0
        while context.clock.monotonic() < end:
            try:
                await context.clock.sleep(end - context.clock.monotonic())
            except asyncio.CancelledError:
                pass
        return "slow"

    async def main() -> None:
        assert await hedge(stubborn).execute("x", WorkflowContext(clock=clock)) == "quick"
        assert clock.monotonic() == 2.0
        assert len(left_behind.orphans) == 1
        await asyncio.wait(set(left_behind.orphans))

    with caplog.at_level(logging.WARNING, "tta_sync"):
        asyncio.run(main())
    assert "stubborn" in caplog.text

    async def cancelled() -> None:
        clock = FakeClock()
        task = asyncio.ensure_future(hedge(stubborn).execute("x", WorkflowContext(clock=clock)))
        await clock.sleep(1.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait(set(left_behind.orphans))

    asyncio.run(cancelled())


def test_loser_is_neutral_for_a_breaker_and_a_timeout_around_is_not() -> None:
    """A cancelled loser says nothing about the dependency; a limit around the hedge says it failed."""
    attempts = Attempts((60, "slow"), (0.5, "quick"))
    breaker: CircuitBreakerPrimitive[Any, Any] = CircuitBreakerPrimitive(
        step(attempts, idempotent=True), failure_threshold=1
    )
    assert run(HedgePrimitive(breaker, 1.0)) == "quick"
    assert breaker.failure_count == 0
    attempts.plan = ((60, "slow"),)
    with pytest.raises(StepTimeoutError):
        run(TimeoutPrimitive(HedgePrimitive(breaker, 1.0), 2.0))
    assert breaker.state == "open"


def test_delay_is_the_observed_95_percent_when_none_is_given() -> None:
    """Twenty calls are watched first; then only what is slower than 95 % of them is hedged."""
    attempts = Attempts((1.0, "a"))
    primitive = hedge(attempts, None)
    clock = FakeClock()

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        for number in range(20):
            assert primitive.current_delay() is None
            attempts.plan = ((0.1 * (number + 1), "a"),)
            await primitive.execute("x", context)
        assert primitive.current_delay() == pytest.approx(1.9)
        began = clock.monotonic()
        attempts.begun.clear()
        attempts.plan = ((60.0, "slow"), (0.1, "quick"))
        assert await primitive.execute("x", context) == "quick"
        assert attempts.begun == pytest.approx([began, began + 1.9])

    asyncio.run(main())
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([float(n) for n in range(100, 0, -1)], 0.95) == 95.0


def test_hedges_spend_the_retry_budget() -> None:
    """Each takes a token, a success gives back; with the budget at half there is none."""
    budget = RetryBudget(max=4, per_success=0.5)
    attempts = Attempts((60, "slow"), (0.5, "quick"))
    run(hedge(attempts, budget=budget))
    assert budget.tokens == 3.5
    assert budget.spend()
    assert budget.spend()
    assert not budget.spend()
    alone = Attempts((60, "slow"), (0.5, "quick"))
    assert run(hedge(alone, budget=budget)) == "slow"
    assert len(alone.begun) == 1


async def _answer(data: Any) -> Any:
    return data


FREE = step(_answer)
TWICE = step(_answer, idempotent=True)
ONCE = step(_answer, idempotent=False)


@pytest.mark.parametrize("inner", [FREE, ONCE, TWICE >> FREE, TimeoutPrimitive(FREE, 1)], ids=str)
def test_step_must_be_declared_idempotent_in_writing(inner: Any) -> None:
    """Silence is not consent, in any part; the word can be given on the hedge as well."""
    with pytest.raises(ConfigurationError, match="idempotent=True"):
        HedgePrimitive(inner, 1.0)
    assert run(HedgePrimitive(inner, 1.0, idempotent=True)) == "x"


def test_declaration_of_every_part_is_enough() -> None:
    """A sequence of declared steps, and wrappers of one."""
    assert run(HedgePrimitive(TimeoutPrimitive(TWICE >> TWICE, 5.0), 1.0)) == "x"
    with pytest.raises(ConfigurationError):
        HedgePrimitive(TWICE, 1.0, idempotent=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay": -1}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"delay": True}, "delay"),
        ({"delay": 1, "max_hedges": 0}, "max_hedges"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(options: dict[str, Any], said: str) -> None:
    """Each mistake is told at construction."""
    with pytest.raises(ConfigurationError, match=said):
        HedgePrimitive(TWICE, **options)


def test_event_tells_of_each_hedge(workflow_events: list[events.Event]) -> None:
    """HedgeStarted with the delay."""
    run(hedge(Attempts((60, "slow"), (0.5, "quick"))))
    (started,) = workflow_events
    assert isinstance(started, events.HedgeStarted)
    assert (started.step, started.delay) == ("fetch", 1.0)


def test_repr_shows_the_delay() -> None:
    """A workflow can be read."""
    assert repr(hedge(_answer, 0.25, name="h")) == "Hedge(fetch, delay=0.25)"
    assert repr(hedge(_answer, None)) == "Hedge(fetch, delay=p95)"


def test_error_leaves_no_reference_cycle() -> None:
    """Once the caller lets go of the error it is gone, without the garbage collector."""

    class Mark(Exception):
        pass

    async def fail(data: Any, context: WorkflowContext) -> None:
        await context.clock.sleep(2.0)
        raise Mark

    async def main() -> weakref.ref[Mark]:
        try:
            await hedge(fail).execute("x", WorkflowContext(clock=FakeClock()))
        except Mark as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        reference = asyncio.run(main())
        assert reference() is None
    finally:
        gc.enable()


def test_workflow_that_contains_itself_is_judged_by_its_other_parts() -> None:
    """What walks down a tree is built, or refused, and ends."""
    safe, unsafe = step(lambda data: data, idempotent=True), step(lambda data: data)
    tree = ConditionalPrimitive(bool, safe, safe)
    tree.else_primitive = tree
    assert asyncio.run(HedgePrimitive(tree, delay=1.0).execute(1)) == 1
    tree.then_primitive = unsafe
    with pytest.raises(ConfigurationError, match="must be declared harmless"):
        HedgePrimitive(tree, delay=1.0)
