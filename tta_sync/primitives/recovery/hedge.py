"""A second attempt beside one that is slow to answer."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from typing import Any

from tta_sync import events
from tta_sync.context import WorkflowContext
from tta_sync.exceptions import ConfigurationError, came_before_call, was_called
from tta_sync.primitives.core.base import In, Out, StepLike, WorkflowPrimitive, as_primitive, note, shown
from tta_sync.primitives.core.composition import check_composition, children_of
from tta_sync.primitives.core.options import is_count, is_number
from tta_sync.primitives.observability.instrumented import give_trace
from tta_sync.primitives.recovery.forks import renew_after_fork
from tta_sync.primitives.recovery.naming import call_name
from tta_sync.primitives.recovery.orphans import GRACE, leave_behind
from tta_sync.primitives.recovery.retry import RetryBudget, check_budget

OBSERVED = 100
"""How many calls the observed delay looks back on."""

ENOUGH = 20
"""Below so many there is no saying what is slow."""


def percentile(durations: list[float], share: float) -> float:
    """Return the value that *share* of *durations* do not exceed."""
    ranked = sorted(durations)
    return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)]


def declared_idempotent(step: WorkflowPrimitive[Any, Any], above: tuple[int, ...] = ()) -> bool:
    """Say whether it is written down, for *step* or for all that it is made of, that it may run twice."""
    if step.idempotent is not None:
        return step.idempotent
    above = (*above, id(step))
    parts = children_of(step)
    # A workflow that contains itself: what is said of its other parts decides.
    return bool(parts) and all(id(part) in above or declared_idempotent(part, above) for part in parts)


class HedgePrimitive(WorkflowPrimitive[In, Out]):
    """Start a second attempt when the first has not answered after *delay* seconds; the first success wins.

    The losers are cancelled and awaited. An attempt that fails waits for the others; when all have failed, the first
    error comes out as itself. Each attempt has its own copy of the context's state; the winner's is kept. Only for
    steps of which it is written down that they may run twice, with ``idempotent=True``.

    Args:
        primitive: the step.
        delay: seconds; None: the time in which 95 % of the last 100 calls answered, and no hedge before there were
            20 of them.
        max_hedges: how many attempts may be started beside the first, each *delay* after the one before.
        idempotent: True: the step may run twice, where it does not say so itself.
        budget: a :class:`RetryBudget`; each hedge takes a token, and there is none while the budget is spent.

    Raises:
        ConfigurationError: the step is not declared idempotent, or an option makes no sense.

    Source: Dean and Barroso, *The Tail at Scale*.
    """

    def __init__(
        self,
        primitive: StepLike[In, Out],
        delay: float | None = None,
        *,
        max_hedges: int = 1,
        idempotent: bool | None = None,
        budget: RetryBudget | None = None,
        name: str | None = None,
    ) -> None:
        if delay is not None and not (is_number(delay) and delay >= 0):
            raise ConfigurationError(f"delay is a number of seconds, or None for the observed 95 %, not {delay!r}")
        if not is_count(max_hedges, 1):
            raise ConfigurationError(f"max_hedges is a number of attempts, 1 or more, not {max_hedges!r}")
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        if not (declared_idempotent(self.primitive) if idempotent is None else idempotent):
            raise ConfigurationError(
                f"a hedge runs {self.primitive!r} twice, which must be declared harmless: "
                "write @step(idempotent=True), or HedgePrimitive(step, idempotent=True)"
            )
        check_budget(budget)
        self.idempotent = True
        self.delay = delay
        self.max_hedges = max_hedges
        if name is not None:
            self.name = name
        self._budget = budget
        self._durations: deque[float] = deque(maxlen=OBSERVED)  # guarded by _lock
        self._lock = threading.Lock()
        self._inner = self.primitive._run
        renew_after_fork(self)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,)

    def details(self) -> str:
        return "delay=" + ("p95" if self.delay is None else f"{self.delay:g}")

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def current_delay(self) -> float | None:
        """Return the seconds after which a hedge starts now; None while too little has been observed."""
        if self.delay is not None:
            return self.delay
        with self._lock:
            durations = list(self._durations)
        return percentile(durations, 0.95) if len(durations) >= ENOUGH else None

    def _observe(self, seconds: float) -> None:
        if self.delay is None:
            with self._lock:
                self._durations.append(seconds)

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        began = context.clock.monotonic()
        delay = self.current_delay()
        if delay is None:
            result = await self._inner(data, context)
        else:
            race = _Race(self, data, context, delay)
            try:
                await race.run()
            finally:
                await race.end()
            result = race.outcome()
        self._observe(context.clock.monotonic() - began)
        if self._budget is not None:
            self._budget.succeeded()
        return result

    def _may_hedge(self) -> bool:
        return self._budget is None or self._budget.spend()


class _Race:
    """One call's attempts (loop thread only)."""

    def __init__(self, hedge: HedgePrimitive[Any, Any], data: Any, context: WorkflowContext, delay: float) -> None:
        self._hedge = hedge
        self._data = data
        self._context = context
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = 0
        self._errors: list[BaseException] = []
        self._winner: tuple[Any, WorkflowContext] | None = None
        # What each attempt has its own copy of, with the keys that are in it at the start: the winner may delete some.
        self._given = {name: set(getattr(context, name)) for name in ("state", "metadata", "tags", "baggage")}
        self._woken: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Start attempts until one succeeds, or all that may be started have failed."""
        clock = self._context.clock
        self._start()
        due = clock.monotonic() + self._delay
        while self._winner is None and self._running and not self._interrupted():
            more = len(self._tasks) <= self._hedge.max_hedges
            timer = clock.call_at(due, self._wake) if more else None
            try:
                await self._woken
            finally:
                if timer is not None:
                    timer.cancel()
            self._woken = self._loop.create_future()
            if more and self._winner is None and self._running and clock.monotonic() >= due:
                due = clock.monotonic() + self._delay
                if self._hedge._may_hedge():
                    self._tell()
                    self._start()

    def _start(self) -> None:
        name = f"attempt {len(self._tasks) + 1} of {call_name(self._hedge.primitive)}"
        self._running += 1
        if self._context.trace_id is None:
            give_trace(self._context)
        own = self._context.create_child_context()
        own.correlation_id = self._context.correlation_id
        own._parent = None  # what a loser has to make do with does not mark the call
        attempt = self._attempt(own)
        self._tasks.append(self._loop.create_task(attempt, name=name))

    async def _attempt(self, context: WorkflowContext) -> None:
        """Run the step; whatever it raises is kept here, so that no exit of the interpreter starts inside a task."""
        try:
            result = await self._hedge._inner(self._data, context)
        except BaseException as error:
            self._errors.append(error)
        else:
            if self._winner is None:
                self._winner = (result, context)
        self._running -= 1
        self._wake()

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def _interrupted(self) -> bool:
        return any(not isinstance(error, Exception) for error in self._errors)

    async def end(self) -> None:
        """Cancel the losers and await them; leave behind those that do not end within the grace."""
        losers = {task for task in self._tasks if not task.done()}
        if not losers:
            return
        for loser in losers:
            loser.cancel()
        clock = self._context.clock
        grace: asyncio.Future[None] = self._loop.create_future()
        timer = clock.call_at(clock.monotonic() + GRACE, grace.set_result, None)
        hit: asyncio.CancelledError | None = None
        try:
            while losers and not grace.done():
                try:
                    await asyncio.wait((*losers, grace), return_when=asyncio.FIRST_COMPLETED)
                except asyncio.CancelledError as cancelled:
                    hit = cancelled  # it waits until the losers have ended
                losers = {task for task in losers if not task.done()}
            for loser in losers:
                leave_behind(loser, loser.get_coro(), self._hedge.primitive)
            if hit is not None:
                raise hit
        finally:
            timer.cancel()
            hit = None

    def outcome(self) -> Any:
        """Return the winner's result, or raise what came of the call."""
        if self._winner is not None:
            result, won = self._winner
            context = self._context
            for name, keys in self._given.items():
                kept, copy = getattr(context, name), getattr(won, name)
                for key in keys - copy.keys():
                    kept.pop(key, None)
                kept.update(copy)
            context.checkpoints.extend(won.checkpoints)
            if won.degraded:
                context.mark_degraded()
            return result
        errors, self._errors = self._errors, []  # else each error's frames would lead back to it
        first = next((error for error in errors if not isinstance(error, Exception)), errors[0])
        if not all(map(came_before_call, errors)):
            was_called(first)
        try:
            if isinstance(first, Exception):
                others = [shown(error) for error in errors if error is not first]
                for text in others:
                    note(first, f"another attempt of the hedge failed as well: {text}")
            raise first
        finally:
            del errors, first

    def _tell(self) -> None:
        if events.bus.emit is not None:
            events.bus.emit(
                events.HedgeStarted(
                    step=call_name(self._hedge.primitive),
                    correlation_id=self._context.correlation_id,
                    delay=self._delay,
                )
            )
