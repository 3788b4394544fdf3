"""Virtual time: an hour of back-off in a test takes no time, and durations compare exactly."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from tta_sync.exceptions import ConfigurationError

_EPOCH = 1_700_000_000.0


class _Timer:
    """One entry of the clock's heap."""

    __slots__ = ("args", "callback", "context", "loop", "order", "when")

    def __init__(
        self,
        when: float,
        order: int,
        loop: asyncio.AbstractEventLoop,
        callback: Callable[..., object],
        args: tuple[Any, ...],
    ) -> None:
        self.when = when
        self.order = order
        self.loop: asyncio.AbstractEventLoop | None = loop  # None once fired or called off
        self.callback = callback
        self.args = args
        self.context = contextvars.copy_context()

    def __lt__(self, other: _Timer) -> bool:
        return (self.when, self.order) < (other.when, other.order)

    def cancel(self) -> None:
        self.loop = None
        self.args = ()


class FakeClock:
    """A clock that stands still while there is work, and jumps to the next timer when all tasks wait.

    Give it to a call as ``WorkflowContext(clock=FakeClock())``. ``sleep`` and ``call_at`` return at exactly the moment
    they were set for, so a test may write ``clock.monotonic() == 2.5``. Tasks run in the order in which real time would
    have run them. Safe to share between threads and loops; the time moves only while each loop that waits on this clock
    is idle, as far as it can see. It cannot see work in threads or sockets, and cannot move a Redis TTL: a test that
    waits for such work besides a timer sets *autojump_threshold*.

    Args:
        start: where ``monotonic()`` begins, in seconds.
        autojump_threshold: real seconds for which the loop must be idle before the clock jumps; None: it never jumps
            by itself, only by :meth:`jump` and :meth:`advance`.
        epoch: what ``time()`` returned when ``monotonic()`` was 0, in seconds.

    Raises:
        ConfigurationError: the threshold is negative.

    Source: trio's MockClock.
    """

    def __init__(self, start: float = 0.0, *, autojump_threshold: float | None = 0.0, epoch: float = _EPOCH) -> None:
        if autojump_threshold is not None and autojump_threshold < 0:
            raise ConfigurationError(f"autojump_threshold is in seconds and at least 0, not {autojump_threshold}")
        self.autojump_threshold = autojump_threshold
        self._epoch = epoch
        self._now = start
        self._order = itertools.count()
        self._lock = threading.Lock()  # guards _now, _timers and _idle
        self._timers: list[_Timer] = []
        self._idle: dict[asyncio.AbstractEventLoop, bool] = {}  # the loops that wait on this clock

    # ---- the Clock protocol -------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def time(self) -> float:
        """Return the virtual time in seconds since the epoch."""
        return self._epoch + self._now

    async def sleep(self, seconds: float) -> None:
        """Suspend the current task until the virtual time is *seconds* from now."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake = asyncio.get_running_loop().create_future()
        timer = self.call_at(self._now + seconds, _wake, wake)
        try:
            await wake
        finally:
            timer.cancel()

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> _Timer:
        """Call *callback* on the running loop when the virtual time reaches *when*; the result has ``cancel()``."""
        loop = asyncio.get_running_loop()
        with self._lock:
            timer = _Timer(when, next(self._order), loop, callback, args)
            heapq.heappush(self._timers, timer)
            due = when <= self._now
            watch = self.autojump_threshold is not None and loop not in self._idle
            if watch:
                self._idle[loop] = False
        if due:
            self._fire()
        if watch:
            self._look(loop)
        return timer

    # ---- moving it ----------------------------------------------------------------------------------------------

    def jump(self, seconds: float) -> None:
        """Move the time by *seconds* at once. What was due meanwhile runs afterwards, in order, at the new time.

        For plain tests; in a coroutine :meth:`advance` stops at each timer on the way.

        Raises:
            ValueError: time does not run backwards.
        """
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds}")
        self._move(self._now + seconds)

    async def advance(self, seconds: float) -> None:
        """Move the time by *seconds*, stopping at each timer on the way until all that it wakes waits again.

        Raises:
            ValueError: time does not run backwards.
        """
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds}")
        target = self._now + seconds
        await self.settle()
        while (when := self._next()) is not None and when <= target:
            self._move(when)
            await self.settle()
        self._move(target)
        await self.settle()

    async def settle(self) -> None:
        """Wait until every other task of this loop waits for a timer, for I/O or for a thread."""
        watcher = _Watcher(asyncio.get_running_loop())
        while not watcher.idle():
            try:
                await asyncio.sleep(0)
            finally:
                watcher.resumed()

    def _next(self) -> float | None:
        """Return the moment of the earliest live timer."""
        with self._lock:
            self._drop_dead()
            return self._timers[0].when if self._timers else None

    def _drop_dead(self) -> None:
        timers = self._timers
        while timers and (timers[0].loop is None or timers[0].loop.is_closed()):
            heapq.heappop(timers)

    def _move(self, when: float) -> None:
        with self._lock:
            self._now = max(when, self._now)
        self._fire()

    def _fire(self) -> None:
        """Hand every due timer to its loop."""
        while True:
            with self._lock:
                self._drop_dead()
                if not self._timers or self._timers[0].when > self._now:
                    return
                timer = heapq.heappop(self._timers)
                loop, timer.loop = timer.loop, None
            assert loop is not None
            post = loop.call_soon if loop is _running() else loop.call_soon_threadsafe
            try:
                post(timer.callback, *timer.args, context=timer.context)
            except RuntimeError:
                if not loop.is_closed():  # else its own thread has closed it this very moment
                    raise

    # ---- jumping by itself --------------------------------------------------------------------------------------

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch *loop*, which runs on this thread, until it is idle; go on until it waits on this clock no more."""
        self._pass(loop, _Watcher(loop))

    def _pass(self, loop: asyncio.AbstractEventLoop, watcher: _Watcher) -> None:
        watcher.resumed()
        if not watcher.idle():
            loop.call_soon(self._pass, loop, watcher)
        elif self.autojump_threshold:
            loop.call_later(self.autojump_threshold, self._idle_for_long, loop, next(self._order))
        else:
            self._loop_is_idle(loop)

    def _idle_for_long(self, loop: asyncio.AbstractEventLoop, order: int) -> None:
        # What ran meanwhile and waits on the clock again has drawn a number; what still runs is in the queue.
        if next(self._order) == order + 1 and not _queued(loop):
            self._loop_is_idle(loop)
        else:
            self._look(loop)

    def _loop_is_idle(self, loop: asyncio.AbstractEventLoop) -> None:
        when = self._next()
        with self._lock:
            self._idle[loop] = True
            for other in [other for other in self._idle if not other.is_running()]:
                del self._idle[other]
            waits = any(timer.loop is loop for timer in self._timers)
            if not waits:
                del self._idle[loop]
            jump = waits and when is not None and all(self._idle.values())
            if jump:
                self._idle = dict.fromkeys(self._idle, False)
        if jump and when is not None:
            self._move(when)
        if waits:
            # Another loop is busy: ask again soon, in real time.
            loop.call_soon(self._look, loop) if jump else loop.call_later(_POLL, self._look, loop)


_PASSES = 2
"""How often in a row a loop must have nothing else to do to count as idle: between two passes it polls its sockets."""

_BLIND_PASSES = 50
"""The same for a loop that does not show its queue (uvloop's): no chain of callbacks should be longer."""

_POLL = 0.002

_waiting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, int] = weakref.WeakKeyDictionary()
"""How many watchers stand in each loop's queue; each loop's entry is touched by its own thread only."""


def _queued(loop: asyncio.AbstractEventLoop) -> int:
    """Return how many callbacks other than watchers stand in the loop's queue."""
    return len(getattr(loop, "_ready", ())) - _waiting.get(loop, 0)


class _Watcher:
    """Finds out, pass by pass, that a loop has nothing to do but to watch itself."""

    __slots__ = ("_loop", "_quiet", "_wanted")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._quiet = -1
        self._wanted = _PASSES if hasattr(loop, "_ready") else _BLIND_PASSES

    def resumed(self) -> None:
        """Its turn in the queue has come."""
        if self._quiet >= 0:
            _waiting[self._loop] -= 1

    def idle(self) -> bool:
        """Say whether the loop is idle; where not, the watcher queues itself next."""
        if _queued(self._loop) > 0:
            self._quiet = 0
        else:
            self._quiet += 1
        if self._quiet >= self._wanted:
            return True
        _waiting[self._loop] = _waiting.get(self._loop, 0) + 1
        return False


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
