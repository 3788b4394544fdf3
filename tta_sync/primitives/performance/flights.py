"""Single-flight: while one call computes a result, the others wait for it.

A flight is a task of its own on the loop of the call that began it, so that no caller's end is the end of the work: it
is cancelled only when its last waiter leaves. Waiters may sit on other loops (``asyncio.run`` in a test beside the
managed one); each belongs to its loop and is woken there. Threads without a loop never wait here.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
from collections.abc import Callable, Coroutine, Hashable
from types import TracebackType
from typing import Any

from tta_sync.clock import Clock
from tta_sync.context import (
    Deadline,
    TimeLimit,
    WorkflowContext,
    cancel_reason,
    current_caller,
    cut_off,
    limit_in_force,
    running_context,
    time_limit,
)
from tta_sync.exceptions import DeadlineExceededError, NoCallerError, copy_error
from tta_sync.primitives.performance import snapshots
from tta_sync.primitives.performance.stores import Guard

REFRESH_LIMIT = 30.0  # seconds that a computation in the background may take
PATIENCE = 1.0  # seconds after which those who wait for another loop look whether it runs
_A_DAY = 86_400.0  # stands for "no deadline" where one has to be a number that every timer can take


class _Forks:
    """Which of a family of forked processes this is: what waits on a loop of the parent waits for nothing here."""

    generation = 0


_forks = _Forks()


def _in_child() -> None:
    _forks.generation += 1


os.register_at_fork(after_in_child=_in_child)


Waiter = asyncio.Future[bool]
"""True: the flight has landed; False: the waiter's own deadline has passed."""


class _Until(Deadline):
    """When the most patient of those who wait will be cut: by the limit around it while that holds, or by a deadline.

    It is asked anew: one who waits in a task that outlives the step which started it is cut later than it seemed.
    """

    __slots__ = ("_at", "_deadline", "_limit")

    def __init__(self, limit: float | None, deadline: Deadline | None, clock: Clock) -> None:
        super().__init__(0.0, None if deadline is None else deadline.seconds, clock)
        self._limit = limit
        self._deadline = deadline
        self._reckon()

    def _reckon(self) -> None:
        limit, deadline = limit_in_force(self._limit), self._deadline
        self._limit = limit
        if limit is not None and limit != math.inf and (deadline is None or limit < deadline.at):
            self._at = float(limit)
        else:
            self._at = self.clock.monotonic() + _A_DAY if deadline is None else deadline.at

    def become(self, other: _Until) -> None:
        """Take another's place, for all who have this one."""
        self._limit, self._deadline, self._at = other._limit, other._deadline, other._at
        self.seconds = other.seconds

    @property
    def at(self) -> float:
        if getattr(self._limit, "over", False):
            self._reckon()
        return self._at

    @at.setter
    def at(self, at: float) -> None:
        self._limit, self._at = None, at


class Flight:
    """One computation and those who wait for it. Guarded by its :class:`Flights`' lock, but for what the task owns.

    ``revoked`` is set when the key was invalidated meanwhile: the result goes to those who wait, and nowhere else.
    """

    __slots__ = (
        "background",
        "context",
        "done",
        "error",
        "generation",
        "hits",
        "key",
        "limit",
        "loop",
        "revoked",
        "snapshot",
        "state",
        "tags",
        "task",
        "trace",
        "unlimited",
        "value",
        "waiters",
    )

    def __init__(self, key: Hashable, context: WorkflowContext, tags: frozenset[str], background: bool) -> None:
        self.key = key
        self.tags = tags
        self.background = background
        self.loop = asyncio.get_running_loop()
        self.generation = _forks.generation
        self.waiters: list[tuple[asyncio.AbstractEventLoop, Waiter]] = []
        self.revoked = False
        self.done = False
        self.task: asyncio.Task[None] | None = None
        self.value: Any = None
        self.error: BaseException | None = None
        self.trace: TracebackType | None = None  # as it was when the flight failed: each raise adds to an error's own
        self.snapshot: snapshots.Snapshot | None = None
        # The computation works on a context of its own: it may outlive the call that began it.
        self.context = copy.copy(context)
        self.context._parent = context  # "degraded" reaches the call, and its ancestors
        self.context.state = context.state.copy()
        self.state = context.state.copy()
        self.context.deadline = None
        self.context.degraded = False
        self.limit = TimeLimit(math.inf)
        self.unlimited = False  # one of those who wait would wait for ever

    @property
    def alive(self) -> bool:
        """Say whether somebody flies this: not if its process forked away from it, or its loop stands still.

        Loops of other threads may run for one call at a time: what is left on them goes on with the next one, which
        may never come.
        """
        return self.generation == _forks.generation and self.loop.is_running()

    def extend(self, context: WorkflowContext) -> None:
        """Let the work take as long as the most patient waiter would wait."""
        until = self.context.deadline
        if cut_off(context) is None:
            self.context.deadline = None
            if until is not None:  # whoever inside goes by it already is not to be cut by it
                until.at = context.clock.monotonic() + _A_DAY
            self.unlimited = True
        elif not self.unlimited:
            own = _Until(time_limit.get(), context.deadline, self.context.clock)
            if until is None:
                self.context.deadline = own
            elif own.at <= until.at:
                pass
            elif isinstance(until, _Until):
                until.become(own)
            else:
                until.at = own.at

    def share_state(self, context: WorkflowContext, leads: bool) -> None:
        """Give a caller what the steps told each other: all of it to the one that leads, counts to the others."""
        before, after = self.state, self.context.state
        if leads:
            for name, value in after.items():
                if name not in before or before[name] is not value:
                    context.state[name] = value
        else:
            for name in ("cache_hits", "cache_misses"):
                more = after.get(name, 0) - before.get(name, 0)
                if more:
                    context.state[name] = context.state.get(name, 0) + more
            if self.context.degraded:
                context.mark_degraded()


Work = Callable[[Flight], Coroutine[Any, Any, Any]]
Alone = Callable[[], Coroutine[Any, Any, Any]]


class Flights:
    """The flights of one cache, at most one per key."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._open: dict[Hashable, Flight] = {}  # guarded by the guard's lock
        self._all: set[Flight] = set()  # guarded by the guard's lock; a strong reference to every task that runs

    # ---- waiting

    async def share(
        self, key: Hashable, context: WorkflowContext, tags: frozenset[str], name: str, work: Work, alone: Alone
    ) -> Any:
        """Return the result of *work* for *key*, which is begun only if nobody else is at it.

        *alone* computes without sharing, for a result that cannot be copied.
        """
        while True:
            flight, waiter, leads = self._board(key, context, tags)
            try:
                if leads:
                    self._launch(flight, name, work)
                if not await self._wait(flight, waiter, context):
                    continue
                flight.share_state(context, leads)
                error = flight.error
                if error is None:
                    if leads:
                        return flight.value
                    if flight.snapshot is None:
                        return await alone()
                    return flight.snapshot.copy()
                if leads:
                    raise error
                if not self._was_the_leaders(error, context):
                    raise copy_error(error).with_traceback(flight.trace)
                # What ended the flight concerned the one who led it: the next in line takes over.
            finally:
                error = None  # else its traceback would lead to this frame, and this frame to it
                del flight, waiter

    def waiting(self, key: Hashable) -> bool:
        """Say whether somebody computes *key* right now while others wait for it."""
        flight = self._open.get(key)
        return flight is not None and not flight.background and flight.alive

    def begin(self, key: Hashable, context: WorkflowContext, tags: frozenset[str], name: str, work: Work) -> None:
        """Begin *work* in the background, with a time limit of its own, unless somebody is at it already."""
        flight = Flight(key, context, tags, background=True)
        flight.context.correlation_id = context.correlation_id
        flight.context._parent = None
        flight.context.deadline = Deadline(context.clock.monotonic() + REFRESH_LIMIT, REFRESH_LIMIT, context.clock)
        with self._guard.lock:
            current = self._open.get(key)
            if current is not None and current.alive:
                return
            self._open[key] = flight
            self._all.add(flight)
        self._launch(flight, name, work)

    @staticmethod
    def _was_the_leaders(error: BaseException, context: WorkflowContext) -> bool:
        if isinstance(error, NoCallerError):
            return current_caller.get() is not None
        if isinstance(error, DeadlineExceededError):
            return context.deadline is None or context.deadline.remaining() > 0
        return not isinstance(error, Exception)  # a cancellation, or an interrupt: it has its own addressee

    def _board(self, key: Hashable, context: WorkflowContext, tags: frozenset[str]) -> tuple[Flight, Waiter, bool]:
        loop = asyncio.get_running_loop()
        waiter: Waiter = loop.create_future()
        fresh: Flight | None = None
        while True:
            with self._guard.lock:
                flight = self._open.get(key)
                if flight is None or not flight.alive:
                    flight = fresh
                    if flight is not None:
                        self._open[key] = flight
                        self._all.add(flight)
                if flight is not None:
                    flight.waiters.append((loop, waiter))
                    flight.extend(context)
                    return flight, waiter, flight is fresh
            # Not under the lock, where nothing may run that could come back here.
            fresh = Flight(key, context, tags, background=False)

    async def _wait(self, flight: Flight, waiter: Waiter, context: WorkflowContext) -> bool:
        """Wait until the flight has landed. False: nobody flies it any more."""
        deadline = context.deadline
        timer = None if deadline is None else context.clock.call_at(deadline.at, _wake, waiter, False)
        landed: bool | None
        try:
            landed = await (waiter if flight.loop is asyncio.get_running_loop() else _elsewhere(flight, waiter))
        except asyncio.CancelledError:
            if self._leave(flight, waiter, cancel_reason(context)):
                # As if the step had been awaited directly: its clean-up is over before the cancellation comes out.
                assert flight.task is not None
                await asyncio.wait((flight.task,))
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if landed is None:
            self._leave(flight, waiter, None)
            return False
        if not landed:
            assert deadline is not None
            self._leave(flight, waiter, "deadline")
            deadline.raise_exceeded()
        return True

    def _leave(self, flight: Flight, waiter: Waiter, reason: str | None) -> bool:
        """Stop waiting; cancel the flight if nobody else waits. True if its end can be awaited on this loop."""
        with self._guard.lock:
            flight.waiters = [other for other in flight.waiters if other[1] is not waiter]
            if flight.waiters or flight.done or flight.background:
                return False
            self._close(flight)
        if reason is not None:  # a breaker inside wants to know
            deadline = flight.context.deadline
            flight.limit.struck = reason == "timeout" or deadline is None
            if deadline is not None:
                deadline.struck = reason == "deadline"
        task = flight.task
        if task is None:
            return False
        if flight.loop is asyncio.get_running_loop():
            task.cancel()
            return True
        try:
            flight.loop.call_soon_threadsafe(task.cancel)
        except RuntimeError:
            pass  # that loop was closed, and the task with it
        return False

    def _close(self, flight: Flight) -> None:
        """Take no more waiters on board."""
        if self._open.get(flight.key) is flight:
            del self._open[flight.key]

    # ---- flying ------------------------------------------------------------------------------------------------------

    def _launch(self, flight: Flight, name: str, work: Work) -> None:
        task = flight.loop.create_task(self._fly(flight, work), name=name)
        flight.task = task
        # A task that is cancelled before its first step never enters _fly.
        task.add_done_callback(lambda task: self._land(flight))

    async def _fly(self, flight: Flight, work: Work) -> None:
        running_context.set(flight.context)
        time_limit.set(flight.limit)  # not that of the call which began this: others may have more time
        timer = None
        if flight.background:
            current_caller.set(None)
            task = asyncio.current_task()  # flight.task is not there yet where tasks begin eagerly
            assert task is not None
            # The loop's own time: nobody's call is at stake, and a virtual clock would not wait for a real step.
            timer = flight.loop.call_later(REFRESH_LIMIT, task.cancel)
        try:
            value = await work(flight)
            with self._guard.lock:
                self._close(flight)
                shared = len(flight.waiters) > 1
            if shared and flight.snapshot is None:
                flight.snapshot = snapshots.take(value)
            flight.value = value
        except BaseException as error:  # also interrupts: they belong to a caller, not to the loop
            flight.error, flight.trace = error, error.__traceback__
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            if timer is not None:
                timer.cancel()
            self._land(flight)
            del flight  # an error's traceback leads to this frame

    def _land(self, flight: Flight) -> None:
        with self._guard.lock:
            if flight.done:
                return
            flight.done = True
            self._close(flight)
            self._all.discard(flight)
            waiters, flight.waiters = flight.waiters, []
        if flight.error is None and flight.task is not None and flight.task.cancelled():
            flight.error = asyncio.CancelledError()
        for loop, waiter in waiters:
            if loop.is_closed():
                continue  # nobody waits there any more
            if loop is flight.loop:
                _wake(waiter, True)
            else:
                try:
                    loop.call_soon_threadsafe(_wake, waiter, True)
                except RuntimeError:
                    pass  # it was closed this very moment

    # ---- invalidation ------------------------------------------------------------------------------------------------
    # The caller holds the lock.

    def revoke(self, key: Hashable) -> None:
        """Let the flight of *key* land without being stored, and let later calls begin their own."""
        flight = self._open.pop(key, None)
        if flight is not None:
            flight.revoked = True

    def revoke_tags(self, tags: frozenset[str]) -> None:
        for flight in [flight for flight in self._all if not tags.isdisjoint(flight.tags)]:
            flight.revoked = True
            self._close(flight)

    def revoke_all(self) -> None:
        for flight in self._all:
            flight.revoked = True
        self._open.clear()


async def _elsewhere(flight: Flight, waiter: Waiter) -> bool | None:
    """Wait for a flight on another thread's loop; None once that stands still."""
    while not (await asyncio.wait((waiter,), timeout=PATIENCE))[0]:
        if not flight.alive:
            return None
    return waiter.result()


def _wake(waiter: Waiter, landed: bool) -> None:
    if not waiter.done():
        waiter.set_result(landed)
