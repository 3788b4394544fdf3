"""Functions of a session as steps of a workflow."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, overload

from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction

from tta_sync.context import Caller, WorkflowContext, current_caller, cut_off
from tta_sync.exceptions import ConfigurationError, DeadlineExceededError, NoCallerError, StepTimeoutError
from tta_sync.primitives.core.base import In, Out, WorkflowPrimitive, step_name
from tta_sync.sqlalchemy.engines import bounded, is_transient, limit, ran_out, require_adopted, unbound
from tta_sync.sqlalchemy.units import Unit, current_unit, provided_session, stepping


class _Turn:
    """The judge between a step's end on the caller's thread and the loss of its awaiter on the loop's: one wins."""

    __slots__ = ("_verdict",)

    def __init__(self) -> None:
        self._verdict: dict[int, str] = {}  # setdefault is atomic

    def claim(self) -> bool:
        return self._verdict.setdefault(0, "claimed") == "claimed"

    def abandon(self) -> bool:
        return self._verdict.setdefault(0, "abandoned") == "abandoned"

    @property
    def abandoned(self) -> bool:
        return self._verdict.get(0) == "abandoned"


class _Abandoned(Exception):
    """Nobody waits for this step any more. Never seen outside this module."""


class _Again(Exception):
    """The transaction was lost before anything was done in it: only this step need begin again. Never seen outside."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class SessionPrimitive(WorkflowPrimitive[In, Out]):
    """A function of a session as a step; made by :func:`session_step`."""

    runs_on = "caller"

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        session: Callable[[], Session] | None = None,
        name: str | None = None,
        idempotent: bool | None = None,
        integrity_retries: int = 1,
    ) -> None:
        self.func = func
        self.name = name or step_name(func)
        self.idempotent = idempotent
        self.session = session
        self.integrity_retries = 0 if idempotent is False else integrity_retries
        if inspect.iscoroutinefunction(func):
            raise ConfigurationError(f"{self.name} is async: a session step takes a plain function")
        if integrity_retries < 0:
            raise ConfigurationError(f"integrity_retries is {integrity_retries}: it must be 0 or more")
        self._takes_context = _takes_context(func, self.name)
        functools.update_wrapper(self, func, updated=())

    if TYPE_CHECKING:
        # With the input's type: else a checker would take the step for a function that fits anywhere in a chain.
        def __call__(self, session: Any, data: In, /, *args: Any, **keywords: Any) -> Any:
            """Call the function itself, as if it were not decorated."""
    else:

        def __call__(self, *args, **keywords):
            return self.func(*args, **keywords)

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        caller = current_caller.get()
        if caller is None:
            raise NoCallerError(
                f"{self.name} is a session step, and nobody waits in run_sync: call the workflow through run_sync"
            )
        attempt = 0
        while True:
            try:
                result: Out = await self._one_turn(caller, data, context)
                return result
            except _Again as again:
                error = again.error
            unit = current_unit.get()
            assert unit is not None
            delay = unit.work.delay(attempt)
            attempt += 1
            end = cut_off(context)
            if attempt > unit.work.retries or (end is not None and end - context.clock.monotonic() <= delay):
                raise error
            await context.clock.sleep(delay)

    async def _one_turn(self, caller: Caller, data: Any, context: WorkflowContext) -> Any:
        turn = _Turn()
        task = asyncio.ensure_future(caller.run(self._perform, turn, data, context, cut_off(context)))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if turn.abandon():
                task.add_done_callback(_take_outcome)
                raise
            result = await task  # too late: it is released
            if context.deadline is not None and context.deadline.remaining() <= 0:
                raise  # the whole call ends here, and its unit of work with it
            return result

    # ---- the caller's thread only

    def _perform(self, turn: _Turn, data: Any, context: WorkflowContext, end: float | None) -> Any:
        if turn.abandoned:
            raise _Abandoned
        seconds = None if end is None else end - context.clock.monotonic()
        if seconds is not None and seconds <= 0:
            self._raise_timed_out(context, 0.0, None)
        token = limit.set(None if seconds is None else time.monotonic() + seconds)
        try:
            unit = current_unit.get() if self.session is None else None
            if unit is not None:
                return self._in_unit(unit, turn, data, context)
            session = provided_session() if self.session is None else self.session()
            require_adopted(session)
            try:
                return self._in_session(session, turn, data, context)
            finally:
                _give_back(session)
        except (DBAPIError, PoolTimeoutError) as error:
            if seconds is not None and ran_out(error):
                self._raise_timed_out(context, seconds, error)
            raise
        finally:
            limit.reset(token)

    def _in_unit(self, unit: Unit, turn: _Turn, data: Any, context: WorkflowContext) -> Any:
        session = unit.open()
        unit.step_began()
        try:
            result = self._in_session(session, turn, data, context)
        except Exception as error:
            lost = isinstance(error, DBAPIError) and (is_transient(error) or error.connection_invalidated)
            if unit.fresh:
                unit.begin_again(session)  # nothing is lost by it, and no lock is held for nothing
                if lost and not ran_out(error):
                    raise _Again(error) from error
            else:
                if is_transient(error):
                    unit.doomed = error
                unit.step_ended(self.name or "", context.correlation_id)
            raise
        if unit.work.commit == "end":
            unit.fresh = False
            unit.step_ended(self.name or "", context.correlation_id)
            return result
        try:
            session.commit()
        except Exception as error:
            unit.begin_again(session)
            if is_transient(error):  # the loss of the connection is not: who knows whether it was committed?
                raise _Again(error) from error
            raise
        unit.fresh = True
        return result

    def _in_session(self, session: Session, turn: _Turn, data: Any, context: WorkflowContext) -> Any:
        attempt = 0
        while True:
            try:
                with bounded(session):
                    return self._in_savepoint(session, turn, data, context)
            except IntegrityError:
                if attempt >= self.integrity_retries or turn.abandoned:
                    raise
            attempt += 1

    def _in_savepoint(self, session: Session, turn: _Turn, data: Any, context: WorkflowContext) -> Any:
        savepoint = session.begin_nested()
        try:
            token = stepping.set((session, current_unit.get()))
            try:
                result = self.func(session, data, context) if self._takes_context else self.func(session, data)
            finally:
                stepping.reset(token)
            if inspect.iscoroutine(result):
                result.close()
                raise ConfigurationError(f"{self.name} is async: a session step takes a plain function")
            if not savepoint.is_active:
                raise ConfigurationError(
                    f"{self.name} committed or rolled back by itself: the unit of work does that, leave it out"
                )
            session.flush()
            if not turn.claim():
                raise _Abandoned
        except BaseException:
            _undo(session, savepoint)
            raise
        savepoint.commit()
        return result

    def _raise_timed_out(self, context: WorkflowContext, seconds: float, error: Exception | None) -> NoReturn:
        deadline = context.deadline
        if deadline is not None and deadline.remaining() <= 0.05:
            raise DeadlineExceededError(deadline.seconds) from error
        raise StepTimeoutError(self.name or "a session step", seconds) from error


def _takes_context(func: Callable[..., Any], name: str) -> bool:
    parameters = list(inspect.signature(func).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for count in (3, 2):
        try:
            inspect.signature(func).bind(*[None] * count)
        except TypeError:
            continue
        # A third parameter with a default is the context only if it is called so.
        if count == 3 and len(positional) > 2 and positional[2].default is not positional[2].empty:
            return positional[2].name in ("context", "ctx")
        return count == 3
    raise ConfigurationError(
        f"{name} cannot be a session step: write it as f(session, data) or f(session, data, context)"
    )


def _undo(session: Session, savepoint: SessionTransaction) -> None:
    """Roll the savepoint back, and let every object be read again: a retry must not decide by what it read before.

    Raises nothing: what made it necessary is on its way out, and matters more.
    """
    try:
        if savepoint.is_active or session.in_nested_transaction():
            savepoint.rollback()
        session.expire_all()
    except Exception:
        session.invalidate()  # the connection is beyond use, and says so to whoever tries the session next


def _give_back(session: Session) -> None:
    """Leave an application's session as it was found, whatever became of the step."""
    try:
        unbound(session)
    except DBAPIError:
        session.invalidate()  # the connection is gone; the step's own outcome matters more


def _take_outcome(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # nobody else will, and asyncio complains about one that was never looked at


if TYPE_CHECKING:

    class _SessionStepDecorator(Protocol):
        # Any for the session: it may be a subclass, or a scoped_session.
        @overload
        def __call__(self, func: Callable[[Any, In, WorkflowContext], Out], /) -> SessionPrimitive[In, Out]: ...
        @overload
        def __call__(self, func: Callable[[Any, In], Out], /) -> SessionPrimitive[In, Out]: ...


@overload
def session_step(func: Callable[[Any, In, WorkflowContext], Out], /) -> SessionPrimitive[In, Out]: ...
@overload
def session_step(func: Callable[[Any, In], Out], /) -> SessionPrimitive[In, Out]: ...
@overload
def session_step(
    *,
    session: Callable[[], Session] | None = None,
    name: str | None = None,
    idempotent: bool | None = None,
    integrity_retries: int = 1,
) -> _SessionStepDecorator: ...
def session_step(func: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make ``fn(session, data, context)``, or ``fn(session, data)``, a step in a SAVEPOINT on the caller's thread.

    Args:
        session: where the session comes from, instead of the current unit of work: ``lambda: db.session()`` say.
        name: for messages.
        idempotent: False: never run it twice.
        integrity_retries: how often it is run again, in a new savepoint, after an IntegrityError: whoever was faster
            has committed by then, and the step can find what it wrote.

    Raises:
        ConfigurationError: the function is async, or takes other arguments.
    """
    if func is None:
        return lambda func: SessionPrimitive(func, **options)
    return SessionPrimitive(func, **options)
