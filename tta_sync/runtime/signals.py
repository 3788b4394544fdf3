"""Signals while the main thread drives the loop: held back, so that no handler raises into whichever task runs.

What came is delivered as soon as the loop lets go of the thread, a moment later: each handler is called, and what it
raises comes out of the caller's wait. Where the loop does not let go, because some code blocks it, the handler is
called there and then: its exception still comes out of the wait, and the blocking code, where it is the caller's own,
is cut off by a CancelledError at the place where it blocks.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal wraps numbers in enums, at ten times the cost
import asyncio
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from tta_sync.context import current_caller
from tta_sync.runtime import generation, native

if TYPE_CHECKING:
    from tta_sync.runtime.call import Call
    from tta_sync.runtime.driven import DrivenLoop

PATIENCE = 0.1
"""Seconds that a signal is held back for a loop that lets go, before it is taken for one that is blocked."""

_NAMES = (
    "SIGHUP SIGINT SIGQUIT SIGTRAP SIGABRT SIGUSR1 SIGUSR2 SIGPIPE SIGALRM SIGTERM SIGCHLD SIGCONT SIGTSTP SIGTTIN "
    "SIGTTOU SIGURG SIGXCPU SIGVTALRM SIGPROF SIGWINCH SIGIO SIGPWR SIGSYS"
)
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES.split() if hasattr(signal, name))


class HeldBack:
    """The signals that come during one turn of the main thread at the loop. Main thread only, but for ``insist``."""

    __slots__ = ("_call", "_driving", "_handlers", "_ident", "_loop", "_may_repeat", "_raised", "_since", "came")

    def __init__(self, loop: DrivenLoop, call: Call) -> None:
        self._loop = loop
        self._call = call
        self._ident = native.get_ident()
        self._handlers: dict[int, Any] = {}
        self.came: list[int] = []  # in the order in which they came
        self._since = 0.0
        self._raised: BaseException | None = None  # by a handler that was called while the loop was blocked
        self._may_repeat: dict[str, bool] = {"may": True}  # to send a signal again; both operations are atomic
        self._driving = True

    def turn(self) -> None:
        """Run the loop for the call, with the handlers of all signals held back."""
        handlers, defer = self._handlers, self._defer
        try:
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if callable(handler):
                    handlers[number] = handler
                    _signal.signal(number, defer)
            self._loop.turn(self._call)
        finally:
            if not self._may_repeat.pop("may", False):
                self._await_repeat()
            self._driving = False
            for number, handler in handlers.items():
                if _signal.getsignal(number) is defer:  # else a coroutine has set its own
                    _signal.signal(number, handler)

    def deliver(self) -> None:
        """Call the handlers of what came; what they raise comes out."""
        if self.came or self._raised is not None:
            self._deliver(sys._getframe())

    def _defer(self, number: int, frame: FrameType | None) -> None:
        if not self._driving or self._loop.generation != generation.current.number:
            # Left behind when a signal struck while the handlers were put back, or inherited from a parent that forked
            # while it drove.
            _signal.signal(number, self._handlers[number])
            self._handlers[number](number, frame)
        elif number in self.came:
            self._may_repeat.setdefault("may", True)
            if time.monotonic() - self._since >= PATIENCE:
                self._call_now(number, frame)
        else:
            if not self.came:
                self._since = time.monotonic()
            self.came.append(number)
            self._loop.let_go()

    def _call_now(self, number: int, frame: FrameType | None) -> None:
        """Call a handler in the middle of what blocks the loop."""
        self.came.remove(number)
        try:
            self._handlers[number](number, frame)
        except BaseException as error:
            self._raised = error
        else:
            return
        if current_caller.get() is self._call:  # signal handlers run in the context of the code that they interrupt
            raise asyncio.CancelledError

    def insist(self) -> None:
        """Send a signal again that has been held back for too long. The standby driver's thread."""
        if self.came and time.monotonic() - self._since >= PATIENCE and self._may_repeat.pop("may", False):
            try:
                number = self.came[0]
            except IndexError:  # delivered just now
                self._may_repeat.setdefault("may", True)
            else:
                signal.pthread_kill(self._ident, number)

    def _await_repeat(self) -> None:
        """Wait for a signal that is being sent again just now: it must not meet its own handler once more."""
        give_up = time.monotonic() + 1.0
        while not self._may_repeat.pop("may", False) and time.monotonic() < give_up:
            time.sleep(0.0005)

    def _deliver(self, frame: FrameType) -> None:
        """Call the handler of each signal that came, whatever the others raise; what is raised last comes out."""
        try:
            error, self._raised = self._raised, None
            if error is not None:
                try:
                    raise error
                finally:
                    del error
            number = self.came.pop(0)
            self._handlers[number](number, frame)
        finally:
            if self.came:
                self._deliver(frame)
