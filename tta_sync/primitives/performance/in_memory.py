"""The layer of a cache that lives in this process's memory."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from tta_sync.context import WorkflowContext
from tta_sync.exceptions import copy_error
from tta_sync.primitives.performance import keys, snapshots
from tta_sync.primitives.performance.flights import Flight
from tta_sync.primitives.performance.snapshots import Snapshot
from tta_sync.primitives.performance.stores import Entry, MemoryStore

if TYPE_CHECKING:
    from tta_sync.primitives.performance.cache import CachePrimitive
    from tta_sync.primitives.performance.in_redis import RedisLayer


class MemoryLayer:
    """Answer from a :class:`MemoryStore`, or compute once for all who ask at the same time."""

    def __init__(self, cache: CachePrimitive[Any, Any], store: MemoryStore, owner: bytes) -> None:
        self._cache = cache
        self.store = store
        self.owner = owner  # what the keys of this cache begin with, in a store that it shares; else nothing
        self.below: tuple[RedisLayer, ...] = ()  # whose invalidations in other processes concern this memory, too

    async def answer(self, data: Any, known: Any, context: WorkflowContext) -> Any:
        cache = self._cache
        key = self.key(known, context.tenant)
        entry = self._look_up(key, known, context)
        if entry is not None:
            return self._from(entry, key, data, known, context)
        primitive = cache.primitive
        assert primitive is not None
        # Before the flight begins: what is missed until the subscription stands must not touch it.
        for layer in self.below:
            await layer.listen()

        # Not a function around it: its frame would hold the flight, and the flight an error that leads to the frame.
        work = partial(self._compute, key=key, known=known, data=data)
        return await cache.flights.share(
            key, context, self._tags(data, known, context), cache.label, work, lambda: primitive._run(data, context)
        )

    def key(self, known: Any, tenant: str | None) -> bytes:
        cache = self._cache
        return self.owner + keys.prefix(tenant).encode() + keys.digest(known, cache.key_argument)

    def _tags(self, data: Any, known: Any, context: WorkflowContext) -> frozenset[str]:
        """Return the call's tags, with those of the layers below, and with the names of their entries."""
        tags = self._cache.tags_for(data, context)
        for layer in self.below:
            tags |= layer.trail(data, context)
        return tags

    def _look_up(self, key: bytes, known: Any, context: WorkflowContext) -> Entry | None:
        """Return what answers the call without computing, and count the call."""
        cache, store = self._cache, self.store
        now = context.clock.monotonic()
        reason = "absent"
        with store.lock:
            entry = store.entries.get(key)
            if entry is not None and now < entry.expires_at:
                store.entries.move_to_end(key)
                self._alias(entry, known, context.tenant)
                return entry
            if entry is not None:
                reason = "expired"
                if not entry.expired:
                    entry.expired = True
                    cache.expirations += 1
                if now >= entry.keep_until:
                    store.drop(key)
        cache.count_miss(context, "memory", reason)
        return None

    def _alias(self, entry: Entry, known: Any, tenant: str | None) -> None:
        form = keys.exact_form(known, tenant)
        # Without an exact form the entry is found by its key: a hit, only a slower one.
        if form is not None and keys.is_plain(known):
            self.store.alias(entry, self.owner + form, keys.holds_bytes(known))

    def _from(self, entry: Entry, key: bytes, data: Any, known: Any, context: WorkflowContext) -> Any:
        cache = self._cache
        now = context.clock.monotonic()
        cache.count_hit(context, "memory", stale=not entry.error and now >= entry.stale_from)
        if entry.error:
            raise copy_error(entry.stored)
        if entry.degraded:
            context.mark_degraded()
        if now >= entry.fresh_until:
            work = partial(self._compute, key=key, known=known, data=data)
            cache.refresh(key, context, self._tags(data, known, context), "memory", work)
        return entry.copy()

    # ---- computing ---------------------------------------------------------------------------------------------------

    async def _compute(self, flight: Flight, key: bytes, known: Any, data: Any) -> Any:
        try:
            cache, store, context = self._cache, self.store, flight.context
            primitive = cache.primitive
            assert primitive is not None
            clock = context.clock
            began = clock.monotonic()
            with store.lock:
                old = store.entries.get(key)
            if old is not None and began < old.fresh_until:  # another loop was quicker
                flight.snapshot = Snapshot(old.stored, old.load, old.size)
                return old.copy()
            for layer in self.below:
                await layer.listen()
            try:
                value = await primitive._run(data, context)
            except Exception as error:
                if old is not None and not old.error and clock.monotonic() < old.expires_at:
                    raise  # a refresh that failed: the result in use is good enough
                if old is not None and not old.error and clock.monotonic() < old.keep_until:
                    context.mark_degraded()
                    flight.snapshot = Snapshot(old.stored, old.load, old.size)
                    cache.emit_hit(context, "memory", stale=True)
                    return old.copy()
                if cache.negative_ttl is not None and isinstance(error, cache.negative_for):
                    self._remember_error(flight, key, known, error)
                raise
            flight.snapshot = snapshots.take(value)
            if flight.snapshot is None:
                cache.emit_bypassed(context, "memory", f"a {type(value).__qualname__} cannot be copied")
            else:
                self._remember(flight, key, known, flight.snapshot, clock.monotonic() - began)
            return value
        finally:
            del flight  # an error's traceback leads to this frame

    def _remember(self, flight: Flight, key: bytes, known: Any, snapshot: Snapshot, cost: float) -> None:
        cache, clock = self._cache, flight.context.clock
        now = clock.monotonic()
        lifetime = cache.lifetime()
        expires_at = now + lifetime
        stale_from = expires_at if cache.soft_ttl is None else min(now + cache.soft_ttl, expires_at)
        fresh_until = stale_from
        if cache.xfetch_beta:
            # Drawn once per entry, not at each hit: single-flight leaves only processes to tell apart.
            fresh_until = min(fresh_until, cache.early(expires_at, cost))
        entry = Entry(
            key,
            snapshot,
            fresh_until=fresh_until,
            stale_from=stale_from,
            expires_at=expires_at,
            keep_until=expires_at + cache.stale_if_error,
            clock=clock,
            tags=flight.tags,
            degraded=flight.context.degraded,
        )
        if self._put(flight, entry, known):
            cache.emit_stored(flight.context, "memory", lifetime)

    def _remember_error(self, flight: Flight, key: bytes, known: Any, error: Exception) -> None:
        kept = copy_error(error)
        if kept is error:
            return  # it cannot be copied, so it cannot be raised twice
        # Frames of a call that is over, and all that they hold, are not kept.
        kept.__traceback__ = kept.__context__ = kept.__cause__ = None
        cache, clock = self._cache, flight.context.clock
        assert cache.negative_ttl is not None
        expires_at = clock.monotonic() + cache.negative_ttl
        entry = Entry(
            key,
            Snapshot(kept, None, 1000),
            fresh_until=-math.inf,
            stale_from=expires_at,
            expires_at=expires_at,
            keep_until=expires_at,
            clock=clock,
            tags=flight.tags,
            error=True,
        )
        if self._put(flight, entry, known):
            cache.emit_stored(flight.context, "memory", cache.negative_ttl)

    def _put(self, flight: Flight, entry: Entry, known: Any) -> bool:
        store = self.store
        with store.lock:
            if flight.revoked or not store.put(entry):
                return False
            self._alias(entry, known, flight.context.tenant)
        return True

    # ---- forgetting: in effect on return, from any thread ------------------------------------------------------------

    def forget_key(self, key: bytes) -> None:
        with self.store.lock:
            self.store.drop(key)
            self._cache.flights.revoke(key)

    def forget_tags(self, tags: frozenset[str]) -> None:
        with self.store.lock:
            self.store.drop_tags(tags, self.owner)
            self._cache.flights.revoke_tags(tags)

    def forget_all(self) -> None:
        with self.store.lock:
            self.store.drop_all(self.owner)
            self._cache.flights.revoke_all()
