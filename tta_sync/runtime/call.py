"""One call on its way: made by the caller, run by the loop, waited for by the caller.

Who owns what:

* ``fn`` to ``context``: written by the caller before submission, then read only, but for :meth:`Call.expire_now`.
* ``task``, ``began``, ``timer``, ``cancelled``: the loop thread only.
* ``result``, ``error``: written by the loop thread before ``done``, read by the caller after it, and before it sets
  ``left``: nobody reads the error of a call that has ended and been left, and it is dropped.
* ``why``: the reason to give up, written once by whoever gives up first; both sides read it.
* ``work``: appended by the loop thread, taken by the caller's thread (deque operations are atomic).
* ``answered``: the caller's thread only.
* ``sent``, ``left``: written by the caller's thread, just before it queues the call and when it stops waiting.

The caller waits on a raw lock used as a binary semaphore. A wake-up is only a hint, "something changed: look at
``done`` and ``work``", so a spurious one does no harm and one lock serves all calls of a thread, nested ones too. A
raw lock is used because it is the only waiting primitive that a signal's exception may leave at any point in a sound
state.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from tta_sync.clock import Timer
from tta_sync.context import running_context
from tta_sync.exceptions import NoCallerError

T = TypeVar("T")

INTERRUPTS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What never becomes a step's error: it ends the whole call. See :func:`register_interrupt`."""


def register_interrupt(interrupt: type[BaseException]) -> None:
    """Treat *interrupt* as a signal to end the call wherever it is raised on the caller's thread, even inside a step.

    For exceptions that a signal handler raises, such as RQ's timeouts, which are plain Exceptions.
    """
    global INTERRUPTS
    if interrupt not in INTERRUPTS:
        INTERRUPTS = (*INTERRUPTS, interrupt)


DEADLINE = "deadline"
INTERRUPTED = "interrupted"
STOPPED = "stopped"


class Call:
    """One call; also the :class:`tta_sync.context.Caller` of the steps that run inside it."""

    __slots__ = (
        "answered",
        "args",
        "began",
        "cancelled",
        "context",
        "deadline",
        "done",
        "error",
        "fn",
        "ident",
        "keywords",
        "left",
        "limit",
        "lock",
        "loop",
        "name",
        "result",
        "sent",
        "started",
        "task",
        "timer",
        "why",
        "work",
    )

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: dict[str, Any] | None
    name: str | None
    context: contextvars.Context | None  # forgotten when the call is over: it holds the call
    deadline: float | None  # time.monotonic()
    limit: float | None  # seconds, for the message
    lock: Any  # anything with acquire(blocking, timeout) and release(): gevent brings its own
    loop: Any  # the ManagedLoop
    ident: int
    started: float
    task: asyncio.Task[Any] | None
    timer: Timer | None
    work: deque[Work] | None
    answered: list[tuple[Work, Any, BaseException | None]] | None  # by serve(), until the steps have their answers
    result: Any
    error: BaseException | None
    why: str | None
    began: bool
    cancelled: bool
    done: bool
    left: bool
    sent: bool

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run *fn* on the caller's thread: :class:`tta_sync.context.Caller`. Loop thread only."""
        if self.has_left() or self.done:
            raise NoCallerError(_NO_CALLER)
        loop = asyncio.get_running_loop()
        if self.deadline is not None and self.timer is None:
            # The caller is about to be busy and cannot watch the clock: the loop does, from now on.
            self.timer = loop.call_later(self.deadline - time.monotonic(), self.expire)
        work = Work(loop.create_future(), contextvars.copy_context(), fn, args)
        if self.work is None:
            self.work = deque()
        self.work.append(work)
        self.wake()
        if self.has_left() and work.claim():  # between the check above and the append: nobody will take this
            raise NoCallerError(_NO_CALLER)
        try:
            result: T = await work.future
        except asyncio.CancelledError:
            work.claim()  # one that has not been started never will be; one that runs cannot be stopped
            raise
        finally:
            del work  # its future holds the error, whose traceback holds this frame: no cycle
        return result

    def has_left(self) -> bool:
        """Say whether the caller waits no more. Any thread; the answer may be different a moment later."""
        return self.left

    def wake(self) -> None:
        """Make the caller look. Any thread."""
        try:
            self.lock.release()
        except RuntimeError:
            pass  # it has been woken already and has not looked yet

    def expire(self) -> None:
        """Give up because the deadline has passed. Loop thread only."""
        if not self.done and self.why is None:
            self.why = DEADLINE
            self.cancel()

    def expire_now(self) -> bool:
        """Bring the deadline forward to this moment; say whether there was anything left to end. Loop thread only.

        What follows is what follows a deadline: the grace, then the orphan. ``deadline`` is the one field that is
        written after submission; the caller reads whichever it finds.
        """
        if self.done or self.why is not None:
            return False
        self.deadline = time.monotonic()
        self.expire()
        return True

    def cancel(self, again: bool = False) -> None:
        """Cancel what runs, once: several may find out that the call is to end, and its clean-up must not be cut.

        Loop thread only.
        """
        # A task that is cancelled before its first step never enters its coroutine; that step sees `why` instead.
        if self.began and self.task is not None and (again or not self.cancelled):
            self.cancelled = True
            if self.why is DEADLINE and self.context is not None:
                context = self.context.get(running_context)
                if context is not None and context.deadline is not None and context.deadline.at == self.deadline:
                    context.deadline.struck = True  # a breaker inside will ask why it was cancelled
            self.task.cancel()

    def step_left_behind(self) -> str | None:
        """Count a step of this call that ran on after it was cut; "quietly" when it is cut because all ends.

        Loop thread only.
        """
        self.loop.totals.add("orphans")
        return "quietly" if self.loop.refusing else None

    def finish(self, result: Any, error: BaseException | None) -> None:
        """Hand the outcome to the caller. Loop thread only, or whoever buries a dead loop."""
        if self.deadline is not None and self.why is None and time.monotonic() >= self.deadline:
            self.why = DEADLINE  # the caller has not looked yet: a coroutine held the interpreter's lock past its time
        self.result = result
        self.error = error
        self.done = True
        if self.left:
            self.loop.orphans.discard(self)
            self.forget()
        if self.timer is not None:
            self.timer.cancel()
        try:
            self.lock.release()
        except RuntimeError:
            pass

    def forget(self) -> None:
        """Let go of what refers back to this call, so that no cycle waits for the collector. When all is over only.

        The error does by its traceback. Whoever ends the call and whoever leaves it look at each other's flag after
        setting their own, so that one of them at least forgets.
        """
        self.context = self.task = self.answered = self.error = None

    def serve(self) -> None:
        """Do the work that the loop has posted, in order. Caller's thread only."""
        work = self.work
        while work and self.why is None:
            if self.deadline is not None and time.monotonic() >= self.deadline:  # the loop may be late to notice
                self.why = DEADLINE
                self.loop.post(self.loop.cancel, self)
                break
            try:
                item = work.popleft()
            except IndexError:  # refused just now, by a stream's close() on another thread
                break
            if not item.claim():
                continue
            result = error = None
            try:
                result = item.context.run(item.fn, *item.args)
            except INTERRUPTS:
                # A signal landed in user code: it ends the call, the step only learns that it was cancelled.
                if self.why is None:
                    self.why = INTERRUPTED
                self.loop.post(self._cancel_with, item.future)
                raise
            except BaseException as raised:
                error = raised
            self._remember(item, result, error)
            self.loop.post(item.settle, result, error)
            del item, result, error
        if work:
            self.refuse_work()

    def _cancel_with(self, step: asyncio.Future[Any]) -> None:
        """Cancel the call and, should another task of its wait for that, the *step* as well. Loop thread only.

        Not one after the other: a coroutine that is told of the step first would be cancelled in its clean-up.
        """
        self.loop.cancel(self)
        step.cancel()

    def _remember(self, item: Work, result: Any, error: BaseException | None) -> None:
        answered = self.answered
        if answered is None:
            answered = self.answered = []
        elif len(answered) >= 8:
            answered[:] = [answer for answer in answered if not answer[0].future.done()]
        answered.append((item, result, error))

    def answer_again(self) -> None:
        """Repeat answers that were lost on their way: an exception thrown into the loop thread may strike anywhere."""
        if self.answered is not None:
            lost = self.answered = [answer for answer in self.answered if not answer[0].future.done()]
            for item, result, error in lost:
                self.loop.post(item.settle, result, error)

    def refuse_work(self) -> None:
        """Tell all who wait for this caller that it has left. Caller's thread only."""
        while self.work:
            try:
                item = self.work.popleft()
            except IndexError:
                return
            if item.claim():
                self.loop.post(item.settle, None, NoCallerError(_NO_CALLER))


_NO_CALLER = (
    "nobody waits in run_sync any more: a caller step must end before the workflow does, "
    "or be a thread_step, which needs no caller"
)


class Work:
    """One function for the caller's thread. ``claim`` is the judge between starting it and giving it up: one wins."""

    __slots__ = ("_unclaimed", "args", "context", "fn", "future")

    def __init__(
        self,
        future: asyncio.Future[Any],
        context: contextvars.Context,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> None:
        self.future = future
        self.context = context
        self.fn = fn
        self.args = args
        self._unclaimed = [True]

    def claim(self) -> bool:
        """Return True to the first who asks, on any thread."""
        try:
            return self._unclaimed.pop()  # atomic
        except IndexError:
            return False

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Give the outcome to the step that waits for it. Loop thread only."""
        try:
            if self.future.done():
                return
            if error is None:
                self.future.set_result(result)
            elif isinstance(error, StopIteration):  # a future refuses it
                wrapped = RuntimeError("a caller step raised StopIteration")
                wrapped.__cause__ = error
                self.future.set_exception(wrapped)
            else:
                self.future.set_exception(error)
        except BaseException as struck:  # thrown into the loop thread from outside: the step must not wait for ever
            if not self.future.done():
                self.future.set_exception(struck)
            raise
