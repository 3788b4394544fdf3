"""Work that was handed to a thread, and what becomes of it when nobody waits for it any more.

A thread cannot be interrupted. When a timeout or a cancellation ends the wait for it, its function runs on: it is then
*abandoned*, which is counted and logged. There are never more abandoned threads than the pool has, as each of them
keeps its place in the pool until it ends; steps that come later wait for a place, and are cut like any other where that
takes longer than they may.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tta_sync import events
from tta_sync.context import current_caller

abandoned: set[Errand] = set()
"""Functions that still run on threads, though nobody waits for them. Added to on loops, taken from on the threads."""


class Errand:
    """One function on its way to a thread and back; call it there."""

    __slots__ = ("_began", "_ended", "_function", "_name", "_thread", "_user_code")

    def __init__(self, name: str, function: Callable[..., Any], user_code: Any) -> None:
        self._name = name
        self._function = function
        self._user_code = user_code  # code object of the user's own function, where there is one
        self._thread = 0
        self._began = 0.0
        self._ended = False

    def __call__(self, *args: Any) -> Any:
        self._began = time.monotonic()
        self._thread = threading.get_ident()
        try:
            return self._function(*args)
        finally:
            self._ended = True
            abandoned.discard(self)

    def abandon(self) -> None:
        """Take note that nobody waits any more. Loop thread only, after the queue was told."""
        if not self._thread:
            return  # it never begins
        abandoned.add(self)
        if self._ended:  # asked after: it may end at any moment, and takes itself out then
            abandoned.discard(self)
            return
        caller = current_caller.get()
        # While the process exits nobody reads this, and stderr is all that is left to print it.
        level = logging.DEBUG if caller is not None and caller.step_left_behind() == "quietly" else logging.WARNING
        reason = "its thread cannot be interrupted"
        events.logger.log(level, "%s runs on as an orphan: %s; it stands at %s", self._name, reason, self._where())
        if events.bus.emit is not None:
            events.bus.emit(events.CallOrphaned(step=self._name, reason=reason, age=time.monotonic() - self._began))

    def _where(self) -> str:
        """Return ``file:line`` where the user's function stands; where it begins, if the thread cannot be found."""
        code = self._user_code
        if code is None:
            return "an unknown place"
        enabled = gc.isenabled()
        try:
            # CPython 3.11 can deadlock if _current_frames starts a collection (gh-106883), and crash if f_back does,
            # whose finalizers may let that thread run on while its frame is made an object.
            gc.disable()
            frame = sys._current_frames().get(self._thread)  # gevent's threads go by other numbers
            while frame is not None and frame.f_code is not code:
                frame = frame.f_back
        finally:
            if enabled:
                gc.enable()
        return f"{code.co_filename}:{code.co_firstlineno if frame is None else frame.f_lineno}"
