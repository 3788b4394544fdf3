"""Waiting in line, for calls of any thread and any loop.

A loop of another thread may run for one call at a time, and leave others standing. Who waits there is passed over, so
that those behind it need not wait for a call that may never come, and is told; once its loop runs again, it goes back
to the front.
"""

from __future__ import annotations

import asyncio
from collections import deque

from tta_sync.clock import Clock


class Place:
    """One call's place in a line.

    ``called`` and ``passed_over`` are guarded by the lock of whoever owns the line; the future belongs to the call's
    own loop.
    """

    __slots__ = ("_future", "called", "loop", "passed_over")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self.loop.create_future()
        self.called = self.passed_over = False

    async def wait(self, clock: Clock, end: float | None) -> None:
        """Wait until called, passed over, or the moment *end* on *clock* has come: the flags tell. May be repeated."""
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
        """Wake the call that waits here, from any thread; False if its loop does not run. The owner's lock is held."""
        self.called = self.loop.is_running()
        self.passed_over = not self.called
        try:
            self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop was closed under the call: nobody waits here any more
            self.called = False
        return self.called

    def line_up_again(self, line: Line) -> None:
        """Go back to the front of *line*, having been passed over. On the call's own loop; the owner's lock is held."""
        self.passed_over = False
        line.appendleft(self)

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


Line = deque[Place]


def call_next(line: Line) -> bool:
    """Take the first call that waits and can go on out of *line*, wake it; False if there is none. The lock is held."""
    while line:
        if line.popleft().call():
            return True
    return False


def lead(line: Line) -> None:
    """See to it that the first call that waits and can go on knows that it is first. The lock is held."""
    while line:
        first = line[0]
        if first.called and first.loop.is_running():
            return
        if not first.called and first.call():
            return
        line.popleft()
