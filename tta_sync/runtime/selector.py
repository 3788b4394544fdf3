"""An epoll that answers the callers' bell itself, and that wakes for short timers on time.

asyncio hands every descriptor that is ready to a callback, which it runs in its next turn; a task made there takes its
first step one turn later. A selector is the place that asyncio leaves open to be quicker: a task that is made while it
selects may take its first step at once, and where that was its last one, nothing is left to do but to select again.
A bell that is watched edge by edge need not be read.

epoll counts milliseconds, and asyncio rounds up to them: many short sleepers wake in herds, and late. For short waits
``select`` is asked, which counts microseconds, and an epoll descriptor can be waited for like any other.

Linux only: an ImportError elsewhere.
"""

from __future__ import annotations

import math
import os
import select
import selectors
from collections.abc import Callable

if not hasattr(os, "eventfd") or not hasattr(selectors, "EpollSelector"):
    raise ImportError("needs epoll and eventfd")

SHORT = 0.1
"""Seconds below which a millisecond matters."""
SELECTABLE = 1024
"""What select(2) takes are descriptors below this."""


class BellSelector(selectors.EpollSelector):
    """Call *answer* on the loop's thread whenever somebody has written to *bell*, an eventfd that is never read.

    *answer* hears whether the bell rang alone: else it must run no foreign code, which might close the descriptors that
    the loop is about to be told of. It says whether the loop has nothing else to do, and may go on waiting.
    """

    def __init__(self, bell: int, answer: Callable[[bool], bool]) -> None:
        super().__init__()
        self._bell = bell
        self._answer = answer
        self._waitable = [self.fileno()] if self.fileno() < SELECTABLE else None
        self._epoll: select.epoll = self._selector  # type: ignore[attr-defined]
        self._epoll.register(bell, select.EPOLLIN | select.EPOLLET)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Do what every selector does; wait for *timeout* to within microseconds where it is short."""
        ready: list[tuple[selectors.SelectorKey, int]] = []
        keys = self._fd_to_key  # type: ignore[attr-defined]
        if timeout is None:
            timeout = -1
        elif timeout <= 0:
            timeout = 0
        elif timeout >= SHORT or self._waitable is None:
            timeout = math.ceil(timeout * 1e3) * 1e-3
        while True:
            try:
                if 0 < timeout < SHORT and self._waitable is not None:
                    select.select(self._waitable, (), (), timeout)
                    timeout = 0
                found = self._epoll.poll(timeout, len(keys) + 1)
            except InterruptedError:  # a signal handler that raises nothing: asyncio counts the time anew
                return ready
            rung = False
            for descriptor, event in found:
                if descriptor == self._bell:
                    rung = True
                    continue
                key = keys.get(descriptor)
                if key is not None:
                    events = 0
                    if event & ~select.EPOLLIN:
                        events |= selectors.EVENT_WRITE
                    if event & ~select.EPOLLOUT:
                        events |= selectors.EVENT_READ
                    ready.append((key, events & key.events))
            goes_on = rung and self._answer(not ready)
            if ready or not goes_on or timeout != -1:
                return ready
