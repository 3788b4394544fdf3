"""A limit on the time that one step may take."""

from __future__ import annotations

import asyncio
import math
import types
from collections.abc import Generator
from types import CoroutineType
from typing import Any, NoReturn

from tta_sync import events
from tta_sync.clock import Clock, Timer
from tta_sync.context import TimeLimit, WorkflowContext, time_limit
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, StepTimeoutError
from tta_sync.primitives.core.base import MISS, In, Out, WorkflowPrimitive, as_primitive, step_name
from tta_sync.primitives.core.composition import check_composition, inside

TimeoutError = StepTimeoutError  # noqa: A001  # TTA.dev's name for it in this module

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

    strategy = "timeout"
    peeks = True

    def __init__(
        self,
        primitive: Any,
        timeout_seconds: float | None = None,
        fallback: Any = None,
        track_timeouts: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        if (
            not isinstance(timeout_seconds, (int, float))
            or isinstance(timeout_seconds, bool)
            or not 0 < timeout_seconds < math.inf
        ):
            raise ConfigurationError(
                f"a timeout needs a positive number of seconds, not {timeout_seconds!r}: "
                "write TimeoutPrimitive(step, timeout_seconds=30.0), or leave the timeout out"
            )
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        self.timeout_seconds = float(timeout_seconds)
        self.fallback: WorkflowPrimitive[In, Out] | None = None if fallback is None else as_primitive(fallback)
        self.track_timeouts = track_timeouts
        if name is not None:
            self.name = name
        self._inner = self.primitive._run
        self._in_thread = any(part.runs_on == "pool" for part in (self.primitive, *dict(inside(self.primitive))))
        self.peek_raises = getattr(self.primitive, "peek_raises", False)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,) if self.fallback is None else (self.primitive, self.fallback)

    def details(self) -> str:
        return f"timeout_seconds={self.timeout_seconds:g}"

    def conflict(self, inner: WorkflowPrimitive[Any, Any], direct: bool) -> str | None:
        if isinstance(inner, TimeoutPrimitive) and inner.timeout_seconds > self.timeout_seconds:
            return (
                f"the timeout of {inner.timeout_seconds:g} s inside one of {self.timeout_seconds:g} s never fires: "
                "make the inner limit the shorter one"
            )
        return None

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        clock = context.clock
        now = clock.monotonic()
        at = now + self.timeout_seconds
        outer = time_limit.get()
        deadline = context.deadline
        own = True
        if deadline is not None and deadline.at < at:
            if deadline.at <= now:
                deadline.raise_exceeded()
            at = deadline.at
            own = False
        if outer is not None and outer <= at:
            if outer <= now:
                raise StepTimeoutError(step_name(self.primitive), 0.0, "the limit around it had already passed")
            return await self._inner(data, context)  # whoever set that limit cuts first

        limit = TimeLimit(at)
        if outer is not None:
            limit.outer = outer
        time_limit.set(limit)
        coroutine: Any = self._inner(data, context)
        if type(coroutine) is not CoroutineType:
            coroutine = _as_coroutine(coroutine)
        driver: _Driver | None = None
        cause: BaseException | None = None
        timed_out: StepTimeoutError | None = None
        try:
            try:
                # A step that never waits needs no timer: nothing could fire while it runs.
                first = coroutine.send(None)
            except StopIteration as stop:
                result: Out = stop.value
            else:
                driver = _Driver(coroutine, first, limit, clock, "timeout" if own else "deadline")
                result = await driver
            if clock.monotonic() < at and (driver is None or not driver.fired):
                return result
        except BaseException as error:
            if driver is None or not driver.fired or not isinstance(error, (Exception, asyncio.CancelledError)):
                raise
            cause = error
        finally:
            # Not reset(token): a step that is left behind ends in another context than it began in.
            time_limit.set(outer)
            if driver is not None:
                driver.timer.cancel()
        try:
            if driver is not None and driver.fired and driver.task.uncancel() > driver.cancelling:
                # Somebody else has cancelled as well, and that comes first.
                raise cause if isinstance(cause, asyncio.CancelledError) else asyncio.CancelledError()
            if deadline is not None and not own:
                raise DeadlineExceededError(deadline.seconds) from cause
            detached = driver is not None and driver.detached
            timed_out = self._timed_out(context, detached, blocked=driver is None or not driver.fired)
            if self.fallback is None:
                raise timed_out from cause
            self._fell_back(context, timed_out)
        finally:
            cause = timed_out = None  # their frames lead back to this one
        return await self.fallback._run(data, context)

    def _timed_out(self, context: WorkflowContext, detached: bool, blocked: bool) -> StepTimeoutError:
        """Note that the limit was hit, and make the error that says so."""
        name = step_name(self.primitive)
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
                    detached=detached,
                )
            )
        details = []
        if blocked:
            details.append("it blocked the loop and could not be cancelled: make it a thread_step")
        if detached:
            details.append(f"it swallowed its cancellation for {GRACE:g} s and was left behind, still running")
        if self._in_thread:
            details.append("a thread cannot be interrupted: what it has begun there runs on")
        return StepTimeoutError(name, self.timeout_seconds, "; ".join(details))

    def _fell_back(self, context: WorkflowContext, error: StepTimeoutError) -> None:
        context.mark_degraded()
        if events.bus.emit is not None:
            events.bus.emit(
                events.FallbackUsed(
                    step=step_name(self),
                    correlation_id=context.correlation_id,
                    failed=step_name(self.primitive),
                    used=step_name(self.fallback),
                    error=error,
                )
            )

    def peek(self, data: In, context: WorkflowContext) -> Out | Any:
        inner = self.primitive
        return inner.peek(data, context) if inner.peeks else MISS


async def _as_coroutine(awaitable: Any) -> Any:
    return await awaitable


class _Driver:
    """Drive a suspended step inside the caller's own task, until it ends or is left behind (loop thread only).

    It stands between the task and the step's coroutine like an `await` that can let go: that is why the step needs no
    task of its own, and gets one only when it does not end after its cancellation.
    """

    __slots__ = (
        "_abandon",
        "_clock",
        "_coroutine",
        "_first",
        "_limit",
        "_reason",
        "_stranded",
        "cancelling",
        "detached",
        "fired",
        "task",
        "timer",
    )

    def __init__(self, coroutine: Any, first: Any, limit: TimeLimit, clock: Clock, reason: str) -> None:
        task = asyncio.current_task()
        if task is None:
            coroutine.close()
            raise RuntimeError("a timeout can only cancel what runs in a task: use asyncio.run or run_sync")
        self.task = task
        self.cancelling = task.cancelling()
        self._coroutine = coroutine
        self._first = first
        self._limit = limit
        self._clock = clock
        self._reason = reason
        self._stranded: Any = None
        self._abandon = False
        self.fired = False
        self.detached = False
        self.timer: Timer = clock.call_at(limit, self._fire)

    # ---- what `await` sees

    def __await__(self) -> Generator[Any, None, Any]:
        self_: Any = self
        iterator: Generator[Any, None, Any] = self_
        return iterator

    def __next__(self) -> Any:
        first = self._first
        if first is not _NOTHING:
            self._first = _NOTHING
            return first
        if self._abandon:
            self._detach(None)
        return self._coroutine.send(None)

    def throw(self, *error: Any) -> Any:
        if self._abandon:
            self._detach(error[0] if isinstance(error[0], BaseException) else error[1])
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    @property
    def cr_await(self) -> Any:
        """Let those who look where a task stands look through this object."""
        return self._coroutine

    # ---- what the timers do

    def _fire(self) -> None:
        self._limit.reason = self._reason
        self.fired = True
        self.timer = self._clock.call_at(self._clock.monotonic() + GRACE, self._leave_behind)
        self.task.cancel()

    def _leave_behind(self) -> None:
        """Take the task back from whatever the step waits for, without disturbing the step any further."""
        self._abandon = True
        waited: Any = getattr(self.task, "_fut_waiter", None)
        if waited is None:
            return  # the task is about to run anyway
        for callback, variables in list(getattr(waited, "_callbacks", None) or ()):
            if getattr(callback, "__self__", None) is self.task:
                waited.remove_done_callback(callback)
                self._stranded = waited
                gate = self.task.get_loop().create_future()
                gate.set_result(None)
                self.task.get_loop().call_soon(callback, gate, context=variables)
                return
        self.task.cancel()  # a future of a foreign kind: the step is cancelled a second time

    def _detach(self, error: BaseException | None) -> NoReturn:
        """Let the step go on in a task of its own."""
        self.detached = True
        orphan = self.task.get_loop().create_task(
            _go_on(self._coroutine, self._stranded, error), name=f"orphan of {self.task.get_name()}"
        )
        orphans.add(orphan)
        orphan.add_done_callback(_orphan_ended)
        events.logger.warning(
            "%s swallowed its cancellation for %g s and was left behind, still running", where(self._coroutine), GRACE
        )
        self._coroutine = None
        raise asyncio.CancelledError


_NOTHING: Any = object()


async def _go_on(coroutine: Any, stranded: Any, error: BaseException | None) -> Any:
    return await _resume(coroutine, stranded, error)


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


def _orphan_ended(orphan: asyncio.Task[Any]) -> None:
    orphans.discard(orphan)
    if not orphan.cancelled() and orphan.exception() is not None:
        events.logger.warning("a step that was left behind ended with %r", orphan.exception())


def where(coroutine: Any) -> str:
    """Say where a suspended coroutine stands: ``file:line function`` of its innermost frame."""
    frame = None
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None) or frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    if frame is None:
        return "a step"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}"
