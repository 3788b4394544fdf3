"""Single-flight: one computation per key, however many wait for it, and whoever of them leaves."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tta_sync.context import Deadline, WorkflowContext, cancel_reason, current_caller, cut_off, time_limit
from tta_sync.exceptions import CircuitOpenError, DeadlineExceededError
from tta_sync.primitives import CircuitBreakerConfig, CircuitBreakerPrimitive, RetryPrimitive, TimeoutPrimitive
from tta_sync.primitives.performance import CachePrimitive, flights
from tta_sync.testing import FakeClock


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until *condition* holds."""
    while not condition():
        await asyncio.sleep(0)


def start(cache: Any, data: Any = 1, context: WorkflowContext | None = None) -> asyncio.Future[Any]:
    return asyncio.ensure_future(cache.execute(data, context or WorkflowContext()))


def test_step_runs_once_when_a_thousand_callers_miss_at_once(step: Any) -> None:
    """All callers of one key share one computation, and each gets a copy of its own."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [start(cache, [1]) for _ in range(1000)]
        await step.started.wait()
        await asyncio.sleep(0)
        step.gate.set()
        results = await asyncio.gather(*calls)
        assert step.calls == 1
        results[0]["for"].append("spoilt")
        assert results[1:] == [{"for": [1]}] * 999
        assert len({id(result) for result in results}) == 1000
        assert await cache.execute([1], WorkflowContext()) == {"for": [1]}
        assert cache.get_stats()["misses"] == 1000

    asyncio.run(main())


def test_different_keys_are_computed_side_by_side_when_asked_for_at_once(step: Any) -> None:
    """A flight holds up nobody but those who want the same."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [start(cache, data) for data in range(5)]
        await until(lambda: step.calls == 5)
        step.gate.set()
        assert await asyncio.gather(*calls) == [{"for": data} for data in range(5)]

    asyncio.run(main())


def test_flight_goes_on_when_its_leader_is_cancelled(step: Any) -> None:
    """The others get the result of the computation that a cancelled caller began, and the leader leaves at once."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        leader, other = start(cache), start(cache)
        await step.started.wait()
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert step.ended == []
        step.gate.set()
        assert await other == {"for": 1}
        assert step.calls == 1

    asyncio.run(main())


def test_flight_is_cancelled_when_its_last_waiter_leaves(step: Any) -> None:
    """Nobody computes what nobody waits for, and the step's clean-up is over before the cancellation comes out."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [start(cache) for _ in range(3)]
        await step.started.wait()
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        assert step.ended == ["cancelled"]
        step.gate = None
        assert await cache.execute(1, WorkflowContext()) == {"for": 1}

    asyncio.run(main())


def test_next_in_line_takes_over_when_the_flight_is_cancelled_before_it_began(step: Any) -> None:
    """A task that is cancelled before its first step, as a loop's end does, leaves nobody waiting."""

    async def main() -> None:
        cache = CachePrimitive(step, ttl=60)
        leader, follower = start(cache), start(cache)
        await asyncio.sleep(0)
        (flight,) = cache.flights._all
        assert flight.task is not None
        flight.task.cancel()
        await asyncio.wait([leader, follower])
        assert leader.cancelled()
        assert follower.result() == {"for": 1}
        assert step.calls == 1
        assert not cache.flights._all

    asyncio.run(main())


def test_each_waiter_gets_its_own_error_when_the_step_fails(step: Any) -> None:
    """A failure is shared by those who wait: one run, and an exception object each, with notes, cause and traceback."""

    async def main() -> None:
        step.gate = asyncio.Event()
        step.error = KeyError("no such thing")
        step.error.add_note("a note")
        step.error.__cause__ = cause = ValueError("because")
        cache = CachePrimitive(step, ttl=60)
        calls = [start(cache) for _ in range(30)]
        await step.started.wait()
        step.gate.set()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert step.calls == 1
        assert errors[0] is step.error
        assert len({id(error) for error in errors}) == 30
        assert all(type(error) is KeyError and error.args == ("no such thing",) for error in errors)
        assert all(error.__notes__ == ["a note"] and error.__cause__ is cause for error in errors)
        assert all("raise self.error" in "".join(traceback.format_tb(error.__traceback__)) for error in errors)
        assert len({len(traceback.extract_tb(error.__traceback__)) for error in errors}) == 1
        errors[1].add_note("mine")
        assert errors[2].__notes__ == ["a note"]
        step.error = None
        assert await cache.execute(1, WorkflowContext()) == {"for": 1}

    asyncio.run(main())


def test_failed_flight_is_freed_at_once_when_its_error_is_dropped() -> None:
    """An error that came through a cache is in no reference cycle: it goes when its last user lets go."""

    class Token:
        """Something in the frame of the failing step."""

    tokens: list[weakref.ref[Token]] = []

    async def fail(data: Any) -> None:
        token = Token()
        tokens.append(weakref.ref(token))
        raise ValueError("x")

    async def main() -> None:
        cache = CachePrimitive(fail, ttl=60)
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                try:
                    await cache.execute(1, WorkflowContext())
                except ValueError:
                    pass
                else:
                    pytest.fail("the step's error did not come out")
            await asyncio.sleep(0)
            assert [token() for token in tokens] == [None] * 3
        finally:
            gc.enable()

    asyncio.run(main())


def test_waiter_leaves_alone_when_its_own_deadline_passes(step: Any) -> None:
    """A waiter's deadline ends its wait, not the computation that others wait for."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        hurried = start(cache, context=WorkflowContext(deadline=Deadline.after(0.02)))
        patient = start(cache)
        with pytest.raises(DeadlineExceededError) as caught:
            await hurried
        assert caught.value.deadline == 0.02
        step.gate.set()
        assert await patient == {"for": 1}
        assert step.calls == 1

    asyncio.run(main())


def test_flight_is_cancelled_when_the_deadline_of_its_only_waiter_passes(step: Any) -> None:
    """Nobody is left: the step is cancelled, and sees that the deadline is the reason."""
    reasons: list[str | None] = []

    async def hang(data: Any, context: WorkflowContext) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            reasons.append(cancel_reason(context))
            raise

    async def main() -> None:
        with pytest.raises(DeadlineExceededError):
            await CachePrimitive(hang, ttl=60).execute(1, WorkflowContext(deadline=Deadline.after(0.02)))
        await until(lambda: reasons)

    asyncio.run(main())
    assert reasons == ["deadline"]


def test_work_may_take_as_long_as_the_most_patient_waiter_would_wait(step: Any, clock: Any) -> None:
    """The deadline that the step sees is that of the waiter with the most time, also one who comes later."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [start(cache, context=WorkflowContext(clock=clock, deadline=Deadline.after(5, clock)))]
        await step.started.wait()
        (seen,) = step.contexts
        assert cut_off(seen) == clock.monotonic() + 5
        calls.append(start(cache, context=WorkflowContext(clock=clock, deadline=Deadline.after(9, clock))))
        calls.append(start(cache, context=WorkflowContext(clock=clock, deadline=Deadline.after(7, clock))))
        await asyncio.sleep(0)
        assert seen.deadline.remaining() == seen.deadline.seconds == 9
        calls.append(start(cache, context=WorkflowContext(clock=clock)))
        known = seen.deadline
        await asyncio.sleep(0)
        assert seen.deadline is None
        assert cut_off(seen) is None
        assert known.remaining() > 3600  # for those who look at it already
        calls.append(start(cache, context=WorkflowContext(clock=clock, deadline=Deadline.after(5, clock))))
        await asyncio.sleep(0)
        assert seen.deadline is None
        step.gate.set()
        await asyncio.gather(*calls)
        assert step.calls == 1

    asyncio.run(main())


def test_time_limit_of_one_waiter_does_not_bind_the_work_of_all(step: Any) -> None:
    """A TimeoutPrimitive around one call cuts that call; the computation sees no limit that is not everybody's."""

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        hurried = start(TimeoutPrimitive(cache, timeout_seconds=0.02))
        patient = start(cache)
        with pytest.raises(TimeoutError):
            await hurried
        step.gate.set()
        assert await patient == {"for": 1}
        assert step.calls == 1

    asyncio.run(main())


def test_step_sees_the_time_of_the_most_patient_when_the_first_caller_has_a_limit(clock: Any) -> None:
    """Inside the flight, the limit around the call that began it counts no more than any other's."""
    seen: list[float | None] = []
    started, gate = asyncio.Event(), asyncio.Event()

    async def look(data: Any, context: WorkflowContext) -> int:
        started.set()
        await gate.wait()
        seen.append(cut_off(context))
        return 0

    async def main() -> None:
        cache = CachePrimitive(look, ttl=60)
        hurried = start(TimeoutPrimitive(cache, timeout_seconds=5), context=WorkflowContext(clock=clock))
        await started.wait()
        patient = start(cache, context=WorkflowContext(clock=clock))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(hurried, patient)

    asyncio.run(main())
    assert seen == [None]


def test_retry_inside_does_not_wait_out_an_open_circuit_when_nobody_has_a_deadline() -> None:
    """Nothing in the flight stands for a deadline that there is not: the circuit's minute is more than the back-off."""

    async def fail(data: Any) -> None:
        raise OSError("down")

    clock = FakeClock()
    breaker = CircuitBreakerPrimitive(fail, failure_threshold=1, recovery_timeout=3600.0)
    cache = CachePrimitive(RetryPrimitive(breaker, max_retries=3), ttl=60)

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(CircuitOpenError):
                await cache.execute(1, WorkflowContext(clock=clock))

    asyncio.run(main())
    assert clock.monotonic() < 600.0


@pytest.mark.parametrize("joined", [False, True])
def test_limit_that_is_over_does_not_bind_the_work_of_a_task_that_outlives_it(joined: bool) -> None:
    """A task waits that a step has started and left running: the time it has is no longer what that step had."""
    clock = FakeClock()
    tasks: list[asyncio.Task[Any]] = []
    seen: list[float | None] = []

    async def slow(data: Any, context: WorkflowContext) -> str:
        await context.clock.sleep(3.0)
        seen.append(cut_off(context))
        return "done"

    cache = CachePrimitive(TimeoutPrimitive(slow, 9.0), ttl=60)

    async def spawn(data: Any, context: WorkflowContext) -> None:
        tasks.append(asyncio.create_task(cache.execute(data, context)))
        await context.clock.sleep(0.5)

    async def main() -> None:
        if joined:  # behind one that has less time
            tasks.append(start(TimeoutPrimitive(cache, 0.4), context=WorkflowContext(clock=clock)))  # type: ignore[arg-type]
            await asyncio.sleep(0)
        await TimeoutPrimitive(spawn, 1.0).execute(1, WorkflowContext(clock=clock))
        assert await tasks[-1] == "done"
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert seen == [9.0]


class OtherLoop:
    """A loop of another thread that runs for one call at a time, as code from before asyncio.run does it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._loop = asyncio.new_event_loop()

    def run(self, call: Callable[[], Any]) -> Any:
        return self._thread.submit(lambda: self._loop.run_until_complete(call())).result(30)

    def end(self) -> None:
        async def rest() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self.run(rest)
        self._thread.submit(self._loop.close).result(30)
        self._thread.shutdown()


@pytest.fixture
def other_loop() -> Iterator[OtherLoop]:
    loop = OtherLoop()
    yield loop
    loop.end()


def test_others_compute_when_the_loop_of_a_refresh_stands_still(step: Any, clock: Any, other_loop: OtherLoop) -> None:
    """It was begun on a loop that has had no call since: nobody else may wait for that."""
    cache = CachePrimitive(step, ttl=100, soft_ttl=10, jitter=0)

    async def call() -> Any:
        return await cache.execute(1, WorkflowContext(clock=clock))

    other_loop.run(call)
    clock.jump(20)
    step.gate = asyncio.Event()
    other_loop.run(call)  # stale; its refresh has begun, and waits
    clock.jump(100)
    step.gate = None
    assert asyncio.run(asyncio.wait_for(call(), 30.0)) == {"for": 1}


def test_those_who_wait_compute_when_the_loop_of_a_flight_stands_still(
    step: Any, other_loop: OtherLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its leader has gone, and with it whoever turned that loop."""
    monkeypatch.setattr(flights, "PATIENCE", 0.02)
    cache = CachePrimitive(step, ttl=60)
    flying, boarded = threading.Event(), threading.Event()

    async def lead() -> None:
        step.gate = asyncio.Event()
        leader = asyncio.ensure_future(cache.execute(1, WorkflowContext()))
        await step.started.wait()
        step.gate = None
        flying.set()
        await asyncio.get_running_loop().run_in_executor(None, boarded.wait, 30)
        leader.cancel()  # somebody else waits: the flight goes on, as long as this loop runs
        await asyncio.wait([leader])

    async def follow() -> Any:
        call = start(cache)
        (flight,) = cache.flights._open.values()
        await until(lambda: len(flight.waiters) == 2)
        boarded.set()
        return await asyncio.wait_for(call, 30.0)

    led = threading.Thread(target=other_loop.run, args=(lead,))
    led.start()
    assert flying.wait(30)
    assert asyncio.run(follow()) == {"for": 1}
    led.join()
    assert step.calls == 2


def test_breaker_inside_counts_a_failure_when_a_timeout_outside_cuts_the_only_call() -> None:
    """A cache between a timeout and a breaker does not hide from the breaker that the step took too long."""

    async def hang(data: Any) -> None:
        await asyncio.Event().wait()

    breaker = CircuitBreakerPrimitive(hang, CircuitBreakerConfig(failure_threshold=5))
    flow = TimeoutPrimitive(CachePrimitive(breaker, ttl=60), timeout_seconds=0.02)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await flow.execute(1, WorkflowContext())
        assert breaker.failure_count == 1
        call = start(CachePrimitive(breaker, ttl=60))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait([call])
        assert breaker.failure_count == 1  # nobody wanted it any more: neutral

    asyncio.run(main())


def test_next_in_line_takes_over_when_the_leaders_own_deadline_ended_the_work() -> None:
    """A step that gave up for the first caller's deadline runs again for a caller who has more time."""
    runs = 0

    async def hurried_once(data: Any, context: WorkflowContext) -> str:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0.01)
        if runs == 1:
            raise DeadlineExceededError(0.005)
        return "done"

    async def main() -> None:
        cache = CachePrimitive(hurried_once, ttl=60)
        calls = [start(cache) for _ in range(5)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[0], DeadlineExceededError)
        assert results[1:] == ["done"] * 4
        assert runs == 2

    asyncio.run(main())


@pytest.mark.parametrize("interrupt", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_interrupt_reaches_the_leader_alone_when_the_step_raises_it(interrupt: BaseException) -> None:
    """What ends a process is not handed to bystanders, nor to the loop: the next in line computes anew."""
    runs = 0

    async def once(data: Any) -> str:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        if runs == 1:
            raise interrupt
        return "done"

    seen: list[Any] = []

    async def caught(cache: CachePrimitive[Any, Any]) -> None:
        try:
            seen.append(await cache.execute(1, WorkflowContext()))
        except BaseException as error:
            seen.append(error)

    async def main() -> None:
        cache = CachePrimitive(once, ttl=60)
        await asyncio.gather(*(caught(cache) for _ in range(3)))

    asyncio.run(main())
    assert seen == [interrupt, "done", "done"]
    assert runs == 2


def test_step_that_cancels_itself_concerns_the_leader_alone_when_others_wait() -> None:
    """A CancelledError out of the step itself comes out as itself; the others compute anew."""
    runs = 0

    async def once(data: Any) -> str:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        if runs == 1:
            raise asyncio.CancelledError
        return "done"

    async def main() -> None:
        cache = CachePrimitive(once, ttl=60)
        results = await asyncio.gather(*(start(cache) for _ in range(3)), return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == ["done", "done"]

    asyncio.run(main())


def test_each_waiter_computes_its_own_when_the_result_cannot_be_copied(Step: Any) -> None:
    """One uncopyable object is never handed to two callers."""
    step = Step(lambda data: threading.Lock())

    async def main() -> None:
        step.gate = asyncio.Event()
        cache = CachePrimitive(step, ttl=60)
        calls = [start(cache) for _ in range(4)]
        await step.started.wait()
        step.gate.set()
        locks = await asyncio.gather(*calls)
        assert len({id(lock) for lock in locks}) == 4
        assert step.calls == 4

    asyncio.run(main())


def test_every_waiter_is_told_of_inner_hits_and_degradation_when_they_share_a_flight() -> None:
    """What a shared computation counts and marks reaches all who waited, beside their own counts."""

    async def inner(data: Any, context: WorkflowContext) -> int:
        await asyncio.sleep(0)
        context.state["cache_hits"] = context.state.get("cache_hits", 0) + 2
        context.mark_degraded()
        return 0

    async def main() -> None:
        cache = CachePrimitive(inner, ttl=60)
        contexts = [WorkflowContext(state={"cache_hits": index}) for index in range(3)]
        await asyncio.gather(*(cache.execute(1, context) for context in contexts))
        assert [context.state for context in contexts] == [
            {"cache_hits": index + 2, "cache_misses": 1} for index in range(3)
        ]
        assert all(context.degraded for context in contexts)

    asyncio.run(main())


def test_variables_set_by_the_step_stay_in_the_flight_when_it_ends() -> None:
    """The flight is a task of its own: its limits and caller do not leak into the calls that wait for it."""

    async def main() -> None:
        async def look(data: Any) -> int:
            time_limit.set(1.0)
            return 0

        await CachePrimitive(look, ttl=60).execute(1, WorkflowContext())
        assert time_limit.get() is None
        assert current_caller.get() is None

    asyncio.run(main())


# ---- several loops ---------------------------------------------------------------------------------------------------


def test_loops_share_one_computation_when_they_ask_at_once() -> None:
    """Coroutines of two loops on two threads wait for the same flight."""
    runs: list[str] = []
    entered, release = threading.Event(), threading.Event()

    async def slow(data: Any) -> list[int]:
        runs.append(threading.current_thread().name)
        entered.set()
        while not release.is_set():
            await asyncio.sleep(0.002)
        return [data]

    cache = CachePrimitive(slow, ttl=60)
    results: list[Any] = []

    def other_loop() -> None:
        results.append(asyncio.run(cache.execute(1, WorkflowContext())))

    def waiting() -> int:
        return sum(len(flight.waiters) for flight in cache.flights._all)

    first = threading.Thread(target=other_loop, name="first")
    second = threading.Thread(target=other_loop, name="second")
    first.start()
    assert entered.wait(10)
    second.start()

    async def third() -> Any:
        call = start(cache)
        while waiting() < 3:
            await asyncio.sleep(0.002)
        release.set()
        return await call

    results.append(asyncio.run(third()))
    first.join()
    second.join()
    assert results == [[1]] * 3
    assert len({id(result) for result in results}) == 3
    assert runs == ["first"]


def test_waiter_of_another_loop_computes_when_the_flights_loop_ends() -> None:
    """A flight whose loop is closed under it is taken over by those who wait elsewhere."""
    runs: list[str] = []
    entered, waiting = threading.Event(), threading.Event()

    async def step(data: Any) -> str:
        runs.append(threading.current_thread().name)
        if len(runs) == 1:
            entered.set()
            await asyncio.Event().wait()
        return "done"

    cache = CachePrimitive(step, ttl=60)

    async def leave_early() -> None:
        call = start(cache)
        while not waiting.is_set():
            await asyncio.sleep(0.002)
        del call  # asyncio.run cancels what is left

    leader = threading.Thread(target=lambda: asyncio.run(leave_early()), name="leader")
    leader.start()
    assert entered.wait(10)

    async def follow() -> Any:
        call = start(cache)
        while not any(len(flight.waiters) == 2 for flight in cache.flights._all):
            await asyncio.sleep(0.002)
        waiting.set()
        return await call

    assert asyncio.run(follow()) == "done"
    leader.join()
    assert runs == ["leader", "MainThread"]


def test_flight_is_cancelled_on_its_own_loop_when_the_last_waiter_sits_on_another() -> None:
    """The last one to leave ends the work wherever it runs."""
    cancelled = threading.Event()
    entered, both = threading.Event(), threading.Event()

    async def hang(data: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    cache = CachePrimitive(hang, ttl=60)
    done = threading.Event()

    async def lead() -> None:
        call = start(cache)
        while not both.is_set():
            await asyncio.sleep(0.002)
        call.cancel()
        await asyncio.wait([call])
        while not done.is_set():
            await asyncio.sleep(0.002)

    leader = threading.Thread(target=lambda: asyncio.run(lead()))
    leader.start()
    assert entered.wait(10)

    async def follow() -> None:
        call = start(cache)
        await until(lambda: any(len(flight.waiters) == 2 for flight in cache.flights._all))
        both.set()
        while any(len(flight.waiters) == 2 for flight in cache.flights._all):
            await asyncio.sleep(0.002)
        assert not cancelled.is_set()
        call.cancel()
        await asyncio.wait([call])

    asyncio.run(follow())
    assert cancelled.wait(10)
    done.set()
    leader.join()


def test_abandoned_flight_is_not_waited_for_when_its_loop_was_closed(step: Any) -> None:
    """A loop that was stopped and closed without cancelling its tasks blocks nobody."""
    step.gate = asyncio.Event()
    cache = CachePrimitive(step, ttl=60)
    loop = asyncio.new_event_loop()
    task = loop.create_task(cache.execute(1, WorkflowContext()))
    loop.run_until_complete(step.started.wait())
    loop.close()
    step.gate = None
    assert asyncio.run(cache.execute(1, WorkflowContext())) == {"for": 1}
    assert step.calls == 2
    # The dead loop's tasks complain when they are collected; here they are meant to be abandoned.
    for abandoned in (task, *(flight.task for flight in cache.flights._all)):
        if abandoned is not None:
            abandoned._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch


# ---- several processes -----------------------------------------------------------------------------------------------


def _in_child(work: Callable[[], bool]) -> int:
    """Fork, say in the child whether *work* holds, and return the child's exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_computes_for_itself_when_it_was_forked_during_a_flight(step: Any) -> None:
    """What waits on a loop of the parent is not waited for in the child, and what was stored is there."""
    cache = CachePrimitive(step, ttl=60)

    async def main() -> None:
        await cache.execute("kept", WorkflowContext())
        step.gate = asyncio.Event()
        step.started.clear()
        call = start(cache, "flying")
        await step.started.wait()

        def child() -> bool:
            # A fresh loop beside the parent's, of which only a copy is here.
            step.gate = None
            answers: list[Any] = []

            def work() -> None:
                answers.append(asyncio.run(cache.execute("flying", WorkflowContext())))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(10)
            kept = cache.peek("kept", WorkflowContext()) == {"for": "kept"}
            return answers == [{"for": "flying"}] and kept

        assert _in_child(child) == 0
        step.gate.set()
        assert await call == {"for": "flying"}

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_child_starts_empty_when_it_was_forked_while_a_thread_changed_the_store(step: Any) -> None:
    """A lock that some thread held at the fork blocks nobody in the child; the torn store is given up."""
    cache = CachePrimitive(step, ttl=60)
    asyncio.run(cache.execute(1, WorkflowContext()))
    assert cache._store is not None
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        assert cache._store is not None
        with cache._store.lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:

        def child() -> bool:
            empty = cache.get_stats()["size"] == 0
            cache.invalidate(1)
            answers: list[Any] = []
            worker = threading.Thread(target=lambda: answers.append(asyncio.run(cache.execute(1, WorkflowContext()))))
            worker.start()
            worker.join(10)
            return empty and answers == [{"for": 1}]

        assert _in_child(child) == 0
    finally:
        release.set()
        thread.join()
    assert cache.get_stats()["size"] == 1
