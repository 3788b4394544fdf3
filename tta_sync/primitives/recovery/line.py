"""Waiting in line, for calls of any thread and any loop."""

from __future__ import annotations

import asyncio
from collections import deque

from tta_sync.clock import Clock


class Place:
    """One call's place in a line.

    ``called`` is guarded by the lock of whoever owns the line; the future belongs to the call's own loop.
    """

    __slots__ = ("_future", "called", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self.loop.create_future()
        self.called = False

    async def wait(self, clock: Clock, end: float | None) -> None:
        """Wait until called, or until the moment *end* on *clock*: ``called`` tells which. Again, if it is put off."""
        if self._future.done() and not self.called:
            self._future = self.loop.create_future()
        if end is None:
            await self._future
            return
        timer = clock.call_at(end, self._wake)
        try:
            await self._future
        finally:
            timer.cancel()

    def call(self) -> bool:
        """Wake the call that waits here, from any thread; False if its loop is gone. The owner's lock is held."""
        self.called = True
        try:
            self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop was closed under the call: nobody waits here any more
            return False
        return True

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


Line = deque[Place]


def call_next(line: Line) -> bool:
    """Take the first call that still waits out of *line* and wake it; False if there is none. The lock is held."""
    while line:
        if line.popleft().call():
            return True
    return False


def lead(line: Line) -> None:
    """See to it that the first call that still waits knows that it is first. The lock is held."""
    while line:
        first = line[0]
        if not first.loop.is_closed() and (first.called or first.call()):
            return
        line.popleft()
