"""Run a step inside the caller's own task, and yet be able to let go of it.

A step that never waits costs neither a task nor a timer. One that waits is driven like an ``await`` that can let go; it
gets a task of its own only when it does not end after its cancellation.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import math
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NoReturn

from tta_sync.clock import SYSTEM_CLOCK, Clock, Timer
from tta_sync.context import Deadline, TimeLimit, limit_in_force, time_limit
from tta_sync.primitives.recovery.limits import BorrowedLimit, OwnLimit
from tta_sync.primitives.recovery.orphans import GRACE, awaited_by

NOTHING: Any = object()
"""What stands where a step waits for nothing, or for nothing any more."""


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


def make_starter() -> list[Any]:
    """Make what starts a step: a place for its result, and a function that takes its coroutine: `_first_steps`."""
    starter: list[Any] = [None]  # for the result
    starter.append(_first_steps(starter).send)
    starter[1](None)
    return starter


starters: deque[list[Any]] = deque()
"""Those at rest: as many as have ever been at work at one moment, one inside the other or on several threads. Taken and
given back by atomic operations; one whose coroutine raised, or waits, does not come back. Not a list, which gives its
memory back when its last item is taken, and asks for it again: a tenth of a microsecond."""


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
        self._heap: list[tuple[float, int, Driver]] = []
        self._numbers = itertools.count()
        self._over = 0  # entries whose step has ended
        self._armed = math.inf
        self._timer: Timer | None = None

    def add(self, driver: Driver, at: float) -> None:
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


class Driver:
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
        limit: OwnLimit,
        borrowed: BorrowedLimit | None,
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
        if waited is not NOTHING:
            self._waited = NOTHING
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
                if isinstance(limit, BorrowedLimit):
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
    waited = NOTHING
    if stranded is not None:
        stranded._asyncio_future_blocking = True  # as Future.__await__ sets it for the task that takes it over
        waited = stranded
    while True:
        if waited is not NOTHING:
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
        coroutine = awaited_by(coroutine)


_SCOPES: dict[type, tuple[str, Callable[[Any], bool] | None]] = {
    asyncio.Timeout: ("_task", lambda scope: scope.expired()),
    asyncio.TaskGroup: ("_parent_task", lambda scope: scope._parent_cancel_requested),
    Driver: ("task", lambda scope: scope.fired),
}
"""Where each kind of scope keeps its task, and whether it has cancelled it already."""
