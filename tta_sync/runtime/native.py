"""Threads and locks of the operating system, also in a process where gevent has replaced them by greenlets."""

from __future__ import annotations

import _thread
import sys
from typing import Any

Semaphore: Any
try:
    # Here, and not at a caller's first wait: a signal's exception in the middle of an import leaves the module's lock
    # held for good, and every other thread that wants the module waits for ever. So it is with all that calls need.
    from tta_sync.runtime.semaphore import Semaphore
except ImportError:
    Semaphore = None


def _original(module: str, name: str, default: Any) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    return default if monkey is None else monkey.get_original(module, name)


# Bound at import: before a later monkey.patch_all() these are the originals anyway.
allocate_lock: Any = _original("_thread", "allocate_lock", _thread.allocate_lock)
get_ident: Any = _original("_thread", "get_ident", _thread.get_ident)
reentrant_lock: Any = _original("_thread", "RLock", _thread.RLock)
start_new_thread: Any = _original("_thread", "start_new_thread", _thread.start_new_thread)


def new_lock() -> Any:
    """Return a raw lock in the state in which a thread waits on it."""
    lock = allocate_lock()
    lock.acquire()
    return lock


def new_waiter() -> Any:
    """Return what one thread waits on and others release: the C library's semaphore, else a raw lock."""
    return new_lock() if Semaphore is None else Semaphore()


def threads_are_greenlets() -> bool:
    """Say whether gevent has patched threading in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))
