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
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_sync.events.records import (
        BreakerClosed as BreakerClosed,
    )
    from tta_sync.events.records import (
        BreakerHalfOpened as BreakerHalfOpened,
    )
    from tta_sync.events.records import (
        BreakerOpened as BreakerOpened,
    )
    from tta_sync.events.records import (
        CacheBypassed as CacheBypassed,
    )
    from tta_sync.events.records import (
        CacheHit as CacheHit,
    )
    from tta_sync.events.records import (
        CacheMiss as CacheMiss,
    )
    from tta_sync.events.records import (
        CacheStored as CacheStored,
    )
    from tta_sync.events.records import (
        CallOrphaned as CallOrphaned,
    )
    from tta_sync.events.records import (
        CallRejected as CallRejected,
    )
    from tta_sync.events.records import (
        CompensationFailed as CompensationFailed,
    )
    from tta_sync.events.records import (
        Event as Event,
    )
    from tta_sync.events.records import (
        FallbackUsed as FallbackUsed,
    )
    from tta_sync.events.records import (
        HedgeStarted as HedgeStarted,
    )
    from tta_sync.events.records import (
        LoopRestarted as LoopRestarted,
    )
    from tta_sync.events.records import (
        LoopStalled as LoopStalled,
    )
    from tta_sync.events.records import (
        MapProgressed as MapProgressed,
    )
    from tta_sync.events.records import (
        RetryExhausted as RetryExhausted,
    )
    from tta_sync.events.records import (
        RetryScheduled as RetryScheduled,
    )
    from tta_sync.events.records import (
        StepEnded as StepEnded,
    )
    from tta_sync.events.records import (
        StepStarted as StepStarted,
    )
    from tta_sync.events.records import (
        StepTimedOut as StepTimedOut,
    )
    from tta_sync.events.records import (
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


def __getattr__(name: str) -> Any:
    try:
        value = getattr(importlib.import_module("tta_sync.events.records"), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value
