"""The breaker: what opens it, what it lets through, what it must not count, and how it looks to many at once."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import os
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import (
    BulkheadFullError,
    CircuitBreakerError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    RateLimitedError,
    StepTimeoutError,
    not_called,
)
from tta_sync.primitives.core.base import MISS, WorkflowPrimitive, as_primitive, step
from tta_sync.primitives.core.composition import CompositionWarning
from tta_sync.primitives.core.conditional import ConditionalPrimitive
from tta_sync.primitives.core.mapping import MapPrimitive
from tta_sync.primitives.core.parallel import ParallelPrimitive
from tta_sync.primitives.core.routing import RouterPrimitive, SwitchPrimitive
from tta_sync.primitives.recovery import (
    BulkheadPrimitive,
    CircuitBreakerConfig,
    CircuitBreakerPrimitive,
    CircuitState,
    FallbackPrimitive,
    HedgePrimitive,
    RetryPrimitive,
    SagaPrimitive,
    TimeoutPrimitive,
)
from tta_sync.primitives.recovery.circuit_breaker import (
    CountWindow,
    TimeWindow,
    break_for,
    trips,
    window_of,
)
from tta_sync.testing import FakeClock

CLOSED, OPEN, HALF_OPEN = CircuitState


class Service:
    """A dependency that does what the test says: *outcome* is raised or returned, after *seconds*."""

    def __init__(self) -> None:
        self.outcome: Any = "ok"
        self.seconds = 0.0
        self.calls = 0

    async def __call__(self, data: Any, context: WorkflowContext) -> Any:
        self.calls += 1
        outcome = self.outcome
        if self.seconds:
            await context.clock.sleep(self.seconds)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def _answer(data: Any) -> Any:
    return data


class Bench:
    """A breaker over a service, on a clock that stands still."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock(start=1000.0)
        self.service = Service()
        self.breaker: CircuitBreakerPrimitive[Any, Any] = CircuitBreakerPrimitive(self.service, name="svc", **options)

    def call(self, outcome: Any = "ok", seconds: float = 0.0, around: Any = None, deadline: float | None = None) -> Any:
        self.service.outcome, self.service.seconds = outcome, seconds
        context = WorkflowContext(clock=self.clock)
        if deadline is not None:
            context.deadline = Deadline.after(deadline, self.clock)
        workflow = self.breaker if around is None else around(self.breaker)
        try:
            return asyncio.run(workflow.execute(1, context))
        except Exception as error:
            return error

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.call(OSError("down"))


# ---- consecutive mode -------------------------------------------------


def test_circuit_opens_at_the_threshold_of_failures_in_a_row() -> None:
    """The fifth failure opens it; the next call is not made."""
    bench = Bench()
    bench.fail(4)
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 4)
    bench.fail()
    assert (bench.breaker.state, bench.breaker.failure_count) == (OPEN, 5)
    assert isinstance(bench.call(), CircuitOpenError)
    assert bench.service.calls == 5


def test_success_starts_the_count_again() -> None:
    """Only failures in a row count."""
    bench = Bench(failure_threshold=2)
    for outcome in (OSError(), "ok", OSError(), "ok", OSError()):
        bench.call(outcome)
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 1)


def test_open_circuit_error_carries_all_four_attributes() -> None:
    """circuit, retry_after in seconds, failure_count and last_error; it pickles, under both names."""
    bench = Bench(failure_threshold=1, recovery_timeout=60.0)
    bench.fail()
    bench.clock.jump(20.0)
    error = bench.call()
    assert isinstance(error, CircuitBreakerError)
    assert (error.circuit, error.retry_after, error.failure_count) == ("svc", 40.0, 1)
    assert repr(error.last_error) == "OSError('down')"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.circuit, copy.retry_after) == ("svc", 40.0)


def test_open_circuit_error_pickles_whatever_opened_the_circuit() -> None:
    """An error that cannot cross to another process goes as its text; httpx's own are such."""
    import httpx

    class Local(Exception):
        pass

    for error in (
        httpx.HTTPStatusError("busy", request=httpx.Request("GET", "http://x"), response=httpx.Response(503)),
        Local("local"),
    ):
        refused = CircuitOpenError("svc", 3.0, 5, error)
        refused.add_note("a note")
        assert refused.last_error is error
        copy = pickle.loads(pickle.dumps(refused))
        assert (copy.circuit, copy.retry_after, copy.failure_count) == ("svc", 3.0, 5)
        assert type(error).__name__ in str(copy.last_error)
        assert str(error) in str(copy.last_error)
        assert copy.__notes__ == ["a note"]
    assert pickle.loads(pickle.dumps(CircuitOpenError("svc"))).last_error is None


def test_circuit_closes_after_enough_probes_have_succeeded() -> None:
    """Half-open after recovery_timeout, closed after success_threshold successes."""
    bench = Bench(failure_threshold=1, recovery_timeout=10.0, success_threshold=2)
    bench.fail()
    bench.clock.jump(9.999)
    assert isinstance(bench.call(), CircuitOpenError)
    bench.clock.jump(0.001)
    assert bench.call() == "ok"
    assert (bench.breaker.state, bench.breaker.success_count) == (HALF_OPEN, 1)
    assert bench.call() == "ok"
    assert (bench.breaker.state, bench.breaker.failure_count, bench.breaker.success_count) == (CLOSED, 0, 0)


def test_failed_probe_opens_the_circuit_again_for_the_whole_time() -> None:
    """One failure in half-open is enough."""
    bench = Bench(failure_threshold=3, recovery_timeout=10.0)
    bench.fail(3)
    bench.clock.jump(10.0)
    bench.fail()
    assert bench.breaker.state is OPEN
    error = bench.call()
    assert error.retry_after == 10.0
    assert error.failure_count == 4


def test_half_open_lets_one_probe_through_and_no_crowd(run_shuffled: Callable[..., Any]) -> None:
    """Of fifty calls at once one goes through; the others are told to come back soon."""

    async def main(bench: Bench, permits: int) -> None:
        context = WorkflowContext(clock=bench.clock)
        bench.service.outcome, bench.service.seconds = "ok", 1.0
        calls = [bench.breaker.execute(1, context) for _ in range(50)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results.count("ok") == permits
        refused = [result for result in results if isinstance(result, CircuitOpenError)]
        assert len(refused) == 50 - permits
        assert all(0 < error.retry_after <= 1.0 for error in refused)

    for seed, permits in itertools.product(range(3), (1, 3)):
        bench = Bench(failure_threshold=1, success_threshold=9, half_open_permits=permits)
        bench.fail()
        bench.clock.jump(60.0)
        run_shuffled(main(bench, permits), seed)
        assert bench.breaker.state is HALF_OPEN


def test_result_of_a_call_begun_before_the_trip_is_discarded() -> None:
    """A slow success from before the circuit opened neither closes it nor counts as a probe."""
    bench = Bench(failure_threshold=1, recovery_timeout=5.0, success_threshold=1)

    async def main() -> None:
        context = WorkflowContext(clock=bench.clock)
        bench.service.seconds = 3.0
        early_success = asyncio.ensure_future(bench.breaker.execute(1, context))
        bench_failure = asyncio.ensure_future(bench.breaker.execute(1, context))
        await asyncio.sleep(0)
        bench.service.seconds, bench.service.outcome = 6.0, OSError("late")
        late_failure = asyncio.ensure_future(bench.breaker.execute(1, context))
        await asyncio.sleep(0)
        bench.service.seconds, bench.service.outcome = 0.0, OSError("trip")
        with pytest.raises(OSError, match="trip"):
            await bench.breaker.execute(1, context)
        await early_success
        await bench_failure
        assert bench.breaker.state is OPEN
        await bench.clock.sleep(2.5)
        bench.service.outcome = "ok"
        assert await bench.breaker.execute(1, context) == "ok"
        assert bench.breaker.state is CLOSED
        with pytest.raises(OSError, match="late"):
            await late_failure
        assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 0)

    asyncio.run(main())


# ---- what counts ------------------------------------------------------


def test_call_cut_by_a_timeout_around_counts_as_a_failure() -> None:
    """Timeout(Breaker(hang)) opens the circuit: the breaker knows why it was cancelled."""
    bench = Bench(failure_threshold=2)
    for _ in range(2):
        result = bench.call(seconds=3600, around=lambda breaker: TimeoutPrimitive(breaker, 1.0))
        assert isinstance(result, StepTimeoutError)
    assert bench.breaker.state is OPEN


def test_call_cut_by_the_deadline_counts_as_a_failure() -> None:
    """The deadline, enforced by a timeout around, is the same."""
    bench = Bench(failure_threshold=1)
    result = bench.call(seconds=3600, around=lambda breaker: TimeoutPrimitive(breaker, 9.0), deadline=1.0)
    assert isinstance(result, DeadlineExceededError)
    assert bench.breaker.state is OPEN


def test_call_cut_by_whoever_enforces_the_deadline_counts_as_a_failure() -> None:
    """Whoever sets deadline.struck before he cancels has said why."""
    bench = Bench(failure_threshold=1)

    async def main() -> None:
        bench.service.seconds = 3600
        context = WorkflowContext(clock=bench.clock, deadline=Deadline.after(1.0, bench.clock))
        task = asyncio.ensure_future(bench.breaker.execute(1, context))
        await asyncio.sleep(0)
        assert context.deadline is not None
        context.deadline.struck = True
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert bench.breaker.state is OPEN


def test_step_that_outlives_its_cancellation_counts_as_a_failure_in_the_end() -> None:
    """A late result of a call that was cut is no success."""
    bench = Bench(failure_threshold=1)

    async def stubborn(data: Any, context: WorkflowContext) -> str:
        try:
            await context.clock.sleep(3600)
        except asyncio.CancelledError:
            pass
        return "late"

    bench.breaker = CircuitBreakerPrimitive(stubborn, failure_threshold=1)
    assert isinstance(bench.call(around=lambda breaker: TimeoutPrimitive(breaker, 1.0)), StepTimeoutError)
    assert bench.breaker.state is OPEN


@pytest.mark.parametrize("half_open", [False, True])
def test_cancellation_by_the_caller_is_neutral(half_open: bool) -> None:
    """A caller who goes away says nothing about the dependency, and gives his permit back."""
    bench = Bench(failure_threshold=1, recovery_timeout=5.0, success_threshold=1)
    if half_open:
        bench.fail()
        bench.clock.jump(5.0)

    async def main() -> None:
        bench.service.outcome, bench.service.seconds = "ok", 3600
        context = WorkflowContext(clock=bench.clock)
        task = asyncio.ensure_future(bench.breaker.execute(1, context))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert bench.breaker.state is (HALF_OPEN if half_open else CLOSED)
        bench.service.seconds = 0
        assert await bench.breaker.execute(1, context) == "ok"
        assert bench.breaker.state is CLOSED

    asyncio.run(main())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not expected"),
        CircuitOpenError("inner"),
        BulkheadFullError("inner"),
        RateLimitedError("inner"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_not_expected_count_as_neither(error: Exception) -> None:
    """They neither open nor reset the count, and give the permit of a probe back."""
    bench = Bench(failure_threshold=2, recovery_timeout=5.0, expected_exception=(OSError, CircuitOpenError))
    bench.fail()
    for _ in range(5):
        assert bench.call(error) is error
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 1)
    bench.fail()
    bench.clock.jump(5.0)
    for _ in range(3):
        assert bench.call(error) is error
        assert (bench.breaker.state, bench.breaker.success_count) == (HALF_OPEN, 0)
    assert bench.call() == "ok"


def in_line(breaker: Any, clock: FakeClock, seconds: float, around: Any = None) -> list[Any]:
    """Three calls at once with a deadline after *seconds* each; return what became of them."""

    async def main() -> list[Any]:
        workflow = breaker if around is None else around(breaker)
        contexts = [WorkflowContext(clock=clock, deadline=Deadline.after(seconds, clock)) for _ in range(3)]
        return await asyncio.gather(*(workflow.execute(1, context) for context in contexts), return_exceptions=True)

    return asyncio.run(main())


def test_deadline_that_passes_in_a_bulkheads_line_is_no_failure() -> None:
    """The one call that was made has succeeded: those that were not made say nothing about the dependency."""
    bench = Bench()
    bench.service.seconds = 5.0
    breaker = CircuitBreakerPrimitive(BulkheadPrimitive(bench.service, 1, 10), failure_threshold=2)
    first, *others = in_line(breaker, bench.clock, 3.0)
    assert first == "ok"
    assert [(type(error), error.before_call) for error in others] == [(DeadlineExceededError, True)] * 2
    assert bench.service.calls == 1
    assert (breaker.state, breaker.failure_count) == (CLOSED, 0)


async def _uses_up(data: Any, context: WorkflowContext) -> Any:
    """Take two seconds; when cut, 0.8 to clean up."""
    try:
        await context.clock.sleep(2.0)
    finally:
        await context.clock.sleep(0.8)
    return True


def _down(data: Any) -> None:
    raise OSError("down")


LATER = TimeoutPrimitive(step(lambda data: data), 5.0)  # finds that the time is up
USED_UP: dict[str, Any] = {
    "Timeout's fallback": TimeoutPrimitive(_uses_up, 0.5, fallback=LATER),
    "Parallel": ParallelPrimitive([_uses_up, LATER], max_concurrency=1),
    "Map": MapPrimitive(SwitchPrimitive(lambda item: item, {0: _uses_up}, LATER), max_concurrency=1),
    "Conditional": ConditionalPrimitive(_uses_up, LATER),
    "Switch": SwitchPrimitive(_uses_up, {True: LATER}),
    "Router": RouterPrimitive({True: LATER}, _uses_up),
    "Sequential": step(_uses_up) >> LATER,
}


@pytest.mark.filterwarnings("ignore::tta_sync.primitives.CompositionWarning")
@pytest.mark.parametrize("workflow", USED_UP.values(), ids=USED_UP)
def test_call_that_used_up_the_time_counts_though_a_later_part_says_so(workflow: Any) -> None:
    """The part that finds no time left was not called; what the breaker is around was."""
    clock = FakeClock()
    breaker = CircuitBreakerPrimitive(workflow, failure_threshold=1)
    context = WorkflowContext(clock=clock, deadline=Deadline.after(1.0, clock))
    with pytest.raises(DeadlineExceededError) as caught:
        asyncio.run(breaker.execute([0, 1], context))
    assert not caught.value.before_call
    assert breaker.state == OPEN


def test_attempt_that_was_not_made_says_nothing_about_the_one_that_was() -> None:
    """Of a fallback's parts, and of a hedge's attempts: the error of one that found no time left is not the whole."""

    class Late:
        calls = 0

        async def execute(self, data: Any, context: WorkflowContext) -> Any:
            self.calls += 1
            if self.calls > 1:
                raise not_called(StepTimeoutError("late", 0.0, ""))
            await context.clock.sleep(2.0)
            raise StepTimeoutError("made", 2.0, "")

    async def not_made(data: Any) -> None:
        raise not_called(StepTimeoutError("not made", 0.0, ""))

    async def cut(data: Any) -> None:
        error: Any = asyncio.CancelledError()
        error.before_call = True
        raise error

    def marks(workflow: Any) -> bool:
        with pytest.raises((StepTimeoutError, asyncio.CancelledError)) as caught:
            asyncio.run(workflow.execute(1, WorkflowContext(clock=FakeClock())))
        return bool(getattr(caught.value, "before_call", False))

    late: Any = Late()
    assert not marks(HedgePrimitive(as_primitive(late), 1.0, idempotent=True))
    assert marks(HedgePrimitive(not_made, 1.0, idempotent=True))
    assert not marks(FallbackPrimitive(not_made, _times_out))
    assert marks(FallbackPrimitive(not_made, not_made))
    assert not marks(FallbackPrimitive(_down, cut))
    assert marks(FallbackPrimitive(not_made, cut))


def _times_out(data: Any) -> None:
    raise StepTimeoutError("made", 1.0, "")


def test_limit_that_strikes_in_a_bulkheads_line_is_no_failure() -> None:
    """Cut from within or from without the breaker, by a limit or by a deadline: the step was not called."""
    for seconds, around in ((9.0, None), (9.0, lambda breaker: TimeoutPrimitive(breaker, 3.0))):
        bench = Bench()
        bench.service.seconds = 5.0
        line = BulkheadPrimitive(bench.service, 1, 10, name="line")
        breaker = CircuitBreakerPrimitive(TimeoutPrimitive(line, 3.0) if around is None else line, failure_threshold=2)
        results = in_line(breaker, bench.clock, seconds, around)
        assert all(isinstance(result, (StepTimeoutError, BulkheadFullError)) for result in results)
        assert bench.service.calls == 1
        assert (breaker.state, breaker.failure_count) == (CLOSED, 1)  # the one that was under way


@pytest.mark.parametrize("shape", ["sequence", "retry", "saga"])
def test_call_that_is_cut_in_a_later_steps_line_is_a_failure(shape: str) -> None:
    """Steps had been called by then: it is not as if the breaker's own had not been."""
    clock = FakeClock()
    attempts = itertools.count()

    async def fail_first(data: Any, context: WorkflowContext) -> Any:
        if next(attempts) % 2 == 0:
            raise OSError("down")
        return await line.execute(data, context)

    line = BulkheadPrimitive(lambda data, context: context.clock.sleep(100.0), 1, 5)
    called = step(lambda data: data)
    flow: Any = {
        "sequence": called >> line,
        "saga": SagaPrimitive([(called, None), (line, None)]),
        "retry": RetryPrimitive(fail_first),
    }[shape]
    breaker = CircuitBreakerPrimitive(flow, failure_threshold=9)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        busy = asyncio.create_task(line.execute(0, context))
        await asyncio.sleep(0)
        for count in range(1, 4):
            with pytest.raises(StepTimeoutError):
                await TimeoutPrimitive(breaker, 5.0).execute(1, context)
            assert breaker.failure_count == count
        busy.cancel()
        await asyncio.wait([busy])

    asyncio.run(main())


@pytest.mark.parametrize("struck", ["limit", "deadline"])
def test_call_that_begins_after_the_cut_is_judged_by_its_own_end(struck: str) -> None:
    """A clean-up through a breaker succeeds: that the work around it was cut is no failure of what it calls."""
    release = CircuitBreakerPrimitive(step(lambda data: "released"), failure_threshold=2)
    failing = CircuitBreakerPrimitive(step(lambda data: 1 / 0), failure_threshold=9)
    waiting = CircuitBreakerPrimitive(step(lambda data: asyncio.sleep(0)), failure_threshold=2)
    clock = FakeClock()

    async def work(data: Any, context: WorkflowContext) -> None:
        try:
            await context.clock.sleep(100.0)
        finally:
            await release.execute(data, context)
            await waiting.execute(data, context)
            with pytest.raises(ZeroDivisionError):
                await failing.execute(data, context)

    for count in range(1, 5):
        context = WorkflowContext(clock=clock)
        if struck == "deadline":
            context.deadline = Deadline.after(2.0, clock)
        with pytest.raises(TimeoutError):
            asyncio.run(TimeoutPrimitive(work, 5.0).execute(1, context))
        assert (release.failure_count, waiting.failure_count, failing.failure_count) == (0, 0, count)


@pytest.mark.parametrize("struck", ["cancelled", "woken"])
def test_deadline_enforced_from_outside_is_no_failure_in_a_bulkheads_line(struck: str) -> None:
    """Whoever cancels the call at its deadline may be faster than the line's own timer; and nothing stays held."""
    bench = Bench()
    bench.service.seconds = 5.0
    line = BulkheadPrimitive(bench.service, 1, 10)
    breaker = CircuitBreakerPrimitive(line, failure_threshold=1)

    async def main() -> None:
        first = asyncio.ensure_future(breaker.execute(1, WorkflowContext(clock=bench.clock)))
        await asyncio.sleep(0)
        context = WorkflowContext(clock=bench.clock, deadline=Deadline.after(3.0, bench.clock))
        second = asyncio.ensure_future(breaker.execute(1, context))
        await asyncio.sleep(0)
        assert line.waiting == 1
        assert context.deadline is not None
        context.deadline.struck = True
        if struck == "cancelled":
            second.cancel()
        await asyncio.wait([first, second])
        assert second.cancelled() is (struck == "cancelled")

    asyncio.run(main())
    assert (line.waiting, line.in_use) == (0, 0)
    assert (breaker.state, breaker.failure_count) == (CLOSED, 0)


@pytest.mark.parametrize("deadline", [None, 9.0])
def test_time_that_is_up_before_the_call_is_no_failure(deadline: float | None) -> None:
    """A timeout inside that finds no time left raises before it calls; a call under way that is cut still counts."""
    bench = Bench()
    breaker = CircuitBreakerPrimitive(TimeoutPrimitive(bench.service, 5.0), failure_threshold=1)

    def call(seconds: float) -> Any:
        async def late(data: Any, context: WorkflowContext) -> Any:
            bench.clock.jump(seconds)  # as work does that blocks the loop
            return await breaker._run(data, context)

        bench.service.seconds = 3600
        context = WorkflowContext(clock=bench.clock)
        if deadline is not None:
            context.deadline = Deadline.after(deadline, bench.clock)
        workflow: Any = step(late) if deadline is not None else TimeoutPrimitive(late, 9.0)
        with pytest.raises(TimeoutError):
            asyncio.run(workflow.execute(1, context))
        return breaker.state

    assert (call(10.0), bench.service.calls) == (CLOSED, 0)
    assert (call(1.0), bench.service.calls) == (OPEN, 1)


def test_probe_that_never_reached_the_step_gives_its_permit_back() -> None:
    """It has probed nothing: the next call is the probe."""
    bench = Bench(failure_threshold=1, recovery_timeout=5.0, success_threshold=1)
    bench.fail()
    bench.clock.jump(5.0)
    error = DeadlineExceededError(1.0)
    error.before_call = True
    assert bench.call(error) is error
    assert bench.breaker.state is HALF_OPEN
    assert bench.call() == "ok"
    assert bench.breaker.state is CLOSED


def test_interrupt_gives_the_permit_back() -> None:
    """KeyboardInterrupt says nothing about the dependency."""
    bench = Bench(failure_threshold=1, expected_exception=BaseException)
    bench.service.outcome = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.breaker.execute(1, WorkflowContext()).send(None)
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 0)


def test_permit_of_a_probe_that_hangs_can_be_taken_over() -> None:
    """A lease ends: after probe_seconds another call may probe, and the first one's result no longer counts."""
    bench = Bench(failure_threshold=1, recovery_timeout=10.0, success_threshold=1, probe_seconds=4.0)
    bench.fail()
    bench.clock.jump(10.0)

    async def main() -> None:
        context = WorkflowContext(clock=bench.clock)
        bench.service.outcome, bench.service.seconds = OSError("after all"), 5.0
        hanging = asyncio.ensure_future(bench.breaker.execute(1, context))
        await asyncio.sleep(0)
        with pytest.raises(CircuitOpenError):
            await bench.breaker.execute(1, context)
        await bench.clock.sleep(4.0)
        bench.service.outcome, bench.service.seconds = "ok", 2.0
        second = asyncio.ensure_future(bench.breaker.execute(1, context))
        with pytest.raises(OSError, match="after all"):
            await hanging
        assert bench.breaker.state is HALF_OPEN
        await second
        assert bench.breaker.state is CLOSED

    asyncio.run(main())


def test_lease_is_as_long_as_the_break_by_default() -> None:
    """recovery_timeout in consecutive mode, max_break_duration with a window."""
    assert Bench(recovery_timeout=7.0).breaker._probe_seconds == 7.0
    assert Bench(window=10, max_break_duration=8.0).breaker._probe_seconds == 8.0


# ---- by hand ----------------------------------------------------------


def test_reset_closes_the_circuit_and_forgets() -> None:
    """After reset() it takes the whole threshold again."""
    bench = Bench(failure_threshold=2)
    bench.fail(2)
    bench.breaker.reset()
    bench.fail()
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 1)


def test_forced_open_circuit_stays_open_until_it_is_closed_by_hand() -> None:
    """No probe goes through, however long it takes."""
    bench = Bench(recovery_timeout=5.0)
    bench.breaker.force_open()
    bench.clock.jump(1e9)
    error = bench.call()
    assert isinstance(error, CircuitOpenError)
    assert error.retry_after == 5.0
    bench.breaker.force_close()
    assert bench.call() == "ok"


def test_calls_under_way_are_not_counted_after_a_reset() -> None:
    """What began before belongs to what was forgotten."""
    bench = Bench(failure_threshold=1)

    async def main() -> None:
        bench.service.outcome, bench.service.seconds = OSError(), 1.0
        task = asyncio.ensure_future(bench.breaker.execute(1, WorkflowContext(clock=bench.clock)))
        await asyncio.sleep(0)
        bench.breaker.reset()
        await asyncio.wait([task])
        task.exception()

    asyncio.run(main())
    assert bench.breaker.state is CLOSED


# ---- window mode ------------------------------------------------------

TRIPS = [
    # calls, failures, slow -> opens
    (9, 9, 9, False),
    (10, 4, 0, False),
    (10, 5, 0, True),
    (10, 0, 5, True),
    (10, 0, 4, False),
    (100, 49, 49, False),
    (100, 50, 0, True),
    (10, 0, 0, False),
]


@pytest.mark.parametrize(("calls", "failures", "slow", "opens"), TRIPS)
def test_window_opens_by_ratio_of_enough_calls(calls: int, failures: int, slow: int, opens: bool) -> None:
    """Half of the calls failed or slow, and never on fewer than ten."""
    assert trips(CircuitBreakerConfig(window=100), calls, failures, slow) is opens


def test_break_doubles_from_five_to_sixty_seconds_with_jitter() -> None:
    """Each break lies within [5, 60], is about twice the one before, and no two processes draw the same."""
    config = CircuitBreakerConfig(window=100)
    for opened_before, least in enumerate([5, 10, 20, 40, 48, 48]):
        drawn = {break_for(config, opened_before, 0.0, random.Random(seed)) for seed in range(50)}
        assert all(least <= seconds <= min(60, least * 1.25) for seconds in drawn)
        assert len(drawn) > 40
    assert break_for(config, 100_000, 0.0, random.Random(1)) <= 60


def test_break_is_what_the_server_asks_for_when_it_asks() -> None:
    """Retry-After replaces the drawn break, bounded by an hour; consecutive mode keeps its own fixed time."""
    chance = random.Random(1)
    assert break_for(CircuitBreakerConfig(window=100), 0, 7.5, chance) == 7.5
    assert break_for(CircuitBreakerConfig(window=100), 0, 1e9, chance) == 3600.0
    assert break_for(CircuitBreakerConfig(recovery_timeout=9.0), 0, 7.5, chance) == 9.0


def test_count_window_looks_at_the_last_calls_only() -> None:
    """The eleventh call pushes the first one out."""
    bench = Bench(window=20, minimum_calls=10, failure_ratio=0.5)
    for outcome in [OSError()] * 4 + ["ok"] * 16 + [OSError()] * 5:
        bench.call(outcome)
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 5)
    for _ in range(5):
        bench.call(OSError())
    assert bench.breaker.state is OPEN


def test_success_opens_the_circuit_when_it_completes_the_minimum() -> None:
    """Nine failures and a success are ten calls, nine of them failed; the break begins now."""
    bench = Bench(window="count")
    bench.fail(9)
    bench.call("ok")
    assert bench.breaker.state is OPEN
    error = bench.call()
    assert isinstance(error, CircuitOpenError)
    assert 5.0 <= error.retry_after <= 6.25


@pytest.mark.parametrize("window", [1, 5, 10])
def test_small_window_opens_when_it_is_full_of_failures(window: int) -> None:
    """Without minimum_calls the minimum is what the window holds, and never more than ten."""
    bench = Bench(window=window)
    assert bench.breaker.config.minimum_calls == window
    bench.fail(window - 1)
    assert bench.breaker.state is CLOSED
    bench.fail()
    assert bench.breaker.state is OPEN


def test_minimum_calls_that_nobody_has_given_follow_the_window_when_a_config_is_varied() -> None:
    """A config for a small window may be taken for a large one, and the other way round."""
    small = CircuitBreakerConfig(window=5)
    for window, minimum in ((20, 10), (30.0, 10), ("count", 10), (None, 10), (3, 3)):
        assert CircuitBreakerPrimitive(_answer, small, window=window).config.minimum_calls == minimum
    assert pickle.loads(pickle.dumps(small)) == small
    assert CircuitBreakerPrimitive(_answer, pickle.loads(pickle.dumps(small)), window=20).config.minimum_calls == 10
    assert CircuitBreakerConfig() == CircuitBreakerConfig(minimum_calls=10)
    assert "minimum_calls=10," in repr(CircuitBreakerConfig())


def test_time_window_forgets_with_time() -> None:
    """Failures older than the window no longer count."""
    bench = Bench(window=30.0, minimum_calls=4)
    bench.fail(3)
    bench.clock.jump(31.0)
    bench.fail(3)
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 3)
    bench.fail()
    assert bench.breaker.state is OPEN


def test_slow_calls_open_the_circuit_when_a_limit_is_set() -> None:
    """A success that took longer than slow_call_seconds is slow; the default knows no slow calls."""
    slow, plain = Bench(window=10, slow_call_seconds=1.0), Bench(window=10)
    for bench in (slow, plain):
        for _ in range(10):
            bench.call(seconds=1.5)
    assert (slow.breaker.state, plain.breaker.state) == (OPEN, CLOSED)


def test_cut_call_is_failed_and_slow_in_window_mode() -> None:
    """Five calls cut and five good ones open by either ratio."""
    for options in ({"failure_ratio": 1.0}, {"slow_ratio": 1.0}):
        bench = Bench(window=10, **options)
        for _ in range(5):
            bench.call()
        for _ in range(5):
            bench.call(seconds=60, around=lambda breaker: TimeoutPrimitive(breaker, 1.0))
        assert bench.breaker.state is OPEN


def test_window_starts_empty_after_the_circuit_has_closed() -> None:
    """Old failures do not open it again; the break is short again."""
    bench = Bench(window=10, success_threshold=1)
    bench.fail(10)
    bench.clock.jump(7.0)
    assert bench.call() == "ok"
    assert (bench.breaker.state, bench.breaker.failure_count) == (CLOSED, 0)
    bench.fail(9)
    assert bench.breaker.state is CLOSED
    bench.fail()
    error = bench.call()
    assert error.retry_after <= 6.25


def test_servers_retry_after_sets_the_break_in_window_mode() -> None:
    """The error that opens the circuit says for how long."""

    class Busy(Exception):
        retry_after = 17.0

    bench = Bench(window=10)
    for _ in range(10):
        bench.call(Busy())
    error = bench.call()
    assert error.retry_after == 17.0


@pytest.mark.parametrize(
    ("window", "kind"), [("count", CountWindow), ("time", TimeWindow), (50, CountWindow), (2.5, TimeWindow)]
)
def test_window_is_counted_or_timed_by_its_type(window: Any, kind: type) -> None:
    """An int is a number of calls, a float of seconds."""
    assert isinstance(window_of(CircuitBreakerConfig(window=window)), kind)
    assert window_of(CircuitBreakerConfig()) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"failure_threshold": 0}, "failure_threshold"),
        ({"success_threshold": 1.5}, "success_threshold"),
        ({"half_open_permits": True}, "half_open_permits"),
        ({"recovery_timeout": 0}, "recovery_timeout"),
        ({"recovery_timeout": math.inf}, "recovery_timeout"),
        ({"slow_call_seconds": -1}, "slow_call_seconds"),
        ({"failure_ratio": 1.1}, "failure_ratio"),
        ({"slow_ratio": 0}, "slow_ratio"),
        ({"window": "month"}, "'count' or 'time'"),
        ({"window": 0}, "number of calls"),
        ({"window": True}, "number of calls"),
        ({"window": 5, "minimum_calls": 10}, "write minimum_calls=5 or less"),
        ({"window": "count", "minimum_calls": 101}, "a window of 100 calls never holds minimum_calls=101"),
        ({"config": CircuitBreakerConfig(minimum_calls=10), "window": 9}, "write minimum_calls=9 or less"),
        ({"break_duration": 61.0}, "longer than max_break_duration"),
        ({"expected_exception": "OSError"}, "exception types"),
        ({"expected_exception": ()}, "exception types"),
        ({"treshold": 3}, "treshold"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(options: dict[str, Any], said: str) -> None:
    """Each mistake is told at construction, a misspelt option too."""
    with pytest.raises(ConfigurationError, match=said):
        Bench(**options)


def test_config_and_keywords_combine() -> None:
    """A shared config can be varied for one breaker, in either spelling and under either module name."""
    from tta_sync.primitives.recovery import circuit_breaker_primitive as other

    config = other.CircuitBreakerConfig(failure_threshold=3, recovery_timeout=1.0)
    breaker = other.CircuitBreakerPrimitive(Service(), config, failure_threshold=7)
    assert (breaker.config.failure_threshold, breaker.config.recovery_timeout) == (7, 1.0)
    assert other.CircuitState is CircuitState
    assert other.CircuitBreakerError is CircuitOpenError
    assert CircuitState.HALF_OPEN == "half_open"
    assert str(CircuitState.OPEN) == "open"


# ---- hints, events, peek, composition ---------------------------------


class Board:
    """Hints of other processes, in memory."""

    def __init__(self) -> None:
        self.until: dict[str, float] = {}
        self.told: list[tuple[str, float]] = []

    def open_until(self, circuit: str) -> float | None:
        return self.until.get(circuit)

    def opened(self, circuit: str, until: float) -> None:
        self.told.append((circuit, until))


def test_hint_opens_a_closed_circuit_until_its_moment() -> None:
    """Another process has found the dependency down: no need to find out again."""
    board = Board()
    bench = Bench(hints=board, success_threshold=1)
    board.until["svc"] = bench.clock.time() + 8.0
    error = bench.call()
    assert isinstance(error, CircuitOpenError)
    assert error.retry_after == pytest.approx(8.0)
    bench.clock.jump(8.0)
    assert bench.call() == "ok"
    assert board.told == []


def test_hint_never_closes_what_is_open_here() -> None:
    """The local decision stands, whatever the others say."""
    board = Board()
    bench = Bench(hints=board, failure_threshold=1)
    bench.fail()
    board.until["svc"] = bench.clock.time() - 5.0
    assert bench.call().retry_after == 60.0
    assert board.told == [("svc", bench.clock.time() + 60.0)]


def test_events_tell_of_each_change_and_each_rejection(workflow_events: list[events.Event]) -> None:
    """Opened, rejected, half-opened, closed: once each."""
    bench = Bench(failure_threshold=1, success_threshold=1)
    bench.fail()
    bench.call()
    bench.clock.jump(60.0)
    bench.call()
    bench.breaker.force_open()
    bench.breaker.reset()
    bench.breaker.reset()
    kinds = [type(event).__name__ for event in workflow_events]
    assert kinds == [
        "BreakerOpened",
        "CallRejected",
        "BreakerHalfOpened",
        "BreakerClosed",
        "BreakerOpened",
        "BreakerClosed",
    ]
    opened, rejected = workflow_events[:2]
    assert isinstance(opened, events.BreakerOpened)
    assert (opened.step, opened.failures, opened.retry_after) == ("svc", 1, 60.0)
    assert isinstance(rejected, events.CallRejected)
    assert (rejected.by, rejected.retry_after) == ("circuit breaker", 60.0)


def test_peek_raises_while_the_circuit_is_open_and_leaves_the_probe_to_the_loop() -> None:
    """Closed: MISS. Open: the error, without a hop. Due its probe: MISS, and no permit is taken."""
    bench = Bench(failure_threshold=1, success_threshold=1)
    context = WorkflowContext(clock=bench.clock)
    assert bench.breaker.peek(1, context) is MISS
    bench.fail()
    with pytest.raises(CircuitOpenError):
        bench.breaker.peek(1, context)
    with pytest.raises(CircuitOpenError):
        TimeoutPrimitive(bench.breaker, 1.0).peek(1, context)
    bench.clock.jump(60.0)
    assert bench.breaker.peek(1, context) is MISS
    assert bench.breaker.state is OPEN
    assert not bench.breaker._leases
    assert bench.call() == "ok"


def test_peek_raises_in_half_open_while_the_probe_is_out() -> None:
    """The only permit is taken: nothing could come of a hop."""
    bench = Bench(failure_threshold=1)
    bench.fail()
    bench.clock.jump(60.0)

    async def main() -> None:
        bench.service.outcome, bench.service.seconds = "ok", 1.0
        context = WorkflowContext(clock=bench.clock)
        task = asyncio.ensure_future(bench.breaker.execute(1, context))
        await asyncio.sleep(0)
        with pytest.raises(CircuitOpenError):
            bench.breaker.peek(1, context)
        await task

    asyncio.run(main())


def test_repr_and_name_read_well() -> None:
    """The circuit is named after its step unless it has a name."""

    async def fetch(data: Any) -> Any:
        return data

    fetch_step = step(fetch, name="fetch")
    breaker = CircuitBreakerPrimitive(fetch_step)
    assert breaker.name == "fetch"
    assert repr(breaker) == "CircuitBreaker(fetch, failure_threshold=5, recovery_timeout=60)"
    assert breaker.children() == (fetch_step,)
    assert "window=50, failure_ratio=0.5" in repr(CircuitBreakerPrimitive(fetch_step, window=50))


@pytest.mark.parametrize("around", [lambda step: step, lambda step: TimeoutPrimitive(step, 1.0)])
def test_warning_when_a_breaker_stands_around_a_fallback(around: Callable[[Any], Any]) -> None:
    """The fallback answers, so nothing is ever counted; the warning points at the line that builds it."""
    inner = around(FallbackPrimitive(_answer, _answer))
    with pytest.warns(CompositionWarning, match="put the breaker inside") as caught:
        CircuitBreakerPrimitive(inner)
    assert [warning.filename for warning in caught] == [__file__]


def test_no_warning_where_the_breaker_sees_failures() -> None:
    """Inside the fallback, around a sequence with other steps, or where the fallback lets some errors through."""
    FallbackPrimitive(CircuitBreakerPrimitive(_answer), _answer)
    CircuitBreakerPrimitive(step(_answer) >> FallbackPrimitive(_answer, _answer))
    CircuitBreakerPrimitive(FallbackPrimitive(_answer, _answer, fallback_on=(ValueError,)))


def test_error_leaves_no_reference_cycle_and_is_let_go_when_the_circuit_closes() -> None:
    """Once caller and breaker let go of the error it is gone, without the garbage collector."""

    class Mark(Exception):
        pass

    async def fail(data: Any) -> None:
        raise Mark

    async def main() -> weakref.ref[Mark]:
        try:
            await breaker.execute(1)
        except Mark as error:
            return weakref.ref(error)
        raise AssertionError

    gc.disable()
    try:
        breaker: CircuitBreakerPrimitive[Any, Any] = CircuitBreakerPrimitive(fail, failure_threshold=2)
        assert asyncio.run(main())() is None
        last = asyncio.run(main())
        assert breaker.state is OPEN
        assert last() is not None
        breaker.reset()
        assert last() is None
    finally:
        gc.enable()


# ---- many at once -----------------------------------------------------


def test_breaker_is_shared_by_threads_with_loops_of_their_own() -> None:
    """Eight loops hammer one breaker: no call is lost, none goes through while it is open."""
    began = threading.Barrier(8)
    lock = threading.Lock()
    counts = {"in": 0}

    async def fail(data: Any) -> None:
        with lock:
            counts["in"] += 1
        await asyncio.sleep(0)
        raise OSError

    breaker = CircuitBreakerPrimitive(fail, failure_threshold=100_000)
    refused: list[Any] = []

    def thread() -> None:
        began.wait()

        async def main() -> None:
            for _ in range(300):
                try:
                    await breaker.execute(1)
                except OSError:
                    pass
                except CircuitOpenError as error:
                    refused.append(error)

        asyncio.run(main())

    threads = [threading.Thread(target=thread) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert breaker.failure_count == counts["in"] == 2400
    assert not refused


def test_threads_see_one_trip_when_the_threshold_is_reached() -> None:
    """The failure that reaches the threshold opens the circuit once, and nothing more gets in."""
    opened: list[Any] = []
    unsubscribe = events.bus.subscribe(opened.append)
    inside = threading.Semaphore(0)

    async def fail(data: Any) -> None:
        inside.release()
        raise OSError

    breaker = CircuitBreakerPrimitive(fail, failure_threshold=50)

    def thread() -> None:
        async def main() -> None:
            for _ in range(100):
                try:
                    await breaker.execute(1)
                except (OSError, CircuitOpenError):
                    pass

        asyncio.run(main())

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    unsubscribe()
    assert sum(isinstance(event, events.BreakerOpened) for event in opened) == 1
    assert breaker.state is OPEN
    calls = 0
    while inside.acquire(blocking=False):
        calls += 1
    assert 50 <= calls < 50 + 4


def test_forked_child_has_a_free_lock_and_no_lease_of_its_parent() -> None:
    """A lock held and a permit taken at the moment of the fork bind nobody in the child."""
    bench = Bench(failure_threshold=1, success_threshold=1)
    bench.fail()
    bench.clock.jump(60.0)
    bench.breaker._admit(bench.clock.monotonic(), WorkflowContext(clock=bench.clock))
    assert bench.breaker._leases
    bench.breaker._lock.acquire()
    child = os.fork()
    if not child:
        code = 1
        try:
            coroutine = bench.breaker.execute(1, WorkflowContext(clock=bench.clock))
            bench.service.outcome, bench.service.seconds = "ok", 0.0
            try:
                coroutine.send(None)
            except StopIteration:
                code = 0 if bench.breaker.state is CLOSED else 2
        finally:
            os._exit(code)
    bench.breaker._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- against a naive recount ------------------------------------------


class NaiveBreaker:
    """What the circuit's state must be, recounted from the whole history each time it is asked."""

    def __init__(self, config: CircuitBreakerConfig) -> None:
        self.config = config
        self.history: list[tuple[Any, ...]] = []  # (what, call, moment, ...)

    def add(self, *entry: Any) -> None:
        self.history.append(entry)

    def recount(self) -> tuple[CircuitState, int, set[int]]:
        """Return (state, failures, the calls that hold a permit)."""
        config = self.config
        state, epoch, since = CLOSED, 0, 0.0
        counted: list[tuple[float, bool]] = []  # of the closed epoch: (moment, failed)
        failures = successes = 0
        epochs: dict[int, int] = {}
        probes: dict[int, float] = {}
        for what, call, moment, *rest in self.history:
            if what == "admitted":
                if state is OPEN:
                    state, epoch, successes, probes = HALF_OPEN, epoch + 1, 0, {}
                if state is HALF_OPEN:
                    probes = {each: begun for each, begun in probes.items() if begun + self.lease > moment}
                    probes[call] = moment
                epochs[call] = epoch
                continue
            if what == "reset":
                state, epoch, failures, counted, probes = CLOSED, epoch + 1, 0, [], {}
                continue
            (outcome,) = rest
            held = probes.pop(call, None) is not None
            if epochs[call] != epoch or outcome == "neutral" or (state is HALF_OPEN and not held):
                continue
            failed = outcome in ("failed", "cut")
            if state is HALF_OPEN:
                if failed:
                    state, epoch, since, failures = OPEN, epoch + 1, moment, failures + 1
                else:
                    successes += 1
                    if successes == config.success_threshold:
                        state, epoch, failures, counted = CLOSED, epoch + 1, 0, []
                continue
            counted.append((moment, failed))
            relevant = [each for _, each in self.relevant(counted, moment)]
            if config.window is None:
                failures = len(list(itertools.takewhile(bool, reversed(relevant))))
                opens = failures >= config.failure_threshold
            else:
                failures = sum(relevant)
                opens = len(relevant) >= config.minimum_calls and 0 < failures >= len(relevant) * config.failure_ratio
            if opens:
                state, epoch, since = OPEN, epoch + 1, moment
        self.since = since
        return state, failures, set(probes)

    @property
    def lease(self) -> float:
        return self.config.recovery_timeout if self.config.window is None else self.config.max_break_duration

    def relevant(self, counted: list[tuple[float, bool]], now: float) -> list[tuple[float, bool]]:
        window = self.config.window
        if isinstance(window, float):
            width = window / 10
            return [each for each in counted if each[0] // width > now // width - 10]
        return counted if window is None else counted[-int(window) :]


class BreakerMachine(RuleBasedStateMachine):
    """Calls begin, end, are cancelled or cut in any order, while time passes; the breaker agrees with the recount."""

    kind: type[CircuitBreakerPrimitive[Any, Any]] = CircuitBreakerPrimitive

    @initialize(window=st.sampled_from([None, 6, 8.0]), threshold=st.integers(1, 3), permits=st.integers(1, 2))
    def build(self, window: Any, threshold: int, permits: int) -> None:
        config = CircuitBreakerConfig(
            failure_threshold=threshold,
            recovery_timeout=5.0,
            success_threshold=2,
            window=window,
            minimum_calls=threshold,
            half_open_permits=permits,
            expected_exception=OSError,
        )
        self.config = config
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock(start=100.0, autojump_threshold=None)
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.tasks: dict[int, asyncio.Task[Any]] = {}
        self.numbers = itertools.count()
        self.model = NaiveBreaker(config)

        async def wait(number: int) -> Any:
            self.waiting[number] = self.loop.create_future()
            return await self.waiting[number]

        self.breaker = self.kind(wait, config, chance=random.Random(7))

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            for task in self.tasks.values():
                task.cancel()
            self.pump()
            self.loop.close()

    def pump(self) -> None:
        async def ticks() -> None:
            for _ in range(6):
                await asyncio.sleep(0)

        self.loop.run_until_complete(ticks())

    @rule(timeout=st.sampled_from([None, 3.0]))
    def begin(self, timeout: float | None) -> None:
        number = next(self.numbers)
        now = self.clock.monotonic()
        state, _, probes = self.model.recount()
        until = getattr(self.breaker, "_open_until", 0.0)
        held = {each for each in probes if self.begun(each) + self.model.lease > now}
        expected = (
            state is CLOSED
            or (state is OPEN and now >= until)
            or (state is HALF_OPEN and len(held) < self.config.half_open_permits)
        )
        if state is OPEN:
            least = 5.0
            most = 5.0 if self.config.window is None else 60.0
            assert least - 1e-9 <= until - self.model.since <= most + 1e-9
        workflow: WorkflowPrimitive[Any, Any] = self.breaker
        if timeout is not None:
            workflow = TimeoutPrimitive(self.breaker, timeout)
        task = self.loop.create_task(workflow.execute(number, WorkflowContext(clock=self.clock)))
        self.pump()
        if task.done():
            assert isinstance(task.exception(), CircuitOpenError)
            assert not expected, "it was refused and should have been let through"
            return
        assert expected, "it was let through and should have been refused"
        self.tasks[number] = task
        self.model.add("admitted", number, now)

    def begun(self, number: int) -> float:
        return next(moment for what, call, moment, *_ in self.model.history if what == "admitted" and call == number)

    def collect(self) -> None:
        """Note what has ended meanwhile, in the order in which it did: all of it was cut, in one moment."""
        for number, task in list(self.tasks.items()):
            if task.done():
                assert isinstance(task.exception(), StepTimeoutError)
                self.model.add("ended", number, self.clock.monotonic(), "cut")
                del self.tasks[number]

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 100), outcome=st.sampled_from(["ok", "failed", "failed", "neutral", "cancelled"]))
    def end(self, which: int, outcome: str) -> None:
        number = sorted(self.tasks)[which % len(self.tasks)]
        task, future = self.tasks.pop(number), self.waiting[number]
        if outcome == "ok":
            future.set_result(1)
        elif outcome == "failed":
            future.set_exception(OSError())
        elif outcome == "neutral":
            future.set_exception(ValueError())
        else:
            task.cancel()
        self.pump()
        assert task.done()
        if not task.cancelled():
            task.exception()
        self.model.add("ended", number, self.clock.monotonic(), "neutral" if outcome == "cancelled" else outcome)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5, 5.0, 5.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        # In small steps while there are calls: within one of them at most one limit strikes.
        end = self.clock.monotonic() + seconds
        while self.clock.monotonic() < end:
            self.clock.jump(0.5 if self.tasks else end - self.clock.monotonic())
            self.pump()
            self.collect()

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        self.model.add("reset", -1, self.clock.monotonic())

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "breaker"):
            state, failures, _ = self.model.recount()
            assert self.breaker.state is state
            assert self.breaker.failure_count == failures


EXAMPLES = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_breaker_agrees_with_a_naive_recount_of_its_history() -> None:
    """Whatever begins, ends, is cancelled or cut in whatever order, the state is what the history says."""
    run_state_machine_as_test(BreakerMachine, settings=EXAMPLES)


class Crowd(CircuitBreakerPrimitive[Any, Any]):
    """Half-open lets everybody through."""

    def _refusal(self, now: float) -> CircuitOpenError | None:
        return None if self._state is HALF_OPEN else super()._refusal(now)


class LateCounts(CircuitBreakerPrimitive[Any, Any]):
    """Results of calls from before the last change of state count."""

    def _ended(
        self, error: Any, cut: bool, generation: int, lease: Any, began: float, context: WorkflowContext
    ) -> None:
        super()._ended(error, cut, self._generation, lease, began, context)


class CancelIsFailure(CircuitBreakerPrimitive[Any, Any]):
    """Whoever cancels is taken for a failure."""

    def _ended(
        self, error: Any, cut: bool, generation: int, lease: Any, began: float, context: WorkflowContext
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = OSError()
        super()._ended(error, cut, generation, lease, began, context)


class CutIsNeutral(CircuitBreakerPrimitive[Any, Any]):
    """Timeout(Breaker(hang)) never counts."""

    def _ended(
        self, error: Any, cut: bool, generation: int, lease: Any, began: float, context: WorkflowContext
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            error, cut = ValueError(), False
        super()._ended(error, cut, generation, lease, began, context)


class LeaseIsKept(CircuitBreakerPrimitive[Any, Any]):
    """A probe that is cancelled keeps its permit."""

    def _ended(
        self, error: Any, cut: bool, generation: int, lease: Any, began: float, context: WorkflowContext
    ) -> None:
        if not isinstance(error, (asyncio.CancelledError, ValueError)):
            super()._ended(error, cut, generation, lease, began, context)


@pytest.mark.parametrize("twin", [Crowd, LateCounts, CancelIsFailure, CutIsNeutral, LeaseIsKept])
def test_wrong_twins_fail_the_recount(twin: type[CircuitBreakerPrimitive[Any, Any]]) -> None:
    """The recount can tell a right breaker from a wrong one."""

    class Machine(BreakerMachine):
        kind = twin

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Machine, settings=settings(EXAMPLES, max_examples=500, phases=[Phase.generate], report_multiple_bugs=False)
        )
