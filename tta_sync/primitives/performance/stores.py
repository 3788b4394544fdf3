"""Where cached results are kept: the memory of the process, and the back ends that TTA.dev's spelling names."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from tta_sync.primitives.performance.snapshots import Load, Snapshot

_MAX_FORMS = 8  # exact forms (orders of a dict, say) under which one entry is found without its digest
_OVERHEAD = 400  # bytes that an entry costs besides what it holds

_stores: weakref.WeakSet[MemoryStore] = weakref.WeakSet()


def _in_child() -> None:
    for store in list(_stores):
        store.after_fork()


os.register_at_fork(after_in_child=_in_child)


class Entry:
    """One cached result. Moments are on the clock of the call that stored it."""

    __slots__ = (
        "clock",
        "cost",
        "degraded",
        "error",
        "expired",
        "expires_at",
        "forms",
        "fresh_until",
        "keep_until",
        "key",
        "load",
        "size",
        "stored",
        "tags",
        "verify",
    )

    def __init__(
        self,
        key: bytes,
        snapshot: Snapshot,
        *,
        fresh_until: float,
        expires_at: float,
        keep_until: float,
        clock: Any,
        cost: float = 0.0,
        tags: frozenset[str] = frozenset(),
        error: bool = False,
        degraded: bool = False,
    ) -> None:
        self.key = key
        self.stored, self.load, size = snapshot
        self.size = size + len(key) + _OVERHEAD
        self.forms: list[bytes] = []
        self.verify = False  # its exact forms hold bytes, which other buffers look like
        self.fresh_until = fresh_until  # a hit before this moment asks no questions
        self.expires_at = expires_at
        self.keep_until = keep_until  # beyond expires_at where a stale result may stand in for an error
        self.clock = clock
        self.cost = cost
        self.tags = tags
        self.error = error  # what is stored is an error to raise
        self.degraded = degraded
        self.expired = False  # it was counted as expired

    def copy(self) -> Any:
        load: Load | None = self.load
        return self.stored if load is None else load(self.stored)


class MemoryStore:
    """Entries by key, the least recently used first out; bounded in number and in bytes.

    ``lock`` guards everything, also the counters of the caches that use the store. It is replaced in a forked child; if
    some thread of the parent held it at that moment, the child begins with an empty store.
    """

    def __init__(self, max_size: int, max_bytes: int) -> None:
        self.max_size = max_size
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.forms: dict[bytes, Entry] = {}
        self.tags: dict[str, set[bytes]] = {}
        self.bytes = 0
        _stores.add(self)

    def after_fork(self) -> None:
        torn = self.lock.locked()
        self.lock = threading.Lock()
        if torn:
            self.entries, self.forms, self.tags, self.bytes = OrderedDict(), {}, {}, 0

    # The caller of the methods below holds the lock.

    def put(self, entry: Entry) -> bool:
        """Store *entry* in place of what its key had; False if it alone is more than the store may hold."""
        self.drop(entry.key)
        if entry.size > self.max_bytes:
            return False
        self.entries[entry.key] = entry
        self.bytes += entry.size
        for tag in entry.tags:
            self.tags.setdefault(tag, set()).add(entry.key)
        while len(self.entries) > self.max_size or self.bytes > self.max_bytes:
            self.drop(next(iter(self.entries)))
        return True

    def alias(self, entry: Entry, form: bytes, verify: bool) -> None:
        """Let *form* find *entry* from now on."""
        if self.entries.get(entry.key) is not entry or form in self.forms:
            return
        if len(entry.forms) >= _MAX_FORMS:
            self.forms.pop(entry.forms.pop(0), None)
        entry.verify = entry.verify or verify
        entry.forms.append(form)
        entry.size += len(form)
        self.bytes += len(form)
        self.forms[form] = entry

    def drop(self, key: bytes) -> bool:
        entry = self.entries.pop(key, None)
        if entry is None:
            return False
        self.bytes -= entry.size
        for form in entry.forms:
            self.forms.pop(form, None)
        for tag in entry.tags:
            keys = self.tags[tag]
            keys.discard(key)
            if not keys:
                del self.tags[tag]
        return True

    def drop_tags(self, tags: Iterable[str], owner: bytes) -> None:
        for tag in tags:
            for key in [key for key in self.tags.get(tag, ()) if key.startswith(owner)]:
                self.drop(key)

    def drop_all(self, owner: bytes) -> None:
        for key in [key for key in self.entries if key.startswith(owner)]:
            self.drop(key)

    def drop_expired(self, owner: bytes) -> tuple[int, int]:
        """Drop what has expired for good, each judged by its own clock; return how many, and how many were counted."""
        gone = [
            entry
            for key, entry in self.entries.items()
            if key.startswith(owner) and entry.keep_until <= entry.clock.monotonic()
        ]
        for entry in gone:
            self.drop(entry.key)
        return len(gone), sum(entry.expired for entry in gone)

    def count(self, owner: bytes) -> int:
        return sum(1 for key in self.entries if key.startswith(owner)) if owner else len(self.entries)
