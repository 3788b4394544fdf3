"""A limit on the time that one step may take."""

from __future__ import annotations

import asyncio
import functools
import gc
import heapq
import inspect
import itertools
import logging
import math
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, NoReturn

from tta_sync import events
from tta_sync.clock import SYSTEM_CLOCK, Clock, Timer
from tta_sync.context import Deadline, TimeLimit, WorkflowContext, current_caller, limit_in_force, time_limit
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, StepTimeoutError, not_called
from tta_sync.primitives.core.base import MISS, In, LambdaPrimitive, Out, StepLike, WorkflowPrimitive, as_primitive
from tta_sync.primitives.core.composition import check_composition, children_of, inside, is_unbound
from tta_sync.primitives.core.naming import call_name, called
from tta_sync.primitives.core.options import is_number
from tta_sync.primitives.core.threads import abandoned

__all__ = ["TimeoutPrimitive"]  # no TimeoutError: a star import must not take the builtin's place

Run = Callable[[Any, WorkflowContext], Coroutine[Any, Any, Any]]

TimeoutError = StepTimeoutError  # noqa: A001  # TTA.dev's name for it in this module

# A method of an imported name is looked up anew for each call; of these, once for all.
_limit_around = time_limit.get
_set_time_limit = time_limit.set
_waiting_caller = current_caller.get

GRACE = 1.0
"""Seconds that a step has to end in after it was cancelled at its limit; then it is left behind."""

orphans: set[asyncio.Task[Any]] = set()
"""Steps that swallowed their cancellation and still run. Held here because a loop holds its tasks only weakly."""


class TimeoutPrimitive(WorkflowPrimitive[In, Out]):
    """Cancel a step that takes longer than *timeout_seconds*.

    The limit that holds is the smallest of this one, those around it, and what remains of the call's deadline; the step
    inside sees it, so that a Retry there does not wait for what will be cut anyway. The step runs in the caller's own
    task. It has one second to clean up after it was cancelled; then it is left behind, counted and logged, and the
    caller goes on. A timeout that the step itself raises passes through as what it is.

    Args:
        primitive: the step.
        timeout_seconds: seconds, more than 0.
        fallback: a step that answers instead when the limit was hit; the context is then marked degraded.
        track_timeouts: note each timeout in ``state["timeout_count"]`` and ``state["timeout_history"]``.

    Raises:
        StepTimeoutError: the step hit this limit, also when it blocked the loop past it and then returned.
        DeadlineExceededError: the call's deadline came first.
        ConfigurationError: *timeout_seconds* is missing, or no positive number.

    Source: ``asyncio.timeout``; names as in TTA.dev.
    """

    _tta_kind = "timeout"
    peeks = True

    def __init__(
        self,
        primitive: StepLike[In, Out],
        timeout_seconds: float | None = None,
        fallback: Any = None,
        track_timeouts: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        if not (is_number(timeout_seconds) and timeout_seconds > 0):
            raise ConfigurationError(
                f"a timeout needs a positive number of seconds, not {timeout_seconds!r}: "
                "write TimeoutPrimitive(step, timeout_seconds=30.0), or leave the timeout out"
            )
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        self.timeout_seconds = float(timeout_seconds)
        inner = (self.primitive, *dict(inside(self.primitive)))
        self.fallback: WorkflowPrimitive[In, Out] | None = None if fallback is None else as_primitive(fallback)
        self.track_timeouts = track_timeouts
        if name is not None:
            self.name = name
        # What is driven by hand must be a coroutine; a subclass's `execute` may return any awaitable.
        run = self.primitive._run
        coroutines = inspect.iscoroutinefunction(run) or getattr(run, "makes_coroutines", False)
        self._inner: Run = run if coroutines else _awaiting(run)
        self._waits = False  # whether the step had to wait in the last call, whichever thread made it: a guess, no more
        self._in_thread = any(part.runs_on == "pool" for part in inner)
        self._limited = frozenset(map(id, _cut_with(self.primitive)))
        self.peek_raises = getattr(self.primitive, "peek_raises", False)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,) if self.fallback is None else (self.primitive, self.fallback)

    def details(self) -> str:
        return f"timeout_seconds={self.timeout_seconds:g}"

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        if (
            isinstance(inner, TimeoutPrimitive)
            and inner.timeout_seconds > self.timeout_seconds
            and id(inner) in self._limited
        ):
            return (
                f"the timeout of {inner.timeout_seconds:g} s inside one of {self.timeout_seconds:g} s never fires: "
                "make the inner limit the shorter one"
            )
        return None

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        inner = self._inner  # a local: called on self, it would first be looked for in the class
        clock = context.clock
        monotonic = clock.monotonic
        now = monotonic()
        at = now + self.timeout_seconds
        deadline = context.deadline
        if deadline is not None:
            if deadline.at < at:
                at = deadline.at
                if at <= now:
                    raise not_called(DeadlineExceededError(deadline.seconds))
            else:
                deadline = None
        outer = _limit_around()
        limit: _OwnLimit | None = None
        borrowed: _BorrowedLimit | None = None
        if outer is not None:
            if getattr(outer, "over", False):
                outer = limit_in_force(outer)
            if outer is not None and outer <= at:
                if outer <= now:
                    raise not_called(
                        StepTimeoutError(call_name(self.primitive), 0.0, "the limit around it had already passed")
                    )
                around = getattr(outer, "step", None)
                if around is None or (
                    around.cr_running and (_current_task is None or outer.task is _current_task())  # type: ignore[attr-defined]
                ):
                    return await inner(data, context)  # type: ignore[no-any-return]  # it is cut with that step
                limit = _new_limit(now + self.timeout_seconds, outer)
                borrowed = _borrow(outer, limit, (at, deadline))
                at, deadline = float(outer), None
        if deadline is None:
            if limit is None:
                limit = _set_limit(at, outer)
        elif deadline.kept and clock is SYSTEM_CLOCK and _caller_cuts_at(at):
            return await inner(data, context)  # type: ignore[no-any-return]  # it is cut with that call

        driver: _Driver | None = None
        try:
            # A step that never waits needs no timer: nothing could fire while it runs. Whether this one will is guessed
            # from the last call, as what is cheap for the one is dear for the other.
            step: Any = inner(data, context)
            if limit is not None:
                limit.step = step
            if self._waits:
                coroutine = step
                try:
                    waited = step.send(None)
                except StopIteration as stop:
                    self._waits = False
                    waited = _NOTHING
                    result = stop.value
            else:
                try:
                    starter = _starters.pop()
                except IndexError:
                    starter = _make_starter()
                waited = starter[1](step)
                if waited is starter:
                    result = starter[0]
                    starter[0] = None
                    _starters.append(starter)
                    if monotonic() < at:
                        return result  # type: ignore[no-any-return]
                    waited = _NOTHING
                else:
                    self._waits = True
                    coroutine = starter[1].__self__
                    starter.clear()
            if waited is not _NOTHING:
                if limit is None:  # the deadline may be moved: then this limit may be the one that strikes
                    limit = _set_limit(now + self.timeout_seconds, outer)
                    limit.step = step
                driver = _Driver(waited, coroutine, clock, at, deadline, limit, borrowed)
                try:
                    result = await driver
                except (Exception, asyncio.CancelledError) as error:
                    if not driver.fired:
                        raise
                    driver.cause = error
                else:
                    if not driver.fired and (monotonic() < driver.at or driver.has_moved()):
                        return result  # type: ignore[no-any-return]
                finally:
                    driver.end()
            elif monotonic() < at:
                return result  # type: ignore[no-any-return]
        finally:
            if limit is not None:
                limit.over = True
                limit.task = None
                # Not reset(token): a step that is left behind ends in another context than it began in.
                _set_time_limit(outer)
        if driver is not None:
            deadline, borrowed = driver.deadline, driver.borrowed
        return await self._cut(data, context, driver, deadline, borrowed is not None)

    async def _cut(
        self,
        data: In,
        context: WorkflowContext,
        driver: _Driver | None,
        deadline: Deadline | None,
        borrowed: bool,
    ) -> Out:
        """Say that the step took too long, or let the fallback answer; *borrowed*: at the limit around this one."""
        fired = False
        cause: BaseException | None = None
        error: StepTimeoutError | None = None
        detached = ""
        try:
            if driver is not None:
                fired = driver.fired
                cause, driver.cause = driver.cause, None  # the frames of one lead to the other
                if driver.orphan is not None:
                    detached = leave_behind(*driver.orphan, self.primitive)
            if driver is not None and driver.withdraw():
                # Somebody else has cancelled as well, and that comes first.
                raise cause if isinstance(cause, asyncio.CancelledError) else asyncio.CancelledError()
            if deadline is not None:
                raise DeadlineExceededError(deadline.seconds) from cause
            error = self._timed_out(context, detached, blocked=not fired, borrowed=borrowed)
            if self.fallback is None or borrowed:  # it is too late for the fallback as well
                raise error from cause
            self._fell_back(self.fallback, context, error)
        finally:
            error = cause = driver = None
        return await self.fallback._run(data, context)

    def _timed_out(self, context: WorkflowContext, detached: str, blocked: bool, borrowed: bool) -> StepTimeoutError:
        """Note that the limit was hit, and make the error that says so.

        *detached* is why the step was left behind; *borrowed*: it was the limit around this one.
        """
        name = call_name(self.primitive)
        if self.track_timeouts:
            state = context.state
            state["timeout_count"] = state.get("timeout_count", 0) + 1
            state.setdefault("timeout_history", []).append(
                {"primitive": name, "timeout": self.timeout_seconds, "had_fallback": self.fallback is not None}
            )
        if events.bus.emit is not None:
            events.bus.emit(
                events.StepTimedOut(
                    step=name,
                    correlation_id=context.correlation_id,
                    timeout=self.timeout_seconds,
                    detached=bool(detached),
                )
            )
        details = []
        if borrowed:
            details.append("a shorter limit, around the step that started this task, came first")
        if blocked:
            details.append("it blocked the loop and could not be cancelled: make it a thread_step")
        if detached:
            details.append(f"{detached}; it was left behind, still running")
        if self._in_thread:
            details.append("a thread cannot be interrupted: what it has begun there runs on")
            if abandoned:
                details.append(f"threads held by steps that nobody waits for: {len(abandoned)}")
        return StepTimeoutError(name, self.timeout_seconds, "; ".join(details))

    def _fell_back(
        self, fallback: WorkflowPrimitive[In, Out], context: WorkflowContext, error: StepTimeoutError
    ) -> None:
        context.mark_degraded()
        if events.bus.emit is not None:
            events.bus.emit(
                events.FallbackUsed(
                    step=call_name(self),
                    correlation_id=context.correlation_id,
                    failed=call_name(self.primitive),
                    used=call_name(fallback),
                    error=error,
                )
            )

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        inner = self.primitive
        return inner.peek(data, context) if inner.peeks else MISS


def _caller_cuts_at(moment: float) -> bool:
    """Say whether a caller waits who cuts, at *moment*, the very task that asks."""
    caller = _waiting_caller()
    if caller is None or caller.deadline != moment:
        return False
    task: Any = caller.task
    return task is not None and task.get_coro().cr_running and (_current_task is None or task is _current_task())


def _cut_with(step: WorkflowPrimitive[Any, Any]) -> list[WorkflowPrimitive[Any, Any]]:
    """Return *step* and those parts of it that a limit around it cuts.

    What undoes a saga has a time of its own, and so has what a cache computes: others may wait for it, and longer.
    """
    found = [step]
    seen = {id(step)}
    for part in found:  # grows meanwhile
        parts = children_of(part)
        if type(part)._tta_kind == "cache" or any(map(is_unbound, parts)):
            parts = ()
        elif type(part)._tta_kind == "saga":
            parts = tuple(forward for forward, _ in part.steps)  # type: ignore[attr-defined]  # a SagaPrimitive
        for inner in parts:
            if id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return found


def _awaiting(run: Run) -> Run:
    async def awaiting(data: Any, context: WorkflowContext) -> Any:
        return await run(data, context)

    return awaiting


@types.coroutine
def _first_steps(starter: list[Any]) -> Generator[Any, Any, Any]:
    """Run one coroutine after another until it waits for something, without the cost of a StopIteration for each.

    Sent a coroutine, it yields *starter* with the result in its first place; or what the coroutine waits for, and from
    then on it is as good as that coroutine itself: whoever goes on with it has emptied *starter*.
    """
    while True:
        result = yield from (yield starter)
        try:
            starter[0] = result
        except IndexError:
            return result
        result = None


def _make_starter() -> list[Any]:
    starter: list[Any] = [None]  # for the result
    starter.append(_first_steps(starter).send)
    starter[1](None)
    return starter


_starters: deque[list[Any]] = deque()
"""Those at rest: as many as have ever been at work at one moment, one inside the other or on several threads. Taken and
given back by atomic operations; one whose coroutine raised, or waits, does not come back. Not a list, which gives its
memory back when its last item is taken, and asks for it again: a tenth of a microsecond."""


class _OwnLimit(TimeLimit):
    """A TimeLimit that is made for each call, and so without a dictionary."""

    __slots__ = ("outer", "over", "step", "struck", "task")

    task: asyncio.Task[Any] | None  # the one that is cut; None before Python 3.12, whose tasks may begin inside another


def _new_limit(at: float, outer: float | None) -> _OwnLimit:
    limit = _OwnLimit(at)
    limit.outer = outer
    limit.over = limit.struck = False
    limit.task = None if _current_task is None else _current_task()
    return limit


def _set_limit(at: float, outer: float | None) -> _OwnLimit:
    limit = _new_limit(at, outer)
    _set_time_limit(limit)
    return limit


_current_task = asyncio.current_task if sys.version_info >= (3, 12) else None
"""Asked where a task may begin inside another one, eagerly; not in 3.11, which has none such, and is slow to say."""


class _Elsewhere:
    cr_running = False


class _BorrowedLimit(TimeLimit):
    """A limit around the step that started this task, as it holds inside the task: as long as that step lasts.

    It is enforced here, as who has set it cuts another task, and relied on by nobody. ``outer`` comes into its place;
    ``later`` is what the step then has: the moment that is its own, and the deadline if it is to blame for that.
    """

    __slots__ = ("later", "lender", "outer")

    step = _Elsewhere
    later: tuple[float, Deadline | None]
    lender: float

    @property
    def over(self) -> bool:  # type: ignore[override]
        return getattr(self.lender, "over", False)


def _borrow(outer: float, own: _OwnLimit, later: tuple[float, Deadline | None]) -> _BorrowedLimit:
    """Set *outer* for a step that it does not cut, as it runs in another task; and those around it, if before *own*."""
    lenders = [outer]
    while (lender := limit_in_force(getattr(lenders[-1], "outer", None))) is not None and lender <= later[0]:
        lenders.append(lender)
    limit: Any = own
    for lender in reversed(lenders):
        behind, limit = limit, _BorrowedLimit(lender)
        limit.lender, limit.outer, limit.later = lender, behind, later
    _set_time_limit(limit)
    borrowed: _BorrowedLimit = limit
    return borrowed


class _Alarms:
    """The limits of one loop on one clock, behind a single timer (loop thread only).

    Nearly every step ends long before its limit. So a limit is an entry in a heap, which costs a tenth of a loop timer;
    what is over is dropped when it comes to the top, or when it makes up half of the heap. The timer stays armed for a
    while after the last step has ended, so that one step after another need not arm it anew.
    """

    __slots__ = ("_armed", "_heap", "_numbers", "_over", "_timer", "clock", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.loop = weakref.ref(loop)
        self.clock = clock
        self._heap: list[tuple[float, int, _Driver]] = []
        self._numbers = itertools.count()
        self._over = 0  # entries whose step has ended
        self._armed = math.inf
        self._timer: Timer | None = None

    def add(self, driver: _Driver, at: float) -> None:
        """Have ``driver.fire()`` called at the moment *at*."""
        heapq.heappush(self._heap, (at, next(self._numbers), driver))
        if at < self._armed:
            self._arm(at)

    def drop(self) -> None:
        """Take note that the step of one of the entries has ended."""
        heap = self._heap
        self._over += 1
        while heap and heap[0][2].over:
            heapq.heappop(heap)
            self._over -= 1
        if self._over > 100 and self._over * 2 > len(heap):
            heap[:] = [entry for entry in heap if not entry[2].over]
            heapq.heapify(heap)
            self._over = 0
        if not heap and self._timer is not None and self.clock is not SYSTEM_CLOCK:
            # A clock that jumps from timer to timer must not be led to one that no longer matters.
            self._timer.cancel()
            self._timer = None
            self._armed = math.inf

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed = at
        self._timer = self.clock.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._armed = math.inf
        heap = self._heap
        now = self.clock.monotonic()
        while heap and (heap[0][0] <= now or heap[0][2].over):
            driver = heapq.heappop(heap)[2]
            if driver.over:
                self._over -= 1
            else:
                driver.fire()
        if heap:
            self._arm(heap[0][0])


_thread = threading.local()


class _Driver:
    """Drive a suspended step inside the caller's own task, until it ends or is left behind (loop thread only).

    It stands between the task and the step's coroutine like an `await` that can let go: that is why the step needs no
    task of its own, and gets one only when it does not end after its cancellation.
    """

    task: Any  # None once the step has ended within its limit
    fired = False
    cause: BaseException | None = None  # what the step ended with after it was cancelled here
    orphan: tuple[asyncio.Task[Any], Any] | None = None  # the step's task and coroutine, where it was left behind
    over = False
    _abandon = False
    _asked = 0  # cancellations of the task
    _grace: Timer | None = None
    _stranded: Any = None  # what the step waits for when it is left behind

    def __init__(
        self,
        waited: Any,
        coroutine: Any,
        clock: Clock,
        at: float,
        deadline: Deadline | None,
        limit: _OwnLimit,
        borrowed: _BorrowedLimit | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            coroutine.close()
            raise RuntimeError("a timeout can only cancel what runs in a task: use asyncio.run or run_sync")
        self.task = task
        self.cancelling = task.cancelling()
        self._coroutine = coroutine
        self._waited = waited  # what the step waited for first; taken before this was made
        self._clock = clock
        self.at = at
        self.deadline = deadline  # the one to blame; None: the own limit
        self._limit = limit  # the own one
        self.borrowed = borrowed
        alarms: _Alarms | None = getattr(_thread, "alarms", None)
        if alarms is None or alarms.loop() is not loop or alarms.clock is not clock:
            alarms = _thread.alarms = _Alarms(loop, clock)  # those of another loop or clock ring on their own
        self._alarms = alarms
        alarms.add(self, at)

    def end(self) -> None:
        """Let go of everything: the step has ended, or was left behind."""
        self.over = True
        self._coroutine = self._stranded = None
        if self.fired:
            if self._grace is not None:
                self._grace.cancel()
        else:
            self.task = None  # it may keep an error whose frames lead here
            self._alarms.drop()

    # ---- what `await` sees

    def __await__(self) -> Generator[Any, None, Any]:
        self_: Any = self
        iterator: Generator[Any, None, Any] = self_
        return iterator

    def __next__(self) -> Any:
        waited = self._waited
        if waited is not _NOTHING:
            self._waited = _NOTHING
            return waited
        if self._abandon:
            self._detach(None)
        return self._coroutine.send(None)

    def throw(self, *error: Any) -> Any:
        if self._abandon:
            self._detach(error[0] if isinstance(error[0], BaseException) else error[1])
        try:
            return self._coroutine.throw(*error)
        finally:
            del error  # its traceback holds this frame

    def close(self) -> None:
        self._coroutine.close()

    @property
    def cr_await(self) -> Any:
        """Let those who look where a task stands look through this object."""
        return self._coroutine

    # ---- what the timers do

    def withdraw(self) -> bool:
        """Take back the cancellations asked for here; say whether somebody else has asked for one as well."""
        task, self.task = self.task, None
        if not self._asked:
            return False
        for _ in range(self._asked):
            left = task.uncancel()
        return bool(left > self.cancelling)

    def fire(self) -> None:
        """Cancel the step: its limit has come."""
        if self.has_moved():
            self._alarms.add(self, self.at)
            return
        struck = self._limit if self.deadline is None else self.deadline
        struck.struck = True
        self.fired = True
        self._asked = 1
        self._grace = self._clock.call_at(self._clock.monotonic() + GRACE, self._leave_behind)
        self.task.cancel()

    def has_moved(self) -> bool:
        """Look anew when to strike; say whether that is still to come."""
        borrowed, deadline = self.borrowed, self.deadline
        if borrowed is not None:
            if borrowed.over:
                # The step that started this task has ended: its limit no longer holds here.
                limit = limit_in_force(borrowed)
                if isinstance(limit, _BorrowedLimit):
                    self.borrowed, self.at = limit, float(limit)
                else:
                    self.borrowed = None
                    self.at, self.deadline = borrowed.later
        elif deadline is not None and deadline.at > self.at:
            # It was moved, as others wait for the same work, and longer.
            self.at = min(deadline.at, self._limit)
            if self._limit < deadline.at:
                self.deadline = None
        return self.at > self._clock.monotonic()

    def _leave_behind(self) -> None:
        """Take the task back from whatever the step waits for, without disturbing the step any further."""
        self._abandon = True
        task = self.task
        waited: Any = getattr(task, "_fut_waiter", None)
        if waited is None:
            return  # the task is about to run anyway
        for callback, variables in list(getattr(waited, "_callbacks", None) or ()):
            if getattr(callback, "__self__", None) is task:
                waited.remove_done_callback(callback)
                self._stranded = waited
                loop = asyncio.get_running_loop()
                gate = loop.create_future()
                gate.set_result(None)
                loop.call_soon(callback, gate, context=variables)
                return
        if not isinstance(waited, asyncio.Future):
            # A future of a foreign kind, which does not show who waits for it: the step is cancelled a second time.
            self._asked = 2
            task.cancel()
        # Else a limit inside has just done the same, and the task is about to run.

    def _detach(self, error: BaseException | None) -> NoReturn:
        """Let the step go on in a task of its own."""
        orphan = self.task.get_loop().create_task(
            _go_on(self._coroutine, self._stranded, error), name=f"orphan of {self.task.get_name()}"
        )
        _rehome(self._coroutine, self.task, orphan)
        self.orphan = orphan, self._coroutine
        raise asyncio.CancelledError


_NOTHING: Any = object()


async def _go_on(coroutine: Any, stranded: Any, error: BaseException | None) -> Any:
    limit = TimeLimit(-math.inf)  # for what it still does: no more waits, no more retries, and no success for a breaker
    limit.struck = True
    time_limit.set(limit)
    try:
        return await _resume(coroutine, stranded, error)
    finally:
        limit.over = True


@types.coroutine
def _resume(coroutine: Any, stranded: Any, error: BaseException | None) -> Generator[Any, None, Any]:
    """Go on with a coroutine that has been running elsewhere: it waits for *stranded*, or is to be told *error*."""
    waited = _NOTHING
    if stranded is not None:
        stranded._asyncio_future_blocking = True  # as Future.__await__ sets it for the task that takes it over
        waited = stranded
    while True:
        if waited is not _NOTHING:
            try:
                yield waited
            except BaseException as cancelled:
                error = cancelled
        try:
            if error is None:
                waited = coroutine.send(None)
            else:
                thrown, error = error, None
                waited = coroutine.throw(thrown)
        except StopIteration as stop:
            return stop.value


def _rehome(coroutine: Any, old: asyncio.Task[Any], new: asyncio.Task[Any]) -> None:
    """Tell the timeouts and task groups entered inside *coroutine* that it runs in another task now.

    They keep the task that they were entered in, to cancel it: that must not be the caller's any more, nor may a
    cancellation that they have requested already count against it.
    """
    while coroutine is not None:
        for part in gc.get_referents(coroutine):
            # An `async with` keeps the bound __aexit__ on the frame's stack.
            scope = getattr(part, "__self__", part)
            holder, has_cancelled = _SCOPES.get(type(scope), ("", None))
            if has_cancelled is not None and getattr(scope, holder) is old:
                setattr(scope, holder, new)
                if has_cancelled(scope):
                    old.uncancel()
        coroutine = _awaited(coroutine)


_SCOPES: dict[type, tuple[str, Callable[[Any], bool] | None]] = {
    asyncio.Timeout: ("_task", lambda scope: scope.expired()),
    asyncio.TaskGroup: ("_parent_task", lambda scope: scope._parent_cancel_requested),
    _Driver: ("task", lambda scope: scope.fired),
}
"""Where each kind of scope keeps its task, and whether it has cancelled it already."""


def _awaited(coroutine: Any) -> Any:
    return getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def leave_behind(orphan: asyncio.Task[Any], coroutine: Any, step: WorkflowPrimitive[Any, Any]) -> str:
    """Keep the task of *step*, which outlived its cancellation, until it ends; count it; return why it was left."""
    orphans.add(orphan)
    orphan.add_done_callback(_orphan_ended)
    caller = _waiting_caller()
    level = logging.DEBUG if caller is not None and caller.step_left_behind() == "quietly" else logging.WARNING
    frame, excuse = _standing(coroutine)
    if frame is not None:
        name, place = frame.f_code.co_qualname, f"{frame.f_code.co_filename}:{frame.f_lineno}"
    else:  # it waits inside a primitive, for tasks that do not show
        name, place = call_name(step), _place_of(step)
    if excuse:
        reason = f"{excuse} {GRACE:g} s after its cancellation"
    else:
        reason = f"it swallowed its cancellation for {GRACE:g} s"
    events.logger.log(level, "%s runs on as an orphan: %s%s", name, reason, place and f"; it stands at {place}")
    if events.bus.emit is not None:
        events.bus.emit(events.CallOrphaned(step=name, reason=reason, age=GRACE))
    return reason


def _orphan_ended(orphan: asyncio.Task[Any]) -> None:
    orphans.discard(orphan)
    if not orphan.cancelled() and orphan.exception() is not None:
        events.logger.warning("a step that was left behind ended with %s", type(orphan.exception()).__qualname__)


excuses: dict[types.CodeType, str] = {}
"""Primitives' own code that goes on after a cancellation because it has to, and what it is at then."""


def _standing(coroutine: Any) -> tuple[types.FrameType | None, str]:
    """Return where a suspended step stands, the innermost frame that is the user's, and what else there is to say.

    A primitive that waits for tasks of its own swallows nothing: who does stands in one of them.
    """
    innermost = None
    excuse = "it had not ended"
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            path = frame.f_code.co_filename
            if frame.f_code in excuses:
                excuse = excuses[frame.f_code]
                break
            if not path.startswith(_not_the_users()):
                innermost, excuse = frame, ""
            elif path.startswith(_primitives()):
                excuse = "it had not ended"
        coroutine = _awaited(coroutine)
    return innermost, excuse


def _place_of(step: WorkflowPrimitive[Any, Any]) -> str:
    """Return ``file:line`` where the code of *step* begins; "" where it is none of the user's."""
    step = called(step)
    function = step.func if isinstance(step, LambdaPrimitive) else type(step).execute
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or code.co_filename.startswith(_not_the_users()):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


@functools.cache
def _not_the_users() -> tuple[str, ...]:
    """Return where asyncio and this package live."""
    return str(asyncio.__file__).rpartition("__init__")[0], _primitives().rpartition("primitives")[0]


@functools.cache
def _primitives() -> str:
    return __file__.rpartition("recovery")[0]
