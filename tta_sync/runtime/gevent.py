"""The managed loop in a process that gevent has patched: the loop on a real thread, the greenlets waiting on their hub.

A greenlet that waited on a real lock would stop all greenlets of its thread. So it waits for an async watcher of its
hub, the one thing of gevent that another thread may touch.
"""

from __future__ import annotations

import asyncio
import selectors
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any

from gevent import get_hub, local, monkey
from gevent.hub import Waiter

from tta_sync.runtime import native
from tta_sync.runtime.loop import ManagedLoop


class HubLock:
    """A binary semaphore: acquired by greenlets of one hub, released by any thread."""

    def __init__(self) -> None:
        self._hub = get_hub()
        self._watcher = self._hub.loop.async_()
        self._released = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Wait for a release, *timeout* seconds at most; -1 waits for ever."""
        if not self._released and timeout != 0:
            waiter = Waiter(self._hub)
            timer = self._hub.loop.timer(timeout) if timeout > 0 else None
            self._watcher.start(waiter.switch, None)
            try:
                if not self._released:  # else it came before the watcher was started
                    if timer is not None:
                        timer.start(waiter.switch, None)
                    waiter.get()
            finally:
                self._watcher.stop()
                if timer is not None:
                    timer.stop()
                    timer.close()
        released, self._released = self._released, False
        return released

    def release(self) -> None:
        """Wake the greenlet that waits, or the next one that will. Any thread."""
        self._released = True
        self._watcher.send()

    def __del__(self) -> None:
        self._watcher.close()


class GeventLoop(ManagedLoop):
    """A managed loop whose callers are greenlets."""

    def _new_loop(self, use_uvloop: bool) -> AbstractEventLoop:
        if use_uvloop:
            return super()._new_loop(use_uvloop)
        # gevent removes the real selectors and puts one in place that needs a hub on the loop's thread.
        selector = monkey.get_original("selectors", "DefaultSelector")
        if selector is selectors.DefaultSelector:
            selector = monkey.get_original("selectors", "EpollSelector")
        return asyncio.SelectorEventLoop(selector())

    def _new_local(self) -> Any:
        return local.local()

    def _new_lock(self) -> Any:
        return HubLock()

    def _spawn(self, target: Callable[[], object], name: str) -> None:
        native.start_new_thread(target, ())
