"""The managed loop without a hop: the waiting caller drives the shared loop itself.

One loop, one baton. Whoever holds the baton drives; a caller that finds it free takes it, runs the loop until its own
call is done or needs it, and passes it on: to a caller that waits, else to nobody. A standby thread takes a baton
that has lain for some milliseconds while the loop has business, so that background tasks and keep-alives go on when
nobody calls.

A caller that is handling an exception stands aside: what it drove would see that exception as its own context, as
Python shows it to all frames below. It waits for whoever drives, and calls the standby driver where nobody does.

A call that finds the baton free costs no thread switch, and beside a CPU-bound thread no wait for the interpreter's
lock. The price: a coroutine that blocks holds whoever drives, beyond the deadline. Signals: see signals.py.

Who owns what, beyond loop.py: the holder of the baton owns everything that loop.py calls "the loop thread only", and
``driver`` and ``ident``. The baton is a dict entry with the holder's mark in it, not a lock: a signal's exception may
strike between taking a lock and noting that one has it, but never hides who holds the baton. ``_aside`` is anybody's
(set operations are atomic): each caller adds and discards its own call.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Sized
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from tta_sync.exceptions import WouldDeadlockError
from tta_sync.runtime import native
from tta_sync.runtime.call import Call
from tta_sync.runtime.first_steps import FirstStepLoop
from tta_sync.runtime.frames import OUTER_EDGE
from tta_sync.runtime.loop import LOOK_AGAIN, ManagedLoop, Totals
from tta_sync.runtime.signals import HeldBack

if TYPE_CHECKING:
    from tta_sync.runtime.selector import BellSelector

logger = logging.getLogger("tta_sync")

VACANCY = 0.01
"""Seconds for which the baton may lie before the standby driver takes it."""
POLL = 0.02
DOZE = 0.5
"""Seconds between two looks of the standby driver: while calls come and go, and when nothing has happened for long."""

UNPOLLED = 7
"""Callers in a row that may do their call's first step before they look what else the loop has to do. What waits for
that waits for so many first steps at most."""


class _Loop(FirstStepLoop):
    """asyncio's loop. Where user code calls ``stop``, it is counted; the runtime itself calls ``halt``."""

    def __init__(self, totals: Totals, selector: BellSelector | None) -> None:
        super().__init__(selector)
        self.struck: BaseException | None = None
        self._totals = totals

    def stop(self) -> None:
        self._totals.add("restarts")
        super().stop()

    def add_signal_handler(self, *_: object) -> None:  # nobody gets to call it
        """Refuse, as on any thread that is not the main one: the next driver will be another."""
        raise RuntimeError(
            "the loop is turned by whichever caller waits, and has no signals of its own: "
            "use signal.signal on the main thread"
        )

    def stay(self) -> None:
        """Forget that the loop was to be halted: it does not run any more."""
        self._stopping = False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what was thrown into this thread while the runtime's own code ran: it is for the driver, not the log."""
        owner = getattr(getattr(context.get("handle"), "_callback", None), "__self__", None)
        error = context.get("exception")
        if error is not None and (owner is self or type(owner).__module__.startswith(_OWN)):
            self.struck = error
            self.halt()
        else:
            super().call_exception_handler(context)

    halt = asyncio.SelectorEventLoop.stop


class DrivenCall(Call):
    """A call whose caller may be the one who drives: then it is woken by stopping the loop under it."""

    __slots__ = ("waiting",)

    waiting: bool  # written by its caller: whether it waits on its lock, and could be given the baton

    def wake(self) -> None:
        if self.loop.driver is self:
            self.loop.loop.halt()
        else:
            super().wake()

    def finish(self, result: Any, error: BaseException | None) -> None:
        try:
            Call.finish(self, result, error)  # half as dear as super() in Python 3.11
        finally:  # an exception thrown into this thread may strike in there
            driver = self.loop.driver
            if driver is self or (driver is None and self in self.loop._aside):  # the standby driver was called for it
                self.loop.loop.halt()

    def expire(self) -> None:
        super().expire()
        if not self.done:
            # Its caller may be the driver, and must look once more when the grace is over.
            self.timer = self.loop.loop.call_later(self.loop.grace, self.wake)


class DrivenLoop(ManagedLoop):
    """A managed loop that its callers drive in turn."""

    call_class = DrivenCall
    loop: _Loop

    def __init__(self, **options: Any) -> None:
        self._baton: dict[str, list[int]] = {}  # "holder" -> its mark; setdefault and pop are atomic
        self._standby = native.new_lock()
        self._vacant_since = time.monotonic()
        self._dozing = False
        self._aside: set[Call] = set()  # whose callers wait, but will not drive
        self._suspect: list[int] | None = None
        self._suspect_since = 0.0
        self._failures: deque[float] = deque(maxlen=3)
        self._broken = False
        self._held_back: HeldBack | None = None
        self._watched = 0  # the thread that turned the loop last
        self._watched_driver = 0  # its id: a reference would keep what the call was given
        self._watched_since = 0.0
        self._unpolled = 0  # turns in a row that have done first steps and nothing else
        self._main = threading.main_thread().ident  # a forked child, whose main thread is another, makes another loop
        self.driver: Call | None = None
        super().__init__(**options)

    def _prepare(self) -> None:
        super()._prepare()
        self._set_up()  # now, while nobody turns the loop
        self._own_descriptors = len(self._descriptors())

    def _new_loop(self, use_uvloop: bool) -> _Loop:
        self._selector = self._new_selector()
        return _Loop(self.totals, self._selector)

    def _halt(self) -> None:
        self.loop.halt()

    # ---- the baton -------------------------------------------------------------------------------------------------

    def _take(self, mark: list[int]) -> bool:
        """Take the baton for *mark*, a new list with this thread's ident in it; say whether it was free."""
        return self._baton.setdefault("holder", mark) is mark

    def _take_back(self, mark: list[int]) -> bool:
        """Take a baton that lies in this thread's own hands: a signal's exception kept it from putting it down."""
        return self._free_own() and self._take(mark)

    def _free_own(self) -> bool:
        holder = self._baton.get("holder")
        return holder is not None and holder[0] == native.get_ident() and self._is_lost(holder)

    def _pass_on(self, mark: list[int]) -> None:
        """Put the baton down, if it is *mark*'s, and wake somebody who may take it."""
        if self._baton.get("holder") is not mark:
            return
        self._vacant_since = time.monotonic()
        del self._baton["holder"]
        if self.calls:
            for call in list(self.calls):
                if getattr(call, "waiting", False) and not call.done:
                    Call.wake(call)
                    return
        if self._dozing or self._aside or self.refusing or self._broken:
            self._dozing = False
            self._wake_standby()

    def _is_wanted(self) -> bool:
        """Say whether some caller waits and could drive; one that is busy with a caller step could not."""
        return any(getattr(call, "waiting", False) for call in list(self.calls))

    def _is_called_for(self) -> bool:
        """Say whether a caller that stands aside needs the loop to be turned. The standby driver's thread."""
        if not self._aside:
            return False
        waiting = False
        for call in list(self._aside):
            if call.done or call.left:  # a storm of signals cut off its caller's way out
                self._aside.discard(call)
            else:
                waiting = True
        return waiting

    def _wake_standby(self) -> None:
        try:
            self._standby.release()
        except RuntimeError:
            pass

    def discard_unstarted(self) -> None:
        """Throw the loop away if nobody has ever turned it; where callers did, the standby driver ends it."""
        if self._watched:
            self.start()
        else:
            super().discard_unstarted()

    # ---- the standby driver ----------------------------------------------------------------------------------------

    def _run_forever(self) -> None:
        try:
            while not self._broken and not self.stopping:
                self._stand_by()
                self._find_lost_baton()
                self._have_driver_look()
                vacant = time.monotonic() - self._vacant_since
                if self.refusing or self._is_called_for() or (vacant > VACANCY and self._has_business()):
                    mark = [native.get_ident()]
                    try:
                        if self._take(mark):
                            self.turn(None)
                    finally:
                        self._pass_on(mark)
                elif vacant > 1.0:
                    self._dozing = True
        except BaseException as error:  # the loop was closed under it, or something was thrown into this thread
            self.death = error
        finally:
            self._broken = True
            mark = [native.get_ident()]
            while not self._take(mark):  # the last driver leaves before the loop is closed
                self._find_lost_baton()  # its own, perhaps
                self._standby.acquire(True, POLL)
            self._bury()

    def _stand_by(self) -> None:
        # A function of its own: while the standby driver turns the loop, nothing here keeps a finished call.
        held_back = self._held_back
        if held_back is not None and held_back.came:
            self._standby.acquire(True, POLL)
            held_back.insist()
        else:
            del held_back
            self._standby.acquire(True, DOZE if self._dozing else POLL)

    def _find_lost_baton(self) -> None:
        """Free a baton that lies in the hands of a thread which does not drive: a storm of signals cut off _pass_on."""
        holder = self._baton.get("holder")
        if holder is None or self.ident or holder is not self._suspect:
            self._suspect, self._suspect_since = holder, time.monotonic()
        elif time.monotonic() - self._suspect_since > 1.0:
            self._baton.pop("holder", None)

    def _have_driver_look(self) -> None:
        """Make a driver look after its call once in a while, as other callers do: whether it still has a task, say."""
        driver, now = self.driver, time.monotonic()
        if id(driver) != self._watched_driver:
            self._watched_driver, self._watched_since = id(driver), now
        elif driver is not None and now - self._watched_since > LOOK_AGAIN:
            self._watched_since = now
            self.post(driver.wake)

    def _has_business(self) -> bool:
        """Say whether the loop has anything to do without a caller: tasks, timers, more descriptors than its own."""
        loop: Any = self.loop
        more_descriptors = len(self._descriptors()) > self._own_descriptors
        return bool(loop._ready or loop._scheduled or more_descriptors or asyncio.all_tasks(loop))

    def _descriptors(self) -> Sized:
        loop: Any = self.loop
        descriptors: Sized = loop._selector.get_map()
        return descriptors

    # ---- driving ---------------------------------------------------------------------------------------------------

    def turn(self, call: Call | None) -> None:
        """Run the loop until someone stops it. Holder of the baton only."""
        ident = self.ident = native.get_ident()
        self.driver = call
        if ident != self._watched:
            self._watched = ident
            self.watchdog.notice_thread()
        try:
            if call is not None and self._queue and self._unpolled < UNPOLLED:
                self._unpolled += 1
                self._begin_at_once(ident)
            else:
                self._unpolled = 0
                self._drain()
            wanted = self.refusing or not self._is_wanted() if call is None else not call.done
            if wanted and not self.stopping and not self.is_inherited():
                self.loop.run_forever()
            else:
                self.loop.stay()
        except BaseException as error:
            if not _comes_from_a_callback(error):  # else the task that raised SystemExit or KeyboardInterrupt keeps it
                broken = self._is_broken()
                if broken or call is None:
                    self._note_failure(error)
                if call is not None and not (broken and isinstance(error, (OSError, RuntimeError, ValueError))):
                    raise  # thrown into this thread from outside, as RQ's TimerDeathPenalty does: it is the caller's
        finally:
            if call is None or not call.done:
                self._end_child(sys.exception())  # its own call ends as in the parent, for its caller's copy to see
            self.driver = None
            self.ident = 0
            struck, self.loop.struck = self.loop.struck, None
        if struck is not None:
            try:
                if call is not None:
                    raise struck
                logger.error("an exception was thrown into the thread that turned the loop", exc_info=struck)
            finally:
                del struck  # its traceback holds this frame: no cycle

    def _begin_at_once(self, ident: int) -> None:
        """Do the first steps of the calls in the queue. Most calls end with that, and spare the loop a turn.

        What ``run_forever`` sets around a turn is set here around them.
        """
        loop: Any = self.loop
        loop._check_closed()
        hooks = sys.get_asyncgen_hooks()
        try:
            loop._thread_id = ident
            sys.set_asyncgen_hooks(loop._asyncgen_firstiter_hook, loop._asyncgen_finalizer_hook)
            _set_running_loop(loop)
            ManagedLoop._drain(self, at_once=True)
        finally:
            loop._thread_id = None
            _set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _is_broken(self) -> bool:
        """Say whether the loop cannot go on: it was closed, or a descriptor of its own was, under it."""
        loop: Any = self.loop
        if loop.is_closed():
            return True
        try:
            loop._selector.select(0)  # what it finds is found again by the next turn
        except Exception:
            return True
        return False

    def _note_failure(self, error: BaseException) -> None:
        self.death = error
        self._failures.append(time.monotonic())
        if self.loop.is_closed() or (len(self._failures) == 3 and self._failures[-1] - self._failures[0] < 1.0):
            self._broken = True  # the standby driver buries it, and only then tells the others
            self._wake_standby()

    def let_go(self) -> None:
        """Make the driver leave the loop. Its own thread, in a signal handler too."""
        self.loop.halt()
        self._wake_standby()
        self.post(self._drain)  # a selector goes on waiting after a handler that does not raise

    def _answer(self, alone: bool) -> bool:
        # A first step that is queued costs a driver as little: its turn ends with the call anyway.
        self._drain()
        return False

    def _drain(self, at_once: bool = False) -> None:
        super()._drain(at_once)
        if self.driver is None and not self.refusing and self.loop.is_running() and self._is_wanted():
            self.loop.halt()  # the standby driver makes room for a caller

    # ---- the caller's side -----------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        call.waiting = False  # type: ignore[attr-defined]  # a DrivenCall
        holder = self._baton.get("holder")
        if holder is not None and holder[0] == native.get_ident() and not self._is_lost(holder):
            raise WouldDeadlockError(
                f"{call.name} was called while this thread turns the loop (by a finalizer?) and would wait for itself"
            )
        call.sent = True
        self._queue.append(call)
        if call.deadline is not None:
            self.post(self._watch_deadline, call)

    def _is_lost(self, holder: list[int]) -> bool:
        """Free a baton that this thread took in a call that is over, a storm of signals having cut off _pass_on."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_locals.get("mark") is holder:
                return False
            frame = frame.f_back
        self._pass_on(holder)
        return True

    def _watch_deadline(self, call: Call) -> None:
        # Whoever drives cannot watch the clock: the loop does.
        if not call.done and call.deadline is not None and call.timer is None:
            call.timer = self.loop.call_later(call.deadline - time.monotonic(), call.expire)

    def wait(self, call: Call, seconds: float) -> None:
        """Drive until there is something to see about *call*; where another drives, wait for it."""
        self._wait(call, seconds, call.began)  # one that has not begun is told by its first step, or by its deadline

    def wait_at_most(self, call: Call, seconds: float, lock: Any) -> None:
        self._wait(call, seconds, True, lock)

    def _wait(self, call: Call, seconds: float, timed: bool, lock: Any = None) -> None:
        timer = None
        held_back: HeldBack | None = None
        mark: list[int] = [native.get_ident()]
        aside = sys.exception() is not None and not self._is_deserted(call)
        try:
            if aside:
                self._stand_aside(call, seconds)
            elif not self._broken and not self.stopping and (self._take(mark) or self._take_back(mark)):
                if timed:
                    timer = self.loop.call_later(seconds, call.wake)
                if mark[0] != self._main:
                    self.turn(call)
                else:
                    held_back = self._held_back = HeldBack(self, call)
                    held_back.turn()
            else:
                call.waiting = True  # type: ignore[attr-defined]
                if not self._armed:
                    self._armed = True
                    self._ring()
                # A baton that is put down is offered by a wake-up; were one lost, a poll would find it.
                (lock or call.lock).acquire(True, min(seconds, POLL))
        finally:
            try:
                call.waiting = False  # type: ignore[attr-defined]
                if aside:
                    self._aside.discard(call)
                if timer is not None:
                    timer.cancel()
                if held_back is not None:
                    self._held_back = None
                self._pass_on(mark)
            finally:
                if held_back is not None:
                    held_back.deliver()  # only now: a handler may call the facade itself

    def _stand_aside(self, call: Call, seconds: float) -> None:
        """Wait until there may be something to see about *call*, while another drives."""
        self._aside.add(call)  # from now on, who puts the baton down calls the standby driver
        self._free_own()
        if not self._armed:
            self._armed = True
            self._ring()
        if "holder" not in self._baton:
            self._wake_standby()
        call.lock.acquire(True, min(seconds, POLL))

    def _is_deserted(self, call: Call) -> bool:
        """Say whether nobody has come to drive for *call*: better its own caller than nobody."""
        return "holder" not in self._baton and time.monotonic() - max(call.started, self._vacant_since) > LOOK_AGAIN

    def refuse(self) -> None:
        super().refuse()
        self._wake_standby()


def _comes_from_a_callback(error: BaseException) -> bool:
    entry: TracebackType | None = error.__traceback__
    while entry is not None:
        if entry.tb_frame.f_code is _RUN_HANDLE:
            return True
        entry = entry.tb_next
    return False


_OWN = __name__.rpartition(".")[0]
_RUN_HANDLE = asyncio.Handle._run.__code__

OUTER_EDGE.add(DrivenLoop.turn.__code__)
