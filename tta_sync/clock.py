"""Time as a dependency: what primitives and the runtime ask instead of the ``time`` module."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    """A callback that has been scheduled and can be called off."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """One source of time for one call; :class:`tta_sync.testing.FakeClock` is the other one."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def time(self) -> float:
        """Return seconds since the epoch, for what leaves the process."""

    async def sleep(self, seconds: float) -> None:
        """Suspend the current task for *seconds*."""

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call *callback* on the running loop when ``monotonic()`` reaches *when*."""


class SystemClock:
    """The machine's own clocks."""

    # Slots, not static methods: an attribute of the instance is found in half the time, and each step asks for one.
    __slots__ = ("monotonic", "sleep", "time")

    def __init__(self) -> None:
        self.monotonic = time.monotonic
        self.time = time.time
        self.sleep = asyncio.sleep

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        # Through call_later: a loop's own clock need not share time.monotonic's zero (uvloop's is cached).
        return asyncio.get_running_loop().call_later(when - time.monotonic(), callback, *args)


SYSTEM_CLOCK: Clock = SystemClock()
