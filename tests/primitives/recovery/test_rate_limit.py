"""The rate limit: never more than burst + rate * t, in turn, and the same whoever shares it."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import os
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from tta_sync import events
from tta_sync.context import Deadline, WorkflowContext
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, RateLimitedError, StepTimeoutError
from tta_sync.primitives.core.base import step
from tta_sync.primitives.recovery import RateLimitPrimitive, RetryPrimitive, TimeoutPrimitive, rate_limit as module
from tta_sync.primitives.recovery.line import Place, lead
from tta_sync.primitives.recovery.rate_limit import decide
from tta_sync.testing import FakeClock


class Log:
    """A step that notes when it was called with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Any]] = []

    async def __call__(self, data: Any, context: WorkflowContext) -> Any:
        self.calls.append((context.clock.monotonic(), data))
        return data

    @property
    def moments(self) -> list[float]:
        return [moment for moment, _ in self.calls]


def limited(log: Any, *args: Any, **options: Any) -> RateLimitPrimitive[Any, Any]:
    return RateLimitPrimitive(step(log, name="api"), *args, **options)


def check_bound(moments: list[float], rate: float, burst: int) -> None:
    """In any stretch of time there are at most burst + rate * t calls."""
    for first, last in itertools.combinations_with_replacement(range(len(moments)), 2):
        stretch = moments[last] - moments[first]
        assert last - first + 1 <= burst + rate * stretch + 1e-6, (first, last, stretch)


# ---- the decision -----------------------------------------------------

TABLE = [
    # arrival, now -> wait, next arrival; interval 1, burst 3
    (-math.inf, 100.0, 0.0, 101.0),
    (100.5, 100.0, 0.0, 101.5),
    (102.0, 100.0, 0.0, 103.0),
    (102.5, 100.0, 0.5, 103.5),
    (103.0, 100.0, 1.0, 104.0),
    (90.0, 100.0, 0.0, 101.0),
    (102.0 + 1e-10, 100.0, 0.0, 103.0),
]


@pytest.mark.parametrize(("arrival", "now", "wait", "later"), TABLE)
def test_decision_follows_the_table(arrival: float, now: float, wait: float, later: float) -> None:
    """GCRA: up to burst - 1 intervals early is fine, the last bit of a float too."""
    assert decide(arrival, now, 1.0, 2.0) == (pytest.approx(wait), pytest.approx(later))


# ---- reject -----------------------------------------------------------


def test_burst_goes_through_and_then_the_steady_rate() -> None:
    """Three at once, then one every half second; a refusal says when to come back, exactly."""
    log = Log()
    api = limited(log, 2.0, 3)
    clock = FakeClock(start=50.0)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        for _ in range(3):
            await api.execute(1, context)
        for _ in range(4):
            with pytest.raises(RateLimitedError) as caught:
                await api.execute(1, context)
            assert caught.value.limiter == "api"
            assert caught.value.retry_after == pytest.approx(0.5)
            clock.jump(caught.value.retry_after)
            await api.execute(1, context)
        clock.jump(100.0)
        for _ in range(3):
            await api.execute(1, context)
        with pytest.raises(RateLimitedError):
            await api.execute(1, context)

    asyncio.run(main())
    check_bound(log.moments, 2.0, 3)


def test_refusal_takes_no_token() -> None:
    """A thousand refused calls do not put off the next good one."""
    api = limited(Log(), 1.0)
    clock = FakeClock()

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await api.execute(1, context)
        for _ in range(1000):
            with pytest.raises(RateLimitedError):
                await api.execute(1, context)
        clock.jump(1.0)
        await api.execute(1, context)

    asyncio.run(main())


@pytest.mark.parametrize("key", [lambda data: data["user"], lambda data, context: context.tenant])
def test_each_key_has_a_limit_of_its_own(key: Callable[..., Any]) -> None:
    """One caller's spent limit is nobody else's; the key sees data, and context if it wants it."""
    api = limited(Log(), 1.0, key=key)

    async def main() -> None:
        clock = FakeClock()
        for user in "ab":
            context = WorkflowContext(clock=clock, tenant=user)
            await api.execute({"user": user}, context)
            with pytest.raises(RateLimitedError):
                await api.execute({"user": user}, context)

    asyncio.run(main())


def test_keys_that_are_idle_are_forgotten_and_active_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states kept are about as many as keys are active; beyond the bound the longest unused goes."""
    monkeypatch.setattr(module, "MAX_KEYS", 100)
    api = limited(Log(), 1.0, key=lambda data: data)

    async def main() -> None:
        clock = FakeClock()
        context = WorkflowContext(clock=clock)
        for number in range(50):
            await api.execute(number, context)
            await_moment = clock.monotonic()
            clock.jump(2.0)
        assert await_moment < clock.monotonic()
        assert len(api._limits) <= 2
        await api.execute("mine", context)
        for number in range(99):
            await api.execute(f"flood {number}", context)
        with pytest.raises(RateLimitedError):
            await api.execute("mine", context)
        for number in range(1000):
            await api.execute(f"more {number}", context)
        assert len(api._limits) <= 100

    asyncio.run(main())


# ---- wait -------------------------------------------------------------


def test_waiting_calls_go_in_turn_at_the_rate(run_shuffled: Callable[..., Any]) -> None:
    """First come, first served, one per interval, however the loop orders what is ready."""

    async def main() -> None:
        log = Log()
        api = limited(log, 4.0, 2, mode="wait")
        context = WorkflowContext(clock=FakeClock())
        tasks = []
        for number in range(10):
            tasks.append(asyncio.ensure_future(api.execute(number, context)))
            for _ in range(3):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert [data for _, data in log.calls] == list(range(10))
        assert log.moments == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])

    for seed in range(5):
        run_shuffled(main(), seed)


def test_call_is_refused_at_once_when_its_turn_comes_too_late() -> None:
    """Neither the deadline nor a timeout around is waited out; the place in line counts."""
    clock = FakeClock()
    api = limited(Log(), 1.0, mode="wait")

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await api.execute(1, context)
        first = asyncio.ensure_future(api.execute(1, context))
        await asyncio.sleep(0)
        with pytest.raises(RateLimitedError) as caught:
            await api.execute(1, WorkflowContext(clock=clock, deadline=Deadline.after(1.5, clock)))
        assert caught.value.retry_after == pytest.approx(2.0)
        with pytest.raises(RateLimitedError):
            await TimeoutPrimitive(api, 1.5).execute(1, context)
        assert clock.monotonic() == 0.0
        await asyncio.gather(first, api.execute(1, context))
        assert clock.monotonic() == 2.0

    asyncio.run(main())


def test_late_loop_does_not_let_a_crowd_through() -> None:
    """When the time jumps past many turns at once, the bound still holds."""
    log = Log()
    api = limited(log, 1.0, mode="wait")
    clock = FakeClock(autojump_threshold=None)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        tasks = [asyncio.ensure_future(api.execute(n, context)) for n in range(6)]
        for _ in range(4):
            await asyncio.sleep(0)
        clock.jump(10.0)
        while not all(task.done() for task in tasks):
            for _ in range(4):
                await asyncio.sleep(0)
            clock.jump(0.5)

    asyncio.run(main())
    check_bound(log.moments, 1.0, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_call_that_is_cut_while_it_waits_for_its_turn_was_not_made(shared: bool) -> None:
    """The cancellation says ``before_call``: a breaker around has nothing to count."""
    log, clock = Log(), FakeClock(autojump_threshold=None)

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        api = limited(log, 1.0, mode="wait", store=Store(0.0, 1.0) if shared else None)
        await api.execute(0, context)
        task = asyncio.ensure_future(api.execute(1, context))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert getattr(caught.value, "before_call", None) is True

    asyncio.run(main())
    assert len(log.calls) == 1


def test_call_is_refused_when_those_before_it_were_late() -> None:
    """In line it looks again: what no longer fits is not waited for, whether at the head or behind."""
    clock = FakeClock(autojump_threshold=None)
    api = limited(Log(), 1.0, mode="wait")

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await api.execute(0, context)
        ahead = asyncio.ensure_future(api.execute(1, context))
        await asyncio.sleep(0)
        late = [
            asyncio.ensure_future(api.execute(2, WorkflowContext(clock=clock, deadline=Deadline.after(seconds, clock))))
            for seconds in (2.5, 5.2, 30.0)
        ]
        await asyncio.sleep(0)
        for seconds in (4.5, 30.0):
            clock.jump(seconds)  # the loop was blocked
            for _ in range(12):
                await asyncio.sleep(0)
        assert ahead.done()
        await asyncio.wait(late)
        errors = [task.exception() for task in late]
        assert list(map(type, errors)) == [DeadlineExceededError, RateLimitedError, DeadlineExceededError]
        assert [getattr(error, "before_call", None) for error in errors] == [True, None, True]

    asyncio.run(main())


def test_cancel_at_every_await_point_leaves_no_gap_in_the_line(run_shuffled: Callable[..., Any]) -> None:
    """Whoever gives up, the others keep their turns, and take them one interval earlier."""

    async def main(victim: int, tick: int) -> bool:
        log = Log()
        api = limited(log, 1.0, mode="wait")
        clock = FakeClock(autojump_threshold=None)
        context = WorkflowContext(clock=clock)
        tasks = []
        for number in range(5):
            tasks.append(asyncio.ensure_future(api.execute(number, context)))
            for _ in range(3):
                await asyncio.sleep(0)
        for number in range(1, tick + 1):
            await asyncio.sleep(0)
            if number % 6 == 0:
                clock.jump(0.25)
        was_done = tasks[victim].done()
        tasks[victim].cancel()
        for _ in range(60):
            for _ in range(6):
                await asyncio.sleep(0)
            clock.jump(0.25)
        assert all(task.done() for task in tasks)
        served = [n for n, task in enumerate(tasks) if not task.cancelled()]
        assert [data for _, data in log.calls] == served
        check_bound(log.moments, 1.0, 1)
        assert log.moments[-1] <= (len(served) - 1) * 1.25, "a gap was left, beyond the lateness of a tick each"
        assert not api._limit.line
        return was_done

    for seed in range(2):
        for victim in (1, 2, 4):
            for tick in itertools.count():
                if run_shuffled(main(victim, tick), seed):
                    break


def test_line_goes_on_when_the_loop_of_its_head_was_closed() -> None:
    """A loop that ended under its calls keeps nobody waiting."""

    async def place() -> Place:
        return Place()

    def dead() -> Place:
        loop = asyncio.new_event_loop()
        gone = loop.run_until_complete(place())
        loop.close()
        return gone

    log = Log()
    api = limited(log, 1.0, mode="wait")
    head, behind, third = dead(), dead(), dead()
    head.called = True
    api._limit.line.extend([head, behind])
    asyncio.run(api.execute("alive", WorkflowContext(clock=FakeClock())))
    assert [data for _, data in log.calls] == ["alive"]

    async def main() -> None:
        alive = Place()
        line = api._limit.line
        line.extend([third, alive])
        lead(line)
        assert list(line) == [alive]
        assert alive.called
        lead(line)
        line.clear()

    asyncio.run(main())


def test_newcomer_waits_when_the_first_in_line_is_about_to_take_its_turn() -> None:
    """The token is there, and the one whose turn it is has not woken yet."""
    log, clock = Log(), FakeClock(autojump_threshold=None)
    api = limited(log, 1.0, mode="wait")

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await api.execute("at once", context)
        first = asyncio.create_task(api.execute("first", context))
        while not api._limit.line:
            await asyncio.sleep(0)
        newcomer = asyncio.create_task(api.execute("newcomer", context))
        clock.jump(1.0)
        await first
        clock.jump(1.0)
        await newcomer

    asyncio.run(main())
    assert log.calls == [(0.0, "at once"), (1.0, "first"), (2.0, "newcomer")]


def test_only_the_first_in_line_looks_at_the_clock() -> None:
    """However long the line, a token wakes one call."""
    clock = FakeClock(autojump_threshold=None)
    api = limited(Log(), 1.0, mode="wait")

    async def main() -> None:
        tasks = [asyncio.create_task(api.execute(n, WorkflowContext(clock=clock))) for n in range(6)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(api._limit.line), len(clock._timers)) == (5, 1)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(main())


@pytest.mark.parametrize("first", [True, False])
def test_calls_of_a_loop_that_stands_still_keep_nobody_waiting(first: bool) -> None:
    """Whether it knew that it was the first in line or not: it is passed over, and has its turn when its loop turns."""
    log, clock = Log(), FakeClock(autojump_threshold=None)
    api = limited(log, 1.0, mode="wait")
    here, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    tasks = []

    async def ticks() -> None:
        for _ in range(12):
            await asyncio.sleep(0)

    def turn(loop: asyncio.AbstractEventLoop) -> None:
        if loop is other:
            here.is_running = lambda: True  # type: ignore[method-assign]  # all the time, on its thread
        loop.run_until_complete(ticks())
        vars(here).pop("is_running", None)

    def come(loop: asyncio.AbstractEventLoop, data: str) -> None:
        tasks.append(loop.create_task(api.execute(data, WorkflowContext(clock=clock))))
        turn(loop)

    come(here, "at once")
    if first:
        come(other, "left")
    come(here, "a")
    if not first:
        come(other, "left")
    come(here, "b")
    for _ in range(2):
        clock.jump(1.0)
        turn(here)
    assert log.calls == [(0.0, "at once"), (1.0, "a"), (2.0, "b")]
    turn(other)
    clock.jump(1.0)
    turn(other)
    assert log.calls[3:] == [(3.0, "left")]
    come(other, "c")
    clock.jump(1.0)
    turn(other)
    assert log.calls[4:] == [(4.0, "c")]
    assert not api._limit.line
    for loop in (here, other):
        loop.close()


# ---- properties, and twins that must not have them --------------------


def check_limiter(kind: type[RateLimitPrimitive[Any, Any]]) -> None:
    @settings(max_examples=150, deadline=None, database=None, report_multiple_bugs=False)
    @given(
        rate=st.sampled_from([0.5, 1.0, 3.0, 10.0]),
        burst=st.integers(1, 5),
        mode=st.sampled_from(["reject", "wait"]),
        pauses=st.lists(st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0, 4.0]), min_size=1, max_size=25),
    )
    def holds(rate: float, burst: int, mode: Any, pauses: list[float]) -> None:
        log = Log()
        api = kind(log, rate, burst, mode=mode)
        clock = FakeClock(start=7.0)

        pending: list[int] = []

        async def call(context: WorkflowContext) -> bool:
            now = clock.monotonic()
            free = not pending and all(now - moment > burst / rate for moment in log.moments)
            pending.append(1)
            refused = None
            try:
                await api.execute(1, context)
            except RateLimitedError as error:
                refused = error
            pending.pop()
            if refused is not None:
                assert not free, "refused though nothing was spent"
                assert 0 < refused.retry_after <= 1 / rate + 1e-6
            return refused is None

        async def main() -> list[bool]:
            context = WorkflowContext(clock=clock)
            tasks = []
            for pause in pauses:
                tasks.append(asyncio.ensure_future(call(context)))
                await clock.sleep(pause)
            return list(await asyncio.gather(*tasks))

        through = asyncio.run(main())
        check_bound(log.moments, rate, burst)
        if mode == "wait":
            assert all(through)

    holds()


def test_limit_is_burst_plus_rate_times_time_whatever_comes() -> None:
    """No pattern of calls gets more through than that, and none is refused that need not be."""
    check_limiter(RateLimitPrimitive)


class FixedWindow(RateLimitPrimitive[Any, Any]):
    """As many do it: so many per second of the clock, which lets twice as many through at its turn."""

    __module__ = "tta_sync.twins"  # only the library itself may define _run

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        window = math.floor(context.clock.monotonic())
        seen: dict[int, int] = self.__dict__.setdefault("seen", {})
        while seen.get(window, 0) >= max(1, self.rate):
            if self.mode == "reject":
                raise RateLimitedError("fixed", min(0.01, 1 / self.rate))
            await context.clock.sleep(window + 1 - context.clock.monotonic())
            window = math.floor(context.clock.monotonic())
        seen[window] = seen.get(window, 0) + 1
        return await self._inner(data, context)


class SpendsOnRefusal(RateLimitPrimitive[Any, Any]):
    """A refused call takes a token all the same."""

    __module__ = "tta_sync.twins"

    async def _run(self, data: Any, context: WorkflowContext) -> Any:
        now = context.clock.monotonic()
        wait, self._baton[0] = decide(self._baton[0], now, self._interval, self._tolerance)
        if wait:
            raise RateLimitedError("api", wait)
        return await self._inner(data, context)


@pytest.mark.parametrize("twin", [FixedWindow, SpendsOnRefusal])
def test_wrong_twins_fail_the_property(twin: type[RateLimitPrimitive[Any, Any]]) -> None:
    """The property can tell a right limiter from a wrong one."""
    with pytest.raises((AssertionError, RateLimitedError)):
        check_limiter(twin)


def test_threads_with_loops_of_their_own_share_one_limit() -> None:
    """Eight threads get no more through than one would."""
    log: list[int] = []
    api = limited(lambda data: log.append(data), 0.001, 20)

    def thread() -> None:
        async def main() -> None:
            for number in range(20):
                try:
                    await api.execute(number)
                except RateLimitedError:
                    pass

        asyncio.run(main())

    threads = [threading.Thread(target=thread) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(log) == 20


def test_limit_goes_on_when_a_thread_holds_it_or_has_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that finds the state taken waits for it; one that never comes back is begun anew."""
    api = limited(lambda data: data, 1.0)
    taken = api._baton.pop()
    yields: list[float] = []

    def give_back(seconds: float) -> None:
        yields.append(seconds)
        if len(yields) == 3:
            api._baton.append(taken)

    moments = itertools.count(0.0, 0.25)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=give_back, monotonic=lambda: next(moments)))
    clock = FakeClock()
    run(api, clock)
    assert yields == [0, 0, 0]
    api._baton.clear()
    run(api, clock)
    assert len(yields) > 3
    monkeypatch.undo()
    with pytest.raises(RateLimitedError):
        run(api, clock)
    for left in ([], [5.0]):
        api._baton[:] = left
        api.after_fork()
        assert len(api._baton) == 1


def test_threads_wait_in_one_line() -> None:
    """Calls of several loops wake each other in turn."""
    log: list[int] = []
    api = limited(lambda data: log.append(data), 200.0, mode="wait")

    def thread() -> None:
        async def main() -> None:
            await asyncio.gather(*(api.execute(number) for number in range(6)))

        asyncio.run(main())

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(log) == 24
    assert not api._limit.line


def test_forked_child_has_a_free_lock_and_an_empty_line() -> None:
    """What the parent's calls hold binds nobody in the child."""
    api = limited(lambda data: data, 1.0, mode="wait")
    api._limit.line.append("a call of the parent")  # type: ignore[arg-type]
    api._lock.acquire()
    child = os.fork()
    if not child:
        code = 1
        try:
            api.execute(1, WorkflowContext()).send(None)
        except StopIteration:
            code = 0
        finally:
            os._exit(code)
    api._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- a store that processes share -------------------------------------


class Store:
    """Tells the waits it was given, or fails."""

    def __init__(self, *waits: float | BaseException) -> None:
        self.waits = list(waits)
        self.asked: list[tuple[Any, ...]] = []

    async def take(self, limiter: str, key: str, rate: float, burst: int, context: WorkflowContext) -> float:
        self.asked.append((limiter, key, rate, burst))
        answer = self.waits.pop(0) if self.waits else 0.0
        if isinstance(answer, BaseException):
            raise answer
        return answer


def run(api: RateLimitPrimitive[Any, Any], clock: FakeClock, deadline: float | None = None, data: Any = 1) -> Any:
    context = WorkflowContext(clock=clock)
    if deadline is not None:
        context.deadline = Deadline.after(deadline, clock)
    return asyncio.run(api.execute(data, context))


def test_shared_limit_is_asked_with_a_key_spelled_the_same_in_every_process() -> None:
    """Values of plain types are told apart by type; an object is refused, as its spelling would differ."""
    store = Store()
    for key in ("1", 1, ("a", None), b"x", None):
        run(limited(Log(), 5.0, 2, key=lambda data, key=key: key, store=store), FakeClock())
    run(limited(Log(), 5.0, 2, store=store), FakeClock())
    assert [asked[1] for asked in store.asked] == ["'1'", "1", "('a', None)", "b'x'", "None", ""]
    assert store.asked[0] == ("api", "'1'", 5.0, 2)
    with pytest.raises(TypeError, match="return its id"):
        run(limited(Log(), 1.0, key=lambda data: object(), store=store), FakeClock())


def test_shared_limit_refuses_or_waits_as_the_store_says() -> None:
    """reject raises with the store's wait; wait comes back after it, as often as needed, if it fits."""
    clock = FakeClock()
    with pytest.raises(RateLimitedError) as caught:
        run(limited(Log(), 1.0, store=Store(3.0)), clock)
    assert caught.value.retry_after == 3.0
    assert run(limited(Log(), 1.0, mode="wait", store=Store(3.0, 0.5)), clock) == 1
    assert clock.monotonic() == 3.5
    with pytest.raises(RateLimitedError):
        run(limited(Log(), 1.0, mode="wait", store=Store(3.0)), clock, deadline=3.0)
    assert clock.monotonic() == 3.5


@pytest.mark.parametrize("down", [ConnectionError(), TimeoutError()])
def test_local_share_of_the_rate_holds_while_the_store_is_down(down: Exception) -> None:
    """With four workers this one lets a quarter through; "open" lets all, "closed" none."""
    log, clock = Log(), FakeClock()
    local = limited(log, 4.0, store=Store(*[down] * 9), workers=4)
    run(local, clock)
    with pytest.raises(RateLimitedError) as caught:
        run(local, clock)
    assert caught.value.retry_after == pytest.approx(1.0)
    opened = limited(log, 4.0, store=Store(*[down] * 9), fail="open")
    for _ in range(5):
        run(opened, clock)
    with pytest.raises(RateLimitedError):
        run(limited(log, 4.0, store=Store(down), fail="closed"), clock)


@pytest.mark.parametrize(("said", "interval"), [("4", 4.0), ("", 1.0), ("many", 1.0), ("²", 1.0), ("0", 1.0)])
def test_share_of_the_rate_follows_gunicorn_when_nobody_says_how_many_workers(
    monkeypatch: pytest.MonkeyPatch, said: str, interval: float
) -> None:
    """WEB_CONCURRENCY is how many there are; nonsense is one. Without a store the whole rate is this process's."""
    monkeypatch.setenv("WEB_CONCURRENCY", said)
    clock = FakeClock()
    local = limited(Log(), 1.0, store=Store(*[ConnectionError()] * 9))
    run(local, clock)
    with pytest.raises(RateLimitedError) as caught:
        run(local, clock)
    assert caught.value.retry_after == pytest.approx(interval)
    alone = limited(Log(), 1.0)
    run(alone, clock)
    with pytest.raises(RateLimitedError) as caught:
        run(alone, clock)
    assert caught.value.retry_after == pytest.approx(1.0)


# ---- the rest ---------------------------------------------------------


def test_retry_waits_for_the_next_token() -> None:
    """Retry(RateLimit(step)) comes back exactly when it may."""
    log, clock = Log(), FakeClock()
    api = limited(log, 0.5)
    run(api, clock)
    asyncio.run(RetryPrimitive(api).execute(1, WorkflowContext(clock=clock)))
    assert log.moments == [0.0, pytest.approx(2.0)]


def test_timeout_cuts_a_wait_as_what_it_is() -> None:
    """A limit that comes up during the wait, as the loop was late, is the limit's own error."""
    clock = FakeClock(autojump_threshold=None)
    api = limited(Log(), 1.0, mode="wait")

    async def main() -> None:
        context = WorkflowContext(clock=clock)
        await api.execute(1, context)
        task = asyncio.ensure_future(TimeoutPrimitive(api, 1.25).execute(1, context))
        await asyncio.sleep(0)
        clock.jump(5.0)
        with pytest.raises((StepTimeoutError, RateLimitedError)):
            await task

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": math.inf}, "rate"),
        ({"rate": True}, "rate"),
        ({"burst": 0}, "burst"),
        ({"burst": 1.5}, "burst"),
        ({"workers": 0}, "workers"),
        ({"mode": "queue"}, "mode"),
        ({"fail": "maybe"}, "fail"),
        ({"key": "user"}, "write key=lambda data"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_the_remedy(options: dict[str, Any], said: str) -> None:
    """Each mistake is told at construction."""
    with pytest.raises(ConfigurationError, match=said):
        limited(Log(), **{"rate": 1.0, **options})


async def user_of(data: Any) -> Any:
    return data


class UserOf:
    async def __call__(self, data: Any) -> Any:
        return data


async def users_of(data: Any) -> Any:
    yield data


@pytest.mark.parametrize(
    "key", [user_of, partial(user_of), UserOf(), partial(UserOf()), users_of], ids=lambda key: type(key).__name__
)
def test_async_key_is_refused_when_built(key: Any) -> None:
    """Each coroutine would be a key of its own, and nothing limited."""
    with pytest.raises(ConfigurationError, match=r"is async.* make it a plain function"):
        limited(Log(), 1.0, key=key)


@pytest.mark.parametrize("mode", ["reject", "wait"])
def test_key_to_be_awaited_is_refused_when_it_comes(mode: Any) -> None:
    """What only the call can show is told there; the coroutine is closed, and no call is made."""
    log = Log()
    coroutines: list[Any] = []

    def key(data: Any) -> Any:
        coroutines.append(user_of(data))
        return coroutines[-1]

    with pytest.raises(ConfigurationError, match="the key of the rate limit api is a coroutine"):
        run(limited(log, 1.0, key=key, mode=mode), FakeClock())
    assert inspect.getcoroutinestate(coroutines[0]) == inspect.CORO_CLOSED
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ConfigurationError, match="is a Future"):
            run(limited(log, 1.0, key=lambda data: loop.create_future(), mode=mode), FakeClock())
    finally:
        loop.close()
    assert not log.calls


def test_event_tells_of_each_rejection(workflow_events: list[events.Event]) -> None:
    """CallRejected with the wait."""
    api, clock = limited(Log(), 1.0), FakeClock()
    run(api, clock)
    with pytest.raises(RateLimitedError):
        run(api, clock)
    (rejected,) = workflow_events
    assert isinstance(rejected, events.CallRejected)
    assert (rejected.step, rejected.by, rejected.retry_after) == ("api", "rate limit", 1.0)


def test_repr_shows_rate_and_burst() -> None:
    """A workflow can be read."""
    assert repr(limited(Log(), 2.5, 3)) == "RateLimit(api, rate=2.5, burst=3)"
    assert repr(limited(Log(), 1, mode="wait")) == 'RateLimit(api, rate=1, burst=1, mode="wait")'
    assert limited(Log(), 1).children()[0].name == "api"
