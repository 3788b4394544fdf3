"""Where cached results are kept: the memory of the process, and the back ends that TTA.dev's spelling names."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any, Protocol, runtime_checkable

from tta_sync.clock import SYSTEM_CLOCK, Clock
from tta_sync.primitives.performance.snapshots import Load, Snapshot, take
from tta_sync.primitives.recovery.forks import renew_after_fork

_MAX_FORMS = 8  # exact forms (orders of a dict, say) under which one entry is found without its digest
_OVERHEAD = 400  # bytes that an entry costs besides what it holds


class Entry:
    """One cached result. Moments are on the clock of the call that stored it."""

    __slots__ = (
        "clock",
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
        "stale_from",
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
        stale_from: float,
        expires_at: float,
        keep_until: float,
        clock: Any,
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
        self.stale_from = stale_from  # from here to expires_at it answers, while a refresh runs
        self.expires_at = expires_at
        self.keep_until = keep_until  # beyond expires_at where a stale result may stand in for an error
        self.clock = clock
        self.tags = tags
        self.error = error  # what is stored is an error to raise
        self.degraded = degraded
        self.expired = False  # it was counted as expired

    def copy(self) -> Any:
        load: Load | None = self.load
        return self.stored if load is None else load(self.stored)


class Guard:
    """A lock that a forked child finds open, whoever held it in the parent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        renew_after_fork(self)

    def after_fork(self) -> None:
        self.lock = threading.Lock()


class MemoryStore(Guard):
    """Entries by key, the least recently used first out; bounded in number and in bytes.

    ``lock`` guards everything, also the counters of the caches that use the store. If some thread of the parent held it
    at the moment of a fork, the child begins with an empty store.
    """

    def __init__(self, max_size: int, max_bytes: int) -> None:
        super().__init__()
        self.max_size = max_size
        self.max_bytes = max_bytes
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.forms: dict[bytes, Entry] = {}
        self.tags: dict[str, set[bytes]] = {}
        self.bytes = 0
        self.claims: dict[Hashable, Any] = {}

    def after_fork(self) -> None:
        if self.lock.locked():
            self.entries, self.forms, self.tags, self.bytes = OrderedDict(), {}, {}, 0
        super().after_fork()

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


# ---- back ends, in TTA.dev's spelling -------------------------------------------------------------------------------


@runtime_checkable
class CacheBackend(Protocol):
    """A store of a user's own, given to a cache as ``backend=``. Source: TTA.dev.

    A cache gives it bytes and expects them back, so nothing needs to be serialised. An error that a method raises is an
    event, and the call goes on without the store.
    """

    async def get(self, key: str) -> Any | None:
        """Return what is stored under *key*, None if there is nothing."""

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        """Store *value* for *ttl_seconds* seconds."""

    async def delete(self, key: str) -> None:
        """Forget *key*; no error if there is nothing."""


class InMemoryBackend:
    """A store in this process's memory that several caches may share; each keeps to its own keys.

    Bounded in entries and bytes, the least recently used first out. Everybody gets copies.
    """

    def __init__(self, max_size: int = 10_000, max_bytes: int = 64 * 2**20, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.store = MemoryStore(max_size, max_bytes)
        self._clock = clock

    async def get(self, key: str) -> Any | None:
        """Return a copy of what is stored under *key*; None if there is nothing."""
        name = _OWN + key.encode()
        with self.store.lock:
            entry = self.store.entries.get(name)
            if entry is None:
                return None
            if self._clock.monotonic() >= entry.expires_at:
                self.store.drop(name)
                return None
            self.store.entries.move_to_end(name)
        return entry.copy()

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        """Store a copy of *value* for *ttl_seconds* seconds; nothing if it cannot be copied."""
        snapshot = take(value)
        if snapshot is None:
            return
        expires_at = self._clock.monotonic() + ttl_seconds
        name = _OWN + key.encode()
        entry = Entry(
            name,
            snapshot,
            fresh_until=expires_at,
            stale_from=expires_at,
            expires_at=expires_at,
            keep_until=expires_at,
            clock=self._clock,
        )
        with self.store.lock:
            self.store.put(entry)

    async def delete(self, key: str) -> None:
        """Forget *key*."""
        with self.store.lock:
            self.store.drop(_OWN + key.encode())


_OWN = b"="  # no namespace begins so


class RedisBackend:
    """A store in Redis, by URL. Source: TTA.dev.

    Given to a cache, it says where the server is and how the keys begin. On its own, it stores what JSON can carry;
    errors of the connection are raised here, as nobody is there to compute the value.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads it.
        prefix: what every key begins with.
    """

    def __init__(self, url: str, prefix: str = "tta:") -> None:
        self.url = url
        self.prefix = prefix

    async def get(self, key: str) -> Any | None:
        """Return what is stored under *key*; None if there is nothing that can be read."""
        return await self._store().get(key)

    async def set(self, key: str, value: Any, ttl_seconds: float) -> None:
        """Store *value* for *ttl_seconds* seconds.

        Raises:
            ConfigurationError: JSON cannot carry it.
            ConnectionError: Redis cannot be reached.
        """
        await self._store().set(key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        """Forget *key*."""
        await self._store().delete(key)

    def _store(self) -> Any:
        from tta_sync.primitives.performance.in_redis import PlainStore

        return PlainStore(self)

    def __repr__(self) -> str:
        return f"RedisBackend(prefix={self.prefix!r})"  # the URL may hold a password
