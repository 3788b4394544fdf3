"""No more calls at a time than a dependency can take."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any

from tta_sync import events
from tta_sync.context import WorkflowContext, cut_off
from tta_sync.exceptions import BulkheadFullError, ConfigurationError, DeadlineExceededError, not_called
from tta_sync.primitives.core.base import MISS, In, Out, StepLike, WorkflowPrimitive, as_primitive
from tta_sync.primitives.core.composition import check_composition
from tta_sync.primitives.core.options import is_count, is_number
from tta_sync.primitives.recovery.forks import renew_after_fork
from tta_sync.primitives.recovery.line import Line, Place, call_next
from tta_sync.primitives.recovery.naming import call_name


class BulkheadPrimitive(WorkflowPrimitive[In, Out]):
    """Let at most *max_concurrent* calls into a step at a time; let some more wait in line, and refuse the rest.

    The line is first come, first served. A call that is cancelled while it waits leaves no gap. Safe from many threads
    and loops: one primitive is one bulkhead.

    Args:
        primitive: the step.
        max_concurrent: calls inside at a time.
        max_queue: calls that may wait; 0: a full bulkhead refuses at once.
        max_wait: seconds that a call may wait; None: until the call's deadline.

    Raises:
        BulkheadFullError: no place inside nor in line, or none within *max_wait*.
        DeadlineExceededError: the call's deadline passed in line.
        ConfigurationError: an option makes no sense.

    Source: Nygard, *Release It!*; options as Polly's bulkhead and resilience4j's.
    """

    name: str
    peeks = True
    peek_raises = True

    def __init__(
        self,
        primitive: StepLike[In, Out],
        max_concurrent: int,
        max_queue: int = 0,
        max_wait: float | None = None,
        *,
        name: str | None = None,
    ) -> None:
        for option, count, least in (("max_concurrent", max_concurrent, 1), ("max_queue", max_queue, 0)):
            if not is_count(count, least):
                raise ConfigurationError(f"{option} is a number of calls, {least} or more, not {count!r}")
        if max_wait is not None and not (is_number(max_wait) and max_wait > 0):
            raise ConfigurationError(
                f"max_wait is a positive number of seconds, not {max_wait!r}: to refuse at once, write max_queue=0"
            )
        self.primitive: WorkflowPrimitive[In, Out] = as_primitive(primitive)
        self.max_concurrent = max_concurrent
        self.max_queue = max_queue
        self.max_wait = max_wait
        self.name = name or call_name(self.primitive)
        self._inner = self.primitive._run
        self._lock = threading.Lock()
        self._in_use = 0  # guarded by _lock
        self._line: Line = deque()  # guarded by _lock
        self._fork = 0  # changes in a forked child, where the permits of the parent's calls mean nothing
        renew_after_fork(self)
        check_composition(self)

    def children(self) -> tuple[WorkflowPrimitive[Any, Any], ...]:
        return (self.primitive,)

    def details(self) -> str:
        return f"max_concurrent={self.max_concurrent}" + (f", max_queue={self.max_queue}" if self.max_queue else "")

    @property
    def in_use(self) -> int:
        """Calls inside now."""
        return self._in_use

    @property
    def waiting(self) -> int:
        """Calls in line now."""
        return len(self._line)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._line = deque()
        self._in_use = 0
        self._fork += 1

    async def _run(self, data: In, context: WorkflowContext) -> Out:
        fork = self._fork
        with self._lock:
            entered = self._in_use < self.max_concurrent  # a permit given back goes to the line first
            if entered:
                self._in_use += 1
        if not entered:
            await self._queue(context)
        inner = self._inner  # a local: called on self, it would first be looked for in the class
        try:
            return await inner(data, context)
        finally:
            if fork == self._fork:
                self._leave()

    def _leave(self) -> None:
        """Give the permit to the next in line, or back."""
        with self._lock:
            if not self._line or not call_next(self._line):
                self._in_use -= 1

    async def _queue(self, context: WorkflowContext) -> None:
        """Wait for a permit.

        Raises:
            BulkheadFullError, DeadlineExceededError: there is none in time.
        """
        clock = context.clock
        latest = math.inf if self.max_wait is None else clock.monotonic() + self.max_wait
        end = _earlier(cut_off(context), latest)
        with self._lock:
            if self._in_use < self.max_concurrent:  # given back in the meantime
                self._in_use += 1
                return
            place = None
            if len(self._line) < self.max_queue:
                place = Place()
                self._line.append(place)
        if place is None:
            raise self._full(context)
        try:
            await place.wait(clock, end)
            while not place.called:
                end = _earlier(cut_off(context), latest)  # later, once a step which has started this task has ended
                if end is not None and end <= clock.monotonic():
                    break
                self._line_up_again(place)
                await place.wait(clock, end)
        except BaseException as error:
            if self._abandon(place):
                self._leave()  # called and cancelled in the same moment: the permit goes on to the next
            error.before_call = True  # type: ignore[attr-defined]  # a breaker around must not count it: nothing failed
            raise
        if not self._abandon(place):
            deadline = context.deadline
            if deadline is not None and deadline.at <= clock.monotonic():
                raise not_called(DeadlineExceededError(deadline.seconds))
            raise self._full(context)

    def _line_up_again(self, place: Place) -> None:
        """Put *place* back in line, or let it in, if it was passed over."""
        with self._lock:
            if place.passed_over:
                place.line_up_again(self._line)
                if self._in_use < self.max_concurrent and call_next(self._line):
                    self._in_use += 1

    def _abandon(self, place: Place) -> bool:
        """Leave the line; say whether a permit was given before."""
        with self._lock:
            if not place.called and place in self._line:
                self._line.remove(place)
            return place.called

    def _full(self, context: WorkflowContext) -> BulkheadFullError:
        if events.bus.emit is not None:
            events.bus.emit(
                events.CallRejected(
                    step=self.name, correlation_id=context.correlation_id, by="bulkhead", retry_after=0.0
                )
            )
        return BulkheadFullError(self.name)

    def peek(self, data: In, context: WorkflowContext) -> Any:
        if self.max_queue or self._in_use < self.max_concurrent:
            return MISS
        raise self._full(context)


def _earlier(end: float | None, latest: float) -> float | None:
    if latest == math.inf:
        return end
    return latest if end is None else min(end, latest)
