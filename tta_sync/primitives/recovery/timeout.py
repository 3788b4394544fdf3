"""A limit on the time that one step may take."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from tta_sync import events
from tta_sync.clock import SYSTEM_CLOCK
from tta_sync.context import Deadline, WorkflowContext, limit_in_force
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, StepTimeoutError, not_called, was_called
from tta_sync.primitives.core.base import MISS, In, Out, StepLike, WorkflowPrimitive, as_primitive
from tta_sync.primitives.core.composition import check_composition, children_of, inside, is_unbound
from tta_sync.primitives.core.naming import call_name
from tta_sync.primitives.core.options import is_number
from tta_sync.primitives.core.threads import abandoned
from tta_sync.primitives.recovery.driver import NOTHING, Driver, make_starter, starters
from tta_sync.primitives.recovery.limits import (
    BorrowedLimit,
    OwnLimit,
    borrow,
    caller_cuts_at,
    current_task,
    limit_around,
    new_limit,
    set_limit,
    set_time_limit,
)
from tta_sync.primitives.recovery.orphans import leave_behind

__all__ = ["TimeoutPrimitive"]  # no TimeoutError: a star import must not take the builtin's place

Run = Callable[[Any, WorkflowContext], Coroutine[Any, Any, Any]]

_starters = starters  # CPython 3.11 makes a bound method for each call of an imported name's

TimeoutError = StepTimeoutError  # noqa: A001  # TTA.dev's name for it in this module


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
        inner = (self.primitive, *(part for part, _ in inside(self.primitive)))
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
        outer = limit_around()
        limit: OwnLimit | None = None
        borrowed: BorrowedLimit | None = None
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
                    around.cr_running and (current_task is None or outer.task is current_task())  # type: ignore[attr-defined]
                ):
                    return await inner(data, context)  # type: ignore[no-any-return]  # it is cut with that step
                limit = new_limit(now + self.timeout_seconds, outer)
                borrowed = borrow(outer, limit, (at, deadline))
                at, deadline = float(outer), None
        if deadline is None:
            if limit is None:
                limit = set_limit(at, outer)
        elif deadline.kept and clock is SYSTEM_CLOCK and caller_cuts_at(at):
            return await inner(data, context)  # type: ignore[no-any-return]  # it is cut with that call

        driver: Driver | None = None
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
                    waited = NOTHING
                    result = stop.value
            else:
                try:
                    starter = _starters.pop()
                except IndexError:
                    starter = make_starter()
                waited = starter[1](step)
                if waited is starter:
                    result = starter[0]
                    starter[0] = None
                    _starters.append(starter)
                    if monotonic() < at:
                        return result  # type: ignore[no-any-return]
                    waited = NOTHING
                else:
                    self._waits = True
                    coroutine = starter[1].__self__
                    starter.clear()
            if waited is not NOTHING:
                if limit is None:  # the deadline may be moved: then this limit may be the one that strikes
                    limit = set_limit(now + self.timeout_seconds, outer)
                    limit.step = step
                driver = Driver(waited, coroutine, clock, at, deadline, limit, borrowed)
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
                set_time_limit(outer)
        if driver is not None:
            deadline, borrowed = driver.deadline, driver.borrowed
        return await self._cut(data, context, driver, deadline, borrowed is not None)

    async def _cut(
        self,
        data: In,
        context: WorkflowContext,
        driver: Driver | None,
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
        try:
            return await self.fallback._run(data, context)
        except BaseException as failure:
            was_called(failure)
            raise

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
