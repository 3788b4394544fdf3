"""Notice code that blocks the loop, while it does, and say where it stands.

A thread asks the loop for a sign of life every 50 ms. An answer that stays out is a suspicion, not yet a finding:
beside a CPU-bound thread the loop may be ready and only wait for the interpreter's lock. What tells the two apart is
what the loop thread does meanwhile: a blocking call stands still on one instruction of the user's code, a computation
burns processor time; a starved loop does neither.

Cost: two thread switches every 50 ms while calls are in flight or tasks run, nothing otherwise (the thread parks).
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import FrameType
from typing import TYPE_CHECKING

from tta_sync import events
from tta_sync.runtime import native
from tta_sync.runtime.frames import place, running_frame, user_frame

if TYPE_CHECKING:
    from tta_sync.runtime.loop import ManagedLoop

logger = logging.getLogger("tta_sync")

INTERVAL = 0.05
SAMPLE_EVERY = 0.02
CONFIRM_AFTER = 0.08
"""Seconds for which the loop thread is looked at before it is accused."""
BUSY_SHARE = 0.25
"""Share of one processor above which the loop thread counts as computing, even beside threads that compete with it."""
ASK_AGAIN = 1.0
"""Seconds after which a loop that has not answered is asked once more."""
QUIET_ROUNDS = 20
"""Rounds without any call or task after which the thread parks."""


class Watchdog:
    """Watch one loop from a thread of its own. ``lag`` is how long the last sign of life took, in seconds."""

    def __init__(self, loop: ManagedLoop) -> None:
        self._loop = loop
        self._pause = native.new_lock()
        self._answered = 0.0  # written by the loop thread, reset by the watchdog's
        self._cpu_clock: int | None = None
        self._stopped = False
        self.parked = False
        self.lag = 0.0

    def stop(self) -> None:
        """End the thread, soon. Any thread."""
        self._stopped = True
        self._wake()

    def _has_been_stopped(self) -> bool:
        return self._stopped or self._loop.dead

    def unpark(self) -> None:
        """Go on watching: there is work again. Loop thread only."""
        self.parked = False
        self._wake()

    def _wake(self) -> None:
        try:
            self._pause.release()
        except RuntimeError:
            pass

    def notice_thread(self) -> None:
        """Watch the current thread from now on: it turns the loop."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._cpu_clock = time.pthread_getcpuclockid(native.get_ident())

    def _answer(self) -> None:
        if self._cpu_clock is None:
            self.notice_thread()
        self._answered = time.monotonic()

    def watch(self) -> None:
        """Watch until the loop is dead or this is stopped: the body of the watchdog's thread."""
        quiet = 0
        while not self._has_been_stopped():
            asked = time.monotonic()
            self._answered = 0.0
            self._loop.post(self._answer)
            self._pause.acquire(True, INTERVAL)
            if self._has_been_stopped():
                return
            if self._answered:
                self.lag = self._answered - asked
            else:
                self._examine(asked)
            if self._loop.calls or self._loop.orphans or self._has_tasks(quiet):
                quiet = 0
                continue
            quiet += 1
            if quiet >= QUIET_ROUNDS:
                quiet = 0
                self.parked = True
                if self._loop.calls or self._loop._queue:  # came in before it could see that we parked
                    self.parked = False
                    continue
                while self.parked and not self._has_been_stopped():
                    self._pause.acquire()

    def _has_tasks(self, quiet: int) -> bool:
        """Say whether tasks other than the open resources exist; asked only when about to park, for it is not cheap."""
        if quiet < QUIET_ROUNDS - 1:
            return False
        return len(asyncio.all_tasks(self._loop.loop)) > len(self._loop.resources.tasks())

    def _examine(self, asked: float) -> None:
        """Watch an overdue loop until it answers; say so once when its own code is the reason."""
        reported = False
        suspect: FrameType | None = None
        instruction = -1
        seen_since = still_since = time.monotonic()
        cpu = self._cpu_time()
        asked_again = asked
        while not self._answered and not self._has_been_stopped():
            now = time.monotonic()
            self.lag = now - asked
            if now - asked_again > ASK_AGAIN:
                asked_again = now
                self._loop.post(self._answer)  # the first one may have been struck by what was thrown into the loop
            if not reported:
                frame = running_frame(self._loop.ident, user_frame)
                if frame is None or suspect is None:
                    # Outside user code the loop waits for events or for the interpreter's lock: nothing to accuse.
                    seen_since = still_since = now
                    cpu = self._cpu_time()
                elif frame is not suspect or frame.f_lasti != instruction:
                    still_since = now
                seen = now - seen_since
                if frame is not None and (
                    now - still_since >= CONFIRM_AFTER
                    or (seen >= CONFIRM_AFTER and self._cpu_time() - cpu > BUSY_SHARE * seen)
                ):
                    self._report(frame, now - asked)
                    reported = True
                suspect = frame
                instruction = -1 if frame is None else frame.f_lasti
                del frame
            self._pause.acquire(True, INTERVAL if reported else SAMPLE_EVERY)

    def _cpu_time(self) -> float:
        if self._cpu_clock is None:
            return 0.0
        try:
            return time.clock_gettime(self._cpu_clock)
        except OSError:  # the thread has just ended
            return 0.0

    def _report(self, frame: FrameType, seconds: float) -> None:
        if self._loop.refusing:
            return  # on its way out, and its callers are told
        where = place(frame)
        task = asyncio.current_task(self._loop.loop)
        name = "a callback" if task is None else task.get_name()
        waiting = len(self._loop.calls)
        logger.warning(
            "the loop has been blocked for %.2f s at %s (task %s); %d calls wait: "
            "await an async client there, or move the blocking code into a thread_step",
            seconds, where, name, waiting,
        )  # fmt: skip
        if events.bus.emit is not None:
            events.bus.emit(events.LoopStalled(step=name, where=where, seconds=seconds, waiting=waiting))
