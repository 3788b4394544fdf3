"""The managed loop: one thread per process that runs an event loop, and the callers that wait for it.

Life cycle: made by the facade at the first call of a process, dead when its thread ends, never used by a forked child
(see generation.py). Who owns what:

* ``_queue``, ``calls``, ``orphans``: any thread; the deque, dict and set operations used on them are atomic.
* ``_armed``: True from the moment a caller rings the bell until the loop has emptied the queue; both sides write it,
  and a lost update costs one superfluous ring or one first wait of 20 ms, never a call.
* ``_unsure``: the calls that the loop is to look for, added by their callers, taken as a whole by the loop thread.
* ``_asked_at``: since when it has been asked to; written by both sides, and a lost update costs one superfluous look.
* ``resources`` and everything inside coroutines: the loop thread only.
* ``dead``, ``stopping``: written once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import logging
import math
import os
import select
import sys
import threading
import time
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from typing import Any

from tta_sync import events
from tta_sync.context import current_caller
from tta_sync.exceptions import DeadlineExceededError, LoopUnavailableError, SaturatedError
from tta_sync.runtime import generation, native
from tta_sync.runtime.call import DEADLINE, INTERRUPTED, STOPPED, Call
from tta_sync.runtime.first_steps import FirstStepLoop
from tta_sync.runtime.frames import (
    context_of,
    forget_earlier_raises,
    innermost_user_frame,
    place,
    prepare,
    running_frame,
    user_frame,
)
from tta_sync.runtime.pool import DaemonPool
from tta_sync.runtime.resources import OpenResources, belongs_to_a_resource
from tta_sync.runtime.streaming import Pipe, Stream
from tta_sync.runtime.watchdog import Watchdog

try:
    from tta_sync.runtime.selector import BellSelector
except ImportError:  # another platform
    BellSelector = None  # type: ignore[assignment,misc]

logger = logging.getLogger("tta_sync")

FIRST_WAIT = 0.02
"""Seconds after which a caller looks whether its call has begun: a signal may have eaten the wake-up."""

FIRST_STEPS = 64
"""Calls in a row that may take their first steps before the loop looks at what else it has to do."""

LOOK_AGAIN = 1.0
"""Seconds after which a caller looks again whether its call is still carried by a living task on a living loop."""

TAKEN_WITHIN = 0.25
"""Seconds that a shutdown gives a caller to take the result of a call that has ended."""

_loops: list[ManagedLoop] = []
"""Every loop of this process that has not been closed. A forked child keeps those of its parent here for good: closing
one, or letting it be collected, would edit the epoll that it shares with the parent."""


_NO_BELL = frozenset({errno.EBADF, errno.EINVAL, errno.EAGAIN, errno.EPIPE})
"""What writing to the bell says where its number is closed, or has become something else's."""


class Totals:
    """What a facade counts in one process over all its loops. Guarded by ``_lock``; not on the path of a plain call."""

    def __init__(self) -> None:
        # Used by `with` only, which C code enters: a signal's exception cannot leave it held.
        self._lock = native.allocate_lock()
        self.orphans = 0
        self.restarts = 0
        self.calls = 0  # of loops that are gone

    def add(self, name: str, amount: int = 1) -> None:
        """Add *amount* to one of the counts. Any thread."""
        with self._lock:
            setattr(self, name, getattr(self, name) + amount)


class ManagedLoop:
    """One event loop on one thread, and the synchronous side of it."""

    call_class = Call

    def __init__(self, *, grace: float, use_uvloop: bool, pool_size: int, totals: Totals) -> None:
        self.generation = generation.current.number
        self.grace = grace
        self.totals = totals
        self.calls: dict[Call, None] = {}  # a set that remembers the order of arrival
        self.orphans: set[Call] = set()
        self.begun = 0  # loop thread only
        self.stopping = False
        self.dead = False
        self.death: BaseException | None = None
        self.refusing = False
        self.ident = 0
        self._queue: deque[Call] = deque()
        self._armed = False
        self._unsure: set[Call] = set()
        self._asked_at = -math.inf  # unless the loop is asked just now
        self._local = self._new_local()
        self.pool = DaemonPool(pool_size, "tta_sync-pool", self._spawn)
        self.resources = OpenResources()
        self.watchdog = Watchdog(self)
        self._bell = -1
        self._closing: asyncio.Task[None] | None = None
        self._ended = native.new_lock()
        self._unclaimed = [True]  # until a thread has taken it upon itself to turn the loop
        self.loop = self._new_loop(use_uvloop)  # last: from here on there is something to close
        try:
            self._prepare()
            _loops.append(self)
        except BaseException:  # a signal's; nobody else knows of this loop
            self.loop.close()
            raise

    # ---- life ------------------------------------------------------------------------------------------------------

    def _new_loop(self, use_uvloop: bool) -> AbstractEventLoop:
        if use_uvloop:
            import uvloop

            loop: AbstractEventLoop = uvloop.new_event_loop()
            return loop
        loop = asyncio.new_event_loop()
        if type(loop) is asyncio.SelectorEventLoop:  # else the process has chosen another policy
            selector = self._new_selector()
            if selector is not None:
                loop.close()
                return FirstStepLoop(selector)
        return loop

    def _new_selector(self) -> BellSelector | None:
        """Make the bell, and the selector that answers it; None where there is no such thing."""
        if BellSelector is None:
            return None
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return BellSelector(self._bell, self._answer)

    def _prepare(self) -> None:
        self.loop.set_default_executor(self.pool)

    def _new_local(self) -> Any:
        return threading.local()

    def _new_lock(self) -> Any:
        return native.new_waiter()

    def _spawn(self, target: Callable[[], object], name: str) -> None:
        # Through a bare thread: Thread.start() waits for the new one on a Condition, which a signal's exception breaks.
        native.start_new_thread(_start_named, (target, name))

    def start(self) -> None:
        """Start the thread, unless it has been. Any thread, any number of times: the first to arrive turns the loop.

        Nobody needs to wait for it: a call can be queued before the loop turns.
        """
        if self._unclaimed:
            self._spawn(self._run_once_only, "tta_sync-loop")

    def _run_once_only(self) -> None:
        try:
            self._unclaimed.pop()  # atomic
        except IndexError:
            return
        prepare()
        self._start_watchdog()
        self._run_forever()

    def _start_watchdog(self) -> None:
        try:
            self._spawn(self.watchdog.watch, "tta_sync-watchdog")
        except RuntimeError as error:  # the system has no thread to give: better a loop without than none
            logger.warning("blocking calls are not reported: the watchdog cannot be started: %s", error)

    def discard(self) -> None:
        """Throw away a loop that was never started."""
        self._unclaimed.clear()
        self.stopping = True
        self._bury()

    def discard_unstarted(self) -> None:
        """Throw the loop away if no thread turns it and nobody waits for one: a signal struck before it was started."""
        if not self.calls:
            try:
                self._unclaimed.pop()
            except IndexError:
                return
            self.discard()

    def _run_forever(self) -> None:
        self.ident = native.get_ident()
        loop = self.loop
        asyncio.set_event_loop(loop)
        loop.call_soon(self._set_up)
        failures: deque[float] = deque(maxlen=3)
        try:
            while not self.stopping:
                try:
                    loop.run_forever()
                    self._end_child(None)
                except (KeyboardInterrupt, SystemExit) as error:
                    self._end_child(error)  # raised by some task, which keeps it; asyncio lets it through to here
                except BaseException as error:
                    self._end_child(None)  # the loop's own: it finds itself in another process
                    self.death = error
                    now = time.monotonic()
                    failures.append(now)
                    if len(failures) == failures.maxlen and now - failures[0] < 1.0:
                        break
                if loop.is_closed():
                    break
                if not self.stopping:
                    # Someone stopped the loop under everybody else: all that was in flight goes on.
                    self.totals.add("restarts")
                    loop.call_soon(self._drain)  # what was thrown in may have struck while the bell was answered
        finally:
            self._bury()

    def is_inherited(self) -> bool:
        """Say whether this is the copy of a parent's loop, in a child that was forked."""
        return self.generation != generation.current.number

    def leave_in_child(self) -> None:
        """See to it that a child forked on this loop's thread does no more than the code that forked it.

        What else was ready to run is the parent's, and so are the events: who polls a shared epoll takes them away.
        """
        self._queue.clear()
        forking = asyncio.current_task(self.loop)
        for call in [call for call in self.calls if call.done or call.task is not forking]:
            del self.calls[call]
        for handle in getattr(self.loop, "_ready", ()):
            handle.cancel()
        self._halt()
        backend = getattr(self.loop, "_get_backend_id", None)
        if backend is not None:  # uvloop polls once more before it leaves
            empty = select.epoll()
            os.dup2(empty.fileno(), backend(), inheritable=False)
            empty.close()

    def _end_child(self, error: BaseException | None) -> None:
        """In a child that was forked on this loop's thread, end the process: there is nothing for it to go back to."""
        if not self.is_inherited():
            return
        for call in list(self.calls):
            if call.error is not None:
                error = call.error
        status = 0
        with contextlib.suppress(Exception):  # of closed streams
            if isinstance(error, SystemExit):  # as Python itself ends with it
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
                if status == 1 and error.code != 1:
                    sys.stderr.write(f"{error.code}\n")
            elif error is not None:
                status = 1
                logger.error("a child that was forked in a coroutine ended with an error", exc_info=error)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)

    def _set_up(self) -> None:
        if self._bell < 0 and hasattr(os, "eventfd"):
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.loop.add_reader(self._bell, self._read_bell)

    def _bury(self) -> None:
        """End everything that still waits for this loop, which turns no more. On its own thread, as the last thing."""
        if not self.stopping:
            self.totals.add("restarts")
        self.totals.add("calls", self.begun)
        self.begun = 0
        self.watchdog.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)
        # Closed before anybody is told and makes a new loop: should a stranger have closed the loop's descriptor, its
        # number must not be the new loop's by the time it is closed once more.
        try:
            for task in asyncio.all_tasks(self.loop):
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # said below, or at shutdown
            self.loop.close()
        except Exception:  # the loop may be broken in any way: that is why we are here
            logger.debug("the dead loop could not be closed", exc_info=True)
        if self in _loops:
            _loops.remove(self)
        self.dead = True  # before the sweep: who comes later sees this, who came before is in `calls`
        calls = [call for call in list(self.calls) if not call.done]
        for call in calls:
            call.finish(None, self.gone())
        self._ended.release()
        if not self.stopping:
            logger.error("the loop thread died with %d calls in flight", len(calls), exc_info=self.death)
            if events.bus.emit is not None:
                events.bus.emit(events.LoopRestarted(step="loop", waiting=len(calls), error=self.death))

    def __del__(self) -> None:
        # Not when the loop ends: a caller may be about to write to the descriptor, which by then could be a stranger's.
        # Nor in a forked child, where the number may be somebody else's by now.
        if getattr(self, "_bell", -1) >= 0 and self.generation == generation.current.number:
            try:
                os.close(self._bell)
            except OSError:
                pass  # somebody has closed it already

    def gone(self) -> LoopUnavailableError:
        """Return the error for whoever still waits for a loop that has ended."""
        if self.refusing:  # from the first moment of a shutdown on
            return LoopUnavailableError("the facade was shut down while this call was in flight")
        error = LoopUnavailableError("the loop thread died while this call was in flight; the next call gets a new one")
        error.__cause__ = self.death
        return error

    def shutdown(self, timeout: float) -> None:
        """Wait up to *timeout* for calls in flight, cancel the rest, close the resources, end the thread.

        Returns within *timeout* + grace + 1 s, whatever the calls do.
        """
        stop_all([self], timeout, self.grace)

    def is_waited_for(self, ended: dict[Call, float]) -> bool:
        """Say whether a call goes on, or has ended but a moment ago, so that its caller is about to use the result.

        One whose caller was struck twice at its end may stay in ``calls``, and nobody comes for it.
        """
        now = time.monotonic()
        return any(not call.done or now - ended.setdefault(call, now) < TAKEN_WITHIN for call in list(self.calls))

    def refuse(self) -> None:
        """Take no more calls. Any thread."""
        self.refusing = True

    def begin_stopping(self, grace: float) -> None:
        """Cancel what runs, with *grace* seconds to clean up, close the resources, stop. Any thread; does not wait."""
        self.post(self._begin_stopping, grace)

    def has_ended(self, timeout: float) -> bool:
        """Wait *timeout* seconds at most for the thread to end; say whether it has."""
        if not self._ended.acquire(True, max(0.0, timeout)):
            return False
        self._ended.release()
        return True

    def desert(self) -> None:
        """Leave a loop that something blocks for good: its callers at least are told. The thread is a daemon."""
        self.stopping = True
        self.post(self._stop_deserted)
        for call in list(self.calls):
            if not call.done:
                call.finish(None, self.gone())

    def _stop_deserted(self) -> None:
        if self._closing is None or self._closing.done():  # else that stops the loop, at its end
            self._halt()

    def _begin_stopping(self, grace: float) -> None:
        if self._closing is None:
            self._closing = self.loop.create_task(self._close(grace), name="tta_sync-shutdown")

    async def _close(self, grace: float) -> None:
        try:
            self._drain()
            for call in list(self.calls):
                if call.why is None:
                    call.why = STOPPED
            # What an open resource has started for itself ends when that is closed, not before.
            me = asyncio.current_task()
            left_over = [
                task for task in asyncio.all_tasks() if task is not me and not belongs_to_a_resource(context_of(task))
            ]
            for task in left_over:
                task.cancel()
            if left_over:
                try:
                    await asyncio.wait(left_over, timeout=grace)
                except asyncio.CancelledError:
                    pass  # one of them cancels all tasks there are
            await self.resources.close(min(grace, 0.5))
            self._be_quiet_about_generators()
            try:
                await asyncio.wait_for(self.loop.shutdown_asyncgens(), 0.2)
            except TimeoutError:
                pass  # a generator that will not end; the process does
        finally:  # also where somebody cancels all tasks, this one with them: the thread must end
            self.stopping = True
            self._halt()

    def _be_quiet_about_generators(self) -> None:
        """Have nobody told of generators that cannot be closed, as they still run: their calls were told already."""
        loop = self.loop
        before = loop.get_exception_handler()

        def handle(_: AbstractEventLoop, context: dict[str, Any]) -> None:
            if "asyncgen" in context:
                logger.debug("%s", context.get("message"))
            elif before is None:
                loop.default_exception_handler(context)
            else:
                before(loop, context)

        loop.set_exception_handler(handle)

    def _halt(self) -> None:
        self.loop.stop()

    # ---- the caller's side -----------------------------------------------------------------------------------------

    def new_call(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        keywords: dict[str, Any] | None,
        name: str | None,
        deadline: float | None,
        limit: float | None,
        context: contextvars.Context,
    ) -> Call:
        """Make the call of ``fn(*args, **keywords)`` in *context*, for the current thread to wait for."""
        call = self.call_class()
        call.fn = fn
        call.args = args
        call.keywords = keywords
        call.name = name
        call.loop = self
        call.deadline = deadline
        call.limit = limit
        call.context = context
        call.ident = native.get_ident()
        call.started = time.monotonic()
        call.result = call.error = call.task = call.timer = call.work = call.answered = call.why = None
        call.began = call.cancelled = call.done = call.left = call.sent = False
        try:
            call.lock = self._local.lock
        except AttributeError:
            call.lock = self.thread_lock()
        return call

    def thread_lock(self) -> Any:
        """Return the lock on which the current thread waits, for whichever call."""
        local = self._local
        try:
            return local.lock
        except AttributeError:
            local.lock = self._new_lock()
            return local.lock

    def conduct(self, call: Call, max_in_flight: int | None) -> Any:
        """Send *call* to the loop, wait for it, and return its result: on the caller's thread."""
        calls = self.calls
        try:
            calls[call] = None
            if max_in_flight is not None or self.refusing:
                self.admit(call, max_in_flight)
            try:
                self.submit(call)
                deadline = call.deadline
                wait = FIRST_WAIT if deadline is None or deadline - call.started > FIRST_WAIT else 0.0
                while True:
                    self.wait(call, wait)
                    if call.done:
                        break
                    wait = self.look(call)
                    if wait == 0.0:
                        break
            except BaseException:
                # RQ's SIGALRM, Ctrl-C, SystemExit: whatever is raised in the wait ends the call and comes out as
                # itself.
                self.abandon(call)
                raise
        finally:
            error = call.error  # now: once the call is left, it is dropped
            if call.done and not call.work:  # as leave() does
                call.left = True
                calls.pop(call, None)
                call.context = call.task = call.answered = None
            else:
                self.leave(call)
        if error is None and call.why is None:
            return call.result
        try:
            raise self.failure(call, error)
        finally:
            call.error = error = None  # the traceback holds this frame: no cycle

    def leave(self, call: Call) -> None:
        """Wait for *call* no more."""
        call.left = True
        self.calls.pop(call, None)
        if call.work:
            call.refuse_work()
        if call.done or not call.sent:
            call.forget()
        elif self.is_inherited():  # it goes on in the parent, whose business it is
            if call.task is not None:
                call.task._log_destroy_pending = False  # type: ignore[attr-defined]
        else:  # the grace is over, or a second interrupt cut it short
            self.leave_orphan(call)

    def wait(self, call: Call, seconds: float) -> None:
        """Wait until there may be something to see about *call*, *seconds* at most; -1 is for ever."""
        call.lock.acquire(True, seconds)

    def wait_at_most(self, call: Call, seconds: float, lock: Any) -> None:
        """Wait as :meth:`wait` does, also for a call that may not have begun, and not for longer.

        *lock* is the current thread's: the call's may be another's by now, who closes the stream.
        """
        lock.acquire(True, seconds)

    def submit(self, call: Call) -> None:
        """Queue *call* and wake the loop. The caller looks after FIRST_WAIT whether it has begun."""
        call.sent = True
        self._queue.append(call)
        if not self._armed:
            self._armed = True  # many callers share one ring
            self._ring()

    def admit(self, call: Call, limit: int | None) -> None:
        """Refuse *call*, which is in ``calls`` already, where the loop is closing or enough others came before it."""
        if self.refusing:
            call.done = True
            raise LoopUnavailableError("this facade was shut down: it takes no more calls")
        if limit is not None and len(self.calls) + len(self.orphans) > limit:
            # Without a lock, which a signal could leave held: the dict remembers who came first.
            before = 0
            for other in list(self.calls):
                if other is call:
                    break
                before += not other.done
            if before + len(self.orphans) >= limit:
                call.done = True  # the later ones need not count it
                raise SaturatedError(limit)

    def failure(self, call: Call, error: BaseException | None) -> BaseException:
        """Return what the caller is to be told. A result that came after the deadline is as good as none."""
        if call.why == DEADLINE:
            if isinstance(error, DeadlineExceededError):
                return error
            exceeded = DeadlineExceededError(call.limit)
            if error is not None and not isinstance(error, asyncio.CancelledError):
                exceeded.__cause__ = error
            return exceeded
        if call.why == STOPPED and (error is None or isinstance(error, asyncio.CancelledError)):
            return self.gone()
        assert error is not None
        return error

    def look(self, call: Call) -> float:
        """Do what there is to do while *call* is not done; return the seconds to wait next, 0 to leave."""
        if call.work:
            call.serve()
            if call.done:
                return 0.0
        elif call.answered is not None:
            call.answer_again()
        if self.dead:
            call.finish(None, self.gone())
            return 0.0
        wait = LOOK_AGAIN
        task: Any = call.task
        if not call.began or (task is not None and (task.done() or task._fut_waiter is None)):
            self.start()  # in case a signal struck before it was started
            self._look_for(call)
            wait = FIRST_WAIT * 5
        if call.deadline is not None:
            remaining = call.deadline - time.monotonic()
            if remaining <= 0 and call.why is None:
                call.why = DEADLINE
                self.post(self.cancel, call)
            if call.why is not None:
                remaining += self.grace
                if remaining <= 0:
                    return 0.0
            wait = min(wait, remaining)
        return wait

    def _look_for(self, call: Call) -> None:
        """Have the loop look whether *call* was lost on its way, together with all others that are in doubt."""
        self._unsure.add(call)
        now = time.monotonic()
        if now - self._asked_at >= LOOK_AGAIN:  # else it will look; asked that long ago, it may have been struck
            self._asked_at = now
            self.post(self._recover)

    def abandon(self, call: Call, why: str = INTERRUPTED) -> BaseException | None:
        """Cancel *call*, give it the grace to clean up, and return what it ended with.

        A second interrupt in here ends the grace and comes out.
        """
        if call.why is None:
            call.why = why
        if not call.sent:
            return None
        self.post(self.cancel, call)
        end = time.monotonic() + self.grace
        while not call.done:
            if call.work:
                call.refuse_work()  # no user code runs here after the caller was told to stop
            remaining = end - time.monotonic()
            if remaining <= 0 or self.dead:
                break
            self.wait(call, min(remaining, 0.1))
        error, call.error = call.error, None
        return error

    def leave_orphan(self, call: Call) -> None:
        """Leave *call* to itself: cancelled, counted, named and logged."""
        if call.why is None:
            call.why = INTERRUPTED
        self.orphans.add(call)
        self.post(self.cancel, call, True)  # once more: it may have swallowed the first
        if call.done:  # it ended just now
            self.orphans.discard(call)
            call.forget()
            return
        self.totals.add("orphans")
        age = time.monotonic() - call.started
        name = call.name or "a call"
        reason = "its deadline has passed" if call.why == DEADLINE else "its caller gave it up"
        logger.log(
            # While the process exits nobody reads this, and stderr is all that is left to print it.
            logging.DEBUG if self.stopping or self.refusing else logging.WARNING,
            "%s runs on as an orphan, %.1f s old: %s, and it had not ended when the wait for it did; it is %s",
            name, age, reason, self.where(call),
        )  # fmt: skip
        if events.bus.emit is not None:
            events.bus.emit(events.CallOrphaned(step=name, reason=reason, age=age))

    def where(self, call: Call) -> str:
        """Return the place in user code where *call* stands now, for people."""
        task = call.task
        if task is None or not call.began:
            return "waiting for its turn; the loop is at " + place(running_frame(self.ident, user_frame))
        pipe = getattr(call.fn, "__self__", None)
        frame = innermost_user_frame(pipe.iterator) if isinstance(pipe, Pipe) else None
        if frame is None:
            frame = innermost_user_frame(task.get_coro())
        if frame is None or task is asyncio.current_task(self.loop):
            frame = running_frame(self.ident, user_frame) or frame
        return "at " + place(frame)

    def left_over(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that outlive the call that made them. Any thread."""

        def outlives(task: asyncio.Task[Any]) -> bool:
            context = context_of(task)
            call = None if context is None else context.get(current_caller)
            if not isinstance(call, Call) or not call.done or task.done():
                return False
            # The task that carried the call ends a moment after its caller has the result.
            return getattr(task.get_coro(), "cr_code", None) is not ManagedLoop._carry.__code__

        return [task for task in asyncio.all_tasks(self.loop) if outlives(task)]

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Call *callback* on the loop thread, soon. A loop that is gone needs to be told nothing."""
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    def _ring(self) -> None:
        if self._bell >= 0:
            try:
                os.eventfd_write(self._bell, 1)  # a third of the cost of call_soon_threadsafe
                return
            except OSError as error:
                if error.errno not in _NO_BELL:
                    raise  # a signal's handler raised it in here: a job's timeout may be an OSError, too
                # Somebody has closed a descriptor that is not theirs; the loop has another one to wake it.
        self.post(self._drain)

    # ---- the loop's side -------------------------------------------------------------------------------------------

    def _read_bell(self) -> None:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass  # answered by a drain that came before
        self._drain()

    def _answer(self, alone: bool) -> bool:
        """Answer the bell, while the loop selects; say whether it may go on waiting. See selector.py."""
        self._drain(at_once=alone)
        nothing_to_do: bool = self.loop.has_nothing_to_do()  # type: ignore[attr-defined]  # a FirstStepLoop
        return nothing_to_do

    def _drain(self, at_once: bool = False) -> None:
        """Make tasks of the calls in the queue; where no other task runs, they may do their first steps *at_once*."""
        queue = self._queue
        loop: Any = self.loop
        watchdog = self.watchdog
        if watchdog.parked:
            watchdog.unpark()
        if self.stopping:
            return  # the last turn is over: a task made now would never begin; its caller is told by _bury
        turns = FIRST_STEPS
        while True:
            while queue:
                if at_once:
                    if turns == 0:  # callers may go on coming: first what else the loop has to do
                        self._ring()
                        return
                    turns -= 1
                call = queue.popleft()
                self.begun += 1
                context = call.context
                if context is None:
                    continue  # its caller has been told that the loop is gone
                if not at_once:
                    call.task = asyncio.Task(self._carry(call), loop=loop, name=call.name, context=context)
                    continue
                call.task, first_step = loop.new_task(self._carry(call), call.name, context)
                if first_step is not None:
                    context.run(first_step)
            self._armed = False
            if not queue:  # else a caller came in between, saw it armed, and did not ring
                return
            self._armed = True

    async def _carry(self, call: Call) -> None:
        call.began = True
        if call.why is not None:  # given up before it began: no coroutine is made that nobody would await
            call.finish(None, asyncio.CancelledError())
            return
        current_caller.set(call)
        try:
            if call.keywords:
                result = await call.fn(*call.args, **call.keywords)
            else:
                result = await call.fn(*call.args)
        except BaseException as error:
            if isinstance(error, GeneratorExit) and not self._runs(call):
                # Not the coroutine's own: its task was dropped, with a dead loop for example, and is being collected.
                if not call.done:
                    call.finish(None, self.gone())
                raise
            forget_earlier_raises(error, BOUNDARIES, DETOURS)
            call.finish(None, error)
        else:
            call.finish(result, None)

    def _runs(self, call: Call) -> bool:
        running = asyncio.current_task(self.loop) if self.loop.is_running() else None
        return running is not None and running is call.task

    def _recover(self) -> None:
        """Find the calls that were lost on their way, of those whose callers are in doubt. Loop thread only.

        Whoever it passes over, because an exception strikes in here too, is in doubt still and asks again.
        """
        self._asked_at = -math.inf  # first: who asks from now on needs another look
        unsure, self._unsure = self._unsure, set()
        calls = list(unsure)  # at once: somebody may be about to add to it
        self._drain()
        lost = [call for call in calls if call.task is None and not call.done]
        if lost:  # an exception thrown into the loop thread struck between queue and task
            self._queue.extend(lost)
            self._drain()
        queued = self._queued_steps()
        for call in calls:
            task = call.task
            if call.done or task is None:
                pass
            elif task.done():
                self._finish_for(task, call)
            elif queued is not None and self._has_lost_its_step(task, queued):
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # its caller is told
                cut_off = LoopUnavailableError("an exception thrown into the loop thread has cut this call off")
                call.finish(None, cut_off)

    def _finish_for(self, task: asyncio.Task[Any], call: Call) -> None:
        # Cancelled before its first step, so that _carry never ran; or struck in its last lines.
        error = None if task.cancelled() else task.exception()
        call.finish(None, error or asyncio.CancelledError())

    def _queued_steps(self) -> set[int] | None:
        """Return the ids of all tasks whose next step waits for its turn. Loop thread only."""
        queue = getattr(self.loop, "_ready", None)
        if queue is None:
            return None  # uvloop: no Python code there for an exception to strike
        ready = list(queue)  # at once: others append to it from their threads
        return {id(getattr(handle._callback, "__self__", None)) for handle in ready}

    def _has_lost_its_step(self, task: asyncio.Task[Any], queued: set[int]) -> bool:
        """Say whether *task* will never go on, given whose steps are *queued* now. Loop thread only.

        An exception thrown into the loop thread may strike where asyncio queues a task's next step, or between taking
        it from the queue and running it.
        """
        if task._fut_waiter is not None or task is asyncio.current_task(self.loop):  # type: ignore[attr-defined]
            return False
        return id(task) not in queued

    def cancel(self, call: Call, again: bool = False) -> None:
        """Give *call* up, whatever state it is in. Loop thread only."""
        self._drain()  # it may still be in the queue
        if call.done:
            return
        if call.task is None:  # the interrupt came before the call was queued
            call.finish(None, asyncio.CancelledError())
        elif call.task.done():
            self._finish_for(call.task, call)
        else:
            call.cancel(again)


def _start_named(target: Callable[[], object], name: str) -> None:
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
        return
    except RuntimeError:
        pass  # the system has no second thread to give
    target()  # on this one then, without the name: whoever asked for it has been told that it was started


def stop_all(loops: list[ManagedLoop], timeout: float, grace: float) -> None:
    """Shut *loops* down side by side: *timeout* to finish, *grace* to clean up, and half a second to end."""
    for managed in loops:
        managed.refuse()
        managed.discard_unstarted()
    end = time.monotonic() + timeout
    ended: dict[Call, float] = {}  # calls whose callers have not taken the result yet, and since when
    while any(managed.is_waited_for(ended) and not managed.dead for managed in loops) and time.monotonic() < end:
        time.sleep(0.002)
    for managed in loops:
        if not managed.dead:
            managed.begin_stopping(grace)
    end = time.monotonic() + grace + 0.7
    for managed in loops:
        if not managed.has_ended(end - time.monotonic()):
            managed.desert()


BOUNDARIES = frozenset({ManagedLoop.conduct.__code__, Stream.__next__.__code__, Stream.close.__code__})
DETOURS = frozenset({Call.serve.__code__, DaemonPool.work.__code__})


def living_loops() -> list[ManagedLoop]:
    """Return the loops of this process that have not ended."""
    return [managed for managed in _loops if managed.generation == generation.current.number]


def managed_loop_of(loop: AbstractEventLoop) -> ManagedLoop | None:
    """Return the ManagedLoop around *loop*, where it is one of this process's."""
    for managed in living_loops():
        if managed.loop is loop:
            return managed
    return None


def _forget_in_child() -> None:
    for managed in _loops:
        # The interpreter may still collect these at its end; an asyncio loop that believes itself closed leaves the
        # parent's epoll alone.
        try:
            managed.loop._closed = True  # type: ignore[attr-defined]
        except AttributeError:
            pass  # uvloop's, which does not close itself
        managed.dead = True
        if managed.ident == native.get_ident():
            managed.leave_in_child()


generation.on_fork(_forget_in_child)
