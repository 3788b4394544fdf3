"""Threads for the synchronous parts of jobs that run on a loop.

All state belongs to the loop's thread, but for a lane's own queue. A lane does one thing at a time, in order. A lane
that is given up while it is busy takes no more work and ends when what it does ends: a thread cannot be stopped.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from _queue import SimpleQueue
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from tta_sync.exceptions import NoCallerError

T = TypeVar("T")


class Lane:
    """One thread, for one job at a time."""

    def __init__(self, name: str) -> None:
        self.busy = 0  # calls queued or running; the loop's thread only
        self.when_idle: Callable[[Lane], None] | None = None  # of a lane that was given up
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call

    def end(self) -> None:
        """End the thread once it has nothing to do."""
        self._calls.put(None)

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run *fn* on this lane's thread, in the current context. A call that was cancelled before its turn never runs.

        Cancelling a call that runs leaves it running: the lane stays busy until it returns.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()
        unclaimed = [True]

        def settle(result: Any, error: BaseException | None) -> None:
            self.busy -= 1
            if not self.busy and self.when_idle is not None:
                self.when_idle(self)
            if future.done():
                return
            if error is None:
                future.set_result(result)
            elif isinstance(error, StopIteration):  # a future refuses it
                wrapped = RuntimeError("a step raised StopIteration")
                wrapped.__cause__ = error
                future.set_exception(wrapped)
            else:
                future.set_exception(error)

        def call() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                unclaimed.pop()
            except IndexError:
                error = asyncio.CancelledError()
            else:
                try:
                    result = context.run(fn, *args)
                except BaseException as raised:
                    error = raised
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:
                pass  # the loop has been closed under an abandoned lane: nobody waits any more
            del result, error

        self.busy += 1
        self._calls.put(call)
        try:
            return await future
        except asyncio.CancelledError:
            unclaimed.clear()
            raise


class Lanes:
    """At most *limit* lanes at work, and at most as many that were given up while busy.

    When there are so many of those that no thread may be added, whoever asks for a lane waits until one of them ends.

    Loop thread only.
    """

    def __init__(self, limit: int, name: str) -> None:
        self.limit = limit
        self.abandoned: set[Lane] = set()
        self._name = name
        self._made = 0  # those at work and those free
        self._number = 0
        self._free: list[Lane] = []
        self._waiting: deque[asyncio.Future[Lane]] = deque()

    async def take(self) -> Lane:
        """Wait for a free lane, in order of asking."""
        if self._free:
            return self._free.pop()
        if self._may_make:
            return self._make()
        future: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(future.result())
            raise

    @property
    def exhausted(self) -> bool:
        """Whether as many lanes were given up, and are still busy, as may be."""
        return len(self.abandoned) >= self.limit

    @property
    def _may_make(self) -> bool:
        return self._made < self.limit and not self.exhausted

    def _make(self) -> Lane:
        lane = Lane(f"{self._name}_{self._number + 1}")
        self._made += 1
        self._number += 1
        return lane

    def give_back(self, lane: Lane) -> None:
        """Return *lane*: to the next who waits, or, if it is still busy, to itself."""
        if lane.busy:
            self._made -= 1
            self.abandoned.add(lane)
            lane.when_idle = self._came_to_rest
            lane.end()
            self._serve_waiting()
            return
        self._free.append(lane)
        self._serve_waiting()

    def _came_to_rest(self, lane: Lane) -> None:
        self.abandoned.discard(lane)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        while self._waiting and (self._free or self._may_make):
            future = self._waiting.popleft()
            if future.done():
                continue
            try:
                future.set_result(self._free.pop() if self._free else self._make())
            except RuntimeError as error:  # no more threads on this machine
                future.set_exception(error)

    def count_abandoned(self) -> int:
        """Return how many that were given up are still busy."""
        return len(self.abandoned)

    def close(self) -> None:
        """End the threads that have nothing to do."""
        while self._free:
            self._free.pop().end()


class LaneCaller:
    """The caller of one job's steps (:class:`tta_sync.context.Caller`): a lane, borrowed at the job's first such step
    and kept until the job ends, so that a session stays on one thread."""

    deadline: float | None = None  # the worker cuts its jobs itself
    task: asyncio.Task[Any] | None = None

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._lane: Lane | None = None
        self._taking: asyncio.Task[Lane] | None = None
        self._left = False

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run *fn* on the job's thread.

        Raises:
            NoCallerError: the job has ended.
        """
        if self._lane is None and not self._left:
            if self._taking is None:  # branches of a parallel that ask at once share one
                self._taking = asyncio.create_task(self._lanes.take())
            lane = await asyncio.shield(self._taking)
            if self._lane is None and not self._left:
                self._lane = lane
        if self._left or self._lane is None:
            raise NoCallerError("the job has ended: a caller step must end before it does")
        return await self._lane.run(fn, *args)

    def step_left_behind(self) -> None:
        """Take note of a step that ran on after it was cut: the lane will be found busy."""

    def leave(self) -> None:
        """Give the lane back; no step gets it any more."""
        self._left = True
        taking, self._taking = self._taking, None
        if taking is None:
            return
        if not taking.done():
            taking.cancel()  # whatever it was just given goes back by itself
        elif not taking.cancelled():
            self._lane = None
            self._lanes.give_back(taking.result())
