"""What happened, as frozen records, and who wants to hear of it.

Primitives and the runtime emit a record only where somebody listens; otherwise the cost is one attribute test::

    if events.bus.emit is not None:
        events.bus.emit(events.RetryScheduled(step="fetch", attempt=1, delay=0.2, error=error))

A hook is any callable that takes one event. It is called on the thread where the event happened, must not block, and
cannot fail the workflow: what it raises is logged. Durations are seconds. The idea of records plus hooks is stamina's.

The records load at the first use of one: twenty dataclasses cost 10 ms, which a process without hooks need not pay.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.events.records import (
        BreakerClosed as BreakerClosed,
        BreakerHalfOpened as BreakerHalfOpened,
        BreakerOpened as BreakerOpened,
        CacheBypassed as CacheBypassed,
        CacheHit as CacheHit,
        CacheMiss as CacheMiss,
        CacheStored as CacheStored,
        CallOrphaned as CallOrphaned,
        CallRejected as CallRejected,
        CompensationFailed as CompensationFailed,
        Event as Event,
        FallbackUsed as FallbackUsed,
        HedgeStarted as HedgeStarted,
        LoopRestarted as LoopRestarted,
        LoopStalled as LoopStalled,
        MapProgressed as MapProgressed,
        RetryExhausted as RetryExhausted,
        RetryScheduled as RetryScheduled,
        StepEnded as StepEnded,
        StepStarted as StepStarted,
        StepTimedOut as StepTimedOut,
        TransactionHeld as TransactionHeld,
    )

logger = logging.getLogger("tta_sync")

Hook = Callable[["Event"], object]


class EventBus:
    """The process's hooks. ``emit`` is None while there are none, so that emitting costs one test."""

    def __init__(self) -> None:
        self.emit: Callable[[Event], None] | None = None
        self._hooks: tuple[Hook, ...] = ()  # replaced whole, never changed: readers need no lock
        self._lock = threading.Lock()  # guards _hooks and emit while they are replaced

    def subscribe(self, hook: Hook) -> Callable[[], None]:
        """Call *hook* with every event from now on; return the function that ends this."""
        with self._lock:
            self._hooks = (*self._hooks, hook)
            self.emit = self._emit

        def unsubscribe() -> None:
            with self._lock:
                kept = list(self._hooks)
                if hook in kept:
                    kept.remove(hook)
                self._hooks = tuple(kept)
                self.emit = self._emit if kept else None

        return unsubscribe

    def _emit(self, event: Event) -> None:
        for hook in self._hooks:
            try:
                hook(event)
            except Exception:
                logger.exception("hook %r failed on %s and was passed over", hook, type(event).__name__)


bus = EventBus()


def _in_child() -> None:
    bus._lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def __getattr__(name: str) -> Any:
    try:
        value = getattr(importlib.import_module("tta_sync.events.records"), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value
